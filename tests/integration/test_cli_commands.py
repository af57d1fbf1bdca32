"""The command line as a program: help, short forms, streams, completion and Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import QUICK, Run, records
from tracebacks import has_traceback


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
    assert "loaded" in run("generate", "a lemon", *QUICK).stderr  # quiet lasts for one call


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
        env=os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},  # where there is no shell
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
