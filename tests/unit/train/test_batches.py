"""Precision and the splitting of batches."""

from __future__ import annotations

import pytest

from clipgen.errors import ConfigError
from train.config import Stage1Config, Stage2Config
from train.loop.batches import choose_precision


@pytest.fixture
def t4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU from before Ampere."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "Tesla T4")


@pytest.mark.usefixtures("t4")
def test_gpu_that_emulates_bf16_trains_in_fp16_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_precision(Stage1Config()) == choose_precision(Stage2Config()) == "fp16"
    assert "Tesla T4 only emulates bf16, so training uses precision=fp16" in capsys.readouterr().err
    assert choose_precision(Stage1Config(precision="no")) == "no"
    assert choose_precision(Stage1Config(precision="fp16")) == "fp16"
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("t4")
@pytest.mark.parametrize("settings", [{"optimizer": "muon"}, {"parallel": "fsdp"}])
def test_training_that_cannot_use_fp16_is_refused_where_bf16_is_emulated(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="precision is bf16, which Tesla T4 only emulates; use no, or fp16, but "):
        choose_precision(Stage2Config(**settings))  # type: ignore[arg-type]


def test_gpu_with_bf16_trains_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    assert choose_precision(Stage2Config(optimizer="muon")) == "bf16"


@pytest.mark.parametrize(("dtypes", "precision"), [(["float32", "bfloat16"], "bf16"), (["float32"], "no")])
def test_cpu_trains_in_bf16_only_where_hardware_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtypes: list[str], precision: str
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("train.loop.batches.cpu_dtypes", lambda: dtypes)
    assert choose_precision(Stage1Config()) == choose_precision(Stage2Config(optimizer="muon")) == precision
    said = "this CPU only emulates bf16, so training uses precision=no"
    assert (said in capsys.readouterr().err) == (precision == "no")
