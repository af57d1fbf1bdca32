"""How the images of a step are shared: among processes, among micro-batches, between training and validation."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from accelerate import Accelerator
from torch import Tensor

from clipgen.errors import ConfigError
from clipgen.models.capabilities import cpu_dtypes
from clipgen.utils.cpu import thread_count
from clipgen.utils.distributed import Processes
from train.config import TrainConfig


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate with the configured precision, over as many processes as `torchrun` started. Seeds torch.

    Raises:
        ConfigError: the batch cannot be split equally, the precision is not possible here, or torchrun's variables or
            CLIPGEN_THREADS are wrong.
    """
    processes = Processes.from_environment()
    processes.check_address()
    check_batch_split(config, processes.count)  # before they meet: each refuses by itself, and none waits for another
    torch.set_num_threads(thread_count(torch.get_num_threads()))
    # Unless told so, Accelerate does not join other processes on a CPU.
    accelerator = Accelerator(mixed_precision=choose_precision(config), cpu=not torch.accelerator.is_available())
    torch.manual_seed(config.seed)  # the same initial weights everywhere
    return accelerator


def choose_precision(config: TrainConfig) -> str:
    """The configured precision, or where bf16 is only emulated: fp16 on GPUs (before Ampere, as the T4), no on CPUs.

    Raises:
        ConfigError: fp16 is asked for on a CPU, or is needed here and this training cannot use it.
    """
    has_gpu = torch.accelerator.is_available()
    if config.precision == "fp16" and not has_gpu:
        raise ConfigError("precision=fp16 needs a GPU, and there is none; use bf16 or no")
    if config.precision != "bf16":
        return config.precision
    if not has_gpu and "bfloat16" not in cpu_dtypes():  # a convolution takes 200 times as long as in float32
        print("this CPU only emulates bf16, so training uses precision=no", file=sys.stderr, flush=True)
        return "no"
    if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    gpu = torch.cuda.get_device_name()
    try:
        replace(config, precision="fp16")  # checks the combination with the other settings
    except ConfigError as error:
        raise ConfigError(f"precision is bf16, which {gpu} only emulates; use no, or fp16, but {error}") from error
    print(f"{gpu} only emulates bf16, so training uses precision=fp16", file=sys.stderr, flush=True)
    return "fp16"


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device, if it is not there, without waiting for it."""
    if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()  # copies from pageable memory wait
    return x.to(device, non_blocking=True)


def check_batch_split(config: TrainConfig, processes: int) -> None:
    """Check that a batch splits into equal parts.

    Raises:
        ConfigError: it does not.
    """
    if config.batch_size % processes:
        raise ConfigError(
            f"batch_size is {config.batch_size}, for all processes together; "
            f"it must be a multiple of their number, {processes}"
        )
    if config.batch_size % (processes * config.accumulate):
        raise ConfigError(
            f"accumulate is {config.accumulate}; it must divide the {config.batch_size // processes} images that "
            f"each process has of a batch of {config.batch_size}"
        )


def step_generator(config: TrainConfig, step: int) -> torch.Generator:
    """Random numbers of one step, the same in all processes: each draws for the whole batch and uses its own rows."""
    return torch.Generator().manual_seed(config.seed * 1_000_003 + step)


def process_rows(accelerator: Accelerator, batch_size: int) -> slice:
    """The rows of a batch that belong to this process."""
    size = batch_size // accelerator.num_processes
    return slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)


def micro_batches(accelerator: Accelerator, model: nn.Module, parts: Sequence[Any]) -> Iterator[Any]:
    """Yield the micro-batches of a step; gradients are exchanged between processes after the last one only.

    Those of a sharded model are exchanged after each: kept whole, they would take the memory that sharding saves.
    """
    for part in parts[:-1]:
        with accelerator.no_sync(model):
            yield part
    yield parts[-1]


def mean_scalars(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each scalar over the micro-batches of a step."""
    return {name: torch.stack([row[name].float() for row in rows]).mean() for name in rows[0]}


def split_held_out(count: int, max_held_out: int) -> tuple[Tensor, Tensor]:
    """Split image numbers 0 to count - 1 into those to train on and those to validate with.

    Args:
        count: number of images.
        max_held_out: how many to hold out at most, evenly spread and never more than a twentieth; 0 holds out none
            and validates with up to 64 training images.
    """
    rows = torch.arange(count)
    if not max_held_out or count < 2:
        return rows, torch.linspace(0, count - 1, min(64, count)).long()
    held_out = torch.linspace(0, count - 1, max(1, min(max_held_out, count // 20))).long()
    return rows[~torch.isin(rows, held_out)], held_out
