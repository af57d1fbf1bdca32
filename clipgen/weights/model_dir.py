"""Folders of weights: written in one piece, verified before use, loaded strictly.

FOLDER/config.yaml                        the model (`config.ModelConfig`)
       {clip,vqgan,gpt}.safetensors       its tensors; nothing is ever unpickled
       coverage.safetensors               optional: what the model was trained on (`coverage`)
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipgen.config import ModelConfig, load_model_config
from clipgen.errors import ConfigError, WeightsError
from clipgen.models.meta_init import meta_init
from clipgen.utils.files import sha256

PARTS = ("clip", "vqgan", "gpt")
FILES = ("config.yaml", *(f"{part}.safetensors" for part in PARTS))
EXTRAS = ("coverage.safetensors",)
"""Files that a folder may have besides; drawing works without, but not the same."""
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions that a model runs in, by the names that users give them."""
VERSION = 1

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)


def save_weights(
    folder: str | Path,
    config: ModelConfig,
    parts: Mapping[str, Mapping[str, Tensor]],
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a folder of weights that `load_weights` accepts; other files in it stay.

    Every file is complete before any takes its place, and the manifest comes last: a folder whose writing was
    interrupted is refused, never half-loaded.

    Args:
        folder: made when it does not exist.
        config: the model.
        parts: the state dicts of "clip", "vqgan" and "gpt".
        dtype: what floating-point tensors are stored as; None keeps theirs.

    Returns:
        The folder.

    Raises:
        WeightsError: a part is missing or unknown, or a tensor holds NaN or infinity (or would, in `dtype`).
    """
    if set(parts) != set(PARTS):
        raise WeightsError(f"the parts are {_names(parts)}; give exactly {_names(PARTS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        temporary = Path(name)
        OmegaConf.save(OmegaConf.structured(config), temporary / "config.yaml")
        for part, weights in parts.items():
            stored = {key: _storable(part, key, tensor, dtype) for key, tensor in weights.items()}
            save_file(stored, temporary / f"{part}.safetensors")
            # safetensors lets nobody but the owner read; a server often runs as someone else.
            shutil.copymode(temporary / "config.yaml", temporary / f"{part}.safetensors")
        files = {file: _fingerprint(temporary / file) for file in FILES}
        manifest = json.dumps({"version": VERSION, "files": files}, indent=2)
        (temporary / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
        for file in (*FILES, MANIFEST):
            os.replace(temporary / file, folder / file)
    return folder


def _storable(part: str, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.to(dtype or tensor.dtype)
        if not tensor.isfinite().all():
            raise WeightsError(f"{part}: {name} holds NaN or infinity as {tensor.dtype}; nothing was saved")
    return tensor.contiguous()


def load_weights(folder: str | Path) -> tuple[ModelConfig, dict[str, dict[str, Tensor]]]:
    """Verify a folder of weights against its manifest and map its tensors into memory.

    Returns:
        The model's configuration, and the state dicts "clip", "vqgan" and "gpt" as stored. Their pages are read from
        the files when they are first used.

    Raises:
        WeightsError: a file is missing, is not what the manifest says, or does not fit the others.
    """
    folder = Path(folder)
    _verify(folder)
    try:
        config = load_model_config(folder / "config.yaml")
    except ConfigError as error:
        raise WeightsError(str(error)) from error
    parts = {part: _map(folder / f"{part}.safetensors") for part in PARTS}
    projection = parts["clip"].get("text_projection")
    if projection is None or projection.shape[-1] != config.gpt.n_cond:
        found = "no text_projection" if projection is None else f"embeddings of {projection.shape[-1]} numbers"
        raise WeightsError(
            f"{folder / 'clip.safetensors'} has {found}, but gpt.n_cond in config.yaml is {config.gpt.n_cond}; "
            "use the CLIP that the GPT was trained with"
        )
    return config, parts


def _verify(folder: Path) -> None:
    """Compare every file with the manifest: sizes of all of them first, which costs nothing."""
    if not folder.is_dir():
        raise WeightsError(f"no weights in {folder}: no such folder; give one that holds {_names((*FILES, MANIFEST))}")
    manifest = read_manifest(folder / MANIFEST)
    for file in FILES:
        path = folder / file
        if not path.is_file():
            raise WeightsError(f"{path} is missing; {_FETCH_AGAIN}")
        if path.stat().st_size != manifest[file]["size"]:
            raise WeightsError(
                f"{path} has {path.stat().st_size:,} bytes; {manifest[file]['size']:,} were expected. It is "
                f"incomplete or another file; {_FETCH_AGAIN}"
            )
    for file in FILES:
        found = _fingerprint(folder / file)["sha256"]
        if found != manifest[file]["sha256"]:
            raise WeightsError(
                f"{folder / file} is damaged or was changed: its SHA-256 is {found}, {MANIFEST} says "
                f"{manifest[file]['sha256']}; {_FETCH_AGAIN}"
            )


_FETCH_AGAIN = "fetch the folder again (`git checkout` restores what ships with the code)"


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each of `FILES`, and of those of `EXTRAS` that are there, as a manifest has them.

    Raises:
        WeightsError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is missing; {_FETCH_AGAIN}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, files = manifest["version"], manifest["files"]
        named = (*FILES, *(file for file in EXTRAS if file in files))
        entries = {file: {"size": int(files[file]["size"]), "sha256": str(files[file]["sha256"])} for file in named}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(
            f'{path} is no manifest of weights: it must be JSON with "version" and "files", and in those a "size" and '
            f'a "sha256" for each of {_names(FILES)}; {_FETCH_AGAIN}'
        ) from error
    if version != VERSION:
        raise WeightsError(f"{path} has the version {version!r}; this clipgen reads version {VERSION}: upgrade it")
    return entries


def add_extra(folder: str | Path, file: str, tensors: Mapping[str, Tensor]) -> Path:
    """Write one of `EXTRAS` into a folder of weights, and into its manifest; `save_weights` makes it forgotten again.

    Returns:
        Its path.

    Raises:
        WeightsError: the folder has no manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder / MANIFEST)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        temporary = Path(name)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / file)
        shutil.copymode(folder / MANIFEST, temporary / file)
        text = json.dumps({"version": VERSION, "files": manifest | {file: _fingerprint(temporary / file)}}, indent=2)
        (temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")
        os.replace(temporary / file, folder / file)
        os.replace(temporary / MANIFEST, folder / MANIFEST)
    return folder / file


def load_extra(folder: str | Path, file: str) -> dict[str, Tensor] | None:
    """The tensors of one of `EXTRAS`; None when the folder's manifest does not name it.

    Raises:
        WeightsError: it is missing, or not what the manifest says.
    """
    folder = Path(folder)
    expected = read_manifest(folder / MANIFEST).get(file)
    if expected is None:
        return None
    if not (folder / file).is_file():
        raise WeightsError(f"{folder / file} is missing; {_FETCH_AGAIN}")
    if _fingerprint(folder / file) != expected:
        raise WeightsError(f"{folder / file} is damaged or was changed: {MANIFEST} has another SHA-256; {_FETCH_AGAIN}")
    return _map(folder / file)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _map(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is no safetensors file ({error}); {_FETCH_AGAIN}") from error


def build(
    kind: Callable[[Config], Model],
    config: Config,
    weights: Mapping[str, Tensor],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Make a network out of weights, such as `build(VQGAN, config.vqgan, parts["vqgan"])`.

    It is constructed as a skeleton and takes the tensors as its own, so nothing is initialised in vain and
    no weight is held twice.

    Args:
        kind: the network's class.
        config: what `kind` is called with.
        weights: all of its state dict and nothing else.
        device: where it will run.
        dtype: what its floating-point tensors become.

    Returns:
        The network, frozen and in eval mode.

    Raises:
        WeightsError: missing, unexpected or wrongly shaped weights.
    """
    with meta_init():
        model = kind(config)
    check_fit(
        {name: tuple(value.shape) for name, value in model.state_dict().items()},
        weights,
        getattr(kind, "__name__", repr(kind)),
    )
    placed = {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in weights.items()
    }
    model.load_state_dict(placed, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def check_fit(expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], model: str) -> None:
    """Compare the names and shapes of weights with those that a model has.

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


_USE_ITS_CONFIG = "Use the configuration that the weights were trained with"


def _names(names: Iterable[str], shown: int = 6) -> str:
    listed = list(names)
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" if len(listed) > shown else "")
