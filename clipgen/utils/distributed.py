"""Several processes that share the work, as `torchrun` starts them. A single process is the simplest case."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from clipgen.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Rank and number of the processes. They do not communicate before `joined`."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Processes:
        """Read RANK, WORLD_SIZE and LOCAL_RANK, which `torchrun` sets.

        Raises:
            ConfigError: one of them is not a number in its range.
        """
        count = _read_number(environ, "WORLD_SIZE", 1, low=1)
        rank = _read_number(environ, "RANK", 0, high=count - 1)
        return cls(rank, count, _read_number(environ, "LOCAL_RANK", 0, high=count - 1))

    def check_address(self, environ: Mapping[str, str] = os.environ) -> None:
        """Check that several processes know where to meet.

        Raises:
            ConfigError: MASTER_ADDR or MASTER_PORT is missing or not usable.
        """
        if self.count == 1:
            return
        if not environ.get("MASTER_ADDR"):
            raise ConfigError(f"WORLD_SIZE is {self.count}, but MASTER_ADDR is not set; start with torchrun")
        _read_number(environ, "MASTER_PORT", None, high=65535)

    def own(self, total: int) -> range:
        """Return this process's share of the numbers 0 to total - 1: every count-th."""
        return range(self.rank, total, self.count)

    def device(self, asked: str | None) -> str | None:
        """Return the requested device; without one, several processes on a machine with GPUs use one GPU each."""
        own_gpu = asked is None and self.count > 1 and torch.cuda.is_available()
        return f"cuda:{self.local_rank}" if own_gpu else asked

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Connect the processes, so that `add_up` and `gather` work inside; all processes must enter."""
        if self.count == 1:
            yield
            return
        self.check_address()
        dist.init_process_group("gloo", rank=self.rank, world_size=self.count)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def add_up(self, value: Tensor) -> Tensor:
        """Return the sum of a CPU tensor over all processes; all must call it."""
        if self.count > 1:
            value = value.contiguous().clone()
            dist.all_reduce(value)
        return value

    def gather(self, value: T) -> list[T]:
        """Collect the values of all processes in the order of their ranks; all must call it."""
        if self.count == 1:
            return [value]
        found: list[T | None] = [None] * self.count
        dist.all_gather_object(found, value)
        return [item for item in found if item is not None]


def _read_number(
    environ: Mapping[str, str], name: str, default: int | None, low: int = 0, high: int | None = None
) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < low or (high is not None and int(text) > high):
        allowed = f"{low} or more" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name} is {text!r}; it must be a number {allowed}: leave it unset, or start with torchrun")
    return int(text)
