"""Find the model folder that a name, path or Hub address means, and the one to use when none is named.

The command line, the web page, the server and `ClipGen.from_pretrained` all ask `resolve_weights`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from clipgen.errors import WeightsError
from clipgen.utils.text import expand_home
from clipgen.weights.cache import Report, Settings, fetch
from clipgen.weights.catalog import CATALOG
from clipgen.weights.convert import convert_checkpoints
from clipgen.weights.hub import PREFIX, fetch_from_hub
from clipgen.weights.model_dir import MANIFEST, is_complete

PREFERRED = ("coco", "mini")
"""Models to use when none is named, best first."""

_PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = _PACKAGE / "_weights" if (_PACKAGE / "_weights").is_dir() else _PACKAGE.parent / "weights"
"""Folder of the models beside the code: weights/ of a checkout, clipgen/_weights/ of an installed wheel."""


def resolve_weights(
    weights: str | Path | None = None,
    log: Callable[[str], None] = lambda message: None,
    report: Report = lambda file, done, total: None,
) -> Path:
    """Return the model folder that `weights` means, fetching it first if it names a published model.

    Args:
        weights: a folder, where ~ is the home folder; a name: "mini", "coco"; or hf://user/repo[@revision]. None or
            "" means $CLIPGEN_WEIGHTS, or where that is not set the best model beside the code (`find_default`).
            A folder wins over a model of the same name.
        log: called with a line before something that takes long.
        report: called with a file of a published model, the bytes that are there and its size, while it is fetched.

    Raises:
        ConfigError: ~ is used and there is no home folder, or the Hub address is malformed.
        DownloadError: a file cannot be fetched.
        WeightsError: no such model, or the fetched files cannot be used.
    """
    text = str(weights or os.environ.get("CLIPGEN_WEIGHTS", "")).strip()
    if not text:
        return find_default()[0]
    if text.startswith(PREFIX):
        return fetch_from_hub(text, Settings.from_environment(), log)
    folder = expand_home(text)
    if folder.is_dir():
        return folder
    if Path(text).name == text and (SHIPPED / text / MANIFEST).is_file():
        return SHIPPED / text
    entry = CATALOG.get(text)
    if entry is not None and entry.config is not None:
        return _fetch_model(text, entry.config, log, report)
    names = ", ".join(sorted({"mini", *(name for name, entry in CATALOG.items() if entry.config)}))
    raise WeightsError(f"no weights in {folder}: no such folder, nor a model of that name; there is {names}")


def find_default() -> tuple[Path, str]:
    """Return the model folder to use when none is named, and the reason in a few words.

    Raises:
        WeightsError: there is none beside the code.
    """
    found = [name for name in PREFERRED if (SHIPPED / name / MANIFEST).is_file()]
    if not found:
        raise WeightsError(f"no weights in {SHIPPED}; name a model folder with --weights or CLIPGEN_WEIGHTS")
    partial = [name for name in PREFERRED[: PREFERRED.index(found[0])] if (SHIPPED / name).is_dir()]
    if partial:
        return SHIPPED / found[0], f"{SHIPPED / partial[0]} is incomplete: it has no {MANIFEST}"
    if len(found) > 1:
        return SHIPPED / found[0], f"it is the largest model in {SHIPPED}"
    hint = "in a checkout `clipgen weights fetch coco` adds a larger one"
    return SHIPPED / found[0], f"it is the only model in {SHIPPED}; {hint}"


def _fetch_model(name: str, config: str, log: Callable[[str], None], report: Report) -> Path:
    """Fetch a published model into the cache and convert it there, unless that has happened before."""
    settings = Settings.from_environment()
    folder = settings.cache / "models" / name
    if is_complete(folder):
        return folder
    files = fetch(CATALOG[name], settings, report=report, log=log)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):  # several containers may share a cache: the others wait
        if not is_complete(folder):
            log(f"converting {name} into {folder}")
            convert_checkpoints(files["clip"], files["vqgan"], files["gpt"], folder, config)
    return folder
