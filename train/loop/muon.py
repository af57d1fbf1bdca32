"""Muon, an optimizer for the matrices of hidden layers (Jordan et al. 2024): momentum, made orthogonal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan's quintic: it brings singular values near 1 in few steps, not to 1."""
_STEPS, _MOMENTUM = 5, 0.95


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring all singular values of matrices (N, R, C) near 1 by Newton-Schulz steps in `dtype`; dtype (N, R, C)."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # the largest is at most 1
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def orthogonalise_all(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Orthogonalise matrices of any shapes, those of one shape together; each (R, C) in `dtype`."""
    alike = defaultdict(list)
    for index, matrix in enumerate(matrices):
        alike[matrix.shape].append(index)
    done: dict[int, Tensor] = {}
    for rows in alike.values():
        done |= zip(rows, orthogonalise(torch.stack([matrices[i] for i in rows]), dtype), strict=True)
    return [done[index] for index in range(len(matrices))]


def share(matrices: Sequence[Tensor], processes: int) -> list[list[int]]:
    """Indices of the matrices that each process orthogonalises, at about equal cost: the dearest go first."""
    costs = [2 * min(m.shape) ** 2 * max(m.shape) + min(m.shape) ** 3 for m in matrices]
    parts: list[list[int]] = [[] for _ in range(processes)]
    load = [0] * processes
    for index in sorted(range(len(matrices)), key=lambda i: -costs[i]):
        idlest = load.index(min(load))
        parts[idlest].append(index)
        load[idlest] += costs[index]
    return parts


def orthogonalise_together(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """As `orthogonalise_all`, of matrices that all processes have: each takes some, then they exchange the results."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return orthogonalise_all(matrices, dtype)
    parts = share(matrices, dist.get_world_size())
    sizes = [sum(matrices[i].numel() for i in part) for part in parts]
    own = torch.zeros(max(sizes), dtype=dtype, device=matrices[0].device)  # of one size, as all_gather needs
    rank = dist.get_rank()
    if parts[rank]:
        flat = [m.flatten() for m in orthogonalise_all([matrices[i] for i in parts[rank]], dtype)]
        own[: sizes[rank]] = torch.cat(flat)
    received = [torch.empty_like(own) for _ in parts]
    dist.all_gather(received, own)
    done: dict[int, Tensor] = {}
    for part, size, flat_part in zip(parts, sizes, received, strict=True):
        pieces = flat_part[:size].split([matrices[i].numel() for i in part])
        done |= {i: piece.view(matrices[i].shape) for i, piece in zip(part, pieces, strict=True)}
    return [done[index] for index in range(len(matrices))]


class Muon(torch.optim.Optimizer):
    """Matrices of one shape are updated together, in the precision of the training's products, shared by all processes.

    PyTorch's Muon takes them one by one and always computes in bfloat16: where that is only emulated, a step takes
    longer than the model's forward and backward pass. Updates have the size of AdamW's (Liu et al., arXiv 2502.16982).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        """Args: dtype: what the updates are made orthogonal in."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient. A closure is not supported."""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            if not matrices:
                continue
            grads = [p.grad for p in matrices]
            for p in matrices:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in matrices]
            torch._foreach_lerp_(momenta, grads, 1 - _MOMENTUM)
            updates = orthogonalise_together(torch._foreach_lerp(grads, momenta, _MOMENTUM), self.dtype)
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(matrices, updates, strict=True):
                p.add_(update.to(p.dtype), alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)
