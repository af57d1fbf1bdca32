"""Encode images into tokens and embeddings once, so that stage 2 reads no pixels.

    python train/encode.py --config mini --data photos --vqgan runs/vqgan --clip clip.safetensors --out runs/encoded
    torchrun --nproc-per-node 8 train/encode.py ...

Both encoders are frozen, so a crop's tokens and embedding never change during stage 2. `stage2.views` random crops of
each image are encoded, in shards that are written completely or not at all: the same command continues an interrupted
run. OUT/index.json records the hashes of the images and networks, so that stage 2 never trains on the tokens of others.

--seen is a second folder with an image of the same name for each of --data. CLIP embeds that image instead, so that the
layout the GPT generates can differ from the layout that CLIP understands.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import track
from torch import Tensor

from clipgen.config import GPTConfig, VQGANConfig
from clipgen.errors import DataError
from clipgen.models.clip import Clip
from clipgen.models.vqgan import VQGAN
from clipgen.utils.files import sha256, write_text
from clipgen.weights.tensor_file import load_tensors
from train.config import Config
from train.data.images import Batch, Images, Key, PairedImages
from train.loop.batches import build_accelerator, process_rows, to_device
from train.loop.checkpoint import save_tensors
from train.loop.loader import image_batches
from train.loop.optimization import load_model_weights
from train.loop.output import check_output, lock_output
from train.loop.script import command, list_failures, parse_args, report_failures
from train.loop.stopping import Stop

ROWS = 4096
"""Crops of one shard."""
BATCH = 64
"""Crops encoded at once."""


Rows = Sequence[int]
"""Rows of an encoded set of N images: row r is crop r // N of image r % N."""


@dataclass(frozen=True)
class Encoders:
    """The two frozen networks and the images that they encode.

    Attributes:
        views: crops of each image.
        seed: of the crops.
        origin: hashes of images and networks, and the settings of the crops, as written to index.json.
    """

    accelerator: Accelerator
    data: Images
    vqgan: VQGAN
    clip: Clip
    views: int
    seed: int
    origin: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.vqgan.to(self.accelerator.device)
        self.clip.to(self.accelerator.device)

    @property
    def num_images(self) -> int:
        return len(self.data)

    @property
    def failures(self) -> dict[str, str]:
        return self.data.failures

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the images."""
        return self.origin["images"]

    def read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) int64 and unit-norm embeddings (B, D) float32 of some rows, on the CPU."""
        (encoded,) = self.read_each([rows], workers=0)
        return encoded

    def read_each(self, parts: Sequence[Rows], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and embeddings, as from `read`, of each list of rows; worker processes decode the images ahead."""
        chunks = [rows[start : start + BATCH] for rows in parts for start in range(0, len(rows), BATCH)]
        images = image_batches(self.data, lambda chunk: self._keys(chunks[chunk]), range(len(chunks)), workers)
        encoded = map(self._encode, images)
        for rows in parts:
            tokens, embeddings = zip(*islice(encoded, -(-len(rows) // BATCH)), strict=True)
            yield torch.cat(tokens).cpu(), torch.cat(embeddings).cpu()

    def batches(
        self, rows: Callable[[int], Rows], start: int, workers: int, stop: Stop | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and embeddings of every step from `start` on, on the device; each process encodes its part.

        Nothing waits for the device, so its next step is queued while it computes.
        """

        def keys(step: int) -> list[Key]:
            step_rows = rows(step)
            return self._keys(step_rows)[process_rows(self.accelerator, len(step_rows))]

        for batch in image_batches(self.data, keys, count(start), workers, stop):
            tokens, embeddings = map(self.accelerator.gather, self._encode(batch))
            yield tokens, embeddings

    def _keys(self, rows: Rows) -> list[Key]:
        # Odd seeds mirror: so an image's views alternate.
        return [(row % len(self.data), 2 * hash((self.seed, row)) + row // len(self.data) % 2) for row in rows]

    @torch.no_grad()
    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = self.accelerator.device
        with self.accelerator.autocast():
            z = self.vqgan.encode(to_device(batch.pixels, device))
            embeddings = self.clip.encode_image(to_device(batch.clip, device))
        # Outside of autocast: the nearest code must be the one that decoding will use.
        return self.vqgan.quantizer(z)[2], embeddings.half().float()  # rounded as in the shards


def load_encoders(
    config: Config,
    data: str,
    vqgan: VQGAN,
    files: Mapping[str, Path],
    accelerator: Accelerator,
    seen: str | None = None,
) -> Encoders:
    """Find the images and load CLIP.

    Args:
        data: folder, list or shards of images.
        files: the weights of "vqgan" and "clip".
        seen: images of the same names, for CLIP.

    Raises:
        DataError: there are no images, `seen` has other names, or CLIP's embeddings do not fit the GPT.
        WeightsError: weights are missing or cannot be read.
    """
    c, clip = config.stage2, load_clip(config.model.gpt, files["clip"])
    sizes = config.model.vqgan.image_size, c.min_scale, c.views > 1, clip.image_size
    images = PairedImages(data, seen, *sizes) if seen else Images(data, *sizes)
    settings = {"views": c.views, "min_scale": c.min_scale, "seed": c.seed}
    origin = {"images": images.fingerprint(), "settings": settings} | hashes(files)
    return Encoders(accelerator, images, vqgan, clip, c.views, c.seed, origin)


def load_clip(config: GPTConfig, path: Path) -> Clip:
    """Load the frozen CLIP.

    Raises:
        WeightsError: the file is missing, or is not a CLIP in .safetensors.
        DataError: its embeddings do not fit the GPT.
    """
    clip = Clip.from_state_dict(load_tensors(path))
    if clip.embed_dim != config.n_cond:
        raise DataError(f"{path} has embeddings of {clip.embed_dim} numbers, gpt.n_cond is {config.n_cond}")
    return clip


def load_vqgan(config: VQGANConfig, path: Path) -> VQGAN:
    """Load the frozen VQGAN of stage 1.

    Raises:
        WeightsError: the file is missing, is not .safetensors, or does not fit the configuration.
    """
    vqgan = VQGAN(config).requires_grad_(False).eval()
    load_model_weights(vqgan, path)
    return vqgan


def hashes(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of each file."""
    return {name: sha256(path) for name, path in files.items()}


def write_shards(encoders: Encoders, out: Path, workers: int, stop: Stop) -> None:
    """Encode the shards that are missing in a folder, each process its share. All processes must call this.

    Raises:
        DataError: the folder holds shards of other networks, images or settings.
    """
    accelerator, index = encoders.accelerator, out / "index.json"
    if index.is_file():
        check_origin(index, encoders.origin)
    total = encoders.num_images * encoders.views
    header = {"origin": encoders.origin, "rows": total, "rows_per_shard": ROWS}
    stop.wait_for_others()
    if accelerator.is_main_process and not index.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_text(index, json.dumps(header | {"complete": False}, indent=1))
    missing = [n for n in range(-(-total // ROWS)) if not shard_path(out, n).is_file()]
    stop.wait_for_others()  # no process writes a shard before all have listed the missing ones
    own = missing[accelerator.process_index :: accelerator.num_processes]
    encoded = encoders.read_each([range(n * ROWS, min(total, (n + 1) * ROWS)) for n in own], workers)
    rounds = range(-(-len(missing) // accelerator.num_processes))
    shown = f"encoding {len(missing)} shards of {ROWS} crops"
    for i in track(rounds, shown) if accelerator.is_main_process and rounds else rounds:
        if stop.requested():
            stop.leave(f"{len(missing) - i * accelerator.num_processes} shards of {out} are missing")
        tokens, embeddings = next(encoded, (None, None))
        stop.wait_for_others()
        # Listed before the shard exists: what is there is not encoded again, so its failures would never be known.
        list_failures(accelerator, out, encoders.failures)
        if tokens is not None and embeddings is not None:
            save_tensors({"tokens": tokens.to(torch.int32), "embeddings": embeddings.half()}, shard_path(out, own[i]))
    stop.wait_for_others()  # until every process has written its last shard
    report_failures(accelerator, out, encoders.failures)
    if accelerator.is_main_process:
        write_text(index, json.dumps(header | {"complete": True}, indent=1))
    stop.wait_for_others()


def shard_path(folder: Path, number: int) -> Path:
    """Path of a shard of an encoded set."""
    return folder / f"{number:06d}.safetensors"


def read_index(path: Path) -> dict[str, Any]:
    """Read the index.json of an encoded set.

    Raises:
        DataError: the file is damaged, or belongs to something else.
    """
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        if {"views"} <= header["origin"]["settings"].keys() and header.keys() >= {"complete", "rows", "rows_per_shard"}:
            return header
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise DataError(f"{path} is damaged or not the index of an encoded set; delete it and encode again")


def check_origin(index: Path, origin: Mapping[str, Any]) -> None:
    """Refuse an encoded set that comes from other images, networks or settings.

    Raises:
        DataError: something differs; the message names it.
    """
    old = read_index(index)["origin"]
    settings, old_settings = origin.get("settings", {}), old["settings"]
    parts = ("vqgan", "clip", "images")  # earlier versions wrote a list of names, "pictures", in place of "images"
    changed = [name for name in parts if old.get(name, origin.get(name)) != origin.get(name, old.get(name))]
    changed += [
        f"{name} ({old_settings[name]}, not {settings[name]})"
        for name in settings
        if old_settings[name] != settings[name]
    ]
    if changed:
        raise DataError(
            f"{index.parent} was encoded with another {', '.join(changed)}; encode again into another folder"
        )


class Encoded:
    """An encoded set: tokens (N, T) and embeddings (N, D), read from disk when rows are asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises: DataError: there is no encoded set, or it is not complete."""
        self.failures: dict[str, str] = {}  # were reported when the set was written
        index = folder / "index.json"
        if not index.is_file():
            raise DataError(f"{folder} holds no index.json; `python train/encode.py --out {folder}` writes one")
        header = read_index(index)
        if not header["complete"]:
            raise DataError(f"{folder} is not complete; run train/encode.py again, it goes on where it stopped")
        self.origin: Mapping[str, Any] = header["origin"]
        origin = self.origin
        self.fingerprint: str = origin.get("images", origin.get("pictures", ""))  # "pictures" in earlier versions
        self._rows, self._per_shard = int(header["rows"]), int(header["rows_per_shard"])
        self.views = origin["settings"]["views"]
        self.num_images = self._rows // self.views
        shards = range(-(-self._rows // self._per_shard))
        self._shards = [load_tensors(shard_path(folder, n)) for n in shards]  # mapped, not read

    def __len__(self) -> int:
        return self._rows

    def read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) int64 and unit-norm embeddings (B, D) float32 of some rows."""
        places = [divmod(row, self._per_shard) for row in rows]
        tokens = torch.stack([self._shards[shard]["tokens"][at] for shard, at in places])
        embeddings = torch.stack([self._shards[shard]["embeddings"][at] for shard, at in places])
        return tokens.long(), embeddings.float()

    def batches(
        self, rows: Callable[[int], Rows], start: int, workers: int = 0, stop: Stop | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and embeddings, as from `read`, of every step from `start` on."""
        return (self.read(rows(step)) for step in count(start))

    def embeddings(self) -> Tensor:
        """All embeddings, (N, D) float32."""
        return torch.cat([shard["embeddings"] for shard in self._shards]).float()


@command
def main() -> None:
    paths = {"vqgan": "folder of stage 1, with vqgan.safetensors", "clip": "CLIP weights, .safetensors"}
    args, config = parse_args(__doc__ or "", paths, optional={"seen": "images for CLIP, in place of --data"})
    if args.seen:
        check_output(args.seen, args.out)
    with lock_output(args.out):
        accelerator, stop = build_accelerator(config.stage2), Stop()
        files = {"vqgan": args.vqgan / "vqgan.safetensors", "clip": args.clip}
        vqgan = load_vqgan(config.model.vqgan, files["vqgan"])
        encoders = load_encoders(config, args.data, vqgan, files, accelerator, args.seen)
        write_shards(encoders, args.out, config.stage2.workers, stop)
        if accelerator.is_main_process:
            print(f"{args.out}: {encoders.views} crops of each of {encoders.num_images} images")


if __name__ == "__main__":
    main()
