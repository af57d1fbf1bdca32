"""`python -m train.all`: unusable input is refused at once, and an interrupted run resumes to complete weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from local_server import wait_until
from PIL import Image
from tracebacks import has_traceback
from training_kit import run, write_config, write_images

from clipgen import ClipGen
from clipgen.config import ModelConfig
from clipgen.errors import DataError, DownloadError
from clipgen.images.sources import open_source
from clipgen.models.vqgan import VQGAN
from clipgen.utils.download import RetryPolicy
from train import all as everything
from train import roundtrip
from train.config import load_config
from train.loop.checkpoint import save_tensors
from train.loop.health import TrainingError
from train.loop.lock import lock_folder

SENTENCES = "".join(f"a {colour} {shape}\n" for colour in ("red", "green", "blue", "white") for shape in "abcdef")


@pytest.fixture
def flags(
    tiny_config: ModelConfig, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """Arguments of a training that takes a moment, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")
    Path("prompts.txt").write_text(SENTENCES)
    config = write_config(tiny_config, tmp_path / "tiny.yaml")
    shutil.copy(tiny_weights / "clip.safetensors", tmp_path / "clip.safetensors")
    few = ["stage1.steps=300", "stage1.disc_start=295", "stage1.lr=6e-3", "stage1.betas=[0.9,0.99]", "stage2.steps=300"]
    few += ["stage1.batch_size=8", "stage1.l2_weight=1"]
    every = [f"stage{i}.{name}_every=20" for i in (1, 2) for name in ("log", "save")]
    every += ["stage1.sample_every=300", "stage2.sample_every=300"]
    files = ["--config", config, "--clip", "clip.safetensors", "--features", "clip"]
    return ["images", "--out", "weights/mine", *files, *few, *every]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts", "few.txt"], "few.txt has 2 sentences; give at least 20"),
        (["--prompts", "none.txt"], "'none.txt' cannot be read"),
        (["--clip", "tiny.yaml"], "tiny.yaml is not a .safetensors file"),
        (["model.gpt.n_cond=64"], "embeddings of 32 numbers, model.gpt.n_cond is 64; add model.gpt.n_cond=32"),
        (["--processes", 3], r"stage1\.batch_size is 8, .* it must be a multiple of their number, 3"),
        (["stage2.accumulate=3"], r"stage2\.accumulate is 3; it must divide the 4 images"),
        (["stage2.accumulate=4", "stage2.clip_weight=0.2", "stage2.clip_batch=2"], r"stage2\.clip_batch is 2; .* 4"),
        (["--processes", 0], "--processes: '0'; use a whole number, 1 or more"),
        (["--out", "tiny.yaml"], "tiny.yaml exists; give another --out"),
        (["--out", "images/mine"], "lies inside the data, images"),
        (["--work", "images/work"], "lies inside the data, images"),
        (["--features", "inception"], "CLIPGEN_OFFLINE is set.*give --features clip or efficientnet"),
        (["stage1.stps=5"], "stps"),
    ],
)
def test_unusable_input_is_refused_before_training(
    flags: list[object],
    more: list[object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("few.txt").write_text("a\nb\n")
    monkeypatch.setenv("CLIPGEN_OFFLINE", "1")
    monkeypatch.setenv("CLIPGEN_CACHE", "cache")
    with pytest.raises(SystemExit) as stopped:
        run(everything, monkeypatch, *flags, *more)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and not has_traceback(said)
    assert re.search(message, said.replace("\n", " ")), said
    assert not Path("runs").exists() or not list(Path("runs").rglob("settings.json"))


def test_changed_settings_are_refused_in_the_same_work_folder(
    flags: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []
    monkeypatch.setattr(everything, "run_step", lambda name, arguments: done.append(name))
    run(everything, monkeypatch, *flags, "--prompts", "prompts.txt")
    assert done == ["check", "stage 1", "round trip", "encode", "stage 2", "export", "index", "evaluate", "card"]
    with pytest.raises(SystemExit):
        run(everything, monkeypatch, *flags, "--prompts", "prompts.txt", "stage1.steps=201")
    assert (
        "runs/mine was begun with another stage1.steps (300, not 201); give another --work" in capsys.readouterr().err
    )
    done.clear()
    minutes = Path("runs/mine/minutes.json")
    minutes.write_text(json.dumps(dict.fromkeys(("check", "stage 1", "round trip", "encode", "stage 2", "card"), 0)))
    run(
        everything, monkeypatch, *flags, "--prompts", "prompts.txt"
    )  # the weights are missing: all steps that write them run again
    assert done == ["export", "index", "evaluate", "card"]


def test_evaluation_without_a_network_uses_features_that_need_no_download(
    flags: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLIPGEN_CACHE", "cache")
    asked: list[Sequence[str]] = []

    def unreachable(entry: object, settings: object, policy: RetryPolicy, log: object) -> None:
        assert policy.attempts * policy.timeout <= 20, "a download with a substitute waits at most 20 s"
        raise DownloadError("no route to host")

    def note(name: str, arguments: Sequence[str]) -> None:
        asked.extend([arguments] if name == "evaluate" else [])

    monkeypatch.setattr(everything, "fetch", unreachable)
    monkeypatch.setattr(everything, "run_step", note)
    position = flags.index("--features")
    flags[position : position + 2] = []
    for network in (False, True):
        if network:
            monkeypatch.setattr(everything, "fetch", lambda *args, **kwargs: {})
        Path("runs/mine/minutes.json").unlink(missing_ok=True)
        run(everything, monkeypatch, *flags)
        said = capsys.readouterr().out
        assert ("evaluation will use efficientnet features: no route to host" in said) == (not network)
    assert [arguments[arguments.index("--features") + 1] for arguments in asked] == ["efficientnet"] * 2, "as begun"
    monkeypatch.setattr(everything, "find_spec", lambda name: None)
    monkeypatch.setattr(everything, "fetch", unreachable)
    assert everything.choose_features(None, None) == "clip"


def test_moved_images_resume_the_training_and_changed_images_are_refused(
    flags: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "run_step", lambda name, arguments: None)
    run(everything, monkeypatch, *flags)
    Path("images").rename("moved")
    flags[0] = str(Path("moved").resolve())
    run(everything, monkeypatch, *flags)
    Path("moved/0/00.png").write_bytes(Path("moved/0/03.png").read_bytes())
    with pytest.raises(SystemExit):
        run(everything, monkeypatch, *flags)
    assert "runs/mine was begun with another images (" in capsys.readouterr().err


def test_second_start_is_refused_and_names_the_running_process(
    flags: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "run_step", lambda name, arguments: None)
    with lock_folder(Path("runs/mine")), pytest.raises(SystemExit) as stopped:
        run(everything, monkeypatch, *flags)
    assert stopped.value.code == 2
    assert f"runs/mine is being written by process {os.getpid()}" in capsys.readouterr().err


def test_plan_without_prompts_and_from_pixels_skips_index_and_encode(flags: list[object], tmp_path: Path) -> None:
    paths = everything.Paths("images", Path("clip"), None, tmp_path / "work", tmp_path / "out")
    config = load_config(tmp_path / "tiny.yaml", ["stage2.from_pixels=true", "stage2.neighbours=0"])
    found = everything.plan_steps(paths, config, "clip", 2)
    assert list(found) == ["check", "stage 1", "round trip", "stage 2", "export", "evaluate", "card"]
    assert found["stage 1"][:5] == ["-m", "train.loop.launch", "--nproc-per-node", "2", "-m"]
    assert "images" in found["stage 2"] and not any("--prompts" in arguments for arguments in found.values())


def test_tokens_that_keep_no_more_than_a_flat_colour_are_refused(
    tiny_config: ModelConfig, tmp_path: Path, flags: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(tiny_config.vqgan).eval()
    found, figure = roundtrip.measure(vqgan, open_source("images"))
    assert found.pictures == 24 and found.codes_possible == 64 and figure.width > 8 * 32
    with pytest.raises(TrainingError, match=r"no more than a flat colour would .*stage1\.steps"):
        found.check()
    good = roundtrip.RoundTrip(24, 25.0, 15.0, 60, 64)
    good.check()
    with pytest.raises(TrainingError, match="only 1 of 64 possible codes"):
        roundtrip.RoundTrip(24, 25.0, 15.0, 1, 64).check()
    (tmp_path / "vqgan").mkdir()
    save_tensors(vqgan.state_dict(), tmp_path / "vqgan" / "vqgan.safetensors")
    with pytest.raises(SystemExit) as stopped:
        arguments = ["--config", "tiny.yaml", "--data", "images", "--vqgan", "vqgan", "--out", "trip"]
        run(roundtrip, monkeypatch, *arguments)
    assert stopped.value.code == 2 and sorted(p.name for p in Path("trip").iterdir()) == [
        "roundtrip.json", "roundtrip.png",
    ]  # fmt: skip
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 1 images can be read"):
        roundtrip.measure(vqgan, open_source("none"))


@pytest.mark.slow
def test_killed_and_stopped_training_resumes_to_weights_that_generate(flags: list[object], root: Path) -> None:
    command = [sys.executable, "-m", "train.all", *map(str, flags), "--prompts", "prompts.txt"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    minutes = Path("runs/mine/minutes.json")

    def begin() -> subprocess.Popen:
        with Path("log").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    first = begin()  # killed with all of its processes in the middle of stage 1
    wait_until(lambda: Path("runs/mine/vqgan/checkpoints/step_000020").exists())
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert list(json.loads(minutes.read_text())) == ["check"] and not Path("weights").exists()
    second = begin()  # stopped as a spot machine is, in the middle of stage 2
    wait_until(lambda: Path("runs/mine/gpt/checkpoints").exists() or second.poll() is not None)
    second.terminate()
    assert second.wait() == 143, Path("log").read_text()[-2000:]
    assert list(json.loads(minutes.read_text())) == ["check", "stage 1", "round trip", "encode"]
    vqgan = Path("runs/mine/vqgan/vqgan.safetensors").stat()
    assert begin().wait() == 0, Path("log").read_text()[-2000:]
    assert Path("runs/mine/vqgan/vqgan.safetensors").stat() == vqgan
    assert "weights/mine is complete" in Path("log").read_text()

    folder = Path("weights/mine")
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "samples.jpg", "coverage.safetensors", "manifest.json"} <= names
    text = (folder / "README.md").read_text()
    assert "clip_fd, 0" in text and "| stage 2 |" in text and "vqgan, psnr" in text and "24 generated images" in text
    assert Image.open(folder / "samples.jpg").width > 4 * 32
    pipe = ClipGen.from_pretrained(folder)
    assert len(pipe("a red circle", num_outputs=2, candidates=4, seed=0).images) == 2
    assert pipe.index is not None and len(pipe.index.names) == 24 and "broken.jpg" not in pipe.index.names
