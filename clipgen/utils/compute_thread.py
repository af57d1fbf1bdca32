"""One thread that does all the tensor work of a pipeline.

PyTorch's OpenMP threads belong to the thread that calls it. A second set on the same cores makes OpenMP put threads to
sleep at every operation: a step of the mini model for one image takes 6.7 ms instead of 3.0. On a GPU, one thread also
means that nothing else touches the device while a CUDA graph is being captured.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar

import torch

from clipgen.utils.cpu import thread_count
from clipgen.utils.text import first_line

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)


class ComputeThread:
    """A single thread that runs work in order of submission, in inference mode.

    It uses as many PyTorch threads as its creator does (`torch.set_num_threads` only affects the calling thread), or
    fewer under a CPU quota, or CLIPGEN_THREADS.

    Raises:
        ConfigError: CLIPGEN_THREADS is no number of threads.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "clipgen", torch.set_num_threads, (thread_count(torch.get_num_threads()),))
        self._thread = self._pool.submit(threading.current_thread).result()
        self._device_error: BaseException | None = None

    def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `work` in the caller's context and wait for it; its exceptions are raised here.

        On the compute thread itself this is a plain call. Interrupting the waiting caller does not stop `work`.
        """
        if threading.current_thread() is self._thread:
            return work(*args, **kwargs)
        return self._pool.submit(copy_context().run, self._infer, lambda: work(*args, **kwargs)).result()

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Queue `work` behind everything submitted so far and return at once; may be called from the thread itself."""
        return self._pool.submit(self._infer, work)

    @property
    def is_healthy(self) -> bool:
        """Whether the thread is alive and its device still answers after an error."""
        return self._thread.is_alive() and self._device_error is None

    def _infer(self, work: Callable[[], R]) -> R:
        try:
            with torch.inference_mode():
                return work()
        except RuntimeError as error:
            self.check_device(error)
            raise

    def check_device(self, error: BaseException) -> None:
        """Find out whether `error` left the CUDA context unusable; after such an error every later call fails too."""
        if self._device_error is not None or "CUDA error" not in str(error):
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as still:
            log.error("the GPU no longer answers (%s); restart the process", first_line(still))
            self._device_error = error


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on a GPU; does nothing on a CPU. Call it on the compute thread only."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
