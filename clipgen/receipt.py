"""Receipts: what every written file says about how it was drawn, so that it can be drawn again.

A receipt is one JSON object under the name `clipgen` in the file's metadata. Files come from anywhere, so what is read
is checked field by field before it is used: a receipt can ask for nothing that a user could not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from clipgen import __version__
from clipgen.images import read_metadata, to_rgb
from clipgen.request import MAX_CANDIDATES, MAX_PARTS, MAX_SEED, Part, Request, Result, parts_of
from clipgen.weights import MANIFEST, read_manifest

if TYPE_CHECKING:
    from clipgen.pipeline import ClipGen

KEY = "clipgen"
VERSION = 1
SAMPLING = ("guidance", "temperature", "top_k", "top_p")
MAX_TEXT = 5_000
"""Characters of a text that are kept: more than the 64 * 77 that CLIP looks at (`clip.tokenize`)."""
MAX_NAME = 255
MAX_BYTES = 60_000
"""Of the prompt, as it is written: a JPEG's EXIF holds 64 KB."""
MAX_READ = 200_000
"""Characters of a receipt that are looked at."""


class ReceiptError(ValueError):
    """A file without a receipt, or with one that cannot be used; the message says why."""


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
    shortened: bool = False
    """Texts were too long to be kept whole: nothing draws this again."""

    @property
    def text(self) -> str:
        """The prompt for people: its texts, and its images by name, with weights that are not 1."""
        return " + ".join(
            (part.text or part.name or "an image") + ("" if part.weight == 1 else f" ({part.weight:g})")
            for part in self.prompt
        )

    def request(self, pictures: Mapping[str, Image.Image] | None = None) -> Request:
        """What draws this picture, and no other, again: `Result.images[Result.seeds.index(image_seed)]`.

        Args:
            pictures: the images among the prompt's parts and the one to keep rows of, by their `image_digest`.

        Raises:
            ReceiptError: one of them is not given, or the prompt was shortened.
        """
        if self.shortened:
            raise ReceiptError("the prompt was too long for the receipt, which holds only its beginning")
        parts: list[tuple[Part, float]] = [
            (_find(pictures, part.image, part.name) if part.image else part.text, part.weight) for part in self.prompt
        ]
        settings: dict[str, Any] = {name: getattr(self, name) for name in SAMPLING}
        if self.keep:
            settings |= {"keep": _find(pictures, self.keep), "keep_rows": self.keep_rows}
        if self.image_seed <= MAX_SEED:
            return Request(parts, seed=self.image_seed, **settings)
        drawn = self.image_seed - self.seed + 1  # no request begins behind the last seed: draw those before it too
        return Request(parts, drawn, drawn, seed=self.seed, **settings)

    def to_metadata(self) -> dict[str, str]:
        """What `images.save_image` embeds: names and texts, at most 64 KB of them."""
        return {KEY: json.dumps({"version": VERSION, **asdict(self)})}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Receipt:
        """Read what `to_metadata` wrote, or anything else.

        Raises:
            ReceiptError: there is no receipt, it is damaged, of another version, or asks for what cannot be.
        """
        if KEY not in metadata:
            raise ReceiptError("there is no receipt in it; a copy that another program made may have lost it")
        record = _parse(metadata[KEY])
        if isinstance(record, list):
            raise ReceiptError(f"it holds {len(record)} pictures; give the file of one of them")
        return _read(record)

    @classmethod
    def from_file(cls, path: str | Path) -> Receipt:
        """The receipt of an image file.

        Raises:
            ReceiptError: as `from_metadata`.
            ImageError: the file cannot be read.
        """
        try:
            return cls.from_metadata(read_metadata(path))
        except ReceiptError as error:
            raise ReceiptError(f"'{path}': {error}") from None


def receipts(pipe: ClipGen, result: Result, weights: str) -> list[Receipt]:
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
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": device_name(pipe.device),
        "torch": torch.__version__,
        "software": __version__,
    }
    prompt, shortened = _parts(request)
    own = zip(result.seeds, result.scores, strict=True)
    return [
        Receipt(prompt, image_seed=seed, index=i, score=round(score, 6), shortened=shortened, **shared)
        for i, (seed, score) in enumerate(own)
    ]


def _parts(request: Request) -> tuple[tuple[PromptPart, ...], bool]:
    """The prompt's parts, and whether their texts had to be shortened to fit into a file's metadata."""
    parts = parts_of(request.prompt)
    for limit in (MAX_TEXT >> halved for halved in range(MAX_TEXT.bit_length())):
        kept = tuple(_part(part, float(weight), limit) for part, weight in parts)
        if len(_twice([asdict(part) for part in kept])) <= MAX_BYTES:
            break
    return kept, limit < MAX_TEXT


def _part(part: Part, weight: float, limit: int) -> PromptPart:
    if isinstance(part, str):  # a longer text counts by its words alone: `clip.tokenize` collapses the space between
        return PromptPart(weight, part if len(part) <= limit else " ".join(part.split())[:limit])
    return PromptPart(weight, image=image_digest(part), name=str(part.info.get("name", ""))[:MAX_NAME])


def _twice(value: Any) -> str:
    """JSON in JSON, as EXIF carries it."""
    return json.dumps(json.dumps(value))


def _find(pictures: Mapping[str, Image.Image] | None, digest: str, name: str = "") -> Image.Image:
    """The picture that has this digest.

    Raises:
        ReceiptError: it is not among them.
    """
    if digest not in (pictures or {}):
        shown = f"'{name}'" if name else "an image"
        raise ReceiptError(f"it was drawn from {shown} (SHA-256 of its pixels {digest}), which is not here")
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


def _parse(text: str) -> Any:
    """JSON in which no name stands twice; that NaN is no number is for the rules to see."""
    if len(text) > MAX_READ:
        raise ReceiptError(f"its receipt has {len(text):,} characters; {MAX_READ:,} are allowed")
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ReceiptError(f"its receipt is damaged: no JSON ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _whole(low: int, high: int) -> Rule:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Rule:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _text(limit: int, pattern: str = "") -> Rule:
    return lambda value: (
        isinstance(value, str) and len(value) <= limit and bool(re.fullmatch(pattern or r"(?s).*", value))
    )


Rule = Callable[[Any], bool]
_SHA256 = "[0-9a-f]{64}"
_PART_RULES: dict[str, Rule] = {
    "weight": _number(-100, 100),
    "text": _text(MAX_TEXT),
    "image": _text(64, f"({_SHA256})?"),
    "name": _text(MAX_NAME),
}
_RULES: dict[str, Rule] = {
    "version": _whole(VERSION, VERSION),
    "prompt": lambda value: type(value) is list and 0 < len(value) <= MAX_PARTS and {*map(type, value)} == {dict},
    "seed": _whole(0, MAX_SEED),
    "image_seed": _whole(0, MAX_SEED + MAX_CANDIDATES),
    "index": _whole(0, MAX_CANDIDATES - 1),
    "num_outputs": _whole(1, MAX_CANDIDATES),
    "candidates": _whole(1, MAX_CANDIDATES),
    "guidance": _number(0, 30),
    "temperature": _number(0, 10),
    "top_k": _whole(0, MAX_SEED),
    "top_p": lambda value: _number(0, 1)(value) and value > 0,
    "keep": _text(64, f"({_SHA256})?"),
    "keep_rows": _whole(0, 1024),
    "score": _number(-2, 2),
    "model": _text(100),
    "weights": _text(64, _SHA256),
    "dtype": _text(20),
    "device": _text(100),
    "torch": _text(50),
    "software": _text(50),
    "shortened": lambda value: isinstance(value, bool),
}


def _damaged(what: str) -> ReceiptError:
    return ReceiptError(f"its receipt is damaged: {what}")


def _read(record: Any) -> Receipt:
    """A checked receipt out of any JSON value."""
    if not isinstance(record, dict):
        raise _damaged("no JSON object")
    version = record.get("version")
    if type(version) is int and version > VERSION:
        raise ReceiptError(f"its receipt has the version {version}; this clipgen reads {VERSION}: upgrade it")
    _check(record, _RULES, "")
    for part in record["prompt"]:
        _check(part, _PART_RULES, "prompt's ")
        if bool(part["text"].strip()) == bool(part["image"]):
            raise _damaged("a part of the prompt must be a text or an image, and one of them")
    if bool(record["keep"]) != bool(record["keep_rows"]):
        raise _damaged("keep and keep_rows do not fit together")
    place = record["image_seed"] - record["seed"]
    if not 0 <= place < record["candidates"] or record["index"] >= record["num_outputs"]:
        raise _damaged("seed, candidates and index do not fit together")
    prompt = tuple(PromptPart(**part) for part in record["prompt"])
    return Receipt(**{name: value for name, value in record.items() if name != "version"} | {"prompt": prompt})


def _check(record: Mapping[str, Any], rules: Mapping[str, Rule], where: str) -> None:
    if record.keys() != rules.keys():
        odd = sorted(record.keys() ^ rules.keys(), key=str)[0]
        state = "is missing" if odd in rules else "is not known here"
        raise _damaged(f"the field {where}{odd[:50]!r} {state}")
    for name, rule in rules.items():
        if not rule(record[name]):
            raise _damaged(f"{where}{name} is {_shown(record[name])}, which cannot be")


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool)) or value is None else f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
