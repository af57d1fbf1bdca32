"""Device and precision of the models: as requested, or chosen for the machine."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from clipgen.config import GPTConfig
from clipgen.errors import RequestError
from clipgen.models.capabilities import cpu_dtypes, has_bfloat16
from clipgen.models.gpt import GPT
from clipgen.utils.text import first_line
from clipgen.weights.model_dir import build_module

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions that a model runs in, by the names that users give them."""
PRECISIONS = (*DTYPES, "int8")
GPU_NODE = Path("/dev/nvidia0")
"""The first NVIDIA GPU, where its kernel driver is loaded."""


@dataclass(frozen=True)
class Precision:
    """Number formats: `name` for the GPT's large weights, `compute` for CLIP, the VQGAN and the cache."""

    name: str
    compute: torch.dtype

    def build_gpt(self, config: GPTConfig, weights: Mapping[str, Tensor], device: torch.device) -> GPT:
        """The GPT in this precision, ready for decoding.

        Raises:
            WeightsError: missing, unexpected or wrongly shaped weights.
        """
        if DTYPES.get(self.name) == self.compute:
            return build_module(GPT, config, weights, device, self.compute).prepack()
        # Rounded from float16, whatever precision the weights are stored in.
        gpt = build_module(GPT, config, weights, device, torch.float16)
        return gpt.quantise(cast(Literal["int8", "float16"], self.name), self.compute)


def pick_device(device: str | None) -> torch.device:
    """The requested device, else a usable GPU, else the CPU, with a warning if there is an unusable GPU.

    Raises:
        RequestError: the device cannot be used here.
    """
    if device is None and torch.cuda.is_available():
        return torch.device("cuda")
    if device is None:
        if problem := explain_unusable_gpu():
            warnings.warn(f"using the CPU: {problem}", stacklevel=2)
        return torch.device("cpu")
    try:
        torch.empty(1, device=device).item()  # a meta device has no values
        return torch.device(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = first_line(error)
        raise RequestError("device", f"is {device!r}, which cannot be used here ({reason}); try cpu") from error


def explain_unusable_gpu() -> str:
    """Why CUDA does not start although this machine has an NVIDIA GPU, and what to do; "" if it starts or has none.

    PyTorch then silently falls back to the CPU. Usually the driver is too old: CUDA 13, which PyPI's PyTorch is built
    for, needs 580 or newer.
    """
    if not GPU_NODE.exists() or torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
        reason = "CUDA finds no device"
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
    return (
        f"there is an NVIDIA GPU ({GPU_NODE}), but PyTorch {torch.__version__} cannot use it ({reason}); update the "
        "driver, to 580 or newer for CUDA 13, or install PyTorch built for an older CUDA, "
        "as pytorch.org describes"
    )


def pick_precision(name: str | None, device: torch.device) -> Precision:
    """The requested precision, or the fastest safe one.

    That is bfloat16 if the hardware supports it (GPUs from Ampere on, CPUs with AVX512-BF16 or AMX), else float16 on
    CUDA and CPUs, float32 on other devices. On CPUs, which lack float16 arithmetic, only the GPT's large weights become
    float16, or int8; everything else is bfloat16 if the CPU supports it, else float32.

    Raises:
        RequestError: an unknown name, or a precision that this device cannot or should not compute in.
    """
    if name is not None and name not in PRECISIONS:
        raise RequestError("dtype", f"is {name!r}; use one of {', '.join(PRECISIONS)}")
    compute = _fastest(device)
    if device.type != "cpu":
        name = name or str(compute).removeprefix("torch.")
        if name == "int8":  # PyTorch's CUDA kernel has one thread per output and reads weights uncoalesced
            raise RequestError("dtype", "is 'int8', which is slower than float16 on a GPU; use float16 or bfloat16")
        return Precision(name, DTYPES[name])
    possible = cpu_dtypes()
    name = name or possible[0]
    if name not in possible:
        raise RequestError("dtype", f"is {name!r}, which this CPU cannot compute in; use one of {', '.join(possible)}")
    return Precision(name, compute if name in ("float16", "int8") else DTYPES[name])


def _fastest(device: torch.device) -> torch.dtype:
    """The fastest safe arithmetic of a device."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.bfloat16 if device.type == "cpu" and has_bfloat16() else torch.float32
