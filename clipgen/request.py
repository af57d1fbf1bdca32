"""What a user asks for, checked when it is built, and what comes back."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from clipgen.errors import RequestError
from clipgen.utils.text import is_blank

if TYPE_CHECKING:
    from clipgen.outputs.metadata import Receipt
    from clipgen.weights.training_index import IndexMatch

Part = str | Image.Image
Prompt = Part | Sequence[Part] | Sequence[tuple[Part, float]]
"""Text, an image, several of either, or several with weights; a negative weight moves away from its part."""

MAX_SEED = 2**31 - 1
MAX_CANDIDATES = 1024
MAX_PARTS = 64


@dataclass
class SamplingParams:
    """Sampling parameters; the only definition of their ranges.

    Raises:
        RequestError: a value is out of its range.
    """

    temperature: float = 1.0
    """0 to 10; 0 takes the likeliest token."""
    top_k: int = 500
    """Sample among the K likeliest tokens; 0 is off."""
    top_p: float = 0.95
    """Sample among the likeliest tokens that add up to this probability, in (0, 1]; 1 is off."""
    guidance: float = 1.0
    """Classifier-free guidance scale (Ho & Salimans, arXiv 2207.12598), 0 to 30; 1 is off."""

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0, 10)
        check_whole("top_k", self.top_k, 0, 2**31 - 1)
        check_number("top_p", self.top_p, 0, 1, "a number above 0 and at most 1")
        if self.top_p == 0:
            raise RequestError("top_p", f"is {self.top_p!r}; it must be above 0 and at most 1")
        check_number("guidance", self.guidance, 0, 30)


SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))


@dataclass(frozen=True)
class GenerationRequest:
    """Generation request, validated on construction. None means the model's default.

    Raises:
        RequestError: a value is out of its range.
    """

    prompt: Prompt
    num_outputs: int = 1
    candidates: int | None = None
    """Images to generate, of which CLIP picks the best `num_outputs`; None generates just those."""
    guidance: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    """Candidate i uses seed + i; None draws a seed, which the output tells."""
    keep: Image.Image | None = None
    """An image whose top `keep_rows` rows of tokens are kept; the rows below are generated to continue them."""
    keep_rows: int = 0
    target_score: float | None = None
    """Budget: candidates come in waves, and none is started once the best `num_outputs` all score this much."""
    seconds: float | None = None
    """Budget: no wave is started after this time. The images then depend on the machine's speed."""
    negative_prompt: Prompt | None = None
    """What guidance moves away from; it needs a guidance above 1."""

    def __post_init__(self) -> None:
        check_whole("num_outputs", self.num_outputs, 1, MAX_CANDIDATES)
        if self.candidates is not None:
            check_whole("candidates", self.candidates, 1, MAX_CANDIDATES)
            if self.candidates < self.num_outputs:
                raise RequestError(
                    "candidates", f"is {self.candidates}; it must be at least num_outputs, {self.num_outputs}"
                )
        SamplingParams(**self._given_sampling())  # checks the ranges
        if self.seed is not None:
            check_whole("seed", self.seed, 0, MAX_SEED)
        if self.target_score is not None:
            check_number("target_score", self.target_score, -1, 1)
        if self.seconds is not None:
            check_number("seconds", self.seconds, 0, 86_400)
        if self.keep is not None and not isinstance(self.keep, Image.Image):
            raise RequestError("keep", f"is of type {type(self.keep).__name__}; give a PIL image")
        check_whole("keep_rows", self.keep_rows, 0, 1024)
        if (self.keep is None) != (self.keep_rows == 0):
            raise RequestError("keep_rows", f"is {self.keep_rows}; give both an image to keep and 1 or more rows of it")
        parts_of(self.prompt)
        if self.negative_prompt is not None:
            parts_of(self.negative_prompt, "negative_prompt")
            self._check_guided(self.guidance)

    @property
    def num_candidates(self) -> int:
        """Images to generate."""
        return self.candidates or self.num_outputs

    def sampling(self, default: SamplingParams) -> SamplingParams:
        """This request's sampling parameters, with the model's defaults where it gives none.

        Raises:
            RequestError: there is a negative prompt, and the model's own guidance is off.
        """
        params = dataclasses.replace(default, **self._given_sampling())
        self._check_guided(params.guidance)
        return params

    def _given_sampling(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}

    def _check_guided(self, guidance: float | None) -> None:
        if self.negative_prompt is not None and guidance is not None and guidance <= 1:
            raise RequestError(
                "guidance", f"is {guidance:g}; a negative prompt works through guidance above 1: raise it, say to 2"
            )


@dataclass(frozen=True)
class GenerationOutput:
    """The images of one request, best first."""

    images: list[Image.Image]
    scores: list[float]
    """Cosine of each image's CLIP embedding and the prompt's."""
    seeds: list[int]
    """Of each image: the same request with this seed and one candidate generates it again."""
    seed: int
    request: GenerationRequest
    truncated: str
    """The end of the prompt that did not fit into CLIP's context; "" when all of it did."""
    seconds: dict[str, float]
    """By stage; requests of one call share their stages, so they share these."""
    num_generated: int
    """Candidates; fewer than the request allowed when a budget ended it early."""
    match: IndexMatch | None = None
    """How near the prompt is to the training images, where the weights have an index of them."""
    receipts: list[Receipt] = field(default_factory=list)
    """How each image was generated; none where the weights did not come from a folder."""


def shown(value: object) -> str:
    """Format a value for an error message, at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_whole(field: str, value: object, low: int, high: int) -> None:
    """Raise a RequestError that names `field` unless `value` is an int from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(field, f"is {shown(value)}; it must be a whole number from {low} to {high}")


def check_number(field: str, value: Any, low: float, high: float, allowed: str = "") -> None:
    """Raise a RequestError that names `field` unless `value` is a finite number from `low` to `high`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):  # False for NaN
        raise RequestError(field, f"is {shown(value)}; it must be {allowed or f'a number from {low:g} to {high:g}'}")


def parts_of(prompt: Prompt, field: str = "prompt") -> list[tuple[Part, float]]:
    """Split a prompt into weighted parts.

    Raises:
        RequestError: it is empty, or not what a prompt can be; `field` is whose prompt it is.
    """
    raw = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str) else [prompt]
    parts = [part if isinstance(part, tuple) else (part, 1.0) for part in raw]
    if not 1 <= len(parts) <= MAX_PARTS:
        raise RequestError(field, f"has {len(parts)} parts; give 1 to {MAX_PARTS}")
    for item in parts:
        if len(item) != 2:
            raise RequestError(field, f"has a part of {len(item)} values; give text, an image or (part, weight)")
        part, weight = item
        if isinstance(part, str) and is_blank(part):
            raise RequestError(field, "is empty; write what to draw, or give an image")
        if not isinstance(part, (str, Image.Image)):
            raise RequestError(field, f"has a part of type {type(part).__name__}; give text or a PIL image")
        check_number(f"{field} weight", weight, -100, 100)
    return parts


def new_seed() -> int:
    """Draw a random seed that leaves room for the candidates' own seeds behind it."""
    return secrets.randbelow(MAX_SEED - MAX_CANDIDATES)
