"""Memory: how many pictures fit at once, and what happens when that was too many.

The estimates are upper bounds for planning, held against measurements by `benchmarks/full_size.py`.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from clipgen.errors import InsufficientMemoryError

if TYPE_CHECKING:
    from clipgen.config import GPTConfig, VQGANConfig

Item = TypeVar("Item")
Output = TypeVar("Output")

log = logging.getLogger(__name__)

HEADROOM = 0.8
"""Share of the free memory that is planned with; the rest is for what is not counted: workspaces, fragmentation."""

MOST_ROWS = 64
"""Pictures whose tokens are decoded at once; with guidance twice as many rows."""
MOST_PICTURES = 16
"""Pictures whose pixels are decoded at once: more are no faster, and their feature maps are what takes memory."""

_LIVE = 7
"""Largest feature maps that a decoder holds at a time: a residual block's input, its normalised and activated copies,
the results of its convolutions, and what a convolution lays out anew."""

# What the allocators of CPUs and GPUs say when nothing is left; only CUDA's has an exception of its own. cuDNN finds no
# engine for a convolution when the workspace of every one of them is too large.
_PHRASES = (
    *("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc"),
    "unable to find an engine",
)


def token_bytes(config: GPTConfig, dtype: torch.dtype, guided: bool) -> int:
    """Memory that decoding the tokens of one picture takes beyond the weights; with guidance there are two rows."""
    cache = 2 * config.n_layer * config.block_size * config.n_embd * dtype.itemsize
    logits = 6 * config.vocab_size * 4  # float32: logits, their sorted copy, its order (int64), probabilities, CDF
    return (cache + logits) * (2 if guided else 1)


def pixel_bytes(config: VQGANConfig, dtype: torch.dtype) -> int:
    """Memory that decoding the pixels of one picture takes beyond the weights."""
    widest = 0
    side = config.image_size // config.patch
    for level, mult in enumerate(config.ch_mult):
        above = config.ch_mult[min(level + 1, len(config.ch_mult) - 1)]  # the channels it arrives with
        widest = max(widest, (side >> level) ** 2 * config.ch * max(mult, above))
    return _LIVE * widest * dtype.itemsize + 3 * 3 * 4 * config.image_size**2


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had on a device; None where nobody tells."""
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


def _container_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the container's limit leaves (cgroup v2); pages of files, such as mapped weights, can be dropped."""
    try:
        limit, used = ((root / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return None if limit == "max" else max(int(limit) - int(used) + int(stat.get("inactive_file", 0)), 0)
    except (OSError, ValueError):
        return None


def fitting(each: int, device: torch.device, most: int) -> int:
    """How many pictures of `each` bytes to work on at once: at least 1, at most `most`."""
    free = free_bytes(device)
    return most if free is None else max(1, min(most, int(free * HEADROOM) // max(each, 1)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


def in_batches(
    run: Callable[[Sequence[Item]], Output], items: Sequence[Item], size: int, what: str
) -> Iterator[Output]:
    """Yield `run(batch)` of every batch, in order; when memory runs out, go on in batches half as large.

    Args:
        run: must give the same for an item whatever its batch, and keep nothing when it fails.
        items: what to work on.
        size: how many of them at a time, at least 1.
        what: names the work in messages.

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
            reason = reason_of(error)
        else:
            yield output
            start += len(batch)
            continue
        # Here the exception is gone, and with its traceback the tensors that the failed attempt held.
        size = halve(len(batch), what, reason)


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def halve(count: int, what: str, reason: str) -> int:
    """With how many pictures to go on when memory ran out with `count`; frees what can be freed.

    Raises:
        InsufficientMemoryError: it was one.
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
