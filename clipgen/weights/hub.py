"""Model folders from the Hugging Face Hub: hf://user/repo or hf://user/repo@revision.

Only the files of a model folder are fetched (.safetensors, .yaml and .json), all from one commit, and their hashes are
compared with the manifest before they are used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from clipgen.errors import ConfigError, DownloadError, WeightsError
from clipgen.utils.text import expand_home, first_line
from clipgen.weights.cache import Settings
from clipgen.weights.model_dir import MANIFEST, read_manifest, verify_model_dir

PREFIX = "hf://"
_ADDRESS = re.compile(r"hf://(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def fetch_from_hub(address: str, settings: Settings, log: Callable[[str], None]) -> Path:
    """Fetch the model folder "hf://user/repo[@branch, tag or commit]" into the cache and verify it.

    HF_ENDPOINT and HF_TOKEN work as for other tools. Files are kept in $HF_HOME or $HF_HUB_CACHE if set, else in
    `hub` in our own cache. Without a connection, what was fetched before is used.

    Raises:
        ConfigError: the address has another form.
        DownloadError: huggingface_hub is not installed, or a file cannot be fetched.
        WeightsError: the repository holds no model folder, or its files differ from its manifest.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f"{address!r} is not a model on the Hub; write hf://user/repo or hf://user/repo@revision")
    manifest = _fetch_file(match["repo"], match["revision"], MANIFEST, settings)
    folder, commit = manifest.parent, manifest.parent.name
    names = tuple(read_manifest(manifest))
    if not all((folder / name).is_file() for name in names):
        log(f"fetching {address} (commit {commit[:10]})")
    for name in names:
        _fetch_file(match["repo"], commit, name, settings)
    try:
        verify_model_dir(folder)
    except WeightsError as damage:
        if settings.offline:
            raise
        log(f"{damage}. The files are fetched again")
        for name in names:
            _fetch_file(match["repo"], commit, name, settings, again=True)
        verify_model_dir(folder)
    return folder


def _hub_cache(settings: Settings) -> Path:
    """Cache folder: $HF_HUB_CACHE or $HF_HOME/hub if set, else `hub` in clipgen's cache."""
    if named := os.environ.get("HF_HUB_CACHE"):
        return expand_home(named)
    home = os.environ.get("HF_HOME")
    return (expand_home(home) if home else settings.cache) / "hub"


def _network_error(hub_error: type[Exception]) -> type[Exception]:
    """The error of huggingface_hub's HTTP library, such as for a broken connection: the base of its own."""
    return next(base for base in hub_error.__bases__ if issubclass(base, Exception))


def _fetch_file(repo: str, revision: str | None, name: str, settings: Settings, again: bool = False) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise DownloadError(
            f"hf://{repo} needs the package huggingface_hub: pip install 'clipgen[hub]' or huggingface_hub"
        ) from None
    place = f"hf://{repo}" + (f"@{revision}" if revision else "")
    try:
        return Path(
            hf_hub_download(
                repo,
                name,
                revision=revision,
                cache_dir=_hub_cache(settings),
                endpoint=os.environ.get("HF_ENDPOINT") or None,
                local_files_only=settings.offline,
                force_download=again,
            )
        )
    except RevisionNotFoundError as error:
        raise DownloadError(f"{place}: the repository has no branch, tag or commit of that name") from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"{place}: no such repository, or it is private or gated; check the name, and set HF_TOKEN for access"
        ) from error
    except LocalEntryNotFoundError as error:
        reason = "CLIPGEN_OFFLINE is set" if settings.offline else "the Hub cannot be reached"
        raise DownloadError(f"{place}: {name} is not in the cache, and {reason}") from error
    except EntryNotFoundError as error:
        raise WeightsError(
            f"{place} has no {name}: it is not a clipgen model; `ClipGen.save_pretrained` writes what belongs there"
        ) from error
    except (OSError, ValueError, _network_error(HfHubHTTPError)) as error:
        reason = first_line(error)
        raise DownloadError(f"{place}: {name} cannot be fetched: {reason}") from error
