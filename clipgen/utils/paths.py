"""Paths from settings and the command line, and the cache folder: `~` and $CLIPGEN_CACHE, or a plain refusal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from clipgen.errors import ConfigError


def expand_path(path: str | Path) -> Path:
    """A path with `~` and `~user` replaced by the home folder.

    Raises:
        ConfigError: the home folder is not known. Containers that run as a user without a passwd entry have none.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(f"{str(path)!r}: there is no such home folder here; set HOME, or give a path without ~")
    return Path(expanded)


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Folder of downloads, whether it exists or not: $CLIPGEN_CACHE, by default ~/.cache/clipgen.

    Raises:
        ConfigError: neither that variable nor a home folder is known.
    """
    named = environ.get("CLIPGEN_CACHE", "").strip()
    if named:
        return expand_path(named)
    try:
        return expand_path("~/.cache/clipgen")
    except ConfigError:
        raise ConfigError("no folder for downloads: there is no home folder here; set CLIPGEN_CACHE to one") from None
