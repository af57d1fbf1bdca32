"""Folders of caches: ours, and those of libraries, also for a user without a name or a home folder."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from clipgen.errors import ConfigError
from clipgen.utils.text import expand_home


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of downloads, whether it exists or not: $CLIPGEN_CACHE, by default ~/.cache/clipgen.

    Raises:
        ConfigError: neither that variable nor a home folder is known. Containers that run as a user without a passwd
            entry have no home folder.
    """
    named = environ.get("CLIPGEN_CACHE", "").strip()
    if named:
        return expand_home(named)
    try:
        return expand_home("~/.cache/clipgen")
    except ConfigError:
        raise ConfigError("no folder for downloads: there is no home folder here; set CLIPGEN_CACHE to one") from None


def place_library_caches() -> None:
    """Let libraries find folders for their caches where the user has no name or no home folder.

    Containers often run as a user without a passwd entry. PyTorch's compiler names its folder after the user and fails
    at import without a name; Triton would write into a folder called "~".
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    if os.path.expanduser("~") == "~":
        os.environ.setdefault("TRITON_HOME", os.path.join(tempfile.gettempdir(), f"triton-{os.getuid()}"))
