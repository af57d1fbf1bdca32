"""The command line: results on stdout, the rest on stderr; exit codes; names; nothing written after a mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from tracebacks import has_traceback
from typer.testing import CliRunner
from typer.testing import Result as RunResult

from clipgen.cli.common import printable
from clipgen.cli.main import app
from clipgen.config import ModelConfig
from clipgen.images.pixels import save_image
from clipgen.outputs.metadata import Receipt
from clipgen.outputs.naming import free_stem
from clipgen.weights.model_dir import load_model_dir, save_model_dir

QUICK = ("--num-outputs", "2", "--candidates", "4", "--seed", "7", "--device", "cpu", "--dtype", "float32")
Run = Callable[..., RunResult]


@pytest.fixture
def run(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("generate", ...)` in an empty folder, with the tiny model; "outputs" is where files go."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPGEN_WEIGHTS", str(tiny_weights))
    return lambda *args, **kwargs: CliRunner().invoke(app, [str(arg) for arg in args], **kwargs)


@pytest.fixture
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "My Photo.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


def records(result: RunResult) -> list[dict]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def pixels(path: str) -> bytes:
    return Image.open(path).tobytes()


def test_generate_writes_images_and_grid_and_prints_seed_scores_and_time(run: Run) -> None:
    result = run("generate", "Sketch of a lemon", *QUICK)
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in Path("outputs").iterdir())
    assert names == [f"sketch-of-a-lemon-7-{end}.png" for end in ("1", "2", "grid")]
    for name in names:
        assert f"outputs/{name}" in result.stdout
    assert re.search(r"Sketch of a lemon: seed 7, \d+\.\d s\n", result.stdout)
    assert len(re.findall(r"CLIP score -?\d\.\d{3}", result.stdout)) == 2
    assert Image.open(f"outputs/{names[0]}").size == (32, 32)
    assert Image.open(f"outputs/{names[2]}").width > 64
    assert "loaded" in result.stderr and "drew 1 of 1 prompts" in result.stderr


def test_json_option_prints_only_json_on_stdout(run: Run) -> None:
    (record,) = records(run("generate", "a lemon", *QUICK, "--json"))
    assert record["prompt"] == "a lemon" and record["seed"] == 7 and record["seconds"] > 0
    assert record["clip_scores"] == sorted(record["clip_scores"], reverse=True)
    assert len(record["files"]) == len(record["clip_scores"]) == len(record["seeds"]) == 2
    assert all(Path(file).is_file() for file in [*record["files"], record["grid"]])


def test_receipt_in_a_file_generates_the_same_image_again(run: Run) -> None:
    (record,) = records(run("generate", "a zitrone ü", *QUICK, "--top-k", "5", "--json"))
    receipt = Receipt.from_file(record["files"][1])
    assert (receipt.text, receipt.seed, receipt.image_seed) == ("a zitrone ü", 7, record["seeds"][1])
    assert (receipt.candidates, receipt.guidance, receipt.top_k, receipt.top_p) == (4, 2.0, 5, 0.95)
    again = ("--seed", receipt.image_seed, "--candidates", 1, "--num-outputs", 1, "--top-k", 5, "--json")
    (redrawn,) = records(run("generate", "a zitrone ü", *QUICK, *again))
    assert pixels(redrawn["files"][0]) == pixels(record["files"][1])
    assert redrawn["grid"] is None


def test_prompt_gives_the_same_images_alone_and_among_others(run: Run) -> None:
    Path("prompts.txt").write_text("\ufeffa red heart\n\n  a dog  \r\n", encoding="utf-8")
    many = records(run("generate", "a lemon", "--prompts-file", "prompts.txt", *QUICK, "--json"))
    assert [record["prompt"] for record in many] == ["a lemon", "a red heart", "a dog"]
    assert {record["seed"] for record in many} == {7}
    (alone,) = records(run("generate", "a dog", *QUICK, "--json", "--out", "alone"))
    assert alone["seeds"] == many[2]["seeds"]
    assert [pixels(file) for file in alone["files"]] == [pixels(file) for file in many[2]["files"]]


def test_run_without_a_seed_uses_one_random_seed(run: Run) -> None:
    few = ("--num-outputs", 1, "--candidates", 1, "--json")
    first, second = (records(run("generate", "a", "b", *few)) for _ in range(2))
    assert first[0]["seed"] == first[1]["seed"] != second[0]["seed"]


def test_more_prompts_than_fit_a_batch_are_generated_in_order(run: Run) -> None:
    many = records(run("generate", *"abcde", "--num-outputs", 1, "--candidates", 40, "--seed", 0, "--json"))
    assert [record["prompt"] for record in many] == list("abcde")
    assert all(record["seed"] == 0 for record in many)


def test_prompts_file_dash_reads_stdin(run: Run) -> None:
    result = run("generate", "--prompts-file", "-", *QUICK, "--json", input="a lemon\na dog\n")
    assert [record["prompt"] for record in records(result)] == ["a lemon", "a dog"]


def test_image_alone_mixed_and_prompt_alone_give_different_images(run: Run, photo: Path) -> None:
    (alone,) = records(run("generate", "--image", photo, *QUICK, "--json"))
    (mixed,) = records(run("generate", "a lemon", "--image", photo, *QUICK, "--json"))
    (words,) = records(run("generate", "a lemon", *QUICK, "--json"))
    assert alone["prompt"] == "" and "my-photo-7-1.png" in alone["files"][0]
    assert len({tuple(record["clip_scores"]) for record in (alone, mixed, words)}) == 3


@pytest.mark.parametrize(("suffix", "format"), [("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG")])
def test_format_option_sets_the_format_of_every_file(run: Run, suffix: str, format: str) -> None:
    (record,) = records(run("generate", "a lemon", *QUICK, "--format", suffix, "--json"))
    assert {Image.open(file).format for file in [*record["files"], record["grid"]]} == {format}


def test_similar_prompts_overwrite_no_file(run: Run) -> None:
    twins = records(run("generate", "a lemon", "A lemon!", "a  lemon", *QUICK, "--json"))
    twins += records(run("generate", "a lemon", *QUICK, "--top-k", 1, "--json"))
    files = [file for record in twins for file in [*record["files"], record["grid"]]]
    assert len(set(files)) == len(files) == len(list(Path("outputs").iterdir())) == 12


def test_long_prompt_is_truncated_with_a_warning(run: Run) -> None:
    result = run("generate", " ".join(f"word{i}" for i in range(500)), *QUICK, "--json")
    assert len(records(result)) == 1
    assert "word499" in result.stderr and "not read" in result.stderr
    assert max(len(path.name.encode()) for path in Path("outputs").iterdir()) < 255


def test_prompt_after_two_dashes_may_start_with_a_dash(run: Run) -> None:
    (record,) = records(run("generate", *QUICK, "--json", "--", "--seed"))
    assert record["prompt"] == "--seed"


@given(st.text(max_size=300), st.integers(0, 2**31 - 1))
def test_file_names_stay_inside_the_folder(text: str, seed: int) -> None:
    out = Path("does-not-exist")
    path = free_stem(out, text, seed)
    assert path.parent == out and path.name.endswith(f"-{seed}")
    assert not path.name.startswith((".", "-")) and "/" not in path.name
    assert path.name == path.name.strip() and path.name.isprintable() and len(path.name.encode()) < 120


def test_file_names_of_copies_and_other_prompts_differ(tmp_path: Path) -> None:
    seen = set()
    for name, seed in [("a", 7), ("a", 7), ("a 7", 2), ("a 7 v2", 1), ("a", 7), ("a-7", 1)]:
        stem = free_stem(tmp_path, name, seed)
        assert not list(tmp_path.glob(f"{stem.name}-*"))
        (tmp_path / f"{stem.name}-1.png").touch()
        seen.add(stem)
    assert len(seen) == 6


@given(st.text())
def test_printable_text_has_no_control_characters(text: str) -> None:
    assert printable(text).isprintable()


def test_mixed_texts_and_images_are_recorded_in_the_receipt(run: Run, photo: Path) -> None:
    plain, mixed = (
        records(run("generate", "a lemon", *QUICK, "--json", *more))[0] for more in ([], ["--mix", "a dog=0.5"])
    )
    assert Receipt.from_file(mixed["files"][0]).text == "a lemon + a dog (0.5)"
    assert mixed["clip_scores"] != plain["clip_scores"]
    more = ("--image", photo, "--image-weight", 0.25, "--mix", "a dog=0.5", "--mix", "green=-1")
    (all_of_it,) = records(run("generate", "a lemon", *QUICK, "--json", *more))
    receipt = Receipt.from_file(all_of_it["files"][0])
    assert (
        run("generate", "a", "--mix", "a=-1")
        .stderr.splitlines()[-1]
        .startswith("clipgen: prompt has parts that cancel")
    )
    assert receipt.text == "My Photo.png (0.25) + a lemon + a dog (0.5) + green (-1)"


def test_keep_rows_keeps_the_top_of_the_image(run: Run, photo: Path) -> None:
    """What the prompt says below it; without one, what the picture says."""
    for prompt in (["a lemon"], []):
        keep = ("--image", photo, "--keep-rows", 3)
        (kept,) = records(run("generate", *prompt, *QUICK, "--json", *keep))
        receipt = Receipt.from_file(kept["files"][0])
        assert receipt.keep_rows == 3 and receipt.text == (prompt or ["My Photo.png"])[0]
        assert run("replay", kept["files"][0], "--image", photo).exit_code == 0


def test_previews_are_written_and_deleted_at_the_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, tuple[int, int]]] = []

    def save(image: Image.Image, path: Path, *more: Any, **named: Any) -> Path:
        written.append((path.name, image.size))
        return save_image(image, path, *more, **named)

    monkeypatch.setattr("clipgen.images.pixels.save_image", save)
    (record,) = records(run("generate", "a lemon", *QUICK, "--previews", 3, "--json"))
    previews = [size for name, size in written if name == "preview-7.png"]
    assert len(previews) == 3 and len(set(previews)) == 1 and previews[0][0] > previews[0][1]
    files = [Path(file).name for file in [*record["files"], record["grid"]]]
    assert sorted(path.name for path in Path("outputs").iterdir()) == sorted(files)


def test_negative_prompts_change_the_image_and_are_in_the_receipt(run: Run) -> None:
    keep_away = (["--negative", "green"], ["--negative", "green", "--negative", "a dog"])
    plain, one, two = (
        records(run("generate", "a lemon", *QUICK, "--json", *more))[0]["files"][0] for more in ([], *keep_away)
    )
    assert Receipt.from_file(one).text == "a lemon, not green"
    assert Receipt.from_file(two).text == "a lemon, not green + a dog"
    assert len({Image.open(file).tobytes() for file in (plain, one, two)}) == 3
    assert run("replay", two).exit_code == 0


def wrong(result: RunResult, *words: str) -> None:
    """Exit code 2, one line on stderr that holds `words`, nothing on stdout and nothing written."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("clipgen: "), result.stderr
    for word in words:
        assert word in lines[0]
    assert result.stdout == ""
    assert not Path("outputs").exists()


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
    wrong(run("generate", *args), *words)


def test_truncated_image_is_named(run: Run, photo: Path) -> None:
    photo.write_bytes(photo.read_bytes()[:200])
    wrong(run("generate", "--image", photo), "My Photo.png", "truncated")


@pytest.fixture
def broken(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny model to damage."""
    return shutil.copytree(tiny_weights, tmp_path_factory.mktemp("broken") / "model")


@pytest.mark.parametrize("file", ["config.yaml", "clip.safetensors", "vqgan.safetensors", "gpt.safetensors"])
def test_weights_with_a_missing_file_are_refused_by_name(run: Run, broken: Path, file: str) -> None:
    (broken / file).unlink()
    wrong(run("generate", "a", "--weights", broken), file, "missing")


def test_weights_with_a_flipped_byte_are_refused(run: Run, broken: Path) -> None:
    data = bytearray((broken / "gpt.safetensors").read_bytes())
    data[-5] ^= 1
    (broken / "gpt.safetensors").write_bytes(data)
    wrong(run("generate", "a", "--weights", broken), "gpt.safetensors", "SHA-256")


def test_weights_with_a_wrong_shape_are_refused_by_tensor(run: Run, broken: Path, tiny_config: ModelConfig) -> None:
    _, parts = load_model_dir(broken)
    parts = {
        part: {name: tensor.clone() for name, tensor in load_file(broken / f"{part}.safetensors").items()}
        for part in parts
    }
    name = next(name for name, tensor in parts["gpt"].items() if tensor.ndim == 2)
    parts["gpt"][name] = parts["gpt"][name][:-1]
    save_model_dir(broken, tiny_config, parts)
    wrong(run("generate", "a", "--weights", broken), name, "shape")


def test_no_arguments_show_help(run: Run) -> None:
    result = run()
    assert result.exit_code == 0 and "generate" in result.stdout


@pytest.mark.parametrize("args", [["a lemon", *QUICK], [*QUICK, "a lemon"], ["-q", "a lemon", *QUICK]])
def test_prompt_without_a_command_is_generate(run: Run, args: list[str]) -> None:
    assert "a lemon: seed 7" in (result := run(*args)).stdout, result.output
    assert Path("outputs/a-lemon-7-1.png").exists()


def test_short_form_takes_a_prompt_after_two_dashes_and_stdin(run: Run) -> None:
    (dash,) = records(run(*QUICK, "--json", "--", "- a list"))
    many = records(run("-", *QUICK, "--json", input="a cat\n\na dog\r\n"))
    assert [record["prompt"] for record in (dash, *many)] == ["- a list", "a cat", "a dog"]


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
    wrong(run(*args), *words)


@pytest.mark.parametrize(
    "command", ["", "generate", "replay", "sheet", "morph", "doctor", "evaluate", "app", "weights"]
)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(run: Run, command: str, flag: str) -> None:
    result = run(*command.split(), flag)
    assert result.exit_code == 0 and f"Usage: clipgen {command}".strip() in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", ["list", "fetch", "verify", "convert", "info"])
def test_every_command_of_weights_has_help(run: Run, command: str) -> None:
    assert f"Usage: clipgen weights {command}" in run("weights", command, "-h").stdout


def test_short_options_equal_the_long_ones(run: Run) -> None:
    (record,) = records(run("generate", "a lemon", "-n", "1", "-s", "9", "-o", "here", "--candidates", "1", "--json"))
    assert record["seed"] == 9 and record["files"] == ["here/a-lemon-9-1.png"]


def test_quiet_prints_only_results_and_warnings(run: Run) -> None:
    result = run("generate", "a lemon", *QUICK, "-q")
    assert result.stderr == "" and "seed 7" in result.stdout
    result = run("generate", " ".join(f"word{i}" for i in range(500)), *QUICK, "-q")
    assert "not read" in result.stderr and len(result.stderr.splitlines()) == 1
    assert "loaded" in run("generate", "a lemon", *QUICK).stderr  # it is not remembered


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
    wrong(run(*args), "-", "not written to stdout")
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
    wrong(run(*args, input="a cat\n"), "-")


def test_shell_completion_works_without_importing_torch(tmp_path: Path) -> None:
    def complete(words: str) -> list[str]:
        asked = {"_CLIPGEN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-X", "importtime", "-m", "clipgen"]
        done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, timeout=600)
        assert not re.search(r"\| +torch\n", done.stderr)
        return done.stdout.split()

    assert complete("clipgen gen") == ["generate"]
    assert {"coco", "openai-vit-b32"} <= set(complete("clipgen weights fetch "))
    assert "--seed" in complete("clipgen generate --se")
    script = subprocess.run(
        [sys.executable, "-m", "clipgen", "--show-completion", "bash"],
        env=os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},  # there may be no shell to detect
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert script.returncode == 0, script.stderr
    assert "_CLIPGEN_COMPLETE" in script.stdout


def test_version_option_prints_the_version(run: Run) -> None:
    assert re.fullmatch(r"clipgen \d+\.\d+\.\d+\n", run("--version").stdout)


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom clipgen.cli.main import app\ntry:\n    app(['generate', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=600)


def start(weights: Path, folder: Path, *args: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "clipgen", "generate", "--weights", str(weights), "--device", "cpu", *args]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **env}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def test_ctrl_c_exits_with_130_and_leaves_no_temporary_file(tiny_weights: Path, tmp_path: Path) -> None:
    process = start(tiny_weights, tmp_path, *[f"prompt {i}" for i in range(300)], "--candidates", "64")
    try:
        assert process.stderr is not None
        assert "loaded" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert not has_traceback(errors) and "stopped" in errors
    assert not list(tmp_path.glob("**/*.tmp"))


def test_prompt_that_the_terminal_cannot_encode_is_generated(tiny_weights: Path, tmp_path: Path) -> None:
    process = start(tiny_weights, tmp_path, "日本のレモン\x1b[31m", *QUICK, PYTHONIOENCODING="ascii")
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "\x1b" not in output and "seed 7" in output
    assert [path.suffix for path in (tmp_path / "outputs").iterdir()] == [".png"] * 3
