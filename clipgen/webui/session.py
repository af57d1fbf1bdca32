"""Generation for the page's visitors, independent of browsers and Gradio."""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from clipgen.errors import Cancelled, ClipGenError, DataError
from clipgen.images.pixels import save_image
from clipgen.outputs.metadata import Receipt
from clipgen.outputs.naming import free_stem
from clipgen.pipeline import ClipGen
from clipgen.utils.text import read_lines
from clipgen.webui.form import Form
from clipgen.weights.training_index import NUM_SHOWN

if TYPE_CHECKING:
    from clipgen.request import GenerationOutput

MAX_RUNNING = 8
"""Concurrent requests, which the engine batches; further ones wait."""
PREVIEWS = 4
"""Number of times that unfinished images are shown."""
PREVIEW_SIZE = 192
"""Side in pixels up to which a CPU decodes images fast enough to show unfinished ones by default.

Four previews of 4 images cost as much as decoding 16 images: with the mini model, a tenth of the best 4 of 16.
"""
UPDATE_SECONDS = 0.25
"""Time between two reports of progress."""
EXAMPLES = "examples.txt"
"""File in a folder of weights: prompts that show what the model knows, one a line."""
MAX_EXAMPLES = 8


@dataclass(frozen=True)
class Result:
    """The images of one finished request, best first, and the form they were drawn from."""

    form: Form
    images: list[Image.Image]
    receipts: list[Receipt]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Files:
    """A result on the disk."""

    images: list[Path]
    archive: Path
    """All images as a ZIP file."""


@dataclass(frozen=True)
class Update:
    """A change on the page while a request is drawn."""

    note: str
    progress: float | None = None
    """Completed share, 0 to 1; None when finished or unknown."""
    previews: list[Image.Image] | None = None
    """Unfinished images; None keeps the ones shown."""
    result: Result | None = None
    """The result, if the request succeeded."""
    error: bool = False
    """Whether the request ended without a result."""
    ignored: bool = False
    """Whether the request was refused because another one of this visitor is being drawn."""


class Session:
    """A loaded model shared by all visitors, one request at a time for each, and the folder of their files.

    Call `close` when done.
    """

    def __init__(self, weights: Path, folder: Path, device: str | None = None, dtype: str | None = None) -> None:
        """Load the model; `folder` is for the files shown to visitors.

        Raises:
            WeightsError, ConfigError, RequestError: see `ClipGen.from_pretrained`.
        """
        self.threads = ThreadPoolExecutor(MAX_RUNNING)
        self.pipe = ClipGen.from_pretrained(weights, device=device, dtype=dtype)
        self.weights = weights
        self.folder = folder
        self.running: dict[str, threading.Event] = {}
        """Visitor -> event that stops the visitor's request when set."""

    def default_form(self) -> Form:
        """The form of a fresh page: the best 4 of 16, the model's own sampling, and previews where they are cheap."""
        is_cheap = self.pipe.device.type != "cpu" or self.pipe.config.vqgan.image_size <= PREVIEW_SIZE
        return Form(num_outputs=4, candidates=16, previews=is_cheap, **asdict(self.pipe.config.sampling))

    def examples(self) -> list[str]:
        """Prompts that the weights' `examples.txt` suggests; [] when there is none."""
        try:
            lines = read_lines(self.weights / EXAMPLES)
        except DataError:
            return []
        return [line for line in lines if line][:MAX_EXAMPLES]

    def generate(
        self, form: Form, visitor: str = "", keep: Image.Image | None = None, keep_rows: float | None = 0
    ) -> Iterator[Update]:
        """Draw a form's request. Yields progress and previews, and finally the result or the error.

        The arguments are those of `Form.request`, and the visitor, for `cancel`.
        """
        stop = threading.Event()
        if self.running.setdefault(visitor, stop) is not stop:
            yield Update("Still drawing: wait, or cancel it first.", ignored=True)
            return
        updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        try:
            yield Update("Starting …", progress=0.0)
            try:
                self.threads.submit(self._run, form, keep, keep_rows, stop, updates)
            except RuntimeError:
                updates.put(Update("The server is closed and generates nothing more.", error=True))
            while True:
                update = updates.get()
                yield update
                if update.result or update.error:
                    return
        finally:  # also if the visitor has left
            stop.set()
            del self.running[visitor]

    def cancel(self, visitor: str) -> None:
        """Stop a visitor's request, if there is one; it ends within one decoding step."""
        if stop := self.running.get(visitor):
            stop.set()

    def close(self) -> None:
        """Stop all requests, accept no more, and wait for the threads."""
        for stop in list(self.running.values()):
            stop.set()
        self.threads.shutdown()

    def _run(
        self,
        form: Form,
        keep: Image.Image | None,
        keep_rows: float | None,
        stop: threading.Event,
        updates: queue.SimpleQueue[Update],
    ) -> None:
        try:
            request = form.request(keep, keep_rows)
            report = _Reporter(updates, request.num_candidates)
            [output] = self.pipe.generate(
                [request],
                progress=report.progress,
                is_cancelled=stop.is_set,
                on_preview=report.previews if form.previews else None,
                previews=PREVIEWS,
            )
            result = Result(replace(form, seed=output.seed), output.images, output.receipts)
            updates.put(Update(self._summary(output), result=result))
        except Exception as error:
            updates.put(Update(describe_error(error), error=True))

    def _summary(self, output: GenerationOutput) -> str:
        count, seconds = len(output.images), output.seconds["total"]
        chosen = f", the best of {output.num_generated}" if output.num_generated > count else ""
        sentences = [f"{_images(count)}{chosen}, in {seconds:.1f} s; seed {output.seed}."]
        if output.truncated:
            sentences.append(f"The prompt is too long, the model did not read: {output.truncated}")
        if output.match is not None:
            captions = output.match.captions
            sentences.append(
                f"Unlike anything this model was trained on; the nearest it has seen is {captions[0]}."
                if output.match.is_out_of_distribution
                else f"Nearest training images: {'; '.join(captions[:NUM_SHOWN])}."
            )
        return " ".join(sentences)

    def write(self, result: Result) -> Files:
        """Write a result's images, with their receipts, and a ZIP file of them into a fresh folder inside `folder`."""
        folder = self.folder / uuid.uuid4().hex
        stem = free_stem(folder, result.form.prompt, result.receipts[0].seed)
        images = [
            save_image(image, stem.with_name(f"{stem.name}-{i}.png"), metadata=record.to_metadata())
            for i, (image, record) in enumerate(zip(result.images, result.receipts, strict=True), start=1)
        ]
        archive = stem.with_name(f"{stem.name}.zip")
        with zipfile.ZipFile(archive, "w") as file:  # stored: PNG is compressed already
            for image in images:
                file.write(image, image.name)
        return Files(images, archive)


class _Reporter:
    """Turns the pipeline's callbacks into updates, a few a second."""

    def __init__(self, updates: queue.SimpleQueue[Update], candidates: int) -> None:
        self.updates = updates
        self.candidates = candidates
        self.started = self.last = time.perf_counter()
        self.done = 0.0

    def progress(self, done: int, total: int) -> None:
        now = time.perf_counter()
        self.done = done / total
        if now - self.last >= UPDATE_SECONDS or done == total:
            self.last = now
            self.updates.put(Update(self._note(), progress=self.done))

    def previews(self, images: list[Image.Image]) -> None:
        self.updates.put(Update(self._note(), progress=self.done, previews=images))

    def _note(self) -> str:
        spent = time.perf_counter() - self.started
        if self.done == 1:
            return f"Decoding and ranking {_images(self.candidates)} · {spent:.0f} s"
        left = f", about {spent * (1 - self.done) / self.done:.0f} s left" if self.done else ""
        return f"Drawing {_images(self.candidates)} · {self.done:.0%} · {spent:.0f} s{left}"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def describe_error(error: Exception) -> str:
    """An error as a sentence for visitors. Errors that visitors cannot fix are logged instead."""
    if isinstance(error, Cancelled):
        return "Cancelled."
    if isinstance(error, ClipGenError):
        return hide_folders(str(error))
    logging.getLogger(__name__).error("drawing failed", exc_info=error)
    return "Something went wrong on the server; its log has the details."


def hide_folders(message: str) -> str:
    """A message without the server's folders in front of a quoted file name."""
    head, quote, rest = message.partition("'/")
    path, end, tail = rest.partition("'")
    return f"{head}'{path.rsplit('/', 1)[-1]}'{tail}" if quote and end else message
