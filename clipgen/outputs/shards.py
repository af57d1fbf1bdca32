"""Many prompts -> WebDataset shards: drawn by any number of processes, resumed after a kill.

FOLDER/index.json     what is drawn: prompts, settings, seed, weights; another is refused
       000000.tar     the first 64 prompts: 000000-1.png and its receipt 000000-1.json, 000000-2.png, ...
       .000001*       a shard under way, or what a killed process left of it

A shard is complete or not there. It is drawn by itself, so its bytes do not depend on how many processes there are;
which of them draws it follows from its number alone, so they need not talk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from PIL import Image

from clipgen.errors import OutputError
from clipgen.images.pixels import save_image
from clipgen.outputs.metadata import KEY, image_digest
from clipgen.request import GenerationRequest
from clipgen.utils.files import write_text

if TYPE_CHECKING:
    from clipgen.pipeline import ClipGen

PROMPTS = 64
"""Prompts of one shard, and so the most that a kill costs each process."""
CANDIDATES = 64
"""Candidates drawn together."""
INDEX = "index.json"


@dataclass(frozen=True)
class Shard:
    """One shard to draw."""

    number: int
    path: Path
    prompts: range
    """Numbers of its prompts."""


def claim(
    folder: Path,
    requests: Sequence[GenerationRequest],
    weights: str,
    suffix: str,
    seed: int | None,
    new_seed: Callable[[], int],
) -> list[GenerationRequest]:
    """Make a folder this work's own, or see that it is: the first process to come writes its index.

    Args:
        folder: made if it does not exist.
        requests: one a prompt, alike but for the prompt; their seed does not count.
        weights: digest of the model (`receipt.weights_digest`).
        suffix: format of the pictures.
        seed: None takes the folder's, or a new one.

    Returns:
        The requests with the seed that all processes use.

    Raises:
        OutputError: the folder holds shards of other prompts, settings or weights, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            path = folder / INDEX
            before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            if before is None:
                before = _about(requests, weights, suffix) | {"seed": new_seed() if seed is None else seed}
                write_text(path, json.dumps(before, indent=1) + "\n")
    except (OSError, ValueError) as error:
        raise OutputError(f"--shards '{folder}' cannot be used: {error}") from error
    now = _about(requests, weights, suffix) | {"seed": before.get("seed") if seed is None else seed}
    other = [f"{name} ({before.get(name)}, not {value})" for name, value in now.items() if before.get(name) != value]
    if other:
        raise OutputError(
            f"{folder} was begun with another {', '.join(other)}; give another folder, or the same settings"
        )
    return [replace(request, seed=before["seed"]) for request in requests]


def missing(folder: Path, prompts: int, rank: int, count: int) -> list[Shard]:
    """The shards that process `rank` of `count` still has to draw."""
    shards = range(rank, -(-prompts // PROMPTS), count)
    every = [Shard(n, folder / f"{n:06d}.tar", range(n * PROMPTS, min((n + 1) * PROMPTS, prompts))) for n in shards]
    return [shard for shard in every if not shard.path.is_file()]


def write_shard(
    pipe: ClipGen,
    shard: Shard,
    requests: Sequence[GenerationRequest],
    weights: str,
    suffix: str,
    log: Callable[[str], None] = lambda message: None,
) -> int:
    """Draw one shard; it gets its name when it is complete.

    Args:
        requests: those of all prompts.
        weights, suffix: as for `claim`.
        say: told of prompts that are too long.

    Returns:
        How many pictures it holds.

    Raises:
        OutputError: it cannot be written.
    """
    work, packed = (shard.path.with_name(f".{shard.number:06d}{end}") for end in ("", ".tmp"))
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        try:
            files = list(_draw(pipe, shard, requests, weights, suffix, work, log))
            _pack(files, packed)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        os.replace(
            packed, shard.path
        )  # the last step: a finished shard leaves nothing beside it, whenever it is killed
    except OSError as error:
        packed.unlink(missing_ok=True)
        raise OutputError(f"{shard.path} cannot be written: {error.strerror or error}") from error
    return len(files) // 2


def _draw(
    pipe: ClipGen,
    shard: Shard,
    requests: Sequence[GenerationRequest],
    weights: str,
    suffix: str,
    work: Path,
    log: Callable[[str], None],
) -> Iterator[Path]:
    """Draw a shard's pictures into a folder; yields the files in the order of the tar."""
    size = max(1, CANDIDATES // requests[0].num_candidates)
    for start in range(shard.prompts.start, shard.prompts.stop, size):
        numbers = range(start, min(start + size, shard.prompts.stop))
        results = pipe.generate([requests[n] for n in numbers])
        for n, result in zip(numbers, results, strict=True):
            if result.truncated:
                log(f"prompt {n} is too long for the model, which did not read this part: {result.truncated}")
            for place, (image, record) in enumerate(
                zip(result.images, result.receipts, strict=True), start=1
            ):
                metadata = record.to_metadata()
                # The key ends at the first dot, and both files of a sample have the same.
                yield save_image(image, work / f"{n:06d}-{place}.{suffix}", metadata=metadata)
                text = work / f"{n:06d}-{place}.json"
                text.write_text(metadata[KEY] + "\n", encoding="utf-8")
                yield text


def _pack(files: Sequence[Path], path: Path) -> None:
    """An uncompressed tar of nothing but names and contents: the same files are the same bytes."""
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for member in files:
                info = tarfile.TarInfo(member.name)
                info.size, info.mode = member.stat().st_size, 0o644
                with member.open("rb") as contents:
                    tar.addfile(info, contents)
        file.flush()
        os.fsync(file.fileno())


def _about(requests: Sequence[GenerationRequest], weights: str, suffix: str) -> dict[str, Any]:
    """What a folder's shards hold, as JSON: the settings that all requests share, and a fingerprint of the prompts."""
    names = [field.name for field in fields(GenerationRequest) if field.name not in ("prompt", "seed")]
    prompts = json.dumps([_plain(request.prompt) for request in requests])
    return {
        "prompts": len(requests),
        "prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
        "prompts_per_shard": PROMPTS,
        **{name: _plain(getattr(requests[0], name)) for name in names},
        "format": suffix,
        "weights": weights,
    }


def _plain(value: Any) -> Any:
    """A prompt or a setting as JSON; pictures become their fingerprints."""
    if isinstance(value, Image.Image):
        return image_digest(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
