"""Describe a model folder: parameters, memory by precision, and the GPUs it fits on, from the files' headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch

from clipgen.config import ModelConfig, load_model_config
from clipgen.errors import WeightsError
from clipgen.utils.memory import HEADROOM, MAX_DECODE_BATCH, MAX_NUM_SEQS, pixel_bytes, token_bytes
from clipgen.weights.model_dir import PARTS
from clipgen.weights.precision import DTYPES
from clipgen.weights.tensor_file import read_header

GPUS = {"T4": 15.0, "RTX 3060": 12.0, "L4": 22.5, "A10G": 22.5, "A100 40GB": 39.5, "A100 80GB": 79.2, "H100": 79.6}
"""GiB that a program can use, which is less than the name says."""
CUDA_CONTEXT = 0.7
"""GiB that CUDA, its kernels and libraries take before the first tensor."""


def describe_model_dir(folder: str | Path) -> dict[str, Any]:
    """Describe what a model folder holds and what it takes to run it. No tensor is read.

    Returns:
        JSON-able: "name", "config" (all settings), "parts" (parameters, bytes, and parameters by stored dtype),
        "parameters", "memory" (by dtype, bytes: weights, tokens and pixels of one image, all for 64 candidates) and
        "gpus" (by dtype: the GPUs that can hold it, and how many candidates at a time).

    Raises:
        WeightsError: a file of tensors is missing or cannot be read.
        ConfigError: the same of the configuration, or it cannot work.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"no weights in {folder}: no such folder")
    config = load_model_config(folder / "config.yaml")
    parts = {part: _describe_file(folder / f"{part}.safetensors") for part in PARTS}
    parameters = sum(part["parameters"] for part in parts.values())
    memory = {name: _memory_needed(config, parameters, dtype) for name, dtype in DTYPES.items()}
    return {
        "name": config.name,
        "config": asdict(config),
        "parts": parts,
        "parameters": parameters,
        "memory": memory,
        "gpus": {name: _fitting_gpus(name, needed) for name, needed in memory.items()},
    }


def _describe_file(path: Path) -> dict[str, Any]:
    dtypes = Counter[str]()
    for tensor in read_header(path).values():
        dtypes[tensor.dtype] += prod(tensor.shape)
    return {"parameters": dtypes.total(), "bytes": path.stat().st_size, "dtypes": dict(dtypes)}


def _memory_needed(config: ModelConfig, parameters: int, dtype: torch.dtype) -> dict[str, int]:
    guided = config.sampling.guidance != 1
    tokens, pixels = token_bytes(config.gpt, dtype, guided), pixel_bytes(config.vqgan, dtype)
    weights = parameters * dtype.itemsize
    # On a CPU the cache is given back before the first image is decoded, so the two do not add up.
    peak = weights + max(MAX_NUM_SEQS * tokens, MAX_DECODE_BATCH * pixels)
    return {
        "weights": weights,
        "tokens_per_candidate": tokens,
        "pixels_per_picture": pixels,
        "with_64_candidates": peak,
    }


def _fitting_gpus(dtype: str, needed: Mapping[str, int]) -> list[str]:
    """GPUs that hold the weights and at least one image, planned as the engine does: half of the room is its cache."""
    fitting = []
    for gpu, size in GPUS.items():
        if dtype == "bfloat16" and gpu == "T4":
            continue  # Turing has no bfloat16 arithmetic
        free = (size - CUDA_CONTEXT) * 2**30 - needed["weights"]
        room = int(free * HEADROOM / 2)
        candidates = min(MAX_NUM_SEQS, room // needed["tokens_per_candidate"])
        if candidates >= 1 and room >= needed["pixels_per_picture"]:
            fitting.append(f"{gpu} ({candidates} candidates at a time)")
    return fitting
