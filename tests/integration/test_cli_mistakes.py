"""Mistakes on the command line: one line that names them, exit code 2, nothing on stdout and nothing written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import Run, assert_refused
from PIL import Image
from safetensors.torch import load_file

from clipgen.config import ModelConfig
from clipgen.weights.model_dir import load_model_dir, save_model_dir


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["prompt", "--image"]),
        ([""], ["prompt"]),
        (["   "], ["prompt"]),
        (["\u200b\u3164"], ["prompt is empty"]),
        (["a\udcff"], ["UTF-8"]),
        (["a", "--seed", "-1"], ["seed", "-1"]),
        (["a", "--seed", "x"], ["--seed", "x"]),
        (["a", "--seed", str(2**31)], ["seed", str(2**31)]),
        (["a", "--top-p", "0"], ["top_p", "0"]),
        (["a", "--top-p", "1.5"], ["top_p", "1.5"]),
        (["a", "--top-k", "-3"], ["top_k", "-3"]),
        (["a", "--temperature", "nan"], ["temperature", "nan"]),
        (["a", "--temperature", "-1"], ["temperature", "-1"]),
        (["a", "--guidance", "inf"], ["guidance", "inf"]),
        (["a", "--num-outputs", "0"], ["num_outputs", "0"]),
        (["a", "--num-outputs", "2000"], ["num_outputs", "2000"]),
        (["a", "--num-outputs", "4", "--candidates", "2"], ["candidates", "2"]),
        (["a", "--candidates", "100000"], ["candidates", "100000"]),
        (["a", "--mix", "b=x"], ["--mix", "b=x", "TEXT=WEIGHT"]),
        (["a", "--mix", "b"], ["--mix", "TEXT=WEIGHT"]),
        (["a", "--mix", "b=101"], ["weight", "101"]),
        (["a", "--mix", "b=nan"], ["weight", "nan"]),
        (["a", "--mix", "=1"], ["empty"]),
        (["a", "--mix", "\udcff=1"], ["UTF-8"]),
        (["a", "--keep-rows", "2"], ["--keep-rows", "--image"]),
        (["a", "--negative", " "], ["negative", "empty"]),
        (["a", "--negative", "\udcff"], ["UTF-8"]),
        (["a", "--negative", "b", "--guidance", "1"], ["guidance is 1", "above 1", "raise it"]),
        (["a", "--format", "bmp"], ["bmp", "png"]),
        (["a", "--device", "quantum"], ["device", "quantum"]),
        (["a", "--dtype", "float8"], ["dtype", "float8"]),
        (["a", "--image", "missing.png"], ["missing.png"]),
        (["a", "--image", "empty.png"], ["empty.png", "0 bytes"]),
        (["a", "--image", "text.txt"], ["text.txt"]),
        (["--prompts-file", "missing.txt"], ["missing.txt"]),
        (["--prompts-file", "blank.txt"], ["blank.txt", "no prompt"]),
        (["--prompts-file", "latin.txt"], ["latin.txt", "UTF-8"]),
        (["a", "--weights", "nowhere"], ["nowhere"]),
        (["a", "--out", "text.txt"], ["text.txt"]),
        (["a", "--sed", "1"], ["--sed"]),
    ],
)
def test_mistake_is_one_line_and_writes_nothing(run: Run, args: list[str], words: list[str]) -> None:
    Path("empty.png").touch()
    Path("blank.txt").write_text(" \n\n")
    Path("text.txt").write_text("a lemon")
    Path("latin.txt").write_bytes("zitrönchen".encode("latin-1"))
    assert_refused(run("generate", *args), *words)


def test_truncated_image_is_named(run: Run, photo: Path) -> None:
    photo.write_bytes(photo.read_bytes()[:200])
    assert_refused(run("generate", "--image", photo), "My Photo.png", "truncated")


@pytest.fixture
def broken(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny model to damage."""
    return shutil.copytree(tiny_weights, tmp_path_factory.mktemp("broken") / "model")


@pytest.mark.parametrize("file", ["config.yaml", "clip.safetensors", "vqgan.safetensors", "gpt.safetensors"])
def test_weights_with_a_missing_file_are_refused_by_name(run: Run, broken: Path, file: str) -> None:
    (broken / file).unlink()
    assert_refused(run("generate", "a", "--weights", broken), file, "missing")


def test_weights_with_a_flipped_byte_are_refused(run: Run, broken: Path) -> None:
    data = bytearray((broken / "gpt.safetensors").read_bytes())
    data[-5] ^= 1
    (broken / "gpt.safetensors").write_bytes(data)
    assert_refused(run("generate", "a", "--weights", broken), "gpt.safetensors", "SHA-256")


def test_weights_with_a_wrong_shape_are_refused_by_tensor(run: Run, broken: Path, tiny_config: ModelConfig) -> None:
    _, parts = load_model_dir(broken)
    parts = {
        part: {name: tensor.clone() for name, tensor in load_file(broken / f"{part}.safetensors").items()}
        for part in parts
    }
    name = next(name for name, tensor in parts["gpt"].items() if tensor.ndim == 2)
    parts["gpt"][name] = parts["gpt"][name][:-1]
    save_model_dir(broken, tiny_config, parts)
    assert_refused(run("generate", "a", "--weights", broken), name, "shape")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generat", "a lemon"], ["'generat'", "did you mean `clipgen generate`"]),
        (["wieghts", "fetch", "coco"], ["did you mean `clipgen weights`"]),
        (["fetch", "coco"], ["did you mean `clipgen weights fetch`"]),
        (["Doctor"], ["did you mean `clipgen doctor`"]),
        (["lemon"], ["'lemon' is not a command", "clipgen generate lemon"]),
        (["lemon", "-n", "2", "a cat"], ["clipgen generate lemon -n 2 'a cat'"]),
        ([""], ["empty"]),
        (["a lemon", "--sed", "7"], ["--sed", "--seed"]),
        (["--sed", "7"], ["--sed", "--seed"]),
    ],
)
def test_mistyped_command_is_refused_with_a_suggestion(run: Run, args: list[str], words: list[str]) -> None:
    assert_refused(run(*args), *words)


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "a", "--out", "-"],
        ["generate", "a", "--shards", "-"],
        ["sheet", "a", "--guidance", "1,2", "-o", "-"],
        ["morph", "a", "b", "--out", "-"],
        ["replay", "missing.png", "--save", "-"],
        ["evaluate", "--reference", "missing", "--out", "-"],
        ["weights", "fetch", "coco", "--out", "-"],
        ["weights", "convert", "--out", "-"],
    ],
)
def test_dash_as_output_file_is_refused(run: Run, args: list[str]) -> None:
    assert_refused(run(*args), "-", "not written to stdout")
    assert not Path("-").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["sheet", "-", "--guidance", "1,2"],
        ["morph", "-", "a"],
        ["morph", "a", "-"],
        ["generate", "a", "--negative", "-", "--guidance", "3"],
        ["generate", "a", "--mix", "-"],
    ],
)
def test_dash_is_refused_where_stdin_is_not_read(run: Run, args: list[str]) -> None:
    assert_refused(run(*args, input="a cat\n"), "-")


def test_image_of_too_many_pixels_is_one_line(root: Path, tmp_path: Path) -> None:
    """Of a process of its own: Pillow's warning would be a second line."""
    Image.new("1", (10_000, 9_500)).save(tmp_path / "large.png")
    command = [sys.executable, "-m", "clipgen", "replay", str(tmp_path / "large.png")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "megapixels" in done.stderr
