"""Receipts: what every written file says about how it was drawn, so that it can be drawn again.

A receipt is one JSON object under the name `clipgen` in the file's metadata. `receipt_rules` says what may stand in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from clipgen import __version__
from clipgen.errors import DataError
from clipgen.images.pixels import read_metadata, to_rgb
from clipgen.outputs.metadata_rules import MAX_NAME, MAX_TEXT, VERSION, checked, parse
from clipgen.request import MAX_SEED, GenerationOutput, GenerationRequest, Part, parts_of
from clipgen.weights.model_dir import MANIFEST, read_manifest

if TYPE_CHECKING:
    from clipgen.pipeline import ClipGen

KEY = "clipgen"
SAMPLING = ("guidance", "temperature", "top_k", "top_p")
MAX_BYTES = 60_000
"""Of prompt and negative prompt, as they are written: a JPEG's EXIF holds 64 KB."""


@dataclass(frozen=True)
class PromptPart:
    """A text, or the fingerprint of an image, and its weight."""

    weight: float
    text: str = ""
    image: str = ""
    """SHA-256 of the picture (`image_digest`); "" for a text."""
    name: str = ""
    """The image's file name, where it came from a file."""


@dataclass(frozen=True)
class Receipt:
    """Of one picture: what was asked, of which model, and what came out. Every setting is the one that was used."""

    prompt: tuple[PromptPart, ...]
    seed: int
    """Of the request."""
    image_seed: int
    """Of this picture: the same request with this seed and one candidate draws it again."""
    index: int
    """Its rank by CLIP among the pictures that were kept: 0 is the best."""
    num_outputs: int
    candidates: int
    """Pictures that were drawn to choose from."""
    guidance: float
    temperature: float
    top_k: int
    top_p: float
    keep: str
    """`image_digest` of the picture whose top `keep_rows` rows of tokens were kept; "" when none was."""
    keep_rows: int
    score: float
    """Cosine of its CLIP embedding and the prompt's."""
    model: str
    weights: str
    """`weights_digest` of the folder it was drawn with."""
    dtype: str
    device: str
    """Kind and name, such as "cpu AVX512": another may round differently."""
    torch: str
    software: str
    """Version of clipgen."""
    negative: tuple[PromptPart, ...] = ()
    """What guidance moved away from; () for nothing in particular."""
    shortened: bool = False
    """Texts were too long to be kept whole: nothing draws this again."""

    @property
    def text(self) -> str:
        """The prompt for people: its texts, and its images by name, with weights that are not 1."""
        return _for_people(self.prompt) + (f", not {_for_people(self.negative)}" if self.negative else "")

    def request(self, pictures: Mapping[str, Image.Image] | None = None) -> GenerationRequest:
        """What draws this picture, and no other, again: `GenerationOutput.images[GenerationOutput.seeds.index(image_seed)]`.

        Args:
            pictures: the images among the parts of prompt and negative prompt and the one to keep rows of, by their
                `image_digest`.

        Raises:
            DataError: one of them is not given, or the prompt was shortened.
        """
        if self.shortened:
            raise DataError("the prompt was too long for the receipt, which holds only its beginning")
        parts = _restored(self.prompt, pictures)
        settings: dict[str, Any] = {name: getattr(self, name) for name in SAMPLING}
        settings["negative"] = _restored(self.negative, pictures) or None
        if self.keep:
            settings |= {"keep": _find(pictures, self.keep), "keep_rows": self.keep_rows}
        if self.image_seed <= MAX_SEED:
            return GenerationRequest(parts, seed=self.image_seed, **settings)
        drawn = self.image_seed - self.seed + 1  # no request begins behind the last seed: draw those before it too
        return GenerationRequest(parts, drawn, drawn, seed=self.seed, **settings)

    def to_metadata(self) -> dict[str, str]:
        """What `images.save_image` embeds: names and texts, at most 64 KB of them."""
        return {KEY: json.dumps({"version": VERSION, **asdict(self)})}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Receipt:
        """Read what `to_metadata` wrote, or anything else.

        Raises:
            DataError: there is no receipt, it is damaged, of another version, or asks for what cannot be.
        """
        if KEY not in metadata:
            raise DataError("there is no receipt in it; a copy that another program made may have lost it")
        record = parse(metadata[KEY])
        if isinstance(record, list):
            raise DataError(f"it holds {len(record)} pictures; give the file of one of them")
        fields = checked(record)
        parts = {name: tuple(PromptPart(**part) for part in fields[name]) for name in ("prompt", "negative")}
        return cls(**fields | parts)

    @classmethod
    def from_file(cls, path: str | Path) -> Receipt:
        """The receipt of an image file.

        Raises:
            DataError: as `from_metadata`.
            DataError: the file cannot be read.
        """
        try:
            return cls.from_metadata(read_metadata(path))
        except DataError as error:
            raise DataError(f"'{path}': {error}") from None


def receipts(pipe: ClipGen, result: GenerationOutput, weights: str) -> list[Receipt]:
    """One receipt per picture of a result.

    Args:
        pipe: what drew it.
        result: what came out.
        weights: `weights_digest` of the pipe's folder.
    """
    request = result.request
    sampling = request.sampling(pipe.config.sampling)
    shared: dict[str, Any] = {
        "seed": result.seed,
        "num_outputs": request.num_outputs,
        "candidates": result.drawn,
        "keep": image_digest(request.keep) if request.keep else "",
        "keep_rows": request.keep_rows,
        **{name: getattr(sampling, name) for name in SAMPLING},
        "model": pipe.config.name,
        "weights": weights,
        "dtype": pipe.precision,
        "device": device_name(pipe.device),
        "torch": torch.__version__,
        "software": __version__,
    }
    shared |= _parts(request)
    own = zip(result.seeds, result.scores, strict=True)
    return [Receipt(image_seed=seed, index=i, score=round(score, 6), **shared) for i, (seed, score) in enumerate(own)]


def _parts(request: GenerationRequest) -> dict[str, Any]:
    """The parts of prompt and negative prompt, and whether their texts were shortened to fit into a file's metadata."""
    prompt, negative = parts_of(request.prompt), [] if request.negative is None else parts_of(request.negative)
    for limit in (MAX_TEXT >> halved for halved in range(MAX_TEXT.bit_length())):
        kept = [_part(part, float(weight), limit) for part, weight in prompt + negative]
        if len(_twice([asdict(part) for part in kept])) <= MAX_BYTES:
            break
    split = len(prompt)
    return {"prompt": tuple(kept[:split]), "negative": tuple(kept[split:]), "shortened": limit < MAX_TEXT}


def _part(part: Part, weight: float, limit: int) -> PromptPart:
    if isinstance(part, str):  # a longer text counts by its words alone: `clip.tokenize` collapses the space between
        return PromptPart(weight, part if len(part) <= limit else " ".join(part.split())[:limit])
    return PromptPart(weight, image=image_digest(part), name=str(part.info.get("name", ""))[:MAX_NAME])


def _restored(parts: Sequence[PromptPart], pictures: Mapping[str, Image.Image] | None) -> list[tuple[Part, float]]:
    """A prompt out of its parts."""
    return [(_find(pictures, part.image, part.name) if part.image else part.text, part.weight) for part in parts]


def _for_people(parts: Sequence[PromptPart]) -> str:
    return " + ".join(
        (part.text or part.name or "an image") + ("" if part.weight == 1 else f" ({part.weight:g})") for part in parts
    )


def _twice(value: Any) -> str:
    """JSON in JSON, as EXIF carries it."""
    return json.dumps(json.dumps(value))


def _find(pictures: Mapping[str, Image.Image] | None, digest: str, name: str = "") -> Image.Image:
    """The picture that has this digest.

    Raises:
        DataError: it is not among them.
    """
    if digest not in (pictures or {}):
        shown = f"'{name}'" if name else "an image"
        raise DataError(f"it was drawn from {shown} (SHA-256 of its pixels {digest}), which is not here")
    return (pictures or {})[digest]


def together(records: Sequence[Receipt]) -> dict[str, str]:
    """Metadata of one file that shows several pictures, in reading order: as many of their receipts as fit."""
    found = [{"version": VERSION, **asdict(record)} for record in records]
    while len(found) > 1 and len(_twice(found)) > MAX_BYTES:
        found = found[: len(found) // 2]
    return {KEY: json.dumps(found)}


def weights_digest(folder: str | Path) -> str:
    """SHA-256 that stands for a folder's model: over the SHA-256s of its files, which the manifest holds.

    Raises:
        WeightsError: there is no manifest, or it is not one.
    """
    files = read_manifest(Path(folder) / MANIFEST)
    return hashlib.sha256("".join(entry["sha256"] for entry in files.values()).encode()).hexdigest()


def image_digest(image: Image.Image) -> str:
    """SHA-256 of a picture's size and 8-bit RGB pixels: the same whatever file they came from."""
    picture = to_rgb(image)
    return hashlib.sha256(f"{picture.width}x{picture.height}:".encode() + picture.tobytes()).hexdigest()


def device_name(device: torch.device) -> str:
    """Kind and name, of which rounding depends: "cpu AVX512", "cuda NVIDIA H200"."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
