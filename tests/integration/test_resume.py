"""A training that is stopped, killed or runs out of disk resumes to the same weights as an uninterrupted one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from local_server import wait_until
from tracebacks import has_traceback
from training_kit import finish, same_weights, scalars, start, start_together, write_config, write_images

from clipgen.config import ModelConfig
from train.loop.checkpoint import CheckpointError, Checkpoints, save_tensors


@dataclass
class Training:
    """One stage, run in a process of its own; `weights` is the name of the file it writes."""

    script: str
    weights: str
    flags: list[object]

    def start(self, out: Path, *more: object, file_limit: int = 0):
        return start(self.script, [*self.flags, "--out", out, *more], log(out), file_limit=file_limit)

    def finish(self, out: Path, *more: object) -> None:
        assert finish(self.start(out, *more)) == 0, log(out).read_text()


def log(out: Path) -> Path:
    return out.with_suffix(".log")


@pytest.fixture(scope="module")
def trainings(
    tiny_config: ModelConfig, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Training]:
    """Both stages, saving after every second step."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    images, config = write_images(folder / "images"), write_config(tiny_config, folder / "tiny.yaml")
    flags = ["--config", config, "--data", images]
    parts = ["--vqgan", tiny_weights, "--clip", tiny_weights / "clip.safetensors"]
    return {
        "stage1": Training("train.stage1", "vqgan.safetensors", [*flags, "stage1.save_every=2"]),
        "stage2": Training("train.stage2", "gpt.safetensors", [*flags, *parts, "stage2.save_every=2"]),
    }


@pytest.fixture(scope="module")
def whole(trainings: dict[str, Training], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with each stage, trained without interruption."""
    out = tmp_path_factory.mktemp("whole")
    for name, training in trainings.items():
        training.finish(out / name)
    return out


def logged(out: Path, step: int) -> Callable[[], bool]:
    return lambda: log(out).exists() and f"step {step}/" in log(out).read_text()


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_training_stopped_by_signals_ends_with_the_same_weights(
    name: str, trainings: dict[str, Training], tmp_path: Path
) -> None:
    training, out, reference = trainings[name], tmp_path / name, tmp_path / "reference"
    more = [f"{name}.steps=30", f"{name}.save_every=30", f"{name}.sample_every=30"]
    training.finish(reference, *more)
    for number, said in ((signal.SIGTERM, "stopped by SIGTERM"), (signal.SIGINT, "stopped by Ctrl-C")):
        before = max((step for step, _ in scalars(out)), default=0) if out.exists() else 0
        process = training.start(out, *more)
        wait_until(logged(out, before + 2))
        os.kill(process.pid or 0, number)
        assert finish(process) == 128 + number
        step = max(int(path.name.removeprefix("step_")) for path in (out / "checkpoints").iterdir())
        assert (
            f"{said}: step {step} of 30 is saved in {out}; the same command continues from there"
            in log(out).read_text()
        )
        assert before < step < 30
    training.finish(out, *more)
    assert same_weights(out / training.weights, reference / training.weights)


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_resumed_training_ends_with_the_same_weights_and_scalars(
    name: str, trainings: dict[str, Training], whole: Path, tmp_path: Path
) -> None:
    training, out = trainings[name], tmp_path / name
    shutil.copytree(whole / name, out, ignore=shutil.ignore_patterns("step_000006", training.weights, "scalars.csv"))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000004"]
    training.finish(out)
    assert same_weights(out / training.weights, whole / name / training.weights)
    best = training.weights.replace(".", "_best.")
    assert same_weights(out / best, whole / name / best)
    rest = {key: value for key, value in scalars(whole / name).items() if key[0] > 4 and key[1] != "images_per_second"}
    assert rest and rest.items() <= scalars(out).items()


def test_old_checkpoints_are_removed_and_curves_have_each_step_once(
    trainings: dict[str, Training], whole: Path, tmp_path: Path
) -> None:
    training, out = trainings["stage1"], tmp_path / "stage1"
    shutil.copytree(whole / "stage1", out, ignore=shutil.ignore_patterns("step_000006"))
    (out / "checkpoints" / "step_000005.tmp").mkdir()  # killed while it saved
    (out / "checkpoints" / "step_000005.tmp" / "model.safetensors").write_bytes(b"half")
    training.finish(out, "stage1.steps=8", "stage1.keep=1")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000008"]
    lines = (out / "scalars.csv").read_text().splitlines()
    keys = [tuple(line.split(",")[:2]) for line in lines]
    assert len(keys) == len(set(keys)) and ("8", "l1") in keys


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("stage1", "stage1.batch_size=8", "batch_size 4, not 8"),
        ("stage1", "model.vqgan.ch=64", "vqgan.ch 32, not 64"),
        ("stage2", "model.gpt.n_layer=3", "gpt.n_layer 2, not 3"),
        ("stage2", "stage2.optimizer=adamw", "optimizer muon, not adamw"),
    ],
)
def test_resuming_with_changed_fixed_settings_is_refused(
    name: str, change: str, message: str, trainings: dict[str, Training], whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole / name, tmp_path / name)
    assert finish(trainings[name].start(out, change)) == 2
    assert message in log(out).read_text() and "give a new --out" in log(out).read_text()
    assert same_weights(out / trainings[name].weights, whole / name / trainings[name].weights)


@pytest.mark.parametrize(
    "share", [0.5, 1.02]
)  # of the weights' size: 0.5 does not hold them, 1.02 does, but not the rest
@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_full_disk_leaves_the_previous_checkpoint_intact(
    name: str, share: float, trainings: dict[str, Training], whole: Path, tmp_path: Path
) -> None:
    training, out = trainings[name], tmp_path / name
    shutil.copytree(whole / name, out, ignore=shutil.ignore_patterns("step_000006", "tensorboard"))
    before = (out / training.weights).stat()
    assert finish(training.start(out, file_limit=int(share * before.st_size))) == 2
    said = log(out).read_text()
    assert not has_traceback(said) and ("could not be saved" in said or "could not be written" in said)
    if share > 1:
        assert "step 6 could not be saved" in said and "the checkpoint of step 4 is intact" in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000004"]
    training.finish(out)
    assert same_weights(out / training.weights, whole / name / training.weights)


def test_failed_write_is_reported_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(torch.nn.Linear(2, 2))
    checkpoints = Checkpoints(accelerator, tmp_path)
    checkpoints.save(1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("train.loop.checkpoint.os.fsync", full)
        with pytest.raises(CheckpointError, match=r"step 2 could not .*No space left on device; .* step 1 is intact"):
            checkpoints.save(2)
        patch.setattr("train.loop.checkpoint.os.replace", full)
        with pytest.raises(CheckpointError, match=r"a\.safetensors could not be written: No space"):
            save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".safetensors")] == []
    assert [step for step, _ in checkpoints.complete()] == [1]


def test_all_processes_stop_when_one_gets_a_signal(trainings: dict[str, Training], tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = [*trainings["stage1"].flags, "--out", out, "stage1.steps=100000", "stage1.save_every=100000"]
    first, second = start_together("train.stage1", [*flags, "stage1.sample_every=100000"], log(out), 2)
    wait_until(logged(out, 1))
    second.terminate()
    assert [finish(first), finish(second)] == [143, 143]
    assert len(list((out / "checkpoints").iterdir())) == 1 and "stopped by SIGTERM" in log(out).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_training_killed_ten_times_ends_with_the_same_weights(
    name: str, trainings: dict[str, Training], whole: Path, tmp_path: Path
) -> None:
    training, out, rng = trainings[name], tmp_path / name, random.Random(name)
    began = time.monotonic()
    training.finish(tmp_path / "timed", f"{name}.save_every=1")
    seconds = time.monotonic() - began
    kills = saving = ends = 0
    while kills < 10:
        process = training.start(out, f"{name}.save_every=1")
        if kills % 2:  # at a random moment
            process.join(rng.uniform(0.1, 0.9) * seconds)
        else:  # while it saves
            until = time.monotonic() + rng.uniform(0.1, 0.9) * seconds
            while process.is_alive() and (
                time.monotonic() < until or not list(out.glob("checkpoints/*.tmp")) + list(out.glob("*.tmp"))
            ):
                time.sleep(0.0005)
        if process.is_alive():
            process.kill()
        if finish(process) == -signal.SIGKILL:
            kills += 1
            saving += bool(list(out.rglob("*.tmp")))
        else:  # it finished first
            assert process.exitcode == 0, log(out).read_text()
            assert same_weights(out / training.weights, whole / name / training.weights)
            shutil.rmtree(out)
            ends += 1
            assert ends < 20
    training.finish(out)
    assert saving >= 2, "some kills must interrupt a save"
    assert same_weights(out / training.weights, whole / name / training.weights)
