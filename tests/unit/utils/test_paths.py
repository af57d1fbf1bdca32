"""Folders of caches, also for a user without a name or a home folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_kit import write_config, write_images

from clipgen.config import ModelConfig
from clipgen.utils.paths import cache_dir

NOBODY = 54321
"""A user id without a passwd entry, as containers run with."""


def test_cache_is_the_configured_folder_or_lies_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_dir({}) == cache_dir({"CLIPGEN_CACHE": "  "}) == Path("/home/someone/.cache/clipgen")
    assert cache_dir({"CLIPGEN_CACHE": "/c"}) == Path("/c")
    assert cache_dir({"CLIPGEN_CACHE": "~/c"}) == Path("/home/someone/c")


SCRIPT = f"""
import os
from clipgen.errors import ConfigError
from clipgen.utils.paths import cache_dir
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
for environ in ({{}}, {{"CLIPGEN_CACHE": "~/c"}}):
    try:
        print("took", cache_dir(environ))
    except ConfigError as error:
        print(error)
print(cache_dir({{"CLIPGEN_CACHE": "/c"}}))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_home_of_a_user_without_passwd_entry_and_home_is_refused() -> None:
    environ = {name: value for name, value in os.environ.items() if name not in ("HOME", "CLIPGEN_CACHE")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "no folder for downloads: there is no home folder here; set CLIPGEN_CACHE to one",
        "'~/c' begins with ~, but this user has no home folder; set HOME or give a full path",
        "/c",
    ]


NAMELESS = """
import os, pwd, runpy, sys
def unknown(*_):
    raise KeyError("getpwuid(): uid not found: 54321")
pwd.getpwuid = unknown
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""Runs a module as a user without a passwd entry would: what Python asks for the user's name knows none."""


def run_nameless(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    named = ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "CLIPGEN_CACHE")
    environ = {name: value for name, value in os.environ.items() if name not in named}
    full = [sys.executable, "-c", NAMELESS, *map(str, command)]
    return subprocess.run(full, cwd=folder, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_both_stages_train_for_a_user_without_name_and_home(
    tiny_config: ModelConfig, tiny_weights: Path, tmp_path: Path
) -> None:
    data, config = write_images(tmp_path), write_config(tiny_config, tmp_path / "tiny.yaml")
    common = ("--config", config, "--data", tmp_path / "0")
    for stage, more in (
        ("stage1", ()),
        ("stage2", ("--vqgan", tiny_weights, "--clip", tiny_weights / "clip.safetensors")),
    ):
        done = run_nameless(tmp_path, f"train.{stage}", *common, *more, "--out", tmp_path / "runs" / stage)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "stage2" / "gpt.safetensors").is_file() and not (data / "~").exists()


@pytest.mark.slow
def test_fetching_for_a_user_without_home_is_refused_in_one_line(tmp_path: Path) -> None:
    done = run_nameless(tmp_path, "clipgen", "weights", "fetch", "coco")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("clipgen: no folder for downloads: there is no home folder here; set CLIPGEN_CACHE to one\n")
    assert not list(tmp_path.iterdir())
