"""Memory: how many images fit at once, and smaller batches when memory runs out all the same.

The estimates are upper bounds for planning; `benchmarks/full_size.py` compares them with measurements.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from clipgen.errors import InsufficientMemoryError
from clipgen.utils.cpu import CGROUPS, cgroups
from clipgen.utils.text import first_line

if TYPE_CHECKING:
    from clipgen.config import GPTConfig, VQGANConfig

Item = TypeVar("Item")
Output = TypeVar("Output")

log = logging.getLogger(__name__)

HEADROOM = 0.8
"""Share of the free memory to plan with; the rest is for workspaces and fragmentation, which are not counted."""

MAX_NUM_SEQS = 64
"""Images whose tokens are decoded at once; guidance doubles the rows."""
MAX_DECODE_BATCH = 16
"""Images whose pixels are decoded at once: more are not faster, and their feature maps take the most memory."""

_LIVE = 7
"""Largest feature maps that a decoder holds at a time: a residual block's input, its normalised and activated copies,
the results of its convolutions, and a convolution's re-laid input."""

_V1_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes")
"""Files of cgroup v1; a group without a limit has a very large one."""

# Messages of allocators that have run out; only CUDA's has an exception of its own. cuDNN finds no engine for a
# convolution when the workspace of every one is too large.
_PHRASES = (
    *("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc"),
    "unable to find an engine",
)


def token_bytes(config: GPTConfig, dtype: torch.dtype, guided: bool) -> int:
    """Bytes that decoding the tokens of one image takes beyond the weights; guidance needs two rows."""
    cache = 2 * config.n_layer * config.block_size * config.n_embd * dtype.itemsize
    logits = 6 * config.vocab_size * 4  # float32: logits, their sorted copy, its order (int64), probabilities, CDF
    return (cache + logits) * (2 if guided else 1)


def pixel_bytes(config: VQGANConfig, dtype: torch.dtype) -> int:
    """Bytes that decoding the pixels of one image takes beyond the weights."""
    widest = 0
    side = config.image_size // config.patch
    for level, mult in enumerate(config.ch_mult):
        above = config.ch_mult[min(level + 1, len(config.ch_mult) - 1)]  # channels of its input
        widest = max(widest, (side >> level) ** 2 * config.ch * max(mult, above))
    return _LIVE * widest * dtype.itemsize + 3 * 3 * 4 * config.image_size**2


def free_bytes(device: torch.device) -> int | None:
    """Free bytes on a device; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        known = [amount for amount in (_system_free(), _container_free()) if amount is not None]
        return min(known, default=None)
    return None


def _system_free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None


def _container_free(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes up to the lowest limit of the container and the groups above it; None without one (cgroup v1 and v2)."""
    free = [rest for folder in cgroups("memory", root, membership) if (rest := _group_free(folder)) is not None]
    return min(free, default=None)


def _group_free(folder: Path) -> int | None:
    """Bytes up to a group's limit; cached file pages, such as mapped weights, count as free."""
    names = ("memory.max", "memory.current") if (folder / "memory.max").is_file() else _V1_NAMES
    try:
        limit, used = ((folder / name).read_text().strip() for name in names)
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
        return max(int(limit) - int(used) + cached, 0)
    except (OSError, ValueError):  # no such group, or "max", which is no limit
        return None


def max_batch_size(bytes_each: int, device: torch.device, limit: int) -> int:
    """How many items of `bytes_each` to process at once: at least 1, at most `limit`."""
    free = free_bytes(device)
    return limit if free is None else max(1, min(limit, int(free * HEADROOM) // max(bytes_each, 1)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a CPU or GPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


def in_batches(
    run: Callable[[Sequence[Item]], Output], items: Sequence[Item], size: int, what: str
) -> Iterator[Output]:
    """Yield `run(batch)` for every batch, in order; when memory runs out, continue with batches half as large.

    Args:
        run: its result for an item must not depend on the batch; it must keep nothing when it fails.

    Raises:
        InsufficientMemoryError: one item alone does not fit.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + size]
        try:
            output = run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        else:
            yield output
            start += len(batch)
            continue
        # Outside the except block: the exception, and with its traceback the tensors of the failed attempt, are freed.
        size = halve(len(batch), what, reason)


def halve(count: int, what: str, reason: str) -> int:
    """Return half of `count`, the batch that memory ran out with, after freeing what can be freed.

    Raises:
        InsufficientMemoryError: `count` is 1.
    """
    if count <= 1:
        raise InsufficientMemoryError(
            f"{what}: not even one image fits into memory ({reason}); close other programs, take a smaller "
            "model or a device with more memory, or dtype bfloat16 or float16 where the device has it"
        )
    log.warning("%s: out of memory with %d images at once; going on with %d", what, count, count // 2)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return count // 2
