"""Trainings by several processes give the results of one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_kit import (
    finish,
    run,
    same_curves,
    same_weights,
    scalars,
    start,
    start_together,
    write_config,
    write_images,
)

from clipgen.config import ModelConfig
from clipgen.utils.listening import usable_address
from train import stage2
from train.encode import Encoded

SCRIPTS = {"vqgan": "train.stage1", "gpt": "train.stage2", "pixels": "train.stage2"}
PIXELS = ["stage2.from_pixels=true", "stage2.neighbours=0"]
SHARDED = ["stage2.optimizer=adamw", "stage2.parallel=fsdp", "stage2.save_every=2", "stage2.recompute=true"]
SHARDED += ["stage2.accumulate=2", "stage2.clip_weight=0.2", "stage2.clip_batch=4"]


@pytest.fixture(scope="module")
def flags(tiny_config: ModelConfig, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    config = write_config(tiny_config, folder / "tiny.yaml")
    # With a higher rate, Adam turns rounding differences of the smallest gradients into different codes now and then.
    return ["--config", config, "--data", write_images(folder / "images"), "stage1.lr=1e-4"]


@pytest.fixture(scope="module")
def parts(tiny_weights: Path) -> list[object]:
    return ["--vqgan", tiny_weights, "--clip", tiny_weights / "clip.safetensors"]


@pytest.fixture(scope="module")
def alone(flags, parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with each training, by one process."""
    out = tmp_path_factory.mktemp("alone")
    for name, script in SCRIPTS.items():
        more = [] if name == "vqgan" else parts + (PIXELS if name == "pixels" else [])
        process = start(script, [*flags, "--out", out / name, *more], out / f"{name}.log")
        assert finish(process) == 0, (out / f"{name}.log").read_text()
    return out


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("vqgan", 2),
        ("gpt", 2),
        ("pixels", 2),
        pytest.param("vqgan", 4, marks=pytest.mark.slow),
        pytest.param("gpt", 4, marks=pytest.mark.slow),
    ],
)
def test_several_processes_give_the_curves_of_one(
    name: str, processes: int, flags, parts, alone: Path, tmp_path: Path
) -> None:
    more = [] if name == "vqgan" else parts + (PIXELS if name == "pixels" else [])
    arguments = [*flags, "--out", tmp_path / name, *more]
    together = start_together(SCRIPTS[name], arguments, tmp_path / "log", processes)
    assert [finish(p) for p in together] == [0] * processes, (tmp_path / "log").read_text()
    same_curves(alone / name, tmp_path / name, (1, "loss"), (6, "grad_norm"))
    if name == "vqgan":
        assert {(4, "discriminator"), (4, "adaptive_weight"), (2, "codes_used")} <= scalars(alone / name).keys()
        assert "broken.jpg" in (tmp_path / name / "skipped.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lecam", "r1"])
def test_averages_of_stage1_are_reduced_over_all_processes(kind: str, flags, tmp_path: Path) -> None:
    more = [f"stage1.disc_regularisation={kind}", "stage1.disc_regularisation_weight=0.1"]
    more += ["stage1.codes=ema", "stage1.lr=3e-5"]
    for processes in (1, 2):
        arguments = [*flags, *more, f"stage1.accumulate={processes}", "--out", tmp_path / str(processes)]
        together = start_together("train.stage1", arguments, tmp_path / "log", processes)
        assert [finish(p) for p in together] == [0] * processes, (tmp_path / "log").read_text()
    same_curves(tmp_path / "1", tmp_path / "2", (6, "disc_penalty"), (6, "perplexity"), (6, "held_loss"))


def test_two_processes_resume_the_checkpoint_of_one(flags, alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone / "vqgan", tmp_path / "vqgan")
    shutil.rmtree(tmp_path / "vqgan" / "checkpoints" / "step_000006")
    arguments = [*flags, "--out", tmp_path / "vqgan"]
    together = start_together("train.stage1", arguments, tmp_path / "log", 2)
    assert [finish(p) for p in together] == [0, 0], (tmp_path / "log").read_text()
    one, several = scalars(alone / "vqgan"), scalars(tmp_path / "vqgan")
    assert several[(6, "l1")] == pytest.approx(one[(6, "l1")], abs=1e-4)
    assert several[(6, "discriminator")] == pytest.approx(one[(6, "discriminator")], abs=1e-4)


def test_process_without_the_checkpoint_of_the_main_one_is_refused(flags, alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone / "vqgan", tmp_path / "0")
    host, port = usable_address("127.0.0.1", 0)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    processes = []
    for rank in ("0", "1"):  # as on two machines that do not share a disk
        environment = common | {"RANK": rank, "LOCAL_RANK": rank}
        arguments = [*flags, "--out", tmp_path / rank, "stage1.steps=8"]
        processes.append(start("train.stage1", arguments, tmp_path / f"log{rank}", environment))
    try:
        assert finish(processes[1]) == 2
        said = (tmp_path / "log1").read_text()
        assert "step_000006 is not on this machine; all machines must share the folder of --out" in said
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def sharded(flags, parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a GPT that two processes trained, each with half of it."""
    out = tmp_path_factory.mktemp("sharded") / "gpt"
    together = start_together("train.stage2", [*flags, "--out", out, *parts, *SHARDED], out.with_suffix(".log"), 2)
    assert [finish(p) for p in together] == [0, 0], out.with_suffix(".log").read_text()
    return out


@pytest.mark.slow
def test_sharded_gpt_gives_the_curves_and_weights_of_an_unsharded_one(
    sharded: Path, flags, parts, tmp_path: Path
) -> None:
    arguments = [*flags, "--out", tmp_path / "gpt", *parts, "stage2.optimizer=adamw"]
    arguments += ["stage2.clip_weight=0.2", "stage2.clip_batch=4"]
    assert finish(start("train.stage2", arguments, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    same_curves(tmp_path / "gpt", sharded, (6, "loss"), (6, "grad_norm"), (6, "held_loss"), (6, "clip_distance"))
    whole, cut = (load_file(out / "gpt.safetensors") for out in (tmp_path / "gpt", sharded))
    assert whole.keys() == cut.keys() and all(torch.allclose(whole[name], cut[name], atol=1e-4) for name in whole)
    step = sharded / "checkpoints" / "step_000006" / "sharded"
    assert {path.name for path in step.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}


def test_sharding_without_torchrun_is_refused(flags, parts, tmp_path: Path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run(stage2, monkeypatch, *flags, "--out", tmp_path / "gpt", *parts, *SHARDED)
    assert stop.value.code == 2
    assert "start it with torchrun, or use parallel=ddp" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_sharded_checkpoint_is_resumed_by_another_number_of_processes(
    processes: int, sharded: Path, flags, parts, tmp_path: Path
) -> None:
    out = shutil.copytree(sharded, tmp_path / "gpt", ignore=shutil.ignore_patterns("step_000006"))
    arguments = [*flags, "--out", out, *parts, *SHARDED, "stage2.accumulate=1"]
    together = start_together("train.stage2", arguments, tmp_path / "log", processes)
    assert [finish(p) for p in together] == [0] * processes, (tmp_path / "log").read_text()
    same_curves(sharded, out, (5, "loss"), (6, "grad_norm"), (6, "held_loss"))
    whole, cut = (load_file(folder / "gpt.safetensors") for folder in (sharded, out))
    assert all(torch.allclose(whole[name], cut[name], atol=1e-4) for name in whole)


def test_two_processes_encode_the_shards_of_one(flags, parts, tmp_path: Path) -> None:
    folders = {}
    for processes in (1, 2):
        out = folders[processes] = tmp_path / str(processes)
        arguments = [*flags, *parts, "--out", out, "stage2.views=3", "stage2.min_scale=0.8"]
        together = start_together("train.encode", arguments, tmp_path / "log", processes)
        assert [finish(p) for p in together] == [0] * processes, (tmp_path / "log").read_text()
    assert len(Encoded(folders[2])) == 75
    assert same_weights(*(folder / "000000.safetensors" for folder in folders.values()))


def test_batch_size_that_is_no_multiple_of_the_processes_is_refused(flags, tmp_path: Path) -> None:
    arguments = [*flags, "--out", tmp_path / "run", "stage1.batch_size=3"]
    together = start_together("train.stage1", arguments, tmp_path / "log", 2)
    assert [finish(p) for p in together] == [2, 2]
    assert (
        "batch_size is 3, for all processes together; it must be a multiple of their number, 2"
        in (tmp_path / "log").read_text()
    )
