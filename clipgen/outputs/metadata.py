"""Receipts: metadata in every written image that says how it was generated, so that it can be generated again.

A receipt is one JSON object under the name `clipgen` in the file's metadata. Files are untrusted, so each field is
checked before it is used: a receipt allows nothing that a user's request would not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import torch
from PIL import Image

from clipgen import __version__
from clipgen.errors import DataError
from clipgen.images.pixels import PARAMETERS, read_metadata, to_rgb
from clipgen.outputs.parameters import parameters_text
from clipgen.request import MAX_CANDIDATES, MAX_PARTS, MAX_SEED, SAMPLING, GenerationRequest, Part, parts_of
from clipgen.weights.model_dir import MANIFEST, read_manifest

if TYPE_CHECKING:
    from clipgen.pipeline import ClipGen
    from clipgen.request import GenerationOutput

KEY = "clipgen"
VERSION = 2  # version 1 had no negative prompt
MAX_BYTES = 60_000  # of prompt and negative prompt in a file: a JPEG's EXIF holds 64 KB
MAX_READ = 200_000  # characters of a receipt that are parsed
MAX_TEXT, MAX_NAME = 5_000, 255  # characters kept of a text (CLIP reads 64 * 77 of them) and of a name


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high  # false for NaN


def _text(limit: int, pattern: str = r"(?s).*") -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= limit and bool(re.fullmatch(pattern, value))


def _objects(low: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and low <= len(value) <= MAX_PARTS and all(type(v) is dict for v in value)


_SHA256 = "[0-9a-f]{64}"


@dataclass(frozen=True)
class PromptPart:
    """A text, or the digest of an image, and its weight."""

    weight: Annotated[float, _number(-100, 100)]
    text: Annotated[str, _text(MAX_TEXT)] = ""
    image: Annotated[str, _text(64, f"({_SHA256})?")] = ""
    """SHA-256 of the image (`image_digest`); "" for a text."""
    name: Annotated[str, _text(MAX_NAME)] = ""  # file name of the image, if it came from a file


@dataclass(frozen=True)
class Receipt:
    """What one image was generated from: request, model and outcome. Settings are those that were used.

    Fields with a rule (`Annotated`) are written and read; the others are known while the image is written.
    """

    prompt: Annotated[tuple[PromptPart, ...], _objects(1)]
    seed: Annotated[int, _whole(0, MAX_SEED)]
    """The request's seed."""
    image_seed: Annotated[int, _whole(0, MAX_SEED + MAX_CANDIDATES)]
    """This image's seed: the same request with this seed and one candidate generates it again."""
    index: Annotated[int, _whole(0, MAX_CANDIDATES - 1)]
    """Its rank by CLIP among the outputs; 0 is the best."""
    num_outputs: Annotated[int, _whole(1, MAX_CANDIDATES)]
    candidates: Annotated[int, _whole(1, MAX_CANDIDATES)]
    """Images that were generated to choose from."""
    guidance: Annotated[float, _number(0, 30)]
    temperature: Annotated[float, _number(0, 10)]
    top_k: Annotated[int, _whole(0, MAX_SEED)]
    top_p: Annotated[float, _number(5e-324, 1)]
    keep: Annotated[str, _text(64, f"({_SHA256})?")]
    """`image_digest` of the image whose top `keep_rows` rows of tokens were kept; "" if none was."""
    keep_rows: Annotated[int, _whole(0, 1024)]
    score: Annotated[float, _number(-2, 2)]  # cosine of its CLIP embedding and the prompt's
    model: Annotated[str, _text(100)]
    weights: Annotated[str, _text(64, _SHA256)]
    """`weights_digest` of the model's folder."""
    dtype: Annotated[str, _text(20)]
    device: Annotated[str, _text(100)]
    """Kind and name, such as "cpu AVX512": another may round differently."""
    torch: Annotated[str, _text(50)]
    software: Annotated[str, _text(50)]  # version of clipgen
    negative: Annotated[tuple[PromptPart, ...], _objects(0)] = ()
    """What guidance moved away from; () for the unconditional model."""
    shortened: Annotated[bool, lambda value: isinstance(value, bool)] = False
    """Texts were too long to be stored: the image cannot be generated again from the receipt."""
    steps: int = field(default=0, compare=False)  # tokens of an image
    size: int = field(default=0, compare=False)  # its side, px

    @property
    def text(self) -> str:
        """The prompt for people: its texts, and its images by name, with weights that are not 1."""
        return _describe(self.prompt) + (f", not {_describe(self.negative)}" if self.negative else "")

    def request(self, images: Mapping[str, Image.Image] | None = None) -> GenerationRequest:
        """The request that generates this image again, as output number `seeds.index(image_seed)`.

        Args:
            images: the images of prompt and negative prompt, and the one whose rows were kept, by `image_digest`.

        Raises:
            DataError: one of them is missing, or the prompt was shortened.
        """
        if self.shortened:
            raise DataError("the prompt was too long for the receipt, which holds only its beginning")
        parts = _restore(self.prompt, images)
        settings: dict[str, Any] = {name: getattr(self, name) for name in SAMPLING}
        settings["negative_prompt"] = _restore(self.negative, images) or None
        if self.keep:
            settings |= {"keep": _find(images, self.keep), "keep_rows": self.keep_rows}
        if self.image_seed <= MAX_SEED:
            return GenerationRequest(parts, seed=self.image_seed, **settings)
        count = self.image_seed - self.seed + 1  # a request's seed ends at MAX_SEED: generate those before it, too
        return GenerationRequest(parts, count, count, seed=self.seed, **settings)

    def to_json(self) -> dict[str, Any]:
        """The receipt as it is written."""
        values = asdict(self)
        return {"version": VERSION, **{name: values[name] for name in _rules(Receipt)}}

    def to_metadata(self) -> dict[str, str]:
        """What `save_image` embeds: the receipt, and the text that Stable Diffusion web UIs read."""
        return {KEY: json.dumps(self.to_json()), PARAMETERS: parameters_text(self)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Receipt:
        """Read what `to_metadata` wrote, in this or an earlier version.

        Raises:
            DataError: there is no receipt, or it is damaged, of a later version, or asks for something impossible.
        """
        if KEY not in metadata:
            raise DataError("there is no receipt in it; another program may have removed it when copying the file")
        record = _parse(metadata[KEY])
        if isinstance(record, list):
            raise DataError(f"it holds {len(record)} images; give the file of one of them")
        values = _check_receipt(record)
        parts = {name: tuple(PromptPart(**part) for part in values[name]) for name in ("prompt", "negative")}
        return cls(**values | parts)

    @classmethod
    def from_file(cls, path: str | Path) -> Receipt:
        """Read the receipt of an image file.

        Raises:
            DataError: the file cannot be read; or as `from_metadata`.
        """
        metadata = read_metadata(path)
        try:
            return cls.from_metadata(metadata)
        except DataError as error:
            raise DataError(f"'{path}': {error}") from None


def _parse(text: str) -> Any:
    """Parse JSON, rejecting duplicate keys; NaN is rejected later, by the rules."""
    if len(text) > MAX_READ:
        raise DataError(f"its receipt has {len(text):,} characters; {MAX_READ:,} are allowed")
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"not valid JSON ({error})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


@cache
def _rules(kind: type) -> dict[str, Callable[[Any], bool]]:
    """The rule of each field of a receipt or a part that is written to files."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def _check_receipt(record: Any) -> dict[str, Any]:
    """Check any JSON value as a receipt of any version, and return its fields.

    Raises:
        DataError: it is damaged, of a later version, or asks for something impossible.
    """
    if not isinstance(record, dict):
        raise _damaged("not a JSON object")
    record = dict(record)
    if "version" not in record:
        raise _damaged("the field 'version' is missing")
    version = record.pop("version")
    if type(version) is not int or version < 1:
        raise _damaged(f"version is {_shown(version)}; it must be a whole number from 1 to {VERSION}")
    if version > VERSION:
        raise DataError(f"its receipt has version {version}; this clipgen reads up to {VERSION}: upgrade clipgen")
    if version == 1:
        record.setdefault("negative", [])
    _check_fields(record, Receipt, "")
    for name in ("prompt", "negative"):
        for part in record[name]:
            _check_fields(part, PromptPart, f"{name}'s ")
            if bool(part["text"].strip()) == bool(part["image"]):
                raise _damaged(f"each part of the {name} must be either a text or an image")
    if bool(record["keep"]) != bool(record["keep_rows"]):
        raise _damaged("keep and keep_rows contradict each other")
    if record["negative"] and record["guidance"] <= 1:
        raise _damaged("negative and guidance contradict each other")
    offset = record["image_seed"] - record["seed"]
    if not 0 <= offset < record["candidates"] or record["index"] >= record["num_outputs"]:
        raise _damaged("seed, candidates and index contradict each other")
    return record


def _check_fields(record: Mapping[str, Any], kind: type, where: str) -> None:
    rules = _rules(kind)
    if record.keys() != rules.keys():
        odd = sorted(record.keys() ^ rules.keys(), key=str)[0]
        state = "is missing" if odd in rules else "is unknown"
        raise _damaged(f"the field {where}{odd[:50]!r} {state}")
    for name, is_valid in rules.items():
        if not is_valid(record[name]):
            raise _damaged(f"{where}{name} is {_shown(record[name])}, which is not a valid value")


def _damaged(reason: str) -> DataError:
    return DataError(f"its receipt is damaged: {reason}")


def _shown(value: Any) -> str:
    text = f"a {type(value).__name__}" if isinstance(value, (list, dict)) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def receipts(pipe: ClipGen, result: GenerationOutput, weights: str) -> list[Receipt]:
    """One receipt for each image of a result; `weights` is the `weights_digest` of the pipeline's folder."""
    request, sampling = result.request, result.request.sampling(pipe.config.sampling)
    shared: dict[str, Any] = {
        "seed": result.seed,
        "num_outputs": request.num_outputs,
        "candidates": result.num_generated,
        "keep": image_digest(request.keep) if request.keep else "",
        "keep_rows": request.keep_rows,
        **{name: getattr(sampling, name) for name in SAMPLING},
        "model": pipe.config.name,
        "weights": weights,
        "dtype": pipe.precision,
        "device": device_name(pipe.device),
        "torch": torch.__version__,
        "software": __version__,
        "steps": pipe.config.gpt.block_size,
        "size": pipe.config.vqgan.image_size,
        **_store_prompts(request),
    }
    own = enumerate(zip(result.seeds, result.scores, strict=True))
    return [Receipt(image_seed=seed, index=i, score=round(score, 6), **shared) for i, (seed, score) in own]


def _store_prompts(request: GenerationRequest) -> dict[str, Any]:
    """The parts of prompt and negative prompt, with texts shortened until they fit into a file's metadata."""
    prompt = parts_of(request.prompt)
    negative = [] if request.negative_prompt is None else parts_of(request.negative_prompt)
    for limit in (MAX_TEXT >> halvings for halvings in range(MAX_TEXT.bit_length())):
        kept = [_store_part(part, float(weight), limit) for part, weight in prompt + negative]
        if _size_in_exif([asdict(part) for part in kept]) <= MAX_BYTES:
            break
    shortened = limit < MAX_TEXT
    return {"prompt": tuple(kept[: len(prompt)]), "negative": tuple(kept[len(prompt) :]), "shortened": shortened}


def _store_part(part: Part, weight: float, limit: int) -> PromptPart:
    if isinstance(part, str):  # of a longer text only the words matter: `clip.tokenize` collapses white space
        return PromptPart(weight, part if len(part) <= limit else " ".join(part.split())[:limit])
    return PromptPart(weight, image=image_digest(part), name=str(part.info.get("name", ""))[:MAX_NAME])


def _size_in_exif(value: Any) -> int:
    """Bytes of JSON nested in JSON, as stored in EXIF."""
    return len(json.dumps(json.dumps(value)))


def _restore(parts: Sequence[PromptPart], images: Mapping[str, Image.Image] | None) -> list[tuple[Part, float]]:
    return [(_find(images, part.image, part.name) if part.image else part.text, part.weight) for part in parts]


def _find(images: Mapping[str, Image.Image] | None, digest: str, name: str = "") -> Image.Image:
    """The image that has this digest."""
    if digest not in (images or {}):
        shown = f"'{name}'" if name else "an image"
        raise DataError(f"it was drawn from {shown} (SHA-256 of its pixels {digest}), which is not here")
    return (images or {})[digest]


def _describe(parts: Sequence[PromptPart]) -> str:
    return " + ".join(
        (part.text or part.name or "an image") + ("" if part.weight == 1 else f" ({part.weight:g})") for part in parts
    )


def together(records: Sequence[Receipt]) -> dict[str, str]:
    """Metadata of one file that shows several images, in reading order: as many of their receipts as fit."""
    found = [record.to_json() for record in records]
    while len(found) > 1 and _size_in_exif(found) > MAX_BYTES:
        found = found[: len(found) // 2]
    return {KEY: json.dumps(found), PARAMETERS: parameters_text(records[0])}


def weights_digest(folder: str | Path) -> str:
    """SHA-256 that identifies a model's weights: of the SHA-256s of its files in the manifest.

    Raises:
        WeightsError: there is no manifest, or it is damaged.
    """
    hashes = [entry["sha256"] for entry in read_manifest(Path(folder) / MANIFEST).values()]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def image_digest(image: Image.Image) -> str:
    """SHA-256 of an image's size and 8-bit RGB pixels, which does not depend on the file's format."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + to_rgb(image).tobytes()).hexdigest()


def device_name(device: torch.device) -> str:
    """Kind and name of a device, on which rounding depends: "cpu AVX512", "cuda NVIDIA H200"."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
