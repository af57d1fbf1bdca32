"""The two floors of a decoding step on this machine: bytes to read and products to compute.

    python benchmarks/roofline.py [--json]

A step reads every weight and the cache once, and multiplies every weight with every row. It cannot be faster than
memory is read or matrices are multiplied, both measured here by PyTorch on all threads.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from end_to_end import describe_machine

from clipgen.config import GPTConfig
from clipgen.models.capabilities import has_bfloat16
from clipgen.utils.entry_point import entry_point

LARGE = 400_000_000
"""Bytes read at a time: several times any cache."""


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of a call on the CPU, after a warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Memory bandwidth, bytes/s: the sum of an array larger than any cache."""
    numbers = torch.ones(LARGE // 4)
    return LARGE / seconds(numbers.sum)


def matrix_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations per second of a square matrix product."""
    a, b = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / seconds(lambda: a @ b)


def step_bytes(config: GPTConfig, rows: int, weight_size: int, tokens: int, cache_size: int = 2) -> float:
    """Bytes that an average step reads: weights of `weight_size` bytes each and half of a cache with `cache_size`."""
    cache = rows * config.n_layer * 2 * config.n_embd * cache_size * (tokens + 1) / 2
    return matrix_weights(config) * weight_size + cache


def step_flops(config: GPTConfig, rows: int) -> float:
    """Floating-point operations of a step's products with weights."""
    return 2.0 * rows * matrix_weights(config)


def matrix_weights(config: GPTConfig) -> int:
    """Number of weights that every step multiplies with: all but embeddings."""
    return 12 * config.n_layer * config.n_embd**2 + config.n_embd * config.vocab_size


def floor_seconds(
    config: GPTConfig, rows: int, weight_size: int, tokens: int, machine: dict, cache_size: int = 2
) -> float:
    """Least seconds of `tokens` steps on a machine that `describe` measured: the larger of both floors."""
    read = step_bytes(config, rows, weight_size, tokens, cache_size) / machine["read_bytes_per_s"]
    compute = step_flops(config, rows) / (machine["bfloat16_flops"] or machine["float32_flops"])
    return tokens * max(read, compute)


def describe() -> dict:
    """Facts about this machine and its two rates. `read_bandwidth` varies when others share the bus."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        **describe_machine(),
        "read_bytes_per_s": read_bandwidth(),
        "float32_flops": matrix_rate(torch.float32),
        # Without the instructions PyTorch emulates bfloat16, and nothing runs at that rate.
        "bfloat16_flops": matrix_rate(torch.bfloat16) if has_bfloat16() else None,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def in_words(machine: dict) -> str:
    """Facts about a machine as one line of text."""
    bfloat16 = f", {machine['bfloat16_flops'] / 1e9:.0f} in bfloat16" if machine["bfloat16_flops"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['instruction_set']}, "
        f"torch {machine['torch']}, load {machine['load_average']}; "
        f"reads {machine['read_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"multiplies {machine['float32_flops'] / 1e9:.0f} GFLOP/s in float32{bfloat16}"
    )


def random_weights(module: nn.Module) -> nn.Module:
    """Fill a module from the meta device with small random numbers, its norms with 1, which is enough for timing."""
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.fill_(1)
        else:
            for part in parameter.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
    return module


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    machine = describe()
    print(json.dumps(machine) if args.json else in_words(machine))


if __name__ == "__main__":
    main()
