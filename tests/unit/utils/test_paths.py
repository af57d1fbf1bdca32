"""The folder of downloads, also where there is no home folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipgen.utils.paths import cache_dir

NOBODY = 54321
"""A user id without a passwd entry, as containers run with."""


def test_cache_is_the_named_folder_or_lies_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_user_without_passwd_entry_and_home_gets_a_plain_refusal() -> None:
    environ = {name: value for name, value in os.environ.items() if name not in ("HOME", "CLIPGEN_CACHE")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "no folder for downloads: there is no home folder here; set CLIPGEN_CACHE to one",
        "'~/c' begins with ~, but this user has no home folder; set HOME or give a full path",
        "/c",
    ]
