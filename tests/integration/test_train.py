"""Both training stages on a few images, end to end: train, export, generate; the augmentations of a step."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from training_kit import run, scalars, write_config, write_images

from clipgen import ClipGen
from clipgen.config import GPTConfig, ModelConfig
from clipgen.models.gpt import GPT
from clipgen.request import SamplingParams
from train import export, stage1, stage2
from train.config import Stage2Config
from train.loop.batches import to_device
from train.loop.optimization import build_optimizers
from train.loop.samples import sample
from train.losses import gan
from train.stage2 import corrupt, interpolate, nearest_neighbours, perturb


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def config(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tiny_config, tmp_path_factory.mktemp("config") / "tiny.yaml")


@pytest.fixture(scope="module")
def trained(images: Path, config: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with both trained stages, vqgan and gpt."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        run(stage1, patch, "--config", config, "--data", images, "--out", runs / "vqgan")
        clip = tiny_weights / "clip.safetensors"
        more = ["--vqgan", runs / "vqgan", "--clip", clip]
        run(stage2, patch, "--config", config, "--data", images, "--out", runs / "gpt", *more)
    return runs


def test_stages_write_weights_curves_and_sample_images(trained: Path) -> None:
    rows = scalars(trained / "vqgan")
    assert (1, "l1") in rows and (1, "discriminator") not in rows  # the GAN starts late
    assert (4, "discriminator") in rows and (4, "adaptive_weight") in rows and (4, "codes_used") in rows
    assert (6, "loss") in scalars(trained / "gpt") and (3, "held_loss") in scalars(trained / "gpt")
    assert "broken.jpg: is not an image" in (trained / "vqgan" / "skipped.txt").read_text()
    assert "broken.jpg" in (trained / "gpt" / "encoded" / "skipped.txt").read_text()
    for name in ("vqgan/reconstruction_000003.png", "gpt/samples_000006.png"):
        assert Image.open(trained / name).height > 60  # the held-out image above its reconstruction
    assert list(trained.glob("*/tensorboard/events*"))
    assert {"held_loss", "held_psnr", "perplexity", "grad_norm"} <= {name for _, name in rows}
    lowest = min((value, step) for (step, name), value in rows.items() if name == "held_loss")[1]
    best, last = (load_file(trained / "vqgan" / f"{name}.safetensors") for name in ("vqgan_best", "vqgan"))
    assert all(torch.equal(best[name], last[name]) for name in last) == (lowest == 6)
    assert (trained / "gpt" / "gpt_best.safetensors").is_file()


def test_exported_weights_generate_images(
    trained: Path, config: Path, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ["--clip", tiny_weights / "clip.safetensors", "--vqgan", trained / "vqgan", "--gpt", trained / "gpt"]
    run(export, monkeypatch, "--config", config, *parts, "--out", tmp_path / "weights")
    stored, gpt = (load_file(folder / "gpt.safetensors") for folder in (tmp_path / "weights", trained / "gpt"))
    assert all(torch.equal(stored[name], tensor.half()) for name, tensor in gpt.items())
    result = ClipGen.from_pretrained(tmp_path / "weights", device="cpu")("a lemon", num_outputs=2, seed=0)
    assert [image.size for image in result.images] == [(32, 32)] * 2


def test_export_names_a_missing_file(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ["--clip", tmp_path / "none.safetensors", "--vqgan", trained / "vqgan", "--gpt", trained / "gpt"]
    with pytest.raises(SystemExit) as stop:
        run(export, monkeypatch, *parts, "--out", tmp_path / "weights")
    assert stop.value.code == 2
    assert "none.safetensors is missing" in capsys.readouterr().err


def test_training_starts_from_the_weights_in_init(
    trained: Path, images: Path, config: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    init = trained / "vqgan" / "vqgan.safetensors"
    arguments = ["--config", config, "--data", images, "--out", tmp_path / "run", "stage1.lr=1e-12", "stage1.steps=1"]
    run(stage1, monkeypatch, *arguments, f"stage1.init={init}", "stage1.revive_every=0")
    before, after = load_file(init), load_file(tmp_path / "run" / "vqgan.safetensors")
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    with pytest.raises(SystemExit) as stop:
        run(stage1, monkeypatch, *arguments, f"stage1.init={trained / 'gpt' / 'gpt.safetensors'}")
    assert stop.value.code == 2
    assert "gpt.safetensors: the VQGAN's tensors do not fit" in capsys.readouterr().err


def test_only_decoder_changes_the_decoder_but_no_token(
    trained: Path, images: Path, config: Path, tmp_path: Path, monkeypatch
) -> None:
    init = trained / "vqgan" / "vqgan.safetensors"
    settings = [f"stage1.init={init}", "stage1.only_decoder=true", "stage1.revive_every=0", "stage1.steps=3"]
    run(stage1, monkeypatch, "--config", config, "--data", images, "--out", tmp_path, *settings)
    before, after = load_file(init), load_file(tmp_path / "vqgan.safetensors")
    changed = {key.partition(".")[0] for key in before if not before[key].equal(after[key])}
    assert changed == {"post_quant_conv", "decoder"}


def test_non_finite_loss_stops_training_and_keeps_earlier_checkpoints(
    images: Path, config: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", config, "--data", images, "--out", tmp_path / "run", "stage1.save_every=1"]
    monkeypatch.setattr(gan, "discriminator_loss", lambda real, fake: real.mean() / 0)
    with pytest.raises(SystemExit) as stop:
        run(stage1, monkeypatch, *arguments)
    assert stop.value.code == 2
    assert "step 4: discriminator not finite" in capsys.readouterr().err
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step_000002", "step_000003"]


def test_divergence_at_a_step_with_sample_images_is_told_as_such(
    images: Path, config: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", config, "--data", images, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit) as stop:
        run(stage1, monkeypatch, *flags, "stage1.lr=1e20", "stage1.warmup=0", "stage1.log_every=3")
    assert stop.value.code == 2
    assert re.search(r"step 3: .*not finite, so the weights are lost", capsys.readouterr().err)


STEPS = ["log_every=2", "patience=3", "warmup=0", "save_every=5", "sample_every=1000"]
FAILURES = {
    "explodes": (stage1, ["lr=1e12", "steps=20"], "not finite, so the weights are lost"),
    "collapses": (stage1, ["lr=0.3", "revive_every=0", "codes=gradient", "steps=300"], "the codebook collapses"),
    "loses": (stage1, ["disc_start=0", "disc_lr=1e-2", "disc_weight=0", "steps=400"], "the discriminator wins"),
    "diverges": (stage2, ["lr=1.0", "steps=40"], "the GPT does worse than guessing"),
}


@pytest.mark.parametrize("how", ["explodes", "collapses", "diverges", pytest.param("loses", marks=pytest.mark.slow)])
def test_diverging_training_stops_with_the_cause_and_finite_checkpoints(
    how: str, images: Path, config: Path, tiny_weights: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    script, changes, message = FAILURES[how]
    name = script.__name__.removeprefix("train.")
    flags = ["--config", config, "--data", images, "--out", tmp_path]
    flags += ["--vqgan", tiny_weights, "--clip", tiny_weights / "clip.safetensors"] if script is stage2 else []
    with pytest.raises(SystemExit) as stop:
        run(script, monkeypatch, *flags, *(f"{name}.{change}" for change in STEPS + changes))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and "ontinue from" in said
    for path in tmp_path.glob("checkpoints/*/model*.safetensors"):  # so training can be resumed from them
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


@pytest.mark.slow
def test_stage1_with_all_losses_lowers_l1_and_perceptual_loss(
    images: Path, config: Path, tmp_path: Path, monkeypatch
) -> None:
    more = ["steps=370", "lr=3e-3", "disc_start=360", "log_every=10", "batch_size=8", "perceptual=efficientnet"]
    rarely = ["sample_every=370", "save_every=370"]
    flags = ["--config", config, "--data", images, "--out", tmp_path]
    run(stage1, monkeypatch, *flags, *(f"stage1.{setting}" for setting in more + rarely))
    rows = scalars(tmp_path)
    for name, max_ratio in (("l1", 0.85), ("perceptual", 0.7)):
        early, late = (sum(rows[(step, name)] for step in steps) for steps in ((10, 20, 30), (340, 350, 360)))
        assert late < max_ratio * early
    assert (370, "discriminator") in rows


def test_bf16_loss_is_close_to_that_of_float32(
    images: Path, config: Path, tiny_config: ModelConfig, tiny_weights: Path, trained: Path, tmp_path, monkeypatch
) -> None:
    flags = ["--config", config, "--data", images, "stage1.precision=bf16", "stage2.precision=bf16"]
    parts = ["--vqgan", trained / "vqgan", "--clip", tiny_weights / "clip.safetensors", "stage2.clip_weight=0.2"]
    AcceleratorState._reset_state(True)
    try:
        run(stage1, monkeypatch, *flags, "--out", tmp_path / "vqgan")
        run(stage2, monkeypatch, *flags, "--out", tmp_path / "gpt", *parts, "stage2.clip_batch=4")
    finally:
        AcceleratorState._reset_state(True)
    for name, key in (("vqgan", "l1"), ("gpt", "loss")):
        assert scalars(tmp_path / name)[(6, key)] == pytest.approx(scalars(trained / name)[(6, key)], rel=0.05)


@pytest.mark.parametrize("count", [1, 2])
def test_both_stages_train_on_one_or_two_images(
    count: int, images: Path, config: Path, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sorted(images.rglob("*.png"))[:count]:
        (tmp_path / "few").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "few")
    flags = ["--config", config, "--data", tmp_path / "few"]
    parts = ["--vqgan", tiny_weights, "--clip", tiny_weights / "clip.safetensors"]
    run(stage1, monkeypatch, *flags, "--out", tmp_path / "vqgan", "stage1.steps=2", "stage1.sample_every=2")
    for views in (1, 2):
        few = ["stage2.steps=2", "stage2.sample_every=2", f"stage2.views={views}"]
        run(stage2, monkeypatch, *flags, *parts, "--out", tmp_path / f"gpt{views}", *few)
        assert (2, "held_loss") in scalars(tmp_path / f"gpt{views}")


def test_sharded_average_is_gathered_only_to_generate_samples(
    images: Path, config: Path, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    average_model = stage2.average_model
    monkeypatch.setattr(stage2, "average_model", lambda *args: built.append(args) or average_model(*args))
    parts = ["--vqgan", tiny_weights, "--clip", tiny_weights / "clip.safetensors"]
    flags = ["--config", config, "--data", images, "stage2.save_every=1", "stage2.sample_every=6"]
    run(stage2, monkeypatch, *flags, *parts, "--out", tmp_path)
    assert len(built) == 1 and (tmp_path / "gpt.safetensors").is_file()


def test_samples_longer_than_256_tokens_are_generated() -> None:
    gpt = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=8, block_size=300, n_cond=4)).eval()
    tokens = sample(gpt, F.normalize(torch.ones(2, 4), dim=1), SamplingParams(top_k=0, guidance=2.0))
    assert tokens.shape == (2, 300) and tokens.min() >= 0 and tokens.max() < 8


def test_fp16_without_a_gpu_is_refused(
    images: Path, config: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run(stage1, monkeypatch, "--config", config, "--data", images, "--out", tmp_path, "stage1.precision=fp16")
    assert stop.value.code == 2 and "precision=fp16 needs a GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_fp16_loss_scaling_covers_both_optimizers(images: Path, config: Path, tmp_path: Path, monkeypatch) -> None:
    """As on a GPU, with torch's scaler for CPUs, which Accelerate does not offer."""
    flags = ["--config", config, "--data", images, "stage1.steps=60", "stage1.lr=1e-4"]
    flags += ["stage1.sample_every=60", "stage1.save_every=60"]
    flags += ["stage1.disc_regularisation=r1", "stage1.disc_regularisation_weight=0.1", "stage1.accumulate=2"]
    run(stage1, monkeypatch, *flags, "--out", tmp_path / "whole")
    build = stage1.build_accelerator

    def half(config):
        accelerator = build(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        return accelerator

    monkeypatch.setattr(stage1, "build_accelerator", half)
    try:
        run(stage1, monkeypatch, *flags, "--out", tmp_path / "half")
    finally:
        AcceleratorState._reset_state(True)
    whole, halved = scalars(tmp_path / "whole"), scalars(tmp_path / "half")
    assert (4, "grad_norm") not in halved  # the loss scale was too high, so this step was skipped
    for name in ("l1", "discriminator", "disc_penalty"):
        assert halved[(60, name)] == pytest.approx(whole[(60, name)], rel=0.25), name


@pytest.mark.parametrize("bad", ["stage1.lr=fast", "stage1.stpes=3", "stage1.batch_size=0", "model.vqgan.ch=33"])
def test_bad_override_is_named_and_writes_nothing(
    bad: str, images: Path, config: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(stage1, monkeypatch, "--config", config, "--data", images, "--out", tmp_path / "run", bad)
    assert stop.value.code == 2
    assert bad.split("=")[0].split(".")[-1] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_folder_without_images_is_refused(
    config: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        (tmp_path / "empty").mkdir()
        run(stage1, monkeypatch, "--config", config, "--data", tmp_path / "empty", "--out", tmp_path / "run")
    assert stop.value.code == 2
    assert "holds no image" in capsys.readouterr().err


def test_perturbed_embeddings_stay_on_the_sphere_within_the_angle() -> None:
    embeddings = F.normalize(torch.randn(4000, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    rotated = perturb(embeddings, angle=30, dropout=0.25, generator=torch.Generator().manual_seed(1))
    dropped = (rotated == 0).all(dim=1)
    assert 0.2 < dropped.float().mean() < 0.3
    cosine = (rotated * embeddings).sum(1)[~dropped]
    assert torch.allclose(rotated[~dropped].norm(dim=1), torch.ones(len(cosine)), atol=1e-5)
    angles = cosine.clamp(-1, 1).acos().rad2deg()
    assert angles.max() <= 30.01 and 14 < angles.mean() < 16


def test_interpolated_embeddings_lie_between_an_image_and_its_nearest_neighbour() -> None:
    angles = torch.tensor([0.0, 10.0, 80.0, 95.0]).deg2rad()
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    near = nearest_neighbours(embeddings, 1)
    assert near.flatten().tolist() == [1, 0, 3, 2]
    with_duplicates = nearest_neighbours(embeddings[[0, 0, 2]], 1)
    assert with_duplicates.flatten().tolist() == [1, 0, 0]  # duplicates are neighbours of each other, not of themselves
    assert nearest_neighbours(embeddings[:2], 5).tolist() == [[1], [0]]
    rows = torch.arange(4).repeat(50)
    mixed = interpolate(embeddings, rows, near, torch.Generator().manual_seed(0))
    found = torch.atan2(mixed[:, 1], mixed[:, 0]).rad2deg().view(50, 4)
    assert torch.allclose(mixed.norm(dim=1), torch.ones(200))
    low, high = torch.tensor([0.0, 5.0, 80.0, 87.5]), torch.tensor([5.0, 10.0, 87.5, 95.0])  # at most half of the way
    assert ((found > low - 1e-3) & (found < high + 1e-3)).all() and (found.std(0) > 0.5).all()


def test_corrupted_tokens_come_from_other_images_at_the_same_position() -> None:
    tokens = torch.arange(64)[:, None] * 1000 + torch.arange(100)  # 1000 x image + position
    assert torch.equal(corrupt(tokens, 0.0, torch.Generator().manual_seed(0)), tokens)
    noisy = corrupt(tokens, 0.8, torch.Generator().manual_seed(0))
    assert torch.equal(noisy % 1000, tokens % 1000)
    fraction = (noisy != tokens).float().mean(1)
    assert fraction.max() < 0.95 and fraction.min() < 0.1 and 0.3 < fraction.mean() < 0.5


def test_batch_on_a_device_is_augmented_there_without_reading_its_values() -> None:
    tokens = torch.zeros(8, 16, dtype=torch.long, device="meta")  # a meta tensor has no values to wait for
    embeddings = torch.zeros(8, 32, device="meta")
    generator = torch.Generator().manual_seed(0)
    assert perturb(embeddings, angle=10, dropout=0.1, generator=generator).is_meta
    assert corrupt(tokens, 0.3, generator).is_meta
    assert to_device(tokens, tokens.device) is tokens


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(tiny_config: ModelConfig) -> None:
    model = GPT(tiny_config.gpt)
    muon, adamw = build_optimizers(model, Stage2Config(optimizer="muon"), "no")
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon, by_adamw = ([names[id(p)] for g in o.param_groups for p in g["params"]] for o in (muon, adamw))
    assert sorted(by_muon + by_adamw) == sorted(names.values())
    assert all(name.startswith("blocks.") and name.endswith("weight") for name in by_muon)
    assert {"tok_emb.weight", "head.weight", "cond_proj.weight"} <= set(by_adamw)
    (adamw_alone,) = build_optimizers(model, Stage2Config(), "no")
    assert sum(len(g["params"]) for g in adamw_alone.param_groups) == len(names)
