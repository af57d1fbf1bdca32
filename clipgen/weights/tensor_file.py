"""Read and write .safetensors files. Errors of reading name the file, what is wrong with it and the remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipgen.errors import WeightsError
from clipgen.utils.text import first_line

_FIRST_BYTES = (
    (b"version https://git-lfs.github.com", "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"<", "is a web page, not the file itself; fetch the file again"),
)
_PYTORCH = (b"PK\x03\x04", b"\x80")  # what torch.save writes: a ZIP archive, or before PyTorch 1.6 a pickle
_MAX_HEADER = 100_000_000  # bytes, the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in the header of a .safetensors file; `dtype` is the format's name, such as "F16"."""

    shape: tuple[int, ...]
    dtype: str


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a .safetensors file; their pages are read on first use.

    Raises:
        WeightsError: the file does not exist, is not a .safetensors file, or is cut off.
    """
    with _explained(Path(path)):
        return load_file(path)


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes in a .safetensors file, without reading the tensors.

    Raises:
        WeightsError: as `load_tensors`.
    """
    with _explained(Path(path)), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return {name: TensorInfo(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a .safetensors file that others may read, as far as the umask allows.

    safetensors itself makes files that only their owner can read, and refuses tensors that share their storage.

    Raises:
        OSError: it cannot be written.
    """
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.contiguous()
        storage = own.untyped_storage().data_ptr()
        stored[name] = own.clone() if storage in storages else own
        storages.add(storage)
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(stored, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {first_line(error)}") from error
    path.chmod(mode)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        reason = first_line(error)[:200]
        problem = find_problem(path) or _find_safetensors_problem(path) or f"is not a .safetensors file ({reason})"
        raise WeightsError(f"{path} {problem}") from error


def find_problem(path: Path) -> str | None:
    """The reason why `path` cannot be a file of weights in any format, with the remedy; None if none is found."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        return f"is a folder; name a file{f', such as {files[0]}' if files else ''}"
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not start:
        return "is empty; fetch the file again"
    if start[8:9] == b"{":  # a .safetensors file, whatever the bytes of its header's length look like
        return None
    return next((problem for first, problem in _FIRST_BYTES if start.lstrip().startswith(first)), None)


def _find_safetensors_problem(path: Path) -> str | None:
    """Check the format: 8 bytes with the header's length, the header in JSON, tensors at the offsets it states."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        if start.startswith(_PYTORCH) and start[8:] != b"{":
            return "is a PyTorch checkpoint; convert it to .safetensors with `clipgen weights convert`"
        length = int.from_bytes(start[:8], "little")
        if start[8:] != b"{" or length > _MAX_HEADER:
            return None
        file.seek(8)
        header = file.read(length)
    if len(header) < length:
        return f"is cut off within its header, at {size:,} bytes; fetch the file again"
    try:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return f"is cut off: it has {size:,} of {expected:,} bytes; fetch the file again" if size < expected else None
