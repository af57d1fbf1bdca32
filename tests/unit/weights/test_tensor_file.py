"""Files given where .safetensors is expected: read, or named with the remedy."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from clipgen.config import GPTConfig
from clipgen.errors import WeightsError
from clipgen.weights import tensor_file
from clipgen.weights.tensor_file import TensorInfo, find_problem, load_tensors, read_header, write_tensors
from train.encode import load_clip
from train.loop.optimization import load_model_weights

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 36841586\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A .safetensors file with two tensors."""
    save_file(
        {"a": torch.arange(600.0).reshape(20, 30), "b": torch.ones(3, dtype=torch.half)}, tmp_path / "w.safetensors"
    )
    return tmp_path / "w.safetensors"


def refused(path: Path) -> str:
    """Message of both readers, which must be the same."""
    messages = set()
    for read in (load_tensors, read_header):
        with pytest.raises(WeightsError) as caught:
            read(path)
        messages.add(str(caught.value))
    (message,) = messages
    assert message.startswith(f"{path} ") and "\n" not in message
    return message


def test_tensors_and_header_of_an_intact_file(file: Path) -> None:
    assert load_tensors(file)["a"][19, 29] == 599
    assert read_header(file) == {"a": TensorInfo((20, 30), "F32"), "b": TensorInfo((3,), "F16")}


@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_checkpoint_is_named_with_the_command_that_converts_it(tmp_path: Path, legacy: bool) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "clip.pt", _use_new_zipfile_serialization=not legacy)
    assert "is a PyTorch checkpoint; convert it to .safetensors with `clipgen weights convert`" in refused(
        tmp_path / "clip.pt"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (LFS, "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page, not the file itself"),
        (b"\n<html>404</html>", "is a web page"),
        (b"", "is empty; fetch the file again"),
        (b"GGUF" + bytes(100), "is not a .safetensors file ("),
        (bytes(8) + b"{", "is not a .safetensors file ("),
        (struct.pack("<Q", 2) + b"[]", "is not a .safetensors file ("),
        (struct.pack("<Q", 10**17) + b"{}", "is not a .safetensors file ("),
        (struct.pack("<Q", 8) + b'{"a": 1}', "is not a .safetensors file ("),
    ],
)
def test_file_of_another_kind_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    assert problem in refused(tmp_path / "w.safetensors")


@pytest.mark.parametrize("kept", [9, 50, 0.5, -1])
def test_truncated_file_is_refused_with_the_missing_bytes(file: Path, kept: float) -> None:
    data = file.read_bytes()
    length = int(len(data) * kept) if isinstance(kept, float) else kept % len(data)
    file.write_bytes(data[:length])
    message = refused(file)
    assert "is cut off" in message and f"{length:,}" in message and "fetch the file again" in message
    assert f"of {len(data):,} bytes" in message or "within its header" in message


def test_folder_is_named_with_a_file_in_it(file: Path) -> None:
    assert refused(file.parent) == f"{file.parent} is a folder; name a file, such as {file}"
    (file.parent / "empty").mkdir()
    assert refused(file.parent / "empty").endswith("is a folder; name a file")


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "gone.safetensors").endswith("does not exist")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file_is_named(file: Path) -> None:
    file.chmod(0)
    assert refused(file).endswith("cannot be read: Permission denied")


def test_offsets_beyond_the_file_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**15]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(tmp_path / "w.safetensors")


def test_header_whose_length_looks_like_a_web_page_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for length in (0x3C20, 0x3C0A):  # " <" and a line break before "<"
        entry = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        path.write_bytes(struct.pack("<Q", length) + entry.ljust(length) + bytes(4))
        assert find_problem(path) is None and load_tensors(path)["a"].tolist() == [0.0]


def test_endless_offsets_are_refused(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}'
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(tmp_path / "w.safetensors")


def test_tensors_that_share_storage_are_written(tmp_path: Path) -> None:
    table = torch.arange(6.0).view(2, 3)
    write_tensors(tmp_path / "w.safetensors", {"a": table, "b": table, "c": table[1]})
    found = load_tensors(tmp_path / "w.safetensors")
    assert found["a"].equal(table) and found["b"].equal(table) and found["c"].equal(table[1])


def test_full_disk_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(OSError, match=r"w\.safetensors cannot be written: .*No space left"):
        write_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(1)})


@pytest.mark.parametrize("content", [LFS, b"", b"PK\x03\x04 a checkpoint", b"<html>"])
def test_training_names_a_wrong_file_as_the_library_does(tmp_path: Path, content: bytes) -> None:
    """The weights in --clip, --vqgan and init are read by the same function."""
    path = tmp_path / "clip.pt"
    path.write_bytes(content)
    expected = refused(path)
    for read in (lambda: load_clip(GPTConfig(), path), lambda: load_model_weights(torch.nn.Linear(1, 1), path)):
        with pytest.raises(WeightsError) as caught:
            read()
        assert str(caught.value) == expected
