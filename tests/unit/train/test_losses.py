"""Losses of stage 1 against closed forms, codes as moving averages, and the checks that stop a training."""

from __future__ import annotations

import copy
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from clipgen.config import ModelConfig, VQGANConfig
from clipgen.models.vqgan import VQGAN
from train.config import Stage1Config
from train.loop.batches import split_held_out
from train.loop.checkpoint import fixed_settings
from train.loop.health import (
    Health,
    TrainingError,
    check_finite,
    collapsed_codes,
    discriminator_wins,
    worse_than_guessing,
)
from train.losses.codes import CodeUsage, EMACodebook, count_codes, perplexity, revive_codes
from train.losses.stage1 import (
    Crop,
    LeCam,
    PatchDiscriminator,
    ReconstructionLoss,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_hinge_losses_equal_their_formula() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
    assert generator_loss(fake).item() == pytest.approx(0.5)
    assert PatchDiscriminator(8)(torch.zeros(2, 3, 32, 32)).shape[:2] == (2, 1)


def test_logits_of_the_discriminator_depend_on_no_other_image() -> None:
    x = torch.randn(4, 3, 32, 32, generator=seeded())
    discriminator = PatchDiscriminator(8)
    assert torch.allclose(discriminator(x)[1:2], discriminator(x[1:2]), atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_adaptive_weight_is_the_ratio_of_gradients(scale: float) -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = partial(adaptive_weight, last_layer=w, all_reduce_mean=lambda gradient: gradient, scale=scale)
    assert weight([((3 * w).sum(), (0.5 * w).sum())]).item() == pytest.approx(6.0, rel=1e-3)
    # With two parts it is of the mean gradients, (2, 2) and (0.5, 0.5), not the mean of both weights, 6 and 2.
    parts = [((3 * w).sum(), (0.5 * w).sum()), (w.sum(), (0.5 * w).sum())]
    assert weight(parts).item() == pytest.approx(4.0, rel=1e-3)


def test_r1_penalty_of_linear_logits_is_half_the_squared_mean_slope() -> None:
    x = torch.randn(5, 3, 4, 4, generator=seeded(), requires_grad=True)
    slopes = torch.randn(2, 3, 4, 4, generator=seeded(1), requires_grad=True)
    logits = torch.einsum("bchw,pchw->bp", x, slopes).view(5, 1, 1, 2)
    penalty = r1_penalty(logits, x)
    assert penalty.item() == pytest.approx(0.5 * slopes.mean(0).pow(2).sum().item(), rel=1e-5)
    penalty.backward()  # gradients reach the discriminator
    assert torch.allclose(slopes.grad, slopes.mean(0) / 2 * torch.ones(2, 1, 1, 1), atol=1e-6)


def test_lecam_penalty_is_the_distance_to_the_average_of_the_other_class() -> None:
    lecam = LeCam(decay=0.9)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0])
    assert lecam(real, fake).item() == pytest.approx((1 + 9) / 2 + 1 / 2)  # both averages start at 0
    lecam.update(real.mean(), fake.mean())
    a_real, a_fake = 0.1 * 2, 0.1 * -0.5
    expected = ((1 - a_fake) ** 2 + (3 - a_fake) ** 2) / 2 + ((-1 - a_real) ** 2 + a_real**2) / 2
    assert lecam(real, fake).item() == pytest.approx(expected, rel=1e-6)
    assert lecam.state_dict().keys() == {"real", "fake"}


def test_reconstruction_loss_is_the_weighted_sum_of_its_terms() -> None:
    x, y = (torch.rand(2, 3, 32, 32, generator=seeded(seed)) * 2 - 1 for seed in (0, 1))
    loss, parts = ReconstructionLoss(Stage1Config(perceptual="none", l2_weight=0.5))(y, x)
    assert loss.item() == pytest.approx((F.l1_loss(y, x) + 0.5 * F.mse_loss(y, x)).item()) and parts.keys() == {"l1"}
    reconstruction_loss = ReconstructionLoss(Stage1Config(perceptual="efficientnet", perceptual_weight=0.3))
    crop = Crop(4, 8, 16)
    loss, parts = reconstruction_loss(y, x, crop)
    inside = reconstruction_loss.perceptual(y[..., 4:20, 8:24], x[..., 4:20, 8:24])
    assert parts["perceptual"].item() == pytest.approx(inside.item(), rel=1e-5)
    assert loss.item() == pytest.approx((parts["l1"] + 0.3 * parts["perceptual"]).item(), rel=1e-5)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 50), st.integers(0, 10**6))
def test_random_crop_lies_within_the_image(height: int, width: int, side: int, seed: int) -> None:
    crop = Crop.random((height, width), side, seeded(seed))
    if crop is None:
        assert side == 0 or side >= min(height, width)
    else:
        assert crop(torch.zeros(1, 3, height, width)).shape == (1, 3, side, side)


def quantized(vqgan: VQGAN, z: torch.Tensor) -> torch.Tensor:
    """Codes (N,) that the quantizer chooses in training, for latents that require a gradient."""
    return vqgan.quantizer(z.clone().requires_grad_())[2].flatten()


@pytest.mark.parametrize("l2", [False, True])
def test_ema_codes_follow_the_equations_of_the_paper(l2: bool, tiny_config: ModelConfig) -> None:
    config = copy.deepcopy(tiny_config.vqgan)
    config.l2_codes = l2
    vqgan = VQGAN(config)
    codes = EMACodebook(vqgan.quantizer, decay=0.9)
    assert not vqgan.quantizer.embedding.weight.requires_grad
    codes.attach(vqgan.quantizer)
    sizes, sums = torch.ones(64), vqgan.quantizer.codes().clone()
    for step in range(3):
        z = torch.randn(2, 8, 4, 4, generator=seeded(step))
        parts = z.chunk(2)
        chosen = torch.cat([quantized(vqgan, part) for part in parts])
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        flat = F.normalize(flat, dim=1) if l2 else flat
        one_hot = F.one_hot(chosen, 64).float()
        vqgan.quantizer(z)  # without a gradient, so it is not counted
        codes.update(lambda t: 3 * t)  # three processes with the same latents
        sizes, sums = 0.9 * sizes + 0.3 * one_hot.sum(0), 0.9 * sums + 0.3 * one_hot.t() @ flat
        assert torch.allclose(vqgan.quantizer.embedding.weight, sums / sizes[:, None], rtol=1e-3, atol=1e-4)
    assert not codes.state_dict().keys() - {"sizes", "sums"}


def test_ema_codes_converge_to_their_latents_and_revived_codes_start_there(tiny_config: ModelConfig) -> None:
    vqgan = VQGAN(tiny_config.vqgan)
    codes = EMACodebook(vqgan.quantizer)
    codes.attach(vqgan.quantizer)
    z = torch.randn(1, 8, 1, 1, generator=seeded()).expand(1, 8, 4, 4)
    for _ in range(300):
        (chosen,) = quantized(vqgan, z).unique()
        codes.update(lambda t: t)
    target = F.normalize(z[0, :, 0, 0], dim=0)
    assert F.cosine_similarity(vqgan.quantizer.codes()[chosen], target, dim=0) > 0.999
    usage = F.one_hot(chosen, 64)
    moved = revive_codes(vqgan.quantizer, usage, target.expand(10, 8), seeded())
    codes.reset(moved)
    codes.update(lambda t: t)
    assert len(moved) == 10 and chosen not in moved
    assert torch.allclose(vqgan.quantizer.codes()[moved], target.expand(10, 8), atol=1e-4)


def test_code_counts_of_all_processes_are_gathered_on_the_main_one_for_a_checkpoint() -> None:
    ranks = [CodeUsage(4), CodeUsage(4)]
    for usage, codes in zip(ranks, ([0, 0, 1], [2, 1]), strict=True):
        usage.update(torch.tensor(codes))
    before = [usage.counts.clone() for usage in ranks]
    for rank, usage in enumerate(ranks):
        usage.gather(lambda counts: before[0] + before[1], is_main=rank == 0)
    assert [usage.counts.tolist() for usage in ranks] == [[2, 2, 1, 0], [0, 0, 0, 0]]
    assert [usage.recent.tolist() for usage in ranks] == [[2, 2, 1, 0], [0, 0, 0, 0]]
    ranks[0].clear()
    assert not ranks[0].counts.any() and not ranks[0].recent.any()


def test_code_usage_counts_since_the_last_report() -> None:
    assert perplexity(torch.ones(8)).item() == pytest.approx(8.0)
    assert perplexity(torch.tensor([5.0, 0, 0])).item() == pytest.approx(1.0)
    usage = CodeUsage(4)
    usage.update(torch.tensor([[0, 0], [1, 1]]))
    found = usage.report(lambda t: t)
    assert found["codes_used"].item() == 0.5 and found["perplexity"].item() == pytest.approx(2.0)
    usage.update(torch.tensor([3]))
    assert usage.report(lambda t: t)["codes_used"].item() == 0.25
    assert usage.counts.tolist() == [2, 2, 0, 1]  # counts for the revival of codes are not reset by a report


@given(st.lists(st.integers(0, 6), max_size=40), st.integers(7, 9))
def test_code_counts_equal_bincount(indices: list[int], codebook_size: int) -> None:
    chosen = torch.tensor(indices, dtype=torch.long)
    expected = torch.bincount(chosen, minlength=codebook_size)
    assert count_codes(chosen, codebook_size).tolist() == expected.tolist()


@given(st.integers(1, 3000), st.integers(0, 600))
def test_images_are_either_trained_on_or_held_out(count: int, max_held_out: int) -> None:
    rows, held_out = split_held_out(count, max_held_out)
    assert len(rows) and len(held_out) and held_out.max() < count
    if max_held_out and count > 1:
        assert not set(rows.tolist()) & set(held_out.tolist()) and len(rows) + len(held_out) == count
        assert len(held_out) <= max(1, min(max_held_out, count // 20))
    else:
        assert len(rows) == count


HEALTHY = {"loss": 2.0, "perplexity": 300.0, "discriminator": 0.9}


@pytest.mark.parametrize(
    ("name", "bad", "said"),
    [
        ("perplexity", 4.0, "the codebook collapses: perplexity 4.0 of 1024 codes"),
        ("discriminator", 0.01, "the discriminator wins"),
        ("loss", 7.5, "the GPT does worse than guessing: loss 7.500, uniform guesses have 6.931"),
    ],
)
def test_persistent_symptom_stops_training(
    name: str, bad: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    symptoms = [collapsed_codes(1024), discriminator_wins(), worse_than_guessing(1024)]
    health = Health(3, symptoms)
    for step, value in enumerate([bad, bad, HEALTHY[name], bad, bad], start=1):
        health.check(step, HEALTHY | {name: torch.tensor(value)})
    assert capsys.readouterr().err.count(f"warning: step 1: {said}") == 1
    with pytest.raises(
        TrainingError, match=rf"step 6: {said}.*since step 4.*To continue from an earlier checkpoint"
    ) as error:
        health.check(6, HEALTHY | {name: bad})
    assert "stage" in str(error.value)
    patient = Health(0, symptoms, verbose=False)
    for step in range(50):
        patient.check(step, HEALTHY | {name: bad})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["perplexity", "discriminator"])
def test_settings_that_a_resumed_training_refuses_are_advised_for_a_new_one_only(name: str) -> None:
    health = Health(1, [collapsed_codes(1024), discriminator_wins()])
    with pytest.raises(TrainingError) as error:
        health.check(1, HEALTHY | {name: 0.01})
    to_continue, _, anew = str(error.value).partition("start again with")
    fixed = fixed_settings(Stage1Config(), "", vqgan=VQGANConfig())
    advised = re.findall(r"(?:stage1|model)\.([\w.]+)", to_continue), re.findall(r"(?:stage1|model)\.([\w.]+)", anew)
    assert advised[0] and not set(advised[0]) & set(fixed)
    assert advised[1] and set(advised[1]) & set(fixed)


def test_non_finite_scalars_stop_training_at_once() -> None:
    check_finite(1, {"loss": torch.tensor(2.0), "lr": 0.1})
    with pytest.raises(TrainingError, match="step 7: loss, lr not finite"):
        check_finite(7, {"loss": torch.tensor(float("nan")), "lr": float("inf")})
    with pytest.raises(TrainingError, match="step 2: loss not finite"):
        Health(0, []).check(2, {"loss": float("nan")})
