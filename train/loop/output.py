"""Output folders of training scripts: where they may lie, and that one training at a time writes there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from clipgen.errors import OutputError
from clipgen.images.search import is_remote
from clipgen.utils.text import expand_home
from train.loop.lock import lock_folder


def check_output(data: str, out: Path) -> None:
    """Check that `out` is not searched for data by what `--data` names, now or when the training is resumed.

    Raises:
        OutputError: `out` lies where `data` is searched.
    """
    pattern = re.search(r"[*?\[{]", data)
    if data.endswith(".tar") or is_remote(data):
        return  # these name their files
    folder = expand_home(os.path.dirname(data[: pattern.start()]) or "." if pattern else data)
    if not folder.is_dir() or (folder / "index.json").is_file():  # the latter is an encoded set, read by name
        return
    if out.resolve().is_relative_to(folder.resolve()):
        raise OutputError(
            f"--out {out} lies inside the data, {folder}, so that the images written there would be read as data; "
            "give an --out elsewhere"
        )


@contextmanager
def lock_output(out: Path) -> Iterator[None]:
    """Keep other processes from writing into OUT; of the processes of one training, the main one does so.

    Raises:
        OutputError: another process writes there; the message names it.
    """
    with lock_folder(out) if os.environ.get("RANK", "0") == "0" else nullcontext():
        yield
