"""The page's form, and the texts and files that fill it in: links and receipts. Knows nothing of browsers or Gradio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

from PIL import Image

from clipgen.errors import RequestError
from clipgen.images.pixels import load_image
from clipgen.outputs.metadata import Receipt
from clipgen.request import MAX_SEED, SAMPLING, GenerationRequest, Part, new_seed, shown
from clipgen.utils.text import is_blank

MAX_OUTPUTS = 8
MAX_CANDIDATES = 64
MAX_PROMPT = 2000
"""Characters."""


@dataclass(frozen=True)
class Form:
    """Field values sent by the page; a cleared number is None."""

    prompt: str = ""
    negative_prompt: str = ""
    image: str | None = None
    """Path of an uploaded file."""
    image_weight: float | None = 1.0
    num_outputs: float | None = 1
    candidates: float | None = 1
    guidance: float | None = None
    temperature: float | None = None
    top_k: float | None = None
    top_p: float | None = None
    random_seed: bool = True
    seed: float | None = 0
    previews: bool = True

    def request(self, keep: Image.Image | None = None, keep_rows: float | None = 0) -> GenerationRequest:
        """The request that these fields stand for; a random seed is drawn here.

        The top `keep_rows` rows of tokens of `keep` stay as they are.

        Raises:
            RequestError: a field is empty or out of its range.
            DataError: the image cannot be read.
        """
        parts: list[tuple[Part, float]] = []
        if self.image:
            parts.append((load_image(self.image), self._number("image_weight")))
        if not (parts and is_blank(self.prompt)):  # an empty prompt is an error unless there is an image
            parts.append((self.prompt, 1.0))
        num_outputs, candidates = self._whole("num_outputs", MAX_OUTPUTS), self._whole("candidates", MAX_CANDIDATES)
        return GenerationRequest(
            parts,
            num_outputs=num_outputs,
            candidates=max(candidates, num_outputs),
            guidance=self.guidance,
            temperature=self.temperature,
            top_k=None if self.top_k is None else int(self.top_k),
            top_p=self.top_p,
            seed=new_seed() if self.random_seed else int(self._number("seed")),
            keep=keep,
            keep_rows=int(keep_rows or 0),
            negative_prompt=None if is_blank(self.negative_prompt) else self.negative_prompt,
        )

    def with_receipt(self, record: Receipt) -> Form:
        """The form that generates an image again, without other candidates where its own seed is one that can be."""
        seed, candidates, num_outputs = seed_of(record)
        return replace(self, random_seed=False, seed=seed, candidates=candidates, num_outputs=num_outputs)

    def _number(self, field: str) -> float:
        value = getattr(self, field)
        if value is None:
            raise RequestError(field, "is empty; enter a number")
        return value

    def _whole(self, field: str, largest: int) -> int:
        value = self._number(field)
        if not 1 <= value <= largest:
            raise RequestError(field, f"is {shown(value)}; on this page it must be from 1 to {largest}")
        return int(value)


def seed_of(record: Receipt) -> tuple[int, int, int]:
    """Seed, number of candidates and number of outputs that generate an image again.

    The candidates of a request have the seeds that follow its own, which may be larger than that of any request: then
    the image is one of the request's again.
    """
    if record.image_seed <= MAX_SEED:
        return record.image_seed, 1, 1
    return record.seed, record.candidates, record.num_outputs


LINKED = ("prompt", "negative_prompt", "num_outputs", "candidates", *SAMPLING, "seed")
"""The settings in a link, under the names that the HTTP API gives them."""


def settings_of(record: Receipt) -> dict[str, Any]:
    """The settings in `LINKED` that draw one image again, as far as they are texts and numbers."""
    texts = {
        name: " ".join(part.text for part in parts if part.text)
        for name, parts in (("prompt", record.prompt), ("negative_prompt", record.negative))
    }
    sampling = {name: getattr(record, name) for name in SAMPLING}
    seed, candidates, num_outputs = seed_of(record)
    return {**texts, "num_outputs": num_outputs, "candidates": candidates, **sampling, "seed": seed}


def to_link(settings: Mapping[str, Any]) -> str:
    """Settings as the fragment of an address (what follows `#`): browsers do not send it, so no log holds prompts."""
    return urlencode({name: value for name, value in settings.items() if value != ""})


def from_link(fragment: str, default: Form) -> Form:
    """The form that a link's fragment describes; what it leaves out is as in `default`.

    Raises:
        RequestError: a setting is unknown, no number where one is needed, or out of its range.
    """
    given = dict(parse_qsl(fragment.removeprefix("#"), keep_blank_values=True))
    if unknown := [name for name in given if name not in LINKED]:
        raise RequestError("link", f"holds {unknown[0][:40]!r}, which is no setting; copy the link again")
    changes: dict[str, Any] = {}
    for name, text in given.items():
        if name.endswith("prompt"):
            if len(text) > MAX_PROMPT:
                raise RequestError(name, f"has {len(text)} characters; it must have at most {MAX_PROMPT}")
            changes[name] = text
            continue
        try:
            changes[name] = float(text) if name in ("guidance", "temperature", "top_p") else int(text)
        except ValueError:
            raise RequestError(name, f"is {text[:40]!r}; it must be a number") from None
    form = replace(default, random_seed="seed" not in given, **changes)
    replace(form, prompt=form.prompt or "x").request()  # checks the ranges; the prompt may be filled in later
    return form


def read_receipt(path: str, form: Form) -> tuple[Form, str]:
    """`form` filled in to draw an image file again, as far as the page can hold it, and a note about what it cannot.

    Raises:
        DataError: the file is no image, or carries no receipt.
    """
    record = Receipt.from_file(path)
    prompt, negative, image, missing = "", "", None, []
    for part in record.prompt:
        if part.image and image is None:
            image = part
            missing.append(f"add {part.name or 'the image it was drawn from'} under “Start from an image”")
        elif part.text and part.weight == 1 and not prompt:
            prompt = part.text
        else:
            missing.append(f"{part.text or part.name or 'another image'} ({part.weight:g}) has no field on this page")
    for part in record.negative:
        if part.text and part.weight == 1 and not negative:
            negative = part.text
        else:
            missing.append(f"{part.text or part.name or 'an image'} was avoided too, which has no field on this page")
    if record.keep:
        missing.append(f"its top {record.keep_rows} rows came from another image")
    filled = replace(form, prompt=prompt, negative_prompt=negative, image=None).with_receipt(record)
    filled = replace(filled, **{name: getattr(record, name) for name in SAMPLING})
    if image is not None:
        filled = replace(filled, image_weight=image.weight)
    return filled, "; ".join(["The settings of this image are filled in", *missing]) + "."
