"""Construct networks without memory, for their names and shapes, and without importing PyTorch's compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def meta_init() -> Iterator[None]:
    """Construct networks on the meta device: their tensors have shapes and dtypes, but no values."""
    with torch.device("meta"), _SkipInit():
        yield


class _SkipInit(TorchFunctionMode):
    """Skips the operations that initialise tensors.

    On the meta device they have no effect, but PyTorch imports its compiler for them, which takes several times as long
    as all other steps of loading the mini model.
    """

    def __torch_function__(
        self, func: Callable, types: object, args: Sequence = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.div, Tensor.mul, Tensor.triu_) or getattr(func, "__module__", "") == nn.init.__name__:
            return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)
