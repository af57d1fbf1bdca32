"""Bulk generation: the same shards from any number of processes, complete or absent, resumed after a kill."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from local_server import wait_until
from PIL import Image
from training_kit import finish, start
from typer.testing import CliRunner
from typer.testing import Result as RunResult

from clipgen.cli.main import app
from clipgen.images.sources import open_source
from clipgen.outputs import shards as bulk
from clipgen.outputs.metadata import KEY, Receipt
from clipgen.pipeline import ClipGen

Run = Callable[..., RunResult]
COUNT = 70
FEW = ["--num-outputs", 2, "--candidates", 2, "--seed", 7, "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt number {i}\n" for i in range(COUNT)))
    return path


@pytest.fixture
def run(tiny_weights: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPGEN_WEIGHTS", str(tiny_weights))
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as under torchrun: the number of threads changes the rounding of float32 sums
    yield lambda *args: CliRunner().invoke(app, ["generate", "--prompts-file", "prompts.txt", *map(str, args)])
    torch.set_num_threads(before)


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_receipt_in_a_shard_generates_the_same_image_again(run: Run, tiny_weights: Path) -> None:
    result = run("--shards", "bulk", *FEW, "--json")
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["shard"], line["prompts"], line["pictures"]) for line in told] == [
        ("bulk/000000.tar", 64, 128),
        ("bulk/000001.tar", 6, 12),
    ]
    assert sorted(path.name for path in Path("bulk").iterdir()) == [
        ".lock", "000000.tar", "000001.tar", "index.json",
    ]  # fmt: skip
    assert len(open_source("bulk").names) == 2 * COUNT  # training can read it
    with tarfile.open("bulk/000001.tar") as tar:
        assert tar.getnames()[:4] == ["000064-1.png", "000064-1.json", "000064-2.png", "000064-2.json"]
        image, text = (tar.extractfile(name).read() for name in tar.getnames()[:2])  # type: ignore[union-attr]
    receipt = Receipt.from_metadata({KEY: text.decode()})
    assert receipt.text == "prompt number 64" and receipt.seed == 7
    pipe = ClipGen.from_pretrained(tiny_weights, "cpu", "float32")
    redrawn = pipe.generate([receipt.request()])[0].images[0]
    stored = np.asarray(Image.open(io.BytesIO(image)), dtype=int)
    assert abs(np.asarray(redrawn, dtype=int) - stored).max() <= 1, "other images were decoded beside it"


def test_keys_in_shards_are_line_numbers_of_the_prompts(run: Run) -> None:
    lines = ["a lemon", "", "a\u2028red\x0bheart\x85", "   ", "a dog", *[""] * 130, "a cat"]
    Path("prompts.txt").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    result = run("--shards", "bulk", *FEW[2:], "--num-outputs", 1, "--candidates", 1)
    assert result.exit_code == 0, result.output
    texts = {}
    for path in sorted(Path("bulk").glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in [name for name in tar.getnames() if name.endswith(".json")]:
                text = tar.extractfile(name).read().decode()  # type: ignore[union-attr]
                texts[int(name.split("-")[0])] = Receipt.from_metadata({KEY: text}).text
    assert texts == {number: line.strip() for number, line in enumerate(lines) if line.strip()}
    assert sorted(path.name for path in Path("bulk").glob("*.tar")) == ["000000.tar", "000002.tar"]
    assert json.loads(Path("bulk/index.json").read_text())["prompts"] == 4
    assert "all of its shards" in run("--shards", "bulk", *FEW[2:], "--num-outputs", 1, "--candidates", 1).stderr


def test_folder_written_by_commit_43da29e_is_resumed(run: Run, golden: Path) -> None:
    Path("prompts.txt").write_text("a lemon\na red heart\n")
    few = ["--num-outputs", 1, "--candidates", 1, "--negative", "a dog", "--guidance", 2]
    assert run("--shards", "now", *few, "--seed", 7).exit_code == 0
    now, then = (json.loads(path.read_text()) for path in (Path("now/index.json"), golden / "shards_43da29e.json"))
    assert now == then | {"weights": now["weights"]}


def test_two_processes_write_the_shards_of_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [*FEW[2:], "--num-outputs", 1, "--candidates", 1]
    assert run("--shards", "one", *few).exit_code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):  # one after the other
        monkeypatch.setenv("RANK", str(rank))
        assert run("--shards", "two", *few).exit_code == 0
        assert f"{rank:06d}.tar" in tars(Path("two"))
    assert tars(Path("two")) == tars(Path("one")) and len(tars(Path("one"))) == 2
    assert Path("two", "index.json").read_text() == Path("one", "index.json").read_text()


@pytest.mark.slow
def test_torchrun_with_two_processes_writes_the_shards_of_one(
    run: Run, prompts: Path, tmp_path: Path, tiny_weights: Path, root: Path
) -> None:
    assert run("--shards", "one", *FEW).exit_code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "clipgen"]
    more = ["generate", "--prompts-file", prompts, "--shards", tmp_path / "two", "--weights", tiny_weights, *FEW]
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([*map(str, torchrun + more)], check=True, cwd=tmp_path, timeout=600, env=environment)
    assert tars(tmp_path / "two") == tars(tmp_path / "one") and len(tars(tmp_path / "one")) == 2


def test_killed_run_resumes_and_keeps_finished_shards(run: Run, tmp_path: Path, tiny_weights: Path) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(400)))
    folder, few = tmp_path / "bulk", ["--num-outputs", 1, "--candidates", 1, "--dtype", "float32"]
    arguments = ["generate", "--prompts-file", "prompts.txt", "--shards", folder, "--weights", tiny_weights, *few]
    process = start("cli_process", arguments, tmp_path / "log")
    wait_until(lambda: len(tars(folder)) >= 2)
    process.kill()
    finish(process)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert 2 <= len(kept) < 7
    for path in kept:
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 128
    seed = json.loads((folder / "index.json").read_text())["seed"]
    assert run("--shards", folder, *few).exit_code == 0  # without --seed the one in the folder is used
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert run("--shards", "whole", *few, "--seed", seed).exit_code == 0
    assert tars(folder) == tars(tmp_path / "whole") and len(tars(folder)) == 7
    assert not [path for path in folder.iterdir() if path.name.startswith(".0")]
    done = run("--shards", folder, *few)
    assert done.exit_code == 0 and not done.stdout and "all of its shards are in" in done.stderr


def test_folder_of_other_prompts_or_settings_is_refused(run: Run) -> None:
    Path("prompts.txt").write_text("a\nb\n")
    few = ["--num-outputs", 1, "--candidates", 1]
    assert run("--shards", "bulk", *few, "--seed", 1).exit_code == 0
    for change, message in (
        (["--seed", 2], "another seed (1, not 2)"),
        (["--top-k", 5], "another top_k (None, not 5)"),
        (["--format", "webp"], "another format (png, not webp)"),
        (["--mix", "a dog=0.5"], "another prompts_sha256"),
    ):
        result = run("--shards", "bulk", *few, *change)
        assert result.exit_code == 2 and message in result.stderr and "give another folder" in result.stderr
    for other in ("{", "[1]"):
        (Path("bulk") / "index.json").write_text(other)
        assert "--shards 'bulk' cannot be used" in run("--shards", "bulk", *few).stderr


def test_image_in_every_prompt_is_hashed_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("prompts.txt").write_text("a\nb\nc\n")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "photo.png")
    hashed: list[object] = []
    digest = bulk.image_digest
    monkeypatch.setattr(bulk, "image_digest", lambda image: hashed.append(image) or digest(image))
    assert run("--shards", "bulk", *FEW, "--image", "photo.png").exit_code == 0
    assert len(hashed) == 1


def test_shard_that_another_process_writes_is_refused_and_left_alone(run: Run) -> None:
    Path("prompts.txt").write_text("a\n")
    Path("bulk", ".000000").mkdir(parents=True)
    with FileLock("bulk/.000000.lock"):
        result = run("--shards", "bulk", *FEW)
    assert result.exit_code == 2 and "000000.tar is being written by another process" in result.stderr
    assert Path("bulk", ".000000").is_dir() and not Path("bulk", "000000.tar").exists()
    assert run("--shards", "bulk", *FEW).exit_code == 0
    assert sorted(path.name for path in Path("bulk").iterdir()) == [".lock", "000000.tar", "index.json"]


def test_shard_that_cannot_be_written_leaves_no_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("prompts.txt").write_text("a\n")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bulk.os, "fsync", full)
        result = run("--shards", "bulk", "--num-outputs", 1, "--candidates", 1)
    assert result.exit_code == 2 and "bulk/000000.tar cannot be written: No space left on device" in result.stderr
    assert sorted(path.name for path in Path("bulk").iterdir()) == [".lock", "index.json"]


def test_previews_that_shards_do_not_hold_are_named(run: Run) -> None:
    Path("prompts.txt").write_text("a\n")
    result = run("--shards", "bulk", "--num-outputs", 1, "--candidates", 1, "--previews", 2)
    assert result.exit_code == 0 and "--previews is ignored" in result.stderr


def test_several_processes_without_shards_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(*FEW)
    assert result.exit_code == 2 and "only with --shards DIR" in result.stderr
    shutil.rmtree("outputs", ignore_errors=True)
