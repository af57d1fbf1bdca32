"""`python -m clipgen generate --shards`: one process's part of many prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from clipgen.cli import common as t
from clipgen.outputs.metadata import weights_digest
from clipgen.outputs.shards import claim, missing, write_shard
from clipgen.pipeline import ClipGen
from clipgen.request import GenerationRequest, new_seed
from clipgen.utils.distributed import Processes


def write_shards(
    folder: Path,
    requests: Sequence[GenerationRequest],
    seed: int | None,
    suffix: str,
    as_json: bool,
    model: tuple[str | None, str | None, str | None],
) -> None:
    """Draw this process's shards that are not there yet, and print the path of each when it is.

    Args:
        requests: one a prompt; their seed does not count.
        seed: None takes the folder's own, or a new one.
        suffix: format of the pictures.
        model: --weights, --device and --dtype.

    Raises:
        OutputError: the folder holds other shards, or cannot be written.
    """
    weights, device, dtype = t.find_weights(model[0]), *model[1:]
    processes = Processes.from_environment()
    digest = weights_digest(weights)
    requests = claim(folder, requests, digest, suffix, seed, new_seed)
    todo = missing(folder, len(requests), processes.rank, processes.count)
    if not todo:
        t.log(f"process {processes.rank + 1} of {processes.count}: all of its shards are in {folder}")
        return
    pipe = ClipGen.from_pretrained(weights, processes.device(device), dtype)
    for shard in todo:
        started = time.perf_counter()
        pictures = write_shard(pipe, shard, requests, digest, suffix, t.log)
        seconds = round(time.perf_counter() - started, 3)
        record = {"shard": str(shard.path), "prompts": len(shard.prompts), "pictures": pictures, "seconds": seconds}
        print(json.dumps(record) if as_json else f"{shard.path}: {pictures} pictures, {seconds:.1f} s", flush=True)
