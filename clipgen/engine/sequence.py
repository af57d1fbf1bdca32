"""An image to generate, as the engine schedules it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipgen.request import SamplingParams


@dataclass(frozen=True, eq=False)
class Sequence:
    """The tokens of one image to generate. Compared by identity: two equal requests are two sequences.

    Shapes: D condition size.
    """

    condition: Tensor
    """(D,), what the GPT is conditioned on."""
    seed: int
    params: SamplingParams
    prefix_tokens: Tensor | None = None
    """(K,) int64, K < T: tokens that are given rather than sampled."""
    negative_condition: Tensor | None = None
    """(D,), what guidance moves away from; None for no condition."""

    @property
    def num_rows(self) -> int:
        """Rows of the cache: two under guidance, else one."""
        return 1 if self.params.guidance == 1 else 2

    @property
    def uncond(self) -> Tensor:
        """(D,), the condition of the second row: the negative one, or zeros, which mean no condition."""
        return torch.zeros_like(self.condition) if self.negative_condition is None else self.negative_condition
