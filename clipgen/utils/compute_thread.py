"""One thread that does all the arithmetic of a pipeline, whoever asks for it.

PyTorch's own threads belong to the thread that calls it. A second set on the same cores makes OpenMP put waiting
threads to sleep at every operation: a step of the mini model for one picture takes 6.7 ms in place of 3.0.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class ComputeThread:
    """A thread; what is run by it runs one after the other, in inference mode.

    It has as many of PyTorch's threads as whoever makes it (`torch.set_num_threads` is for the calling thread alone).
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "clipgen", torch.set_num_threads, (torch.get_num_threads(),))
        self._thread = self._pool.submit(threading.get_ident).result()

    def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Have `work` done in the caller's context and wait for it; its exceptions are raised here.

        From the thread itself it is a plain call. A caller who is interrupted while waiting leaves `work` to its end.
        """
        if threading.get_ident() == self._thread:
            return work(*args, **kwargs)

        def infer() -> R:
            with torch.inference_mode():
                return work(*args, **kwargs)

        return self._pool.submit(copy_context().run, infer).result()
