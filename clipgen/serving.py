"""Predictions for a public server: limits, images by URL, output files, metrics, and a log without prompts.

Independent of the server: `predict.py` declares the inputs to Cog and passes them on.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from clipgen.errors import RequestError
from clipgen.images.pixels import grid, load_image, save_image, to_data_url
from clipgen.images.urls import read_url
from clipgen.outputs.metadata import device_name
from clipgen.pipeline import ClipGen
from clipgen.request import SAMPLING, GenerationOutput, GenerationRequest, Part, check_number, check_whole, shown
from clipgen.utils.text import is_blank
from clipgen.weights.resolve import resolve_weights

DEFAULT_PROMPT = "a robot on a beach"
"""Drawn when a request has neither a prompt nor an image: a hosting page's Run button sends the defaults."""
OUTPUT_FORMATS = ("png", "webp", "jpg")
KEPT_FOLDERS = 32
"""Predictions whose files are kept: the server sends files after a prediction has ended, and deletes none."""
MAX_TRUNCATED = 2000
"""Characters of the prompt's unread end that are sent back."""
Record = Callable[[str, Any], None]
"""Set a metric of the prediction, or delete it (None)."""


@dataclass
class PredictionInputs:
    """Inputs of one prediction, as JSON has them, checked when built.

    The limits of a public server are checked here, all other ranges by `GenerationRequest`. Cog's
    server enforces bounds only if it has the schema, so every input is checked with and without it.

    Raises:
        RequestError: a value of the wrong type or out of its range.
    """

    prompt: str
    negative_prompt: str
    image: str | os.PathLike[str] | None
    image_weight: float
    keep_rows: int
    num_outputs: int
    candidates: int
    guidance: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    previews: int
    output_format: str
    output_quality: int

    def __post_init__(self) -> None:
        for name in ("keep_rows", "num_outputs", "candidates", "top_k", "seed", "previews", "output_quality"):
            value = getattr(self, name)
            if isinstance(value, float) and value.is_integer():  # JSON has one type of number
                setattr(self, name, int(value))
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise RequestError(name, f"is {shown(getattr(self, name))}; it must be text")
        if not isinstance(self.image, str | os.PathLike | None):
            raise RequestError("image", f"is {shown(self.image)}; it must be a data: or http(s): URL")
        if self.output_format not in OUTPUT_FORMATS:
            allowed = ", ".join(OUTPUT_FORMATS)
            raise RequestError("output_format", f"is {shown(self.output_format)}; it must be one of {allowed}")
        check_number("image_weight", self.image_weight, -100, 100)
        check_whole("num_outputs", self.num_outputs, 1, 8)
        check_whole("candidates", self.candidates, 1, 64)
        check_whole("keep_rows", self.keep_rows, 0, 63)
        check_whole("previews", self.previews, 0, 8)
        check_whole("output_quality", self.output_quality, 1, 100)
        if self.keep_rows and self.image is None:
            raise RequestError("keep_rows", f"is {self.keep_rows}; it needs an image to keep them of")
        if self.image is not None and self.prompt == DEFAULT_PROMPT:
            self.prompt = ""  # the client sent only an image
        self.to_request(None)  # check the settings before an image is fetched

    def to_request(self, image: Image.Image | None) -> GenerationRequest:
        """The pipeline's request, with the decoded input image.

        An image alone is varied, with a prompt it is mixed, and with rows to keep the prompt describes what is below
        them.

        Raises:
            RequestError: a setting out of its range.
        """
        parts: list[tuple[Part, float]] = []
        if self.image is None or not is_blank(self.prompt):
            parts.append((self.prompt, 1.0))
        if image is not None and not (parts and self.keep_rows):
            parts.append((image, self.image_weight))
        return GenerationRequest(
            parts or DEFAULT_PROMPT,  # an image alone that has not been read yet: only the settings are checked
            num_outputs=self.num_outputs,
            candidates=self.candidates,
            **{name: getattr(self, name) for name in SAMPLING},
            seed=self.seed,
            keep=image if self.keep_rows else None,
            keep_rows=self.keep_rows if image is not None else 0,
            negative_prompt=None if is_blank(self.negative_prompt) else self.negative_prompt,
        )


class PredictionService:
    """A pipeline for any number of concurrent predictions."""

    def __init__(self, pipe: ClipGen) -> None:
        self.pipe = pipe
        self.threads = ThreadPoolExecutor(max_workers=16)  # 8 that run and those that were just cancelled
        self.decoding = threading.Lock()  # an image of 64 megapixels takes a gigabyte: one at a time
        # The process keeps freed blocks of Pillow's usual 16 MB: gigabytes after some large images at once.
        Image.core.set_block_size(64 << 20)
        self.folders: deque[tempfile.TemporaryDirectory[str]] = deque(maxlen=KEPT_FOLDERS)

    @classmethod
    def from_environment(cls) -> PredictionService:
        """Load the model as CLIPGEN_WEIGHTS, CLIPGEN_DEVICE and CLIPGEN_DTYPE say, and draw one image to warm up.

        Raises:
            ClipGenError: the weights or the device cannot be used.
        """
        started = time.perf_counter()
        folder = resolve_weights(log=print)
        device, dtype = (os.environ.get(name) or None for name in ("CLIPGEN_DEVICE", "CLIPGEN_DTYPE"))
        pipe = ClipGen.from_pretrained(folder, device=device, dtype=dtype)
        loaded = time.perf_counter()
        pipe("warm up", seed=0)
        facts: dict[str, Any] = {"model": pipe.config.name, "weights": pipe.digest, "dtype": pipe.precision}
        log_event("ready", started, device=device_name(pipe.device), load=loaded - started, **facts)
        return cls(pipe)

    async def predict(self, record: Record, **inputs: Any) -> list[Path]:
        """Generate images, write them to a new folder, best first, and pass metrics to `record`.

        Raises:
            RequestError: an input is wrong; see `PredictionInputs` for their names.
            asyncio.CancelledError: the prediction was cancelled; its images leave the batch before the next step.
        """
        started = time.perf_counter()
        private = {name: inputs[name] for name in ("prompt", "negative_prompt")}
        stop = threading.Event()
        try:  # the context carries the server's log and metrics into the thread
            work = (self._predict, inputs, record, stop.is_set)
            loop = asyncio.get_running_loop()
            result, files = await loop.run_in_executor(self.threads, copy_context().run, *work)
        except asyncio.CancelledError:
            log_event("canceled", started, private)
            raise
        except Exception as error:
            log_event("failed", started, private, error=type(error).__name__)
            raise
        finally:
            stop.set()
        facts: dict[str, Any] = {"seed": result.seed, "drawn": result.num_generated, "scores": result.scores}
        log_event("succeeded", started, private, **facts, **result.seconds)
        return files

    def _predict(
        self, raw: dict[str, Any], record: Record, is_cancelled: Callable[[], bool]
    ) -> tuple[GenerationOutput, list[Path]]:
        inputs = PredictionInputs(**raw)

        def on_preview(images: list[Image.Image]) -> None:
            record("preview", to_data_url(grid(images)))

        request = inputs.to_request(None if inputs.image is None else self._read(inputs.image, is_cancelled))
        [result] = self.pipe.generate(
            [request],
            is_cancelled=is_cancelled,
            on_preview=on_preview if inputs.previews else None,
            previews=inputs.previews,
        )
        if inputs.previews:
            record("preview", None)
        self._record(result, record)
        return result, self._write(result, inputs.output_format, inputs.output_quality)

    def _read(self, image: str | os.PathLike[str], is_cancelled: Callable[[], bool]) -> Image.Image:
        """Decode an image from a URL, or from a file that the server has fetched; requests cannot name files."""
        try:
            data = read_url(image, is_cancelled) if isinstance(image, str) else Path(image).read_bytes()
            with self.decoding:
                return load_image(data)
        except (OSError, ValueError) as error:
            raise RequestError("image", f"cannot be used: {error}") from error

    def _record(self, result: GenerationOutput, record: Record) -> None:
        for name in ("seed", "seeds", "scores", "seconds"):
            record(name, getattr(result, name))
        if result.truncated:
            record("dropped", result.truncated[:MAX_TRUNCATED])
            print(f"The prompt is too long: the model did not read its last {len(result.truncated)} characters.")
        if match := result.match:
            record("coverage", {**asdict(match), "nearest": [list(pair) for pair in match.nearest]})
            if match.is_out_of_distribution:  # without a name: the log must not reveal the prompt
                print("This model has seen little like it: `coverage` in the metrics names the nearest it has seen.")

    def _write(self, result: GenerationOutput, output_format: str, output_quality: int) -> list[Path]:
        folder = tempfile.TemporaryDirectory(prefix="clipgen-")
        self.folders.append(folder)
        files = []
        for i, (image, receipt) in enumerate(zip(result.images, result.receipts, strict=True), start=1):
            path = Path(folder.name) / f"{i}.{output_format}"
            files.append(save_image(image, path, output_quality, receipt.to_metadata()))
        return files


def log_event(event: str, started: float, private: dict[str, Any] | None = None, **facts: Any) -> None:
    """Print one JSON line, with `private` only if CLIPGEN_LOG_PROMPTS is 1."""
    facts = {name: round(value, 4) if isinstance(value, float) else value for name, value in facts.items()}
    if os.environ.get("CLIPGEN_LOG_PROMPTS") == "1":
        facts |= private or {}
    print(json.dumps({"event": event, "wall": round(time.perf_counter() - started, 4), **facts}), flush=True)
