"""`clipgen weights ...` as a user runs it: results on stdout, a mistake is one line, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from local_server import Answer, Server, serving, wait_until
from safetensors.torch import load_file, save_file
from tracebacks import has_traceback
from typer.testing import CliRunner, Result

from clipgen.cli.main import app
from clipgen.weights.catalog import CATALOG
from clipgen.weights.model_dir import load_model_dir

COCO = {file.part: file.name for file in CATALOG["coco"].files}
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("fetch", ...)` in an empty folder with an empty cache, offline unless a mirror is set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CLIPGEN_MIRROR", raising=False)
    monkeypatch.setenv("CLIPGEN_OFFLINE", "1")
    return lambda *args: CliRunner().invoke(app, ["weights", *map(str, args)])


@pytest.fixture
def mirror(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving() as server:
        monkeypatch.setenv("CLIPGEN_MIRROR", server.address)
        monkeypatch.setenv("CLIPGEN_OFFLINE", "0")
        yield server


@pytest.fixture(scope="module")
def bad_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files that PyTorch can read and that are not CLIP-GEN's."""
    path = tmp_path_factory.mktemp("bad") / "bad.pt"
    torch.save({"model": {"weight": torch.zeros(3)}}, path)
    return {f"/coco/{name}": path.read_bytes() for name in COCO.values()}


@pytest.fixture
def tiny_sources(tiny_weights: Path, tmp_path: Path) -> dict[str, Path]:
    """The tiny model in three files of their own, and its configuration."""
    folder = tmp_path / "sources"
    shutil.copytree(tiny_weights, folder)
    model = "\n".join(f"  {line}" for line in (folder / "config.yaml").read_text().splitlines())
    (folder / "tiny.yaml").write_text(f"model:\n{model}\n")
    return {part: folder / f"{part}.safetensors" for part in ("clip", "vqgan", "gpt")} | {
        "config": folder / "tiny.yaml"
    }


def options(sources: dict[str, Path]) -> list[str | Path]:
    return [item for name, path in sources.items() for item in (f"--{name}", path)]


def mistake(result: Result) -> str:
    """The one line on stderr of a refused command."""
    assert result.exit_code == 2 and result.stdout == "", result.output
    lines = result.stderr.splitlines()
    assert lines and lines[-1].startswith("clipgen: ") and not has_traceback(result.stderr)
    return lines[-1]


def test_list_shows_every_model_with_licence_and_state(run: Run) -> None:
    result = run("list")
    assert result.exit_code == 0, result.output
    for entry in CATALOG.values():
        assert f"{entry.name}: " in result.stdout and entry.licence in result.stdout
        assert all(file.name in result.stdout for file in entry.files)
    assert "size unknown, more than 1,348 MB" in result.stdout and result.stdout.count("absent") == 7
    assert "present" not in result.stdout


def test_list_as_json(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "coco"
    folder.mkdir(parents=True)
    (folder / COCO["gpt"]).write_bytes(b"")
    (folder / f"{COCO['clip']}.part").write_bytes(b"")
    records = {record["name"]: record for record in json.loads(run("list", "--json").stdout)}
    assert set(records) == set(CATALOG)
    coco, openai = records["coco"], records["openai-vit-b32"]
    assert [file["state"] for file in coco["files"]] == ["partial", "absent", "present"]
    assert (coco["model"], coco["converted"], openai["model"]) == ("weights/coco", False, None)
    assert coco["files"][2] == {
        "name": "gpt_coco.pt",
        "url": "https://github.com/HFAiLab/clip-gen/releases/download/v0.1.0/gpt_coco.pt",
        "bytes": None,
        "sha256": None,
        "tensor_bytes": 1348251648,
        "path": str(folder / "gpt_coco.pt"),
        "state": "present",
    }
    assert openai["files"][0]["sha256"] == "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"


def test_weights_without_a_command_shows_help(run: Run) -> None:
    result = run()
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("list", "fetch", "verify", "convert", "info"))


def test_fetch_resumes_records_hashes_and_reuses_the_cache(
    run: Run, mirror: Server, bad_checkpoints: dict[str, bytes], tmp_path: Path
) -> None:
    mirror.files = dict(bad_checkpoints)
    mirror.answers = [Answer(cut=100)]
    result = run("fetch", "coco", "--no-convert")
    assert result.exit_code == 0, result.output
    paths = [tmp_path / "cache" / "coco" / name for name in COCO.values()]
    assert result.stdout.splitlines() == [str(path) for path in paths]
    assert [path.read_bytes() for path in paths] == list(bad_checkpoints.values())
    assert mirror.ranges_asked() == [None, "bytes=100-", None, None]
    assert "broke off at 100 of" in result.stderr and "is recorded from now on" in result.stderr
    assert re.search(r"fetched clip_vit_b32\.pt in \d", result.stderr)
    assert run("fetch", "coco", "--no-convert").exit_code == 0 and len(mirror.requests) == 4
    assert hashlib.sha256(paths[0].read_bytes()).hexdigest() in run("list", "--json").stdout


def test_fetched_files_that_do_not_fit_make_no_model(
    run: Run, mirror: Server, bad_checkpoints: dict[str, bytes]
) -> None:
    mirror.files = dict(bad_checkpoints)
    assert COCO["clip"] in mistake(run("fetch", "coco"))
    assert not Path("weights").exists()


def test_fetch_makes_a_model(
    run: Run, mirror: Server, bad_checkpoints: dict[str, bytes], tiny_sources: dict[str, Path], tmp_path: Path
) -> None:
    """With stand-ins for the files: the cached ones become weights/coco, once."""
    from clipgen.weights import convert as checkpoints

    real, calls = checkpoints.convert_checkpoints, []

    def convert(clip: Path, vqgan: Path, gpt: Path, out: Path, config: str) -> Path:
        calls.append((clip.name, vqgan.name, gpt.name, config))
        tiny_sources["config"].write_text(tiny_sources["config"].read_text().replace("name: tiny", "name: coco"))
        return real(*(tiny_sources[part] for part in ("clip", "vqgan", "gpt")), out, str(tiny_sources["config"]))

    mirror.files = dict(bad_checkpoints)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "convert_checkpoints", convert)
        result = run("fetch", "coco")
        assert result.exit_code == 0 and result.stdout == "weights/coco\n", result.output
        assert calls == [("clip_vit_b32.pt", "vqgan_coco.pt", "gpt_coco.pt", "coco")]
        assert "weights/coco exists and is complete" in run("fetch", "coco").stderr and len(calls) == 1
        Path("weights/coco/gpt.safetensors").write_bytes(b"damaged")
        again = run("fetch", "coco")
        assert again.exit_code == 0 and "It is converted again" in again.stderr and len(calls) == 2
    assert run("verify", "weights/coco").exit_code == 0
    assert "converted\n" in run("list").stdout
    assert "holds the model tiny" in mistake(run("fetch", "coco", "--out", _other(tiny_sources)))


def _other(sources: dict[str, Path]) -> Path:
    """A folder with the tiny model under its own name."""
    return sources["clip"].parent


def test_wrong_bytes_are_refused_and_leave_nothing(run: Run, mirror: Server, tmp_path: Path) -> None:
    mirror.put("/openai-vit-b32/ViT-B-32.pt", b"PK\x03\x04 not OpenAI's")
    line = mistake(run("fetch", "openai-vit-b32"))
    assert "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af" in line and "put it at" in line
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("status", [403, 404])
def test_refused_download_is_one_line(run: Run, mirror: Server, status: int) -> None:
    mirror.default = Answer(status=status)
    line = mistake(run("fetch", "taming-imagenet-f16-16384"))
    assert f"answered {status}" in line and "heibox.uni-heidelberg.de" in line and "CLIPGEN_MIRROR" in line


def test_offline_fetch_names_files_and_their_places(run: Run, tmp_path: Path) -> None:
    line = mistake(run("fetch", "coco"))
    for file in CATALOG["coco"].files:
        assert f"download {file.url} elsewhere and put it at {tmp_path / 'cache' / 'coco' / file.name}" in line
    assert "CLIPGEN_OFFLINE" in line and not (tmp_path / "cache").exists()


def test_cache_option_sets_the_cache_folder(run: Run, tmp_path: Path) -> None:
    assert str(tmp_path / "elsewhere") in mistake(run("fetch", "coco", "--cache", tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("fetch", "cocoa"), "'cocoa'"),
        (("fetch",), "NAME"),
        (("fetch", "openai-vit-b32", "--out", "x"), "--out"),
        (("verify", "nowhere"), "nowhere"),
        (("info", "nowhere"), "nowhere"),
        (("convert", "--clip", "a"), "--out"),
        (("convert", "--out", "x"), "--vqgan"),
        (("convert", "--clip", "nowhere.pt", "--out", "x"), "nowhere.pt"),
        (("fetch", "coco", "--cache", "~no-such-user/x"), "~no-such-user/x"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_mistake_in_weights_is_one_line_that_names_it(run: Run, args: tuple[str, ...], part: str) -> None:
    assert part in mistake(run(*args))


def test_malformed_mirror_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPGEN_MIRROR", "file:///srv")
    assert "'file:///srv' is not a mirror" in mistake(run("fetch", "coco"))


def test_verify_names_a_damaged_file(run: Run, tiny_weights: Path, tmp_path: Path) -> None:
    result = run("verify", tiny_weights)
    assert result.exit_code == 0 and "is complete: the model tiny" in result.stdout
    damaged = Path(shutil.copytree(tiny_weights, tmp_path / "damaged"))
    data = bytearray((damaged / "gpt.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "gpt.safetensors").write_bytes(data)
    assert "gpt.safetensors is damaged" in mistake(run("verify", damaged))
    (damaged / "manifest.json").unlink()
    assert "manifest.json is missing" in mistake(run("verify", damaged))


def test_verify_names_a_damaged_or_missing_index(run: Run, root: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(root / "weights" / "mini", tmp_path / "damaged"))
    assert run("verify", damaged).exit_code == 0
    data = bytearray((damaged / "coverage.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "coverage.safetensors").write_bytes(data)
    assert "coverage.safetensors is damaged" in mistake(run("verify", damaged))
    (damaged / "coverage.safetensors").unlink()
    assert "coverage.safetensors is missing" in mistake(run("verify", damaged))


def test_info_shows_configuration_parameters_and_memory(run: Run, tiny_weights: Path) -> None:
    facts = json.loads(run("info", tiny_weights, "--json").stdout)
    assert facts["name"] == "tiny" and facts["config"]["gpt"]["n_layer"] == 2
    result = run("info", tiny_weights)
    assert result.exit_code == 0
    assert f"\nparameters: {facts['parameters']:,}\n" in result.stdout and "    n_layer: 2\n" in result.stdout
    assert f"weights: {facts['memory']['float32']['weights'] / 1e6:,.1f} MB" in result.stdout and "T4" in result.stdout


def test_convert_three_parts_makes_a_model(run: Run, tiny_sources: dict[str, Path], tiny_weights: Path) -> None:
    result = run("convert", *options(tiny_sources), "--out", "weights/mine")
    assert result.exit_code == 0 and result.stdout == "weights/mine\n", result.output
    ours, theirs = load_model_dir("weights/mine"), load_model_dir(tiny_weights)
    assert ours[0] == theirs[0]
    for part in theirs[1]:
        assert all(torch.equal(tensor, ours[1][part][name]) for name, tensor in theirs[1][part].items())
    assert "weights/mine already holds a model" in mistake(
        run("convert", *options(tiny_sources), "--out", "weights/mine")
    )


def test_convert_two_parts_makes_files_for_training(run: Run, tiny_sources: dict[str, Path]) -> None:
    """`train/stage2.py` starts from them: another VQGAN and CLIP, and no GPT yet."""
    given = {name: path for name, path in tiny_sources.items() if name != "gpt"}
    os.umask(umask := os.umask(0o022))
    result = run("convert", *options(given), "--out", "runs/published")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["runs/published/clip.safetensors", "runs/published/vqgan.safetensors"]
    assert sorted(os.listdir("runs/published")) == ["clip.safetensors", "vqgan.safetensors"]
    for part in ("clip", "vqgan"):
        ours, theirs = load_file(f"runs/published/{part}.safetensors"), load_file(tiny_sources[part])
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert os.stat(f"runs/published/{part}.safetensors").st_mode & 0o777 == 0o666 & ~umask, "as other new files"


def test_convert_overwrites_no_file(run: Run, tiny_sources: dict[str, Path]) -> None:
    Path("runs").mkdir()
    Path("runs/vqgan.safetensors").write_text("trained for hours")
    result = run("convert", *options({name: tiny_sources[name] for name in ("vqgan", "config")}), "--out", "runs")
    assert "runs/vqgan.safetensors exists; give another --out" in mistake(result)
    assert Path("runs/vqgan.safetensors").read_text() == "trained for hours"


@pytest.mark.parametrize("parts", [("clip", "vqgan", "gpt", "config"), ("vqgan", "config")])
def test_convert_names_a_folder_that_cannot_be_written(
    run: Run, tiny_sources: dict[str, Path], parts: tuple[str, ...]
) -> None:
    Path("file").write_text("")
    given = options({name: tiny_sources[name] for name in parts})
    assert "file/model: Not a directory" in mistake(run("convert", *given, "--out", "file/model"))


class Bomb:
    """Creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_convert_refuses_unusable_files_and_writes_nothing(run: Run, tiny_sources: dict[str, Path]) -> None:
    hostile, text, other = Path("hostile.pt"), Path("text.pt"), Path("other.safetensors")
    torch.save({"model": Bomb()}, hostile)
    text.write_text("<html>")
    save_file({"weight": torch.zeros(3)}, other)
    Path("old.pt").write_bytes(pickle.dumps(Bomb()))
    for bad in (hostile, text, other, Path("old.pt"), Path("missing.pt")):
        line = mistake(run("convert", *options(tiny_sources | {"vqgan": bad}), "--out", "weights/mine"))
        assert bad.name in line
    assert not Path("exploded").exists() and not Path("weights").exists()


def test_ctrl_c_keeps_the_downloaded_part(mirror: Server, bad_checkpoints: dict[str, bytes], tmp_path: Path) -> None:
    mirror.files = {path: content * 500 for path, content in bad_checkpoints.items()}
    mirror.default = Answer(pace=0.05, piece=1000)
    part = tmp_path / "cache" / "coco" / "clip_vit_b32.pt.part"
    command = [sys.executable, "-m", "clipgen", "weights", "fetch", "coco"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: part.exists() and part.stat().st_size >= 2000)
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130 and out == "" and not has_traceback(told), told
    assert part.stat().st_size >= 2000 and not part.with_suffix("").exists()


def test_guide_names_existing_options_and_every_catalog_entry(root: Path, run: Run) -> None:
    guide = (root / "docs" / "weights.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"clipgen weights (\w+)([^\n`&|#]*)", guide)
    assert {name for name, _ in commands} == {"list", "fetch", "verify", "convert"}
    for name, rest in commands:
        options = CliRunner().invoke(app, ["weights", name, "--help"], env={"COLUMNS": "200"}).stdout
        assert all(re.search(rf"{option}\b", options) for option in re.findall(r"--[a-z-]+", rest)), (name, rest)
    for entry in CATALOG.values():
        assert (
            f"`{entry.name}`" in guide and entry.page in guide and entry.licence.split(";")[0].split(" by ")[0] in guide
        )
        assert all(f"`{file.name}`" in guide for file in entry.files)
