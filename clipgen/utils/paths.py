"""Folder of downloads."""

from __future__ import annotations

import os
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
