"""Muon, an optimizer for the matrices of hidden layers (Jordan et al. 2024): momentum, made orthogonal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
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


class Muon(torch.optim.Optimizer):
    """Matrices of one shape are updated together, in the precision of the training's products.

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
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, matrices in alike.items():
                grads = [p.grad for p in matrices]
                for p in matrices:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum_buffer"] for p in matrices]
                torch._foreach_lerp_(momenta, grads, 1 - _MOMENTUM)
                updates = torch.stack(torch._foreach_lerp(grads, momenta, _MOMENTUM))
                updates = orthogonalise(updates, self.dtype).to(updates.dtype)
                size = 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, updates.unbind(), alpha=-group["lr"] * size)
