"""Networks made for their names and shapes: no memory, no numbers, and none of PyTorch's compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def meta_init() -> Iterator[None]:
    """Networks made in here are on the meta device: their tensors have shapes and types only."""
    with torch.device("meta"), _NoValues():
        yield


class _NoValues(TorchFunctionMode):
    """Leaves out what would give tensors their first values.

    On the meta device that changes nothing, but to find out PyTorch imports its compiler, which takes several times as
    long as all else about loading the mini model.
    """

    def __torch_function__(
        self, func: Callable, types: object, args: Sequence = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.div, Tensor.mul, Tensor.triu_) or getattr(func, "__module__", "") == nn.init.__name__:
            return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)
