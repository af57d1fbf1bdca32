"""Read published checkpoints: tensors by name, mapped from the file. Nothing in a file is ever executed.

Files of torch.save go through PyTorch's `weights_only` unpickler. It refuses OpenAI's CLIP, a TorchScript program: the
program's data is read with an unpickler of our own that knows tensors, dictionaries and nothing else, and its code is
ignored.
"""

from __future__ import annotations

import mmap
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from clipgen.errors import WeightsError
from clipgen.weights.tensor_file import find_problem, load_tensors

_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
        **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
        "Bool": torch.bool,
    }.items()
}
_WRAPPERS = ("model", "state_dict")  # where HFAiLab and Lightning keep the weights among training state
_FETCH_AGAIN = "fetch the file again from its publisher"


class Placeholder:
    """Stands in for a class that a checkpoint mentions; it has no behaviour."""


# Lightning's checkpoints use this class as a key in their training state; without it CompVis' VQGAN cannot be read.
_HARMLESS = [(Placeholder, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the weights in a published checkpoint, on the CPU, in their stored precision.

    Args:
        path: a file of `torch.save` or `torch.jit.save`, or .safetensors. It holds a state dict, or a dictionary with
            one under "model" or "state_dict".

    Returns:
        Tensors by name. Where the format allows it, their pages are read when they are first used.

    Raises:
        WeightsError: the file is something else, is damaged, or would execute code when unpickled.
    """
    if problem := find_problem(path):
        raise WeightsError(f"{path} cannot be read: it {problem}")
    try:
        content = _read(path)
    except WeightsError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise WeightsError(f"{path} cannot be read: {_reason(error)}; {_FETCH_AGAIN}") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds no weights but {type(content).__name__}; {_FETCH_AGAIN}")
    for name, tensor in content.items():
        _check(path, name, tensor)
    return {name: tensor.detach() for name, tensor in content.items()}


def _read(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return _read_torchscript(path, archive)
        return _load(path, mapped=True)
    with path.open("rb") as file:
        start = file.read(9)
    return load_tensors(path) if start[8:] == b"{" else _load(path, mapped=False)


def _load(path: Path, mapped: bool) -> Any:
    with warnings.catch_warnings(), torch.serialization.safe_globals(cast(list[Any], _HARMLESS)):
        warnings.simplefilter("ignore")  # about pickle protocols, which the user cannot change
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    refused = re.search(r"GLOBAL (\S+) (?:was not|whose)", text)
    if isinstance(error, pickle.UnpicklingError) and refused:
        return f"it asks for {refused[1]}, which no weights need; nothing of it was run"
    if text.startswith("Weights only load failed"):  # PyTorch's advice, not to be followed, then the reason
        text = text.split("\n\n")[-2:][0].strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def _check(path: Path, name: object, tensor: object) -> None:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        raise WeightsError(
            f"{path} holds something that is not a tensor: {str(name)[:80]!r} is a {kind}; {_FETCH_AGAIN}"
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise WeightsError(f"{path}: {name[:80]!r} is stored as a {tensor.layout} tensor; save it as a plain one")
    if tensor.nbytes > tensor.untyped_storage().nbytes():  # a stride of 0 turns one number into terabytes
        raise WeightsError(f"{path}: {name[:80]!r} claims more numbers than the file holds; {_FETCH_AGAIN}")


def _read_torchscript(path: Path, archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Read all tensors of the modules in a TorchScript archive, named as in a state dict."""
    (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
    prefix = name.removesuffix(".pkl")
    with path.open("rb") as file, archive.open(name) as pickled:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        records = {info.filename: _record(file, info) for info in archive.infolist()}
        root = _Unpickler(cast(BinaryIO, pickled), prefix, records, pages).load()
    return _tensors_of(root)


def _record(file: BinaryIO, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Offset and length of an uncompressed entry of a ZIP archive; (0, 0) if it is compressed."""
    if info.compress_type != zipfile.ZIP_STORED:
        return 0, 0
    file.seek(info.header_offset + 26)  # in the local header, whose fields may be padded to align the data
    name, extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + name + extra, info.file_size


class _Object(dict):
    """A module of the program: its attributes without its behaviour."""

    __setstate__ = dict.update


class _Unpickler(pickle.Unpickler):
    """Builds tensors over the pages of a file and refuses everything else that a pickle asks for."""

    def __init__(
        self, pickled: BinaryIO, prefix: str, records: Mapping[str, tuple[int, int]], pages: mmap.mmap
    ) -> None:
        super().__init__(pickled)
        self.prefix, self.records, self.pages = prefix, records, pages

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a GLOBAL; classes are created anew each time, so that no pickle can alter them for others."""
        if module.split(".")[0] == "__torch__":
            return type("Module", (_Object,), {})
        if module == "torch" and name in _STORAGES:
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return type("Ordered", (OrderedDict,), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if module == "torch.jit._pickle":  # lists with the type of their items
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not expected")

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the one-dimensional storage that ("storage", type, entry, device, count) names."""
        _, kind, entry, _, count = pid
        dtype = _STORAGES[kind]
        start, length = self.records[f"{self.prefix}/{entry}"]
        if count * dtype.itemsize > length or count < 0:
            raise ValueError(f"entry {entry} should hold {count} numbers and has {length} bytes")
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.pages, dtype=dtype, count=count, offset=start)


def _tensors_of(root: object) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen: set[int] = set()  # a module that contains itself would otherwise be an endless loop
    pending: list[tuple[str, object]] = [("", root)]
    while pending:
        prefix, value = pending.pop()
        if isinstance(value, _Object) and id(value) not in seen:
            seen.add(id(value))
            pending.extend((f"{prefix}.{key}" if prefix else str(key), child) for key, child in value.items())
        elif isinstance(value, Tensor):
            found[prefix] = value
    return found
