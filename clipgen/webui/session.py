"""What the buttons of the web page do: a form in, pictures and a line of text out. Knows nothing of browsers."""

from __future__ import annotations

import logging
import queue
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from clipgen.errors import Cancelled, ClipGenError, RequestError
from clipgen.images.pixels import load_image, save_image
from clipgen.outputs.metadata import Receipt
from clipgen.outputs.naming import free_stem
from clipgen.pipeline import ClipGen
from clipgen.request import GenerationRequest, Part, new_seed

if TYPE_CHECKING:
    from clipgen.request import GenerationOutput

HISTORY = 20
"""Drawings of a visitor that are kept, in memory."""
WORKERS = 8
"""Drawings under way at once, which the engine draws together; further ones wait."""
PREVIEWS = 4


@dataclass(frozen=True)
class Form:
    """What the page holds, field by field as it comes: an empty number is None."""

    prompt: str = ""
    negative: str = ""
    image: str | None = None
    """Path of an uploaded file."""
    image_weight: float | None = 1.0
    num_outputs: float | None = 1
    candidates: float | None = 1
    guidance: float | None = None
    temperature: float | None = None
    top_k: float | None = None
    top_p: float | None = None
    random: bool = True
    seed: float | None = 0

    def request(self, keep: Image.Image | None = None, keep_rows: float | None = 0) -> GenerationRequest:
        """What to draw, with the seed chosen.

        Raises:
            RequestError: a field is empty or out of its range.
            DataError: the image cannot be read.
        """
        parts: list[tuple[Part, float]] = []
        if self.image:
            parts.append((load_image(self.image), self._given("image_weight")))
        if self.prompt.strip() or not parts:  # an empty prompt is an error, unless there is an image
            parts.append((self.prompt, 1.0))
        return GenerationRequest(
            parts,
            num_outputs=int(self._given("num_outputs")),
            candidates=max(int(self._given("candidates")), int(self._given("num_outputs"))),
            guidance=self.guidance,
            temperature=self.temperature,
            top_k=None if self.top_k is None else int(self.top_k),
            top_p=self.top_p,
            seed=new_seed() if self.random else int(self._given("seed")),
            keep=keep,
            keep_rows=int(keep_rows or 0),
            negative_prompt=self.negative if self.negative.strip() else None,
        )

    def again(self, seed: int) -> Form:
        """The form that draws one picture again: its own seed, and no candidates beside it."""
        return replace(self, random=False, seed=seed, num_outputs=1, candidates=1)

    def _given(self, field: str) -> float:
        value = getattr(self, field)
        if value is None:
            raise RequestError(field, "is empty; write a number")
        return value


@dataclass(frozen=True)
class Drawing:
    """What one click drew, best first, and the form it came from."""

    form: Form
    images: list[Image.Image]
    records: list[Receipt]

    @property
    def captions(self) -> list[str]:
        """CLIP score and seed of each picture."""
        return [f"{record.score:.3f} · seed {record.image_seed}" for record in self.records]


@dataclass(frozen=True)
class View:
    """What the page shows now."""

    note: str
    pictures: list[Image.Image] | None = None
    """Unfinished ones; None leaves what is shown."""
    drawing: Drawing | None = None
    """At the end, when it went well."""
    files: tuple[Path, ...] = ()
    """Of the drawing."""
    failed: bool = False


class Studio:
    """One model for all visitors, and a folder for the files that they are shown."""

    def __init__(self, weights: Path, folder: Path, device: str | None = None, dtype: str | None = None) -> None:
        self.workers = ThreadPoolExecutor(WORKERS)
        self.pipe = ClipGen.from_pretrained(weights, device=device, dtype=dtype)
        self.folder = folder
        self.running: dict[str, set[threading.Event]] = {}

    @property
    def rows(self) -> int:
        """Rows of tokens in a picture."""
        return self.pipe.config.vqgan.grid

    def form(self) -> Form:
        """The form of a fresh page: the model's own defaults."""
        own = self.pipe.config.sampling
        settings: dict[str, Any] = {name: getattr(own, name) for name in ("guidance", "temperature", "top_k", "top_p")}
        return Form(num_outputs=4, candidates=16, **settings)

    def draw(
        self, form: Form, visitor: str = "", keep: Image.Image | None = None, keep_rows: float | None = 0
    ) -> Iterator[View]:
        """Draw, and tell how it goes: first that it began, then previews, at the end pictures or what went wrong.

        Args:
            form: what is asked for.
            visitor: whose `cancel` stops it.
            keep: a picture whose top `keep_rows` rows stay.
            keep_rows: how many.
        """
        news: queue.SimpleQueue[View] = queue.SimpleQueue()
        stop = threading.Event()
        mine = self.running.setdefault(visitor, set())
        mine.add(stop)
        try:
            yield View("Drawing …")
            self.workers.submit(self._work, form, keep, keep_rows, stop, news)
            while True:
                view = news.get()
                yield view
                if view.drawing or view.failed:
                    return
        finally:  # also when the page has gone
            stop.set()
            mine.discard(stop)

    def cancel(self, visitor: str) -> bool:
        """Stop what a visitor has under way; whether there was anything. It ends within one step."""
        stops = list(self.running.get(visitor, ()))
        for stop in stops:
            stop.set()
        return bool(stops)

    def leave(self, visitor: str) -> None:
        """A visitor's page was closed."""
        self.cancel(visitor)
        self.running.pop(visitor, None)

    def close(self) -> None:
        """Stop all drawings, which end within one step, and begin no more."""
        for visitor in list(self.running):
            self.cancel(visitor)
        self.pipe.close()

    def _work(
        self,
        form: Form,
        keep: Image.Image | None,
        keep_rows: float | None,
        stop: threading.Event,
        news: queue.SimpleQueue[View],
    ) -> None:
        try:
            request = form.request(keep, keep_rows)
            [result] = self.pipe.generate(
                [request],
                is_cancelled=stop.is_set,
                on_preview=lambda pictures: news.put(View("Drawing …", pictures)),
                previews=PREVIEWS,
            )
            drawing = Drawing(replace(form, seed=result.seed), result.images, result.receipts)
            news.put(View(self._note(result), drawing=drawing, files=tuple(self.files(drawing))))
        except Exception as error:
            news.put(View(plain(error), failed=True))

    def _note(self, result: GenerationOutput) -> str:
        count = len(result.images)
        pictures = "1 picture" if count == 1 else f"{count} pictures"
        said = [
            f"{pictures}, the best of {result.num_generated}, in {result.seconds['total']:.1f} s; seed {result.seed}."
        ]
        if result.truncated:
            said.append(f"The prompt is too long, the model did not read: {result.truncated}")
        covered = result.match
        if covered:
            sentence = covered.warning("it") if covered.is_out_of_distribution else str(covered)
            said.append(f"{sentence[0].upper()}{sentence[1:]}.")
        return " ".join(said)

    def files(self, drawing: Drawing) -> list[Path]:
        """Write a drawing's pictures, with their receipts, into a fresh folder inside `folder`."""
        folder = self.folder / uuid.uuid4().hex
        stem = free_stem(folder, drawing.form.prompt, drawing.records[0].seed)
        return [
            save_image(image, stem.with_name(f"{stem.name}-{i}.png"), metadata=record.to_metadata())
            for i, (image, record) in enumerate(zip(drawing.images, drawing.records, strict=True), start=1)
        ]


def read_receipt(path: str, form: Form) -> tuple[Form, str]:
    """The form that draws a file again, as far as a page can hold it, and what to say about it.

    Raises:
        DataError, DataError: there is no receipt in it, or no picture.
    """
    record = Receipt.from_file(path)
    prompt, negative, image, left = "", "", None, []
    for part in record.prompt:
        if part.image and image is None:
            image = part
            left.append(f"add {part.name or 'the image it was drawn from'} under “Start from a picture”")
        elif part.text and part.weight == 1 and not prompt:
            prompt = part.text
        else:
            left.append(f"{part.text or part.name or 'another image'} ({part.weight:g}) has no place on this page")
    for part in record.negative:
        if part.text and part.weight == 1 and not negative:
            negative = part.text
        else:
            left.append(
                f"{part.text or part.name or 'an image'} was kept away from too, which has no place on this page"
            )
    if record.keep:
        left.append(f"its top {record.keep_rows} rows were those of another picture")
    settings = {name: getattr(record, name) for name in ("guidance", "temperature", "top_k", "top_p")}
    filled = replace(form, prompt=prompt, negative=negative, image=None, **settings).again(record.image_seed)
    if image is not None:
        filled = replace(filled, image_weight=image.weight)
    return filled, "; ".join(["The settings of this picture are filled in", *left]) + "."


def plain(error: Exception) -> str:
    """An error as a sentence for the page; what no visitor can help goes to the log, and not to them."""
    if isinstance(error, Cancelled):
        return "Cancelled."
    if isinstance(error, ClipGenError):
        return hide_folders(str(error))
    logging.getLogger(__name__).error("drawing failed", exc_info=error)
    return "Something went wrong on the server; its log says what."


def hide_folders(message: str) -> str:
    """A path to an uploaded file, as messages quote it, without the server's folders."""
    head, quote, rest = message.partition("'/")
    path, end, tail = rest.partition("'")
    return f"{head}'{path.rsplit('/', 1)[-1]}'{tail}" if quote and end else message
