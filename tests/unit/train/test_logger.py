"""Progress of a training: terminal, CSV and trackers."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_kit import run, scalars

from train import stage1
from train.loop.logger import Logger


@pytest.fixture(autouse=True)
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)  # Accelerate's trackers ask it which process is the main one


def test_tensorboard_drops_steps_that_are_trained_again(tmp_path: Path) -> None:
    for start in (0, 2):
        log = Logger(tmp_path, steps=4, batch_size=8, start=start)
        for step in range(start + 1, start + 4):
            log.scalars(step, {"loss": float(10 * start + step)})
        log.image(start + 3, "samples", Image.new("RGB", (6, 4), "red"))
        log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]
    (shown,) = board.Images("samples")  # that of step 3 is later than the resumed step, 2
    assert (shown.step, shown.width, shown.height) == (5, 6, 4)
    assert Image.open(tmp_path / "samples_000005.png").getpixel((0, 0)) == (255, 0, 0)
    assert {key: value for key, value in scalars(tmp_path).items() if key[1] == "loss"} == {
        (1, "loss"): 1, (2, "loss"): 2, (3, "loss"): 23, (4, "loss"): 24, (5, "loss"): 25,
    }  # fmt: skip


def test_tracker_that_is_not_installed_is_refused(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.loop.logger.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        run(stage1, monkeypatch, "--data", tmp_path, "--out", tmp_path / "run", "--tracker", "wandb")
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert "--tracker wandb needs Weights & Biases: pip install wandb" in capsys.readouterr().err


def test_weights_and_biases_resumes_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start in (0, 2):
        log = Logger(tmp_path, steps=4, batch_size=8, start=start, tracker="wandb", config={"stage1": {"lr": 1.0}})
        log.scalars(start + 1, {"loss": 3.0})
        log.image(start + 1, "samples", Image.new("RGB", (6, 4), "red"))
        log.close()
    runs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    name = (tmp_path / "wandb_run.txt").read_text()
    assert runs and all(name in path.name for path in runs)  # the same run when training is resumed
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/*.png"))
