"""`make predict` passes any prompt unchanged, and installs once."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

STUB = """#!/bin/sh
echo "$@" >> "{log}"
[ "$2" = clipgen ] || exit 0
exec python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@"
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment whose python notes each call and, asked for clipgen, prints its arguments as JSON."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB.format(log=tmp_path / "calls"))
    python.chmod(0o755)
    return tmp_path / "venv"


def make(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "PROMPT"}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=root, env=clean | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "prompt",
    [
        "sketch of a lemon with hair",
        'it\'s a "lemon"; for $5 # not a comment',
        "$(shell touch {tmp}/pwned) $(touch {tmp}/pwned) `touch {tmp}/pwned`",
        "$$HOME ${HOME} %s \\n \\",
        "--help",
        "ein süßer Hund 🐶",
        "two\nlines",
    ],
)
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_make_predict_passes_the_prompt_unchanged(
    root: Path, tmp_path: Path, venv: Path, prompt: str, way: str
) -> None:
    prompt = prompt.replace("{tmp}", str(tmp_path))
    done = (
        make(root, "predict", f"VENV={venv}", f"PROMPT={prompt}")
        if way == "argument"
        else make(root, "predict", f"VENV={venv}", PROMPT=prompt)
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["-m", "clipgen", "generate", "--", prompt]
    assert not (tmp_path / "pwned").exists()


def test_second_run_installs_nothing(root: Path, tmp_path: Path, venv: Path) -> None:
    for _ in range(2):
        make(root, "predict", f"VENV={venv}", "PROMPT=a lemon")
    calls = (tmp_path / "calls").read_text().splitlines()
    installs = [call for call in calls if " install " in call]
    assert sum("requirements.txt" in call for call in installs) == 1
    assert calls[-2:] == ["-m clipgen generate -- a lemon"] * 2


def test_make_predict_without_a_prompt_is_refused(root: Path, tmp_path: Path, venv: Path) -> None:
    done = make(root, "predict", f"VENV={venv}")
    assert done.returncode == 2
    assert 'make predict PROMPT="' in done.stderr
    assert not (tmp_path / "calls").exists()


def test_unusable_python_is_refused(root: Path, tmp_path: Path) -> None:
    done = make(root, "predict", f"VENV={tmp_path}/none", "PROMPT=a lemon", "PYTHON=false")
    assert done.returncode == 2
    assert "needs Python 3.11" in done.stderr


def test_python_without_venv_is_refused(root: Path, tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\ncase $2 in *ensurepip*) exit 1 ;; esac\n")
    python.chmod(0o755)
    done = make(root, "predict", f"VENV={tmp_path}/none", "PROMPT=a lemon", f"PYTHON={python}")
    assert done.returncode == 2
    assert "python3-venv" in done.stderr
    assert not (tmp_path / "none").exists()
