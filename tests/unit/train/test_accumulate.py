"""Options that save memory, micro-batches and recomputed activations, do not change a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from training_kit import run, same_curves, scalars, write_config, write_images

from clipgen.config import ModelConfig
from clipgen.models.gpt import GPT, Block
from clipgen.models.vqgan import VQGAN, AttnBlock, ResBlock
from train import stage1, stage2
from train.loop.optimization import enable_recompute


@pytest.fixture(scope="module")
def flags(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    config = write_config(tiny_config, folder / "tiny.yaml")
    return ["--config", config, "--data", write_images(folder / "images")]


@pytest.mark.parametrize("kind", ["lecam", pytest.param("r1", marks=pytest.mark.slow)])
def test_stage1_in_micro_batches_gives_the_same_curves(kind: str, flags, tmp_path: Path, monkeypatch) -> None:
    more = [
        f"stage1.disc_regularisation={kind}",
        "stage1.disc_regularisation_weight=0.1",
        "stage1.codes=ema",
        "stage1.lr=3e-5",  # with a higher rate, Adam turns rounding differences into others now and then
    ]
    run(stage1, monkeypatch, *flags, "--out", tmp_path / "whole", *more)
    run(stage1, monkeypatch, *flags, "--out", tmp_path / "parts", *more, "stage1.accumulate=4", "stage1.recompute=true")
    same_curves(tmp_path / "whole", tmp_path / "parts", (4, "adaptive_weight"), (5, "disc_penalty"), (6, "perplexity"))


def test_stage2_in_micro_batches_gives_the_same_curves(flags, tiny_weights: Path, tmp_path: Path, monkeypatch) -> None:
    more = ["--vqgan", tiny_weights, "--clip", tiny_weights / "clip.safetensors"]
    more += ["stage2.clip_weight=0.2", "stage2.clip_batch=2", "stage2.clip_every=3", "stage2.prompts=[a lemon]"]
    run(stage2, monkeypatch, *flags, "--out", tmp_path / "whole", *more)
    run(stage2, monkeypatch, *flags, "--out", tmp_path / "parts", *more, "stage2.accumulate=2", "stage2.recompute=true")
    same_curves(tmp_path / "whole", tmp_path / "parts", (3, "clip_distance"), (6, "clip_distance"), (6, "held_loss"))
    assert (2, "clip_distance") not in scalars(tmp_path / "whole")  # not every step
    assert (tmp_path / "parts" / "prompts_000006.png").is_file()


@pytest.mark.parametrize(
    ("script", "change", "message"),
    [
        (stage1, "stage1.accumulate=3", "accumulate is 3; it must divide the 4 images that each process has"),
        (stage2, "stage2.clip_batch=3", "clip_batch is 3; it must divide batch_size, 4"),
        (
            stage2,
            "stage2.accumulate=4",
            "clip_batch is 2; with 1 processes and accumulate=4 it must be a multiple of 4",
        ),
    ],
)
def test_micro_batches_of_unequal_size_are_refused(
    script, change: str, message: str, flags, tiny_weights: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    more = [] if script is stage1 else ["--vqgan", tiny_weights, "--clip", tiny_weights / "clip.safetensors"]
    more += ["stage2.clip_weight=0.2", "stage2.clip_batch=2"]
    with pytest.raises(SystemExit) as stop:
        run(script, monkeypatch, *flags, "--out", tmp_path / "run", *more, change)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def saved_bytes(forward: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Bytes that a forward pass stores for the backward pass, and its loss."""
    sizes: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = forward()
    return sum(sizes.values()), loss


def models(tiny_config: ModelConfig) -> Iterator[tuple[torch.nn.Module, tuple, Callable[[], torch.Tensor]]]:
    vqgan, gpt = VQGAN(tiny_config.vqgan), GPT(tiny_config.gpt)
    x, e = torch.rand(8, 3, 32, 32) * 2 - 1, torch.randn(8, 32)
    tokens = torch.randint(64, (8, 15))
    yield vqgan, (ResBlock, AttnBlock), lambda: vqgan(x)[0].pow(2).mean() + vqgan(x)[1]
    yield gpt, (Block,), lambda: gpt(tokens, e).pow(2).mean()


def test_recomputation_stores_less_and_gives_the_same_gradients(tiny_config: ModelConfig) -> None:
    for model, kinds, forward in models(tiny_config):
        sizes, gradients = [], []
        for recompute in (False, True):
            if recompute:
                enable_recompute(model, kinds)
            size, loss = saved_bytes(forward)
            model.zero_grad()
            loss.backward()
            sizes.append(size)
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert sizes[1] < 0.6 * sizes[0], type(model).__name__
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
