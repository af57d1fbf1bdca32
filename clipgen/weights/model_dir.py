"""Model folders: written completely or not at all, verified before use, loaded strictly.

FOLDER/config.yaml                        the model (`config.ModelConfig`)
       {clip,vqgan,gpt}.safetensors       its tensors; nothing is ever unpickled
       coverage.safetensors               optional: index of the training images (`training_index`)
       manifest.json                      size and SHA-256 of the files above
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from clipgen.config import ModelConfig, load_model_config
from clipgen.errors import OutputError, WeightsError
from clipgen.models.meta_init import meta_init
from clipgen.utils.files import sha256
from clipgen.weights.tensor_file import find_problem, load_tensors, write_tensors

PARTS = ("clip", "vqgan", "gpt")
FILES = ("config.yaml", *(f"{part}.safetensors" for part in PARTS))
EXTRAS = ("coverage.safetensors",)
"""Optional files; generation works without them."""
CARD = ("README.md", "samples.jpg")
"""The model card: copied along where it exists, not verified."""
MANIFEST = "manifest.json"
VERSION = 1
_FETCH_AGAIN = "fetch the folder again (`git checkout` restores what ships with the code)"
_USE_ITS_CONFIG = "Use the configuration that the weights were trained with"

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)


def save_model_dir(folder: str | Path, config: ModelConfig, parts: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write a model folder that `load_model_dir` accepts; other files in it stay.

    All files are complete before the first is renamed to its place, and the manifest comes last. So a folder whose
    writing was interrupted is refused, never loaded by halves.

    Raises:
        WeightsError: a part is missing or unknown, or a tensor holds NaN or infinity.
    """
    if set(parts) != set(PARTS):
        raise WeightsError(f"the parts are {_names(parts)}; give exactly {_names(PARTS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        temporary = Path(name)
        OmegaConf.save(OmegaConf.structured(config), temporary / "config.yaml")
        for part, weights in parts.items():
            stored = {key: _storable(part, key, tensor) for key, tensor in weights.items()}
            write_tensors(temporary / f"{part}.safetensors", stored)
        files = {file: fingerprint(temporary / file) for file in FILES}
        manifest = json.dumps({"version": VERSION, "files": files}, indent=2)
        (temporary / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
        for file in (*FILES, MANIFEST):
            os.replace(temporary / file, folder / file)
    return folder


def _storable(part: str, name: str, tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise WeightsError(f"{part}: {name} holds NaN or infinity as {tensor.dtype}; nothing was saved")
    return tensor


def load_model_dir(folder: str | Path) -> tuple[ModelConfig, dict[str, dict[str, Tensor]]]:
    """Verify a model folder against its manifest and map its tensors into memory.

    Returns:
        The model's configuration, and the state dicts "clip", "vqgan" and "gpt" as stored. Their pages are read from
        the files when they are first used.

    Raises:
        WeightsError: a file is missing, differs from the manifest, or does not fit the others.
        ConfigError: the folder's configuration cannot work.
    """
    folder = Path(folder)
    verify_model_dir(folder)
    config = load_model_config(folder / "config.yaml")
    parts = {part: load_tensors(folder / f"{part}.safetensors") for part in PARTS}
    projection = parts["clip"].get("text_projection")
    width = 0 if projection is None or not projection.ndim else projection.shape[-1]
    if not width or config.gpt.n_cond != width:
        found = f"embeddings of {width} numbers" if width else "no text_projection"
        raise WeightsError(
            f"{folder / 'clip.safetensors'} has {found}, but gpt.n_cond in config.yaml is {config.gpt.n_cond}; "
            "use the CLIP that the GPT was trained with"
        )
    return config, parts


def verify_model_dir(folder: Path) -> dict[str, dict[str, Any]]:
    """Compare the files of a model folder with its manifest: first all sizes, which is cheap, then all hashes.

    Returns the manifest.

    Raises:
        WeightsError: a file is missing or differs.
    """
    if not folder.is_dir():
        raise WeightsError(f"no weights in {folder}: no such folder; give one that holds {_names((*FILES, MANIFEST))}")
    manifest = _check_sizes(folder)
    for file, about in manifest.items():
        found, expected = sha256(folder / file), about["sha256"]
        if found != expected:
            raise WeightsError(
                f"{folder / file} is damaged or was changed: its SHA-256 is {found}, {MANIFEST} says {expected}; "
                f"{_FETCH_AGAIN}"
            )
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether a folder holds all files of a model, of the sizes in its manifest; their hashes are not compared."""
    try:
        return bool(_check_sizes(folder))
    except WeightsError:
        return False


def _check_sizes(folder: Path) -> dict[str, dict[str, Any]]:
    manifest = read_manifest(folder / MANIFEST)
    for file, about in manifest.items():
        path = folder / file
        if not path.is_file():
            raise WeightsError(f"{path} is missing; {_FETCH_AGAIN}")
        size, expected = path.stat().st_size, about["size"]
        if size != expected:
            problem = find_problem(path) or "is incomplete or another file"
            raise WeightsError(f"{path} has {size:,} bytes; {expected:,} were expected. It {problem}; {_FETCH_AGAIN}")
    return manifest


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Read "size" and "sha256" of each of `FILES`, and of those of `EXTRAS` that the manifest lists.

    Raises:
        WeightsError: there is no manifest, or it is damaged.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is missing; {_FETCH_AGAIN}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, files = manifest["version"], manifest["files"]
        named = (*FILES, *(file for file in EXTRAS if file in files))
        entries = {file: {"size": int(files[file]["size"]), "sha256": str(files[file]["sha256"])} for file in named}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise WeightsError(
            f'{path} is not a manifest of weights: it must be JSON with "version" and "files", and in "files" a '
            f'"size" and a "sha256" for each of {_names(FILES)}; {_FETCH_AGAIN}'
        ) from error
    if version != VERSION:
        raise WeightsError(f"{path} has the version {version!r}; this clipgen reads version {VERSION}: upgrade it")
    return entries


def copy_model_dir(source: Path, target: Path) -> Path:
    """Copy a verified model folder, with its model card if it has one; other files in `target` stay.

    Raises:
        WeightsError: a file of `source` is missing or differs from the manifest.
        OutputError: `target` cannot be written.
    """
    files = tuple(verify_model_dir(source))
    card = [file for file in CARD if (source / file).is_file()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        if source.resolve() == target.resolve():
            return target
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as name:
            for file in (*files, *card, MANIFEST):
                shutil.copyfile(source / file, Path(name) / file)
            for file in (*files, *card, MANIFEST):
                os.replace(Path(name) / file, target / file)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error
    return target


def fingerprint(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its "size" in bytes and its "sha256"."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def build_module(
    kind: Callable[[Config], Model],
    config: Config,
    weights: Mapping[str, Tensor],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Build a frozen network from its whole state dict, such as `build_module(VQGAN, config.vqgan, parts["vqgan"])`.

    The network is constructed without memory (`meta_init`) and takes over the given tensors, so nothing is
    initialised in vain and no weight is held twice.

    Raises:
        WeightsError: missing, unexpected or wrongly shaped weights.
    """
    part = getattr(kind, "__name__", repr(kind))
    with meta_init():
        model = kind(config)
    check_shapes(
        {name: tuple(value.shape) for name, value in model.state_dict().items()},
        weights,
        part,
    )
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not weights[name].is_floating_point():
            raise WeightsError(f"{part}: {name} holds {weights[name].dtype}; it must be floating-point")
    placed = {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in weights.items()
    }
    model.load_state_dict(placed, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def check_shapes(expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], model: str) -> None:
    """Compare names and shapes of weights with those a model expects.

    Raises:
        WeightsError: they differ; the message names `model` and the first few tensors.
    """
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or unexpected:
        kinds = (("missing", missing), ("unexpected", unexpected))
        found = "; ".join(f"{len(names)} {kind}: {_names(sorted(names))}" for kind, names in kinds if names)
        raise WeightsError(f"the {model}'s tensors do not fit. {found}. {_USE_ITS_CONFIG}")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            found = str(tuple(weights[name].shape))
            raise WeightsError(f"the {model}'s {name} has the shape {found}; {shape} was expected. {_USE_ITS_CONFIG}")


def _names(names: Iterable[str], shown: int = 6) -> str:
    listed = list(names)
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" if len(listed) > shown else "")
