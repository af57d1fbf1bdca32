"""Batches of numbered images, decoded ahead by worker processes, with checks for dead or stuck workers."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Sampler

from clipgen.errors import ClipGenError, ConfigError, DataError
from train.data.images import Batch, Images, Key, collate
from train.loop.stopping import Stop

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2
"""Batches that each worker prepares ahead."""
POLL = 2.0
"""Interval in seconds at which a wait for a batch checks the workers and the stop flag."""
GRACE = 10.0
"""Seconds that a step may still wait for its batch after Ctrl-C or SIGTERM."""
MAX_WAIT = 600.0
"""Seconds without a batch after which workers count as stuck."""


def image_batches(
    data: Images, keys: Callable[[int], list[Key]], steps: Iterable[int], workers: int, stop: Stop | None = None
) -> Iterator[Batch]:
    """Yield the batch of each step, read ahead by other processes.

    Ends early only if `stop` was signalled and the next batch did not arrive in time.

    Args:
        keys: step -> keys of the images that this process reads for it.
        steps: the steps, in order; images of earlier ones are not read.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        ConfigError: the batches do not fit into the shared memory through which workers hand them over.
        DataError: a worker died, or no batch came for `MAX_WAIT` seconds.
    """
    steps = iter(steps)
    first = next(steps, None)
    if first is None:
        return
    if workers:
        check_shared_memory(len(keys(first)) * data.item_bytes, workers)
    loader = DataLoader(
        data,
        batch_sampler=_StepKeys(keys, first, steps),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # not the global one, on which initial weights and dropout depend
        timeout=POLL if workers else 0,
    )
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if workers and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)  # torch's handler would raise a worker's death in the middle of a step
    while (batch := _next_batch(batches, stop)) is not None:
        data.failures |= batch.failures  # a worker's failures are in its own process
        yield batch


def check_shared_memory(batch_bytes: int, workers: int) -> None:
    """Check that the batches that are read ahead fit into /dev/shm, where workers put them.

    Raises:
        ConfigError: they do not.
    """
    if not SHARED_MEMORY.is_dir():
        return
    needed = batch_bytes * workers * PREFETCH * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ConfigError(
            f"workers={workers} need {_megabytes(needed)} of shared memory for their batches, and {SHARED_MEMORY} has "
            f"{_megabytes(free)} free; use workers=0, a smaller batch_size, or a container with more "
            f"(docker run --shm-size={_megabytes(2 * needed).replace(' MB', 'm')})"
        )


def ignore_signals(_: int) -> None:
    """Ignore Ctrl-C in a worker, which the trainer needs for the current step; SIGTERM ends it as usual."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _StepKeys(Sampler[list[Key]]):
    """The keys of every step."""

    def __init__(self, keys: Callable[[int], list[Key]], first: int, rest: Iterator[int]) -> None:
        self.keys, self.first, self.rest = keys, first, rest

    def __iter__(self) -> Iterator[list[Key]]:
        yield self.keys(self.first)
        yield from map(self.keys, self.rest)


def _next_batch(batches: Iterator[Batch], stop: Stop | None) -> Batch | None:
    """The next batch; None after the last one, or if `stop` was signalled and it does not arrive.

    Raises:
        DataError: a worker died, or workers are stuck.
    """
    began = time.monotonic()
    signalled: float | None = None
    while True:
        try:
            return next(batches, None)
        except ClipGenError as error:
            if not str(error).startswith("Caught "):
                raise
            message = str(error).strip().splitlines()[-1].partition(": ")[2]  # without the worker's traceback
            raise type(error)(message) from error
        except (RuntimeError, EOFError, ConnectionError) as error:
            # The latter two occur if a dead worker's finished batch can no longer be fetched.
            if not isinstance(error, RuntimeError) or "exited unexpectedly" in str(error):
                if stop is not None and stop.signal:
                    return None  # SIGTERM reached the whole process group
                raise DataError(
                    "a worker process that reads images died: it was killed, or memory ran out; use workers=0, or a "
                    "container with more shared memory (--shm-size). The newest checkpoint is intact"
                ) from error
            if not str(error).startswith("DataLoader timed out"):
                raise
        now = time.monotonic()
        if stop is not None and stop.signal:
            signalled = signalled or now
            if now - signalled > GRACE:
                return None
        if now - began > MAX_WAIT:
            raise DataError(
                f"no batch came from the worker processes for {MAX_WAIT:g} seconds; use workers=0, or a container "
                f"with more shared memory (--shm-size; {SHARED_MEMORY} may be full). The newest checkpoint is intact"
            )


def _megabytes(size: int) -> str:
    return f"{-(-size // 1_000_000)} MB"
