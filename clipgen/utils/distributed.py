"""Several processes that share a work, as `torchrun` starts them; one process is the case of one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Which of how many this one is. Numbers alone: nothing is set up before `joined`."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Processes:
        """Read RANK, WORLD_SIZE and LOCAL_RANK, which `torchrun` sets."""
        rank, count, local = (int(environ.get(name, default)) for name, default in _NAMES)
        return cls(rank, count, local)

    def own(self, total: int) -> range:
        """Which of the numbers 0 to total - 1 are this process's: every count-th."""
        return range(self.rank, total, self.count)

    def device(self, asked: str | None) -> str | None:
        """The asked device, or where there are GPUs and several processes, this one's own."""
        own_gpu = asked is None and self.count > 1 and torch.cuda.is_available()
        return f"cuda:{self.local_rank}" if own_gpu else asked

    @contextmanager
    def joined(self) -> Iterator[None]:
        """While inside, `add_up` and `gather` reach the others; all must enter."""
        if self.count == 1:
            yield
            return
        dist.init_process_group("gloo", rank=self.rank, world_size=self.count)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def add_up(self, value: Tensor) -> Tensor:
        """The sum of a CPU tensor over all processes; all must call it."""
        if self.count > 1:
            value = value.contiguous().clone()
            dist.all_reduce(value)
        return value

    def gather(self, value: T) -> list[T]:
        """What each process has, in their order; all must call it."""
        if self.count == 1:
            return [value]
        found: list[T | None] = [None] * self.count
        dist.all_gather_object(found, value)
        return [item for item in found if item is not None]


_NAMES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
