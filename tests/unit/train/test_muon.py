"""Muon beside PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.loop.muon import Muon, orthogonalise, share

SHAPES = [(16, 48), (48, 16), (16, 48), (16, 16)]


def after_steps(build: type[torch.optim.Optimizer], steps: int = 3, **settings: object) -> list[Tensor]:
    """The matrices after some steps with random gradients; the last one has none."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator).requires_grad_() for shape in [*SHAPES, (16, 48)]]
    optimizer = build(matrices, lr=0.02, weight_decay=0.1, **settings)  # type: ignore[call-arg]
    for _ in range(steps):
        for matrix, shape in zip(matrices, SHAPES, strict=False):
            matrix.grad = torch.randn(shape, generator=generator)
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_are_those_of_pytorchs_muon_within_its_rounding(dtype: torch.dtype) -> None:
    theirs = after_steps(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    start = after_steps(torch.optim.Muon, steps=0)
    for ours, expected, before in zip(after_steps(Muon, dtype=dtype), theirs, start, strict=True):
        moved = (expected - before).abs().max()
        assert (ours - expected).abs().max() <= 0.03 * moved  # bfloat16 has 8 bits


def test_in_float32_it_is_pytorchs_muon_with_its_products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = after_steps(Muon, dtype=torch.float32)
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())
    for mine, theirs in zip(ours, after_steps(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_singular_values_come_near_one_and_zeros_stay_finite(shape: tuple[int, int]) -> None:
    matrices = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e3, torch.zeros(shape)])
    found = orthogonalise(matrices, torch.float32)
    values = torch.linalg.svdvals(found[0])
    assert values.min() > 0.5 and values.max() < 1.4
    assert found[1].eq(0).all()


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_matrices_are_shared_by_processes_at_about_equal_cost(processes: int) -> None:
    shapes = 3 * [(768, 256), (256, 256), (1024, 256), (256, 1024)]
    parts = share([torch.empty(shape, device="meta") for shape in shapes], processes)
    assert sorted(index for part in parts for index in part) == list(range(len(shapes)))
    loads = [sum(shapes[index][0] * shapes[index][1] for index in part) for part in parts]
    assert max(loads) <= 4 / 3 * max(sum(loads) / processes, 1024 * 256)  # Graham's bound
