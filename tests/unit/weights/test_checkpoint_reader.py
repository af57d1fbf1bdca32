"""Damaged, hostile and foreign checkpoint files: refused, with nothing in them executed."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import Source

from clipgen.errors import WeightsError
from clipgen.weights.checkpoint_reader import read_tensors


class Touch:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("part", ["clip", "vqgan", "gpt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_pickle_is_refused_and_not_executed(hfailab: Source, tmp_path: Path, part: str, legacy: bool) -> None:
    trace = tmp_path / "was here"
    path: Path = getattr(hfailab, part)
    weights = torch.load(path)
    torch.save({"model": weights, "extra": Touch(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=rf"{path.name} cannot be read: it asks for \w+\.system, .* was run"):
        hfailab.convert(tmp_path / "out")
    assert not trace.exists() and not (tmp_path / "out").exists()
    with pytest.raises(pickle.UnpicklingError):  # the same file does attack whoever trusts it
        torch.load(path, weights_only=True)
    torch.load(path, weights_only=False)
    assert trace.exists()


def repacked(archive: Path, out: Path, change: Callable[[str, bytes], bytes], compression: int = 0) -> Path:
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w", compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return out


def test_hostile_torchscript_archive_is_refused_and_not_executed(torchscript: Path, tmp_path: Path) -> None:
    trace = tmp_path / "was here"

    def poison(name: str, content: bytes) -> bytes:
        return pickle.dumps(Touch(trace), protocol=2) if name.endswith("/data.pkl") else content

    with pytest.raises(WeightsError, match=r"it asks for \w+\.system, which no weights need"):
        read_tensors(repacked(torchscript, tmp_path / "evil.pt", poison))
    assert not trace.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__Nsb.",
        b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"ctorch\nload\n.",
        b"c__torch__\nX\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.",
        b"I1\n.",
        b"",
    ],
)
def test_archive_with_an_unexpected_pickle_is_refused(torchscript: Path, tmp_path: Path, opcodes: bytes) -> None:
    def poison(name: str, content: bytes) -> bytes:
        return opcodes if name.endswith("/data.pkl") else content

    with pytest.raises(WeightsError, match=r"odd\.pt"):
        read_tensors(repacked(torchscript, tmp_path / "odd.pt", poison))


def test_archive_with_short_or_compressed_storage_is_refused(torchscript: Path, tmp_path: Path) -> None:
    short = repacked(torchscript, tmp_path / "short.pt", lambda name, c: c[:-4] if name.endswith("/data/0") else c)
    with pytest.raises(WeightsError, match=r"short\.pt cannot be read: .* numbers and has \d+ bytes"):
        read_tensors(short)
    packed = repacked(torchscript, tmp_path / "packed.pt", lambda name, c: c, zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match=r"packed\.pt cannot be read"):
        read_tensors(packed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: [1, 2], "holds no weights but list"),
        (dict, "holds no weights but dict"),
        (lambda: torch.zeros(3), "holds no weights but Tensor"),
        (lambda: {"epoch": 3}, "'epoch' is a int"),
        (lambda: {"model": {"a": "b"}}, "'a' is a str"),
        (lambda: {"a": torch.zeros(1).expand(10**12)}, "claims more numbers than the file holds"),
        (lambda: {"a": torch.eye(3).to_sparse()}, "sparse"),
        (lambda: {"a": torch.zeros(2, device="meta")}, "plain one"),
    ],
)
def test_checkpoint_without_plain_tensors_is_refused(tmp_path: Path, content: Callable[[], Any], message: str) -> None:
    torch.save(content(), tmp_path / "odd.pt")
    with pytest.raises(WeightsError, match=message):
        read_tensors(tmp_path / "odd.pt")


@pytest.mark.parametrize("data", [b"", b"\x00" * 100, b"<html>404</html>", b"PK\x03\x04 cut off"])
def test_file_that_is_not_a_checkpoint_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "odd.pt").write_bytes(data)
    with pytest.raises(WeightsError, match=r"odd\.pt cannot be read: .*; fetch the file again") as caught:
        read_tensors(tmp_path / "odd.pt")
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_truncated_checkpoint_is_named(hfailab: Source, tmp_path: Path) -> None:
    data = hfailab.gpt.read_bytes()
    for length in (len(data) - 1, len(data) // 2, 100):
        (tmp_path / "short.pt").write_bytes(data[:length])
        with pytest.raises(WeightsError, match=r"short\.pt"):
            read_tensors(tmp_path / "short.pt")
