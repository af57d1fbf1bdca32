"""The choice of a device: requested, or the best of this machine."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from clipgen.errors import RequestError
from clipgen.weights.precision import pick_device, pick_precision


def fail_to_start() -> None:
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nSecond line")


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail_to_start)


@pytest.mark.usefixtures("no_cuda")
def test_gpu_that_cuda_cannot_start_falls_back_to_the_cpu_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "nvidia0"
    node.touch()
    monkeypatch.setattr("clipgen.weights.precision.GPU_NODE", node)
    with pytest.warns(
        UserWarning, match=r"using the CPU: there is an NVIDIA GPU .*too old .found version 12040"
    ) as found:
        assert pick_device(None) == torch.device("cpu")
    assert "Second line" not in str(found[0].message)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("asked", ["cpu", None])
def test_cpu_that_is_requested_or_the_only_device_gives_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None
) -> None:
    node = tmp_path / "nvidia0"
    if asked:
        node.touch()
    monkeypatch.setattr("clipgen.weights.precision.GPU_NODE", node)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick_device(asked) == torch.device("cpu")


def test_int8_on_a_gpu_is_refused_with_a_faster_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RequestError, match="dtype is 'int8', which is slower than float16 on a GPU; use float16"):
        pick_precision("int8", torch.device("cuda"))
    assert pick_precision(None, torch.device("cuda")).name == "float16"


@pytest.mark.parametrize("device", ["meta", "hpu", "nonsense"])
def test_device_that_cannot_compute_is_refused(device: str) -> None:
    with pytest.raises(RequestError, match=f"device is '{device}', which cannot be used here"):
        pick_device(device)
