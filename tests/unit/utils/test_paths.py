"""Paths with ~, and the cache folder, also where there is no home folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipgen.errors import ConfigError
from clipgen.utils.paths import cache_dir, expand_path

NOBODY = 54321
"""A user id without a passwd entry, as containers run with."""


def test_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert expand_path("~/w") == Path("/home/someone/w") and expand_path("~") == Path("/home/someone")
    assert expand_path("a/~b") == Path("a/~b") and expand_path(Path("w")) == Path("w")


def test_cache_is_the_named_folder_or_lies_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_dir({}) == cache_dir({"CLIPGEN_CACHE": "  "}) == Path("/home/someone/.cache/clipgen")
    assert cache_dir({"CLIPGEN_CACHE": "/c"}) == Path("/c")
    assert cache_dir({"CLIPGEN_CACHE": "~/c"}) == Path("/home/someone/c")


def test_home_of_an_unknown_user_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'~nosuchuser/w': there is no such home folder here; set HOME"):
        expand_path("~nosuchuser/w")


SCRIPT = f"""
import os
from clipgen.errors import ConfigError
from clipgen.utils.paths import cache_dir, expand_path
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
for work in (cache_dir, lambda: expand_path("~/w"), lambda: cache_dir({{"CLIPGEN_CACHE": "~/c"}})):
    try:
        print("took", work())
    except ConfigError as error:
        print(error)
print(cache_dir({{"CLIPGEN_CACHE": "/c"}}))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_user_without_passwd_entry_and_home_gets_a_plain_refusal() -> None:
    environ = {name: value for name, value in os.environ.items() if name not in ("HOME", "CLIPGEN_CACHE")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "no folder for downloads: there is no home folder here; set CLIPGEN_CACHE to one",
        "'~/w': there is no such home folder here; set HOME, or give a path without ~",
        "'~/c': there is no such home folder here; set HOME, or give a path without ~",
        "/c",
    ]
