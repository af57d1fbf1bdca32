"""Weight averages, and steps that the gradient scaler of fp16 skips."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from clipgen.config import ModelConfig
from clipgen.errors import WeightsError
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from train import stage2
from train.config import Stage1Config, Stage2Config
from train.loop.optimization import MovingAverage, build_optimizers, init_weights
from train.losses import gan
from train.losses.stage1 import LeCam, PatchDiscriminator, ReconstructionLoss


def test_gpt_starts_from_the_repeated_blocks_of_a_shallower_one(tiny_config: ModelConfig, tmp_path: Path) -> None:
    two, six = (GPT(replace(tiny_config.gpt, n_layer=n)) for n in (2, 6))
    save_file(two.state_dict(), tmp_path / "two.safetensors")
    init_weights(six, Stage2Config(init=str(tmp_path / "two.safetensors")))
    for i, block in enumerate(six.blocks):
        assert same_tensors(block.state_dict(), two.blocks[i % 2].state_dict())
    assert torch.equal(six.head.weight, two.head.weight)


def test_gpt_of_a_number_of_blocks_that_no_repetition_gives_is_refused(tiny_config: ModelConfig, tmp_path) -> None:
    two, three = (GPT(replace(tiny_config.gpt, n_layer=n)) for n in (2, 3))
    save_file(two.state_dict(), tmp_path / "two.safetensors")
    with pytest.raises(WeightsError, match=r"two\.safetensors: .*blocks\.2"):
        init_weights(three, Stage2Config(init=str(tmp_path / "two.safetensors")))


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_moving_average_equals_that_of_torch_exactly() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    ours = MovingAverage(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(4):
        with torch.no_grad():
            for tensor in (*model.parameters(), model[1].running_mean):
                tensor.normal_(generator=torch.Generator().manual_seed(step))
        for average in (ours, theirs):
            average.update_parameters(model)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys(), "checkpoints of either can be loaded"
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


@pytest.fixture
def scaled() -> Iterator[Accelerator]:
    """An accelerator that scales as in fp16 on a GPU, with torch's scaler for CPUs, which Accelerate does not offer."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    yield accelerator
    AcceleratorState._reset_state(True)


def test_stage2_step_with_overflowed_gradients_counts_as_skipped(scaled: Accelerator, tiny_config: ModelConfig) -> None:
    model = GPT(tiny_config.gpt)
    before = copy.deepcopy(model.state_dict())
    model, (optimizer,) = scaled.prepare(model), build_optimizers(model, Stage2Config(), "fp16")
    optimizer = scaled.prepare(optimizer)
    loss = model(torch.zeros(2, 15, dtype=torch.long), torch.zeros(2, 32)).float().pow(2).mean()
    for factor, skipped in ((1e38, True), (1.0, False)):
        optimizer.zero_grad()
        scaled.backward(factor * loss, retain_graph=True)
        norm = scaled.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert scaled.optimizer_step_was_skipped == skipped == (not norm.isfinite())
        changed = any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert changed == (not skipped)


def test_overflow_of_the_discriminator_lowers_the_scale_once(
    scaled: Accelerator, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Stage1Config(perceptual="none", disc_ch=8)
    vqgan, discriminator = VQGAN(tiny_config.vqgan), PatchDiscriminator(8)
    opt_g, opt_d = (torch.optim.Adam(model.parameters(), 1e-4) for model in (vqgan, discriminator))
    vqgan, discriminator, opt_g, opt_d = scaled.prepare(vqgan, discriminator, opt_g, opt_d)
    adversary = gan.Gan(config, scaled, vqgan, discriminator, opt_d, ReconstructionLoss(config), LeCam())
    monkeypatch.setattr(gan, "discriminator_loss", lambda real, fake: 1e38 * real.float().mean())
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    adversary.step([x], [x])
    assert scaled.optimizer_step_was_skipped and scaled.scaler.get_scale() == 2.0**15
    opt_g.zero_grad()
    scaled.backward(vqgan.decoder.conv_out.weight.sum() * 1e-3)
    scaled.clip_grad_norm_(vqgan.parameters(), 1.0)
    opt_g.step()
    assert scaled.scaler.get_scale() == 2.0**15


def test_validation_is_in_the_precision_of_training(tiny_config: ModelConfig) -> None:
    gpt = GPT(replace(tiny_config.gpt)).eval()
    tokens = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(0))
    embeddings = F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    with torch.no_grad():
        exact = F.cross_entropy(gpt(tokens[:, :-1], embeddings).flatten(0, 1), tokens.flatten()).item()
    loss = stage2.validate_gpt(gpt, tokens, embeddings, nullcontext)["held_loss"]
    assert loss == pytest.approx(exact, rel=1e-6)
    lowered = stage2.validate_gpt(gpt, tokens, embeddings, lambda: torch.autocast("cpu", torch.bfloat16))["held_loss"]
    assert lowered != pytest.approx(exact, rel=1e-6) and lowered == pytest.approx(exact, rel=1e-2)
