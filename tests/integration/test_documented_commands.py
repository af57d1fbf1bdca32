"""README and docs: every command runs as printed, in a fresh copy of the checkout.

Commands that need a network, a GPU or hours are not run: `NOT_RUN` names them with the reason, and so does a line
`<!-- not run: reason -->` before a block. Their options are compared with the program's help.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from documented import Command, read_code, read_commands, split_statements
from PIL import Image
from typer.testing import CliRunner

from clipgen.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
NOT_RUN = {
    r"<[a-z ]+>|\.\.\.|that-machine": "has a placeholder",
    r"^cd |activate$": "changes the shell that it is typed into",
    r"^git clone|^(pip|uv|npm|apt|sudo|docker|cog|hf)\b": "needs a network",
    r"^pip install|weights fetch": "needs a network",
    r"--weights (weights/)?(coco|imagenet)\b|--config (coco|imagenet)\b": "needs weights of gigabytes",
    r"nproc-per-node": "needs several GPUs",
    r"^make (setup|test|test-slow|test-browser|lint|format|clean)\b|\.ci/run": "is what continuous integration does",
    r"^make (bench|mini|renders|scenes)\b": "takes hours, or needs a network",
    r"pre-commit install": "changes git's hooks",
    r"train/stage[12]|train\.all|train/encode|train\.export|train\.index|train\.mini": "trains for hours",
    r"clipgen evaluate": "needs Inception, from a network",
    r"^python benchmarks/": "takes minutes or hours",
    r"^(make app|clipgen app)\b|http\.server": "serves until it is stopped",
}
PROGRAM = re.compile(
    r"(?:^|\s)(clipgen(?: weights)? \w+|python -m (?:train|clipgen)[\w.]*|python (?:train|benchmarks)/[\w/]+\.py)"
)


@dataclass(eq=False)
class Checkout:
    """A fresh copy of the project with an environment, and the photos and prompts that readers have."""

    folder: Path
    environment: dict[str, str]
    background: list[subprocess.Popen[bytes]] = field(default_factory=list)
    is_serving: bool = False

    def run(self, text: str) -> subprocess.CompletedProcess[str]:
        """Run a statement to its end; one that ends with & goes on."""
        shell = ["bash", "-c", text.removesuffix("&")]
        if text.endswith("&"):
            process = subprocess.Popen(shell, cwd=self.folder, env=self.environment, start_new_session=True)
            self.background.append(process)
            return subprocess.CompletedProcess(shell, 0, "", "")
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.run(shell, cwd=self.folder, env=self.environment, text=True, timeout=900, **pipes)

    def serve(self) -> None:
        """Run `make serve` from now on and wait until it answers; pages share it."""
        if not self.is_serving:
            self.run("make serve &")
            wait_for_server()
            self.is_serving = True

    def stop(self) -> None:
        for process in self.background:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def checkout(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    folder = tmp_path_factory.mktemp("fresh") / "clipgen"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    venv = folder / ".venv"
    (venv / "bin").mkdir(parents=True)
    for program in Path(sys.executable).parent.iterdir():
        (venv / "bin" / program.name).symlink_to(program)
    (venv / "bin" / "clipgen").unlink(missing_ok=True)
    (venv / "bin" / "clipgen").write_text(f'#!/bin/sh\nexec "{venv}/bin/python" -m clipgen "$@"\n')
    (venv / "bin" / "clipgen").chmod(0o755)
    (venv / "lib").symlink_to(Path(sys.prefix) / "lib")
    if (Path(sys.prefix) / "pyvenv.cfg").exists():
        shutil.copy(Path(sys.prefix) / "pyvenv.cfg", venv)
    for stamp in (".run", ".dev", ".app"):  # nothing is left to install
        (venv / stamp).touch()
    (folder / "photos").mkdir()
    for i in range(8):
        Image.linear_gradient("L").rotate(45 * i).convert("RGB").save(folder / "photos" / f"{i}.jpg")
    for name in ("prompts.txt", "sentences.txt"):
        (folder / name).write_text("a lemon\na red heart\n")
    shutil.copy(folder / "weights/mini/clip.safetensors", folder)
    shutil.copytree(folder / "weights/mini", folder / "weights/mine")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("CLIPGEN")}
    environment = clean | {
        "PYTHONPATH": str(folder),
        "PATH": f"{venv}/bin:{os.environ['PATH']}",
        "CLIPGEN_OFFLINE": "1",
    }
    checkout = Checkout(folder, environment)
    try:
        yield checkout
    finally:
        checkout.stop()


def reason(command: Command) -> str:
    """Why a command is not run; "" if it is."""
    return command.not_run or next((why for what, why in NOT_RUN.items() if re.search(what, command.text)), "")


def commands_of(root: Path, page: str) -> list[Command]:
    return list(read_commands(page, (root / page).read_text(encoding="utf-8")))


def is_taken(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def wait_for_server() -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen("http://127.0.0.1:5000/health-check", timeout=5) as answer:
            if b'"READY"' in answer.read():
                return
        time.sleep(1)
    raise TimeoutError("make serve was not ready after 600 s")


@cache
def help_of(program: str) -> tuple[object, str]:
    """Exit code and text of a program's --help. It runs in this process, which has imported PyTorch already."""
    first, *words = program.split()
    if first == "clipgen":
        result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"})
        return result.exit_code, result.output
    run, name = (runpy.run_module, words[1]) if words[0] == "-m" else (runpy.run_path, str(ROOT / words[0]))
    shown, code, at_ctrl_c = io.StringIO(), None, signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown), redirect_stderr(shown):
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", [program, "--help"])
        try:
            run(name, run_name="__main__")
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGINT, at_ctrl_c)  # programs set it first of all
    return code, shown.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_docs_run_as_printed(root: Path, checkout: Checkout, page: str) -> None:
    commands = [command for command in commands_of(root, page) if not reason(command)]
    serving = any("localhost:5000" in command.text or "make serve" in command.text for command in commands)
    if serving and not checkout.is_serving and is_taken(5000):
        pytest.skip("port 5000, which the page uses, is taken on this machine")
    if serving:
        checkout.serve()
    failed = []
    for command in commands:
        if command.text.split("#")[0].strip() in ("make serve", "make serve &", "wait"):
            continue
        done = checkout.run(command.text)
        if done.returncode:
            failed.append(f"{command}\n-> {done.returncode}: {done.stderr[-500:]}")
    assert not failed, "\n\n".join(failed)


@pytest.mark.slow
def test_python_of_the_readme_runs(root: Path, checkout: Checkout) -> None:
    for code in read_code((root / "README.md").read_text(encoding="utf-8"), "python"):
        python = [str(checkout.folder / ".venv/bin/python"), "-c", code]
        done = subprocess.run(python, cwd=checkout.folder, env=checkout.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def has_option(shown: str, option: str) -> bool:
    """Whether a help text names an option, and not only a longer one that begins with it."""
    return re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown) is not None


def test_option_that_begins_another_is_not_found_in_it() -> None:
    assert has_option("-n, --num-outputs N", "-n") and not has_option("--num-outputs N", "-n")
    assert has_option("[--image PATH]", "--image") and not has_option("--image-weight W", "--image")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # programs that something else imported
@pytest.mark.parametrize("page", PAGES)
def test_options_of_commands_that_are_not_run_exist(root: Path, page: str) -> None:
    missing = []
    for command in commands_of(root, page):
        programs = list(PROGRAM.finditer(command.text)) if reason(command) else []
        ends = [*(program.start() for program in programs), len(command.text)][1:]
        for program, end in zip(programs, ends, strict=False):
            arguments = command.text[program.end() : end].split(" #")[0]
            code, shown = help_of(program[1])
            if code:
                missing.append(f"{command}: {program[1]} --help fails: {shown[-300:]}")
            options = re.findall(r"(?<!\S)--?[a-z][a-z-]*", arguments)
            missing += [
                f"{command}: {program[1]} has no {option}" for option in options if not has_option(shown, option)
            ]
    assert not missing, "\n".join(missing)


def test_docs_have_commands_to_run(root: Path) -> None:
    assert sum(len(commands_of(root, page)) for page in PAGES) > 30
    assert any(not reason(command) for command in commands_of(root, "README.md"))


@pytest.mark.parametrize(
    ("block", "statements"),
    [
        ("a\nb # why\n", [(0, "a"), (1, "b # why")]),
        ("# only a comment\n\na\n", [(2, "a")]),
        ("a \\\n  --b\nc\n", [(0, "a \\\n  --b"), (2, "c")]),
        ("python -c 'one\ntwo' x\nc\n", [(0, "python -c 'one\ntwo' x"), (2, "c")]),
        ('a "it\'s" &\nwait\n', [(0, 'a "it\'s" &'), (1, "wait")]),
        ("cat <<EOF > x\nb\nEOF\nc\n", [(0, "cat <<EOF > x\nb\nEOF"), (3, "c")]),
        ("for i in 1 2; do\necho $i\ndone\n", [(0, "for i in 1 2; do\necho $i\ndone")]),
    ],
)
def test_blocks_are_split_into_statements(block: str, statements: list[tuple[int, str]]) -> None:
    assert list(split_statements(block)) == statements


def test_commands_are_read_from_sessions_and_not_from_other_languages() -> None:
    page = (
        "text\n```console\n$ a\noutput\n$ b\n```\n<!-- not run: needs a GPU -->\n```sh\nc\n```\n\n```python\nd\n```\n"
        "<!-- not run: too long ago -->\n\nwords\n```bash\ne\n```\n"
    )
    found = [(command.line, command.text, command.not_run) for command in read_commands("p", page)]
    assert found == [(3, "a", ""), (5, "b", ""), (9, "c", "needs a GPU"), (19, "e", "")]
