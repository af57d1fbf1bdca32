"""Published checkpoints become a folder of weights; what a folder holds, and where it fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clipgen.config import ModelConfig, load_model_config, load_preset
from clipgen.errors import ConfigError, WeightsError
from clipgen.utils.memory import HEADROOM, MOST_PICTURES, MOST_ROWS, pixel_bytes, token_bytes
from clipgen.weights.cache import Settings, fetch
from clipgen.weights.catalog import CATALOG
from clipgen.weights.checkpoint_reader import read_tensors
from clipgen.weights.convert import map_clip, map_gpt, map_vqgan
from clipgen.weights.model_dir import DTYPES, MANIFEST, PARTS, save_weights

GPUS = {"T4": 15.0, "RTX 3060": 12.0, "L4": 22.5, "A10G": 22.5, "A100 40GB": 39.5, "A100 80GB": 79.2, "H100": 79.6}
"""GiB that a program finds on them, which is less than the name says."""
CONTEXT = 0.7
"""GiB that CUDA, its kernels and the libraries take before the first tensor."""


def convert_checkpoints(clip: Path, vqgan: Path, gpt: Path, out: Path, config: str = "coco") -> Path:
    """Write a folder of weights from published checkpoints; precision stays what it is in them.

    Nothing in the files is executed. `foreign.read_tensors` says which formats can be read, `convert` whose names.

    Args:
        clip: OpenAI's TorchScript archive, HFAiLab's state dict, or .safetensors under OpenAI's names.
        vqgan: HFAiLab's or CompVis' checkpoint, or .safetensors that stage 1 wrote.
        gpt: HFAiLab's checkpoint, or .safetensors that stage 2 wrote.
        out: made when it does not exist; it is complete when its manifest is there.
        config: the model they belong to: a name ("coco", "imagenet") or the path of a .yaml file.

    Returns:
        `out`.

    Raises:
        WeightsError: a file cannot be read, a tensor is missing, unknown or of another shape, or the three do not fit
            together. Nothing is written then.
    """
    try:
        model = load_preset(config)
    except ConfigError as error:
        raise WeightsError(str(error)) from error
    parts = convert_parts({"clip": clip, "vqgan": vqgan, "gpt": gpt}, model)
    width = parts["clip"]["text_projection"].shape[1]
    if width != model.gpt.n_cond:
        raise WeightsError(
            f"{clip} embeds in {width} dimensions, but gpt.n_cond of {config} is {model.gpt.n_cond}; "
            "use the CLIP that the GPT was trained with"
        )
    return save_weights(out, model, parts)


def convert_parts(paths: Mapping[str, Path], config: ModelConfig) -> dict[str, dict[str, Tensor]]:
    """Some of "clip", "vqgan" and "gpt", read from published checkpoints and under our names; nothing is written.

    Raises:
        WeightsError: a file cannot be read, or a tensor is missing, unknown or of another shape.
    """
    mapped: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
        "clip": map_clip,
        "vqgan": lambda tensors: map_vqgan(tensors, config.vqgan),
        "gpt": lambda tensors: map_gpt(tensors, config.gpt),
    }
    parts = {}
    for part, path in paths.items():
        tensors = read_tensors(path)
        try:
            parts[part] = mapped[part](tensors)
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from error
    return parts


def resolve_weights(weights: str | Path, log: Callable[[str], None]) -> Path:
    """The folder that a setting such as CLIPGEN_WEIGHTS means.

    Args:
        weights: a folder, which is returned as it is, or a whole model of the catalog ("coco"), which is fetched and
            converted into the cache unless that has happened before.
        say: told what takes long.

    Raises:
        DownloadError: a file cannot be had.
        WeightsError: what arrived cannot be converted.
    """
    entry = CATALOG.get(str(weights))
    if entry is None or entry.config is None or Path(weights).is_dir():
        return Path(weights)
    settings = Settings.from_environment()
    folder = settings.cache / "models" / entry.name
    if (folder / MANIFEST).is_file():
        return folder
    files = fetch(entry, settings, log=log)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{entry.name}.lock")):  # several containers may share a cache
        if not (folder / MANIFEST).is_file():
            log(f"converting {entry.name} into {folder}")
            convert_checkpoints(files["clip"], files["vqgan"], files["gpt"], folder, entry.config)
    return folder


def describe(folder: Path) -> dict[str, Any]:
    """What a folder of weights holds and what it takes to run it, from the files' headers; JSON-able.

    Returns:
        "name", "config" (all settings), "parts" (parameters, bytes and dtypes as stored, of each), "parameters",
        "memory" (per dtype, bytes: the weights, tokens and pixels of one picture, and all of it for 64 candidates)
        and "gpus" (per dtype: the GPUs it fits on, and how many candidates at a time).

    Raises:
        WeightsError: a file is missing or cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"no weights in {folder}: no such folder")
    try:
        config = load_model_config(folder / "config.yaml")
    except ConfigError as error:
        raise WeightsError(str(error)) from error
    parts = {part: _header(folder / f"{part}.safetensors") for part in PARTS}
    parameters = sum(part["parameters"] for part in parts.values())
    memory = {name: _memory(config, parameters, dtype) for name, dtype in DTYPES.items()}
    return {
        "name": config.name,
        "config": asdict(config),
        "parts": parts,
        "parameters": parameters,
        "memory": memory,
        "gpus": {name: _gpus(name, needs) for name, needs in memory.items()},
    }


def _header(path: Path) -> dict[str, Any]:
    """Parameters, bytes and dtypes of a file, without reading its tensors."""
    if not path.is_file():
        raise WeightsError(f"{path} is missing; fetch the folder again")
    try:
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 - no mapping
            dtypes = Counter[str]()
            for tensor in slices:
                dtypes[tensor.get_dtype()] += prod(tensor.get_shape())
    except SafetensorError as error:
        raise WeightsError(f"{path} is no safetensors file ({error}); fetch the folder again") from error
    return {"parameters": dtypes.total(), "bytes": path.stat().st_size, "dtypes": dict(dtypes)}


def _memory(config: ModelConfig, parameters: int, dtype: torch.dtype) -> dict[str, int]:
    guided = config.sampling.guidance != 1
    tokens, pixels = token_bytes(config.gpt, dtype, guided), pixel_bytes(config.vqgan, dtype)
    weights = parameters * dtype.itemsize
    # Tokens are done before the first pixel is decoded.
    peak = weights + max(MOST_ROWS * tokens, MOST_PICTURES * pixels)
    return {
        "weights": weights,
        "tokens_per_candidate": tokens,
        "pixels_per_picture": pixels,
        "with_64_candidates": peak,
    }


def _gpus(dtype: str, needs: Mapping[str, int]) -> list[str]:
    """The GPUs that hold the weights and at least one picture, as `pipeline` plans."""
    found = []
    for gpu, size in GPUS.items():
        if dtype == "bfloat16" and gpu == "T4":
            continue  # Turing has no arithmetic for it
        free = (size - CONTEXT) * 2**30 - needs["weights"]
        candidates = min(MOST_ROWS, int(free * HEADROOM) // needs["tokens_per_candidate"])
        if candidates >= 1 and free * HEADROOM >= needs["pixels_per_picture"]:
            found.append(f"{gpu} ({candidates} candidates at a time)")
    return found
