"""The Cog schema: https://cog.run. What it declares is what it enforces; the work is done by `clipgen.pipeline`.

Settings from the environment: CLIPGEN_WEIGHTS, a folder or a model to fetch at set-up (coco, hf://user/repo), by
default weights/coco where it lies beside weights/mini, else weights/mini; CLIPGEN_DEVICE (a GPU if there is one);
CLIPGEN_DTYPE (what suits the device); CLIPGEN_LOG_PROMPTS=1 to log prompts, which are private otherwise.
"""
# No `from __future__ import annotations`: Cog reads the annotations.

import asyncio
import base64
import inspect
import io
import json
import math
import os
import pathlib
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

from cog import BasePredictor, Input, Path, concurrent, streaming
from PIL import Image

from clipgen.errors import RequestError
from clipgen.images.pixels import grid, load_image, save_image
from clipgen.images.urls import read_url
from clipgen.outputs.metadata import device_name
from clipgen.pipeline import ClipGen
from clipgen.request import GenerationOutput, GenerationRequest
from clipgen.weights.resolve import resolve_weights

DROPPED = 2000
"""Characters of what the model did not read that go back to the client, who has them already."""


class Predictor(BasePredictor):
    """Prompt or image in, images out. Up to 8 requests are accepted at a time, and drawn together."""

    def setup(self) -> None:
        """Load the model. Nothing is downloaded unless CLIPGEN_WEIGHTS names a published model instead of a folder."""
        self.workers = ThreadPoolExecutor(max_workers=16)  # 8 that wait, and those that are just cancelled
        self.load()
        self.decoding = threading.Lock()  # a picture of 64 megapixels takes a gigabyte: one at a time
        # Freed blocks of Pillow's usual 16 MB stay with the process: gigabytes, after some large pictures at once.
        Image.core.set_block_size(64 << 20)
        # Cog sends the files after `predict` has returned and deletes none: a folder lives until 32 newer ones exist.
        self.folders: deque[tempfile.TemporaryDirectory] = deque(maxlen=32)

    def load(self) -> None:
        """Make the pipeline and warm it up, so that the first request is not slower than the others."""
        started = time.perf_counter()
        folder = resolve_weights(log=print)
        self.pipe = ClipGen.from_pretrained(
            folder,
            device=os.environ.get("CLIPGEN_DEVICE") or None,
            dtype=os.environ.get("CLIPGEN_DTYPE") or None,
        )
        loaded = time.perf_counter()
        self.pipe("warm up", seed=0)
        machine: dict[str, Any] = {
            "device": device_name(self.pipe.device),
            "dtype": self.pipe.precision,
        }
        log("ready", started, model=self.pipe.config.name, weights=self.pipe.digest, **machine, load=loaded - started)

    @streaming
    @concurrent(max=8)
    async def predict(
        self,
        prompt: str = Input(default="", description="What to draw. May be empty when there is an image."),
        negative_prompt: str = Input(
            default="", description="What to keep away from: the more guidance, the farther; it must be above 1."
        ),
        image: Path | None = Input(
            default=None, description="An image to draw variations of, or to mix with the prompt."
        ),
        image_weight: float = Input(
            default=1.0,
            ge=-100,
            le=100,
            description="How much the image counts, where the prompt counts 1. Below 0 moves away from it.",
        ),
        keep_rows: int = Input(
            default=0,
            ge=0,
            le=63,
            description="Keep so many rows of tokens of the image, from the top, and draw the rest anew: what the "
            "prompt says, or the image where there is none. The mini model has 12 rows, others 16.",
        ),
        num_outputs: int = Input(default=1, ge=1, le=8, description="Images to return, best first."),
        candidates: int = Input(
            default=16, ge=1, le=64, description="Images to draw, of which CLIP picks the best; at least num_outputs."
        ),
        guidance: float | None = Input(
            default=None, ge=0, le=30, description="How closely to follow the prompt; 1 is off. Default: the model's."
        ),
        temperature: float | None = Input(
            default=None, ge=0, le=10, description="How daring to be; 0 is greedy. Default: the model's."
        ),
        top_k: int | None = Input(
            default=None, ge=0, description="Choose among the K likeliest tokens; 0 is off. Default: the model's."
        ),
        top_p: float | None = Input(
            default=None,
            ge=0,
            le=1,
            description="Choose among the likeliest tokens that add up to this probability, above 0; 1 is off. "
            "Default: the model's.",
        ),
        seed: int | None = Input(
            default=None,
            ge=0,
            le=2147483647,
            description="The same seed and inputs give the same images. Default: a new one, returned in the metrics.",
        ),
        previews: int = Input(
            default=0,
            ge=0,
            le=8,
            description="How often to show the unfinished images: as a data: URL in the metric `preview` of a streamed "
            "prediction, the outputs stay apart.",
        ),
        output_format: str = Input(default="png", choices=["png", "webp", "jpg"], description="File format."),
        output_quality: int = Input(default=90, ge=1, le=100, description="For webp and jpg; png is lossless."),
    ) -> AsyncIterator[Path]:
        """Draw images; seed, CLIP scores, coverage and timings by stage are in the prediction's metrics."""
        started = time.perf_counter()
        private = {"prompt": prompt, "negative_prompt": negative_prompt}
        settings: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        settings |= {"num_outputs": num_outputs, "candidates": candidates, "seed": seed, "keep_rows": keep_rows}
        written: dict[str, Any] = {"output_format": output_format, "output_quality": output_quality}
        stop = threading.Event()
        try:  # the context carries the prediction's log and metrics
            check(image=image, image_weight=image_weight, previews=previews, **private, **written, **settings)
            settings["negative_prompt"] = negative_prompt if negative_prompt.strip() else None
            work = partial(self.draw, prompt, image, image_weight, settings, previews, stop)
            result = await asyncio.get_running_loop().run_in_executor(self.workers, copy_context().run, work)
            files = await asyncio.to_thread(self.write, result, **written)
        except asyncio.CancelledError:
            log("canceled", started, private)
            raise
        except Exception as error:
            log("failed", started, private, error=type(error).__name__)
            raise
        finally:  # canceled: the engine drops its pictures before the next step
            stop.set()
        for name in ("seed", "seeds", "scores", "seconds"):
            self.record_metric(name, getattr(result, name))
        if result.truncated:
            self.record_metric("dropped", result.truncated[:DROPPED])
        log(
            "succeeded",
            started,
            private,
            seed=result.seed,
            drawn=result.num_generated,
            scores=result.scores,
            **result.seconds,
        )
        for file in files:
            yield file

    def draw(
        self,
        prompt: str,
        image: str | os.PathLike[str] | None,
        image_weight: float,
        settings: dict[str, Any],
        previews: int,
        stop: threading.Event,
    ) -> GenerationOutput:
        """What a prediction waits for, in a thread of its own."""
        picture = None if image is None else self.read(image, stop)
        if settings["keep_rows"] and picture is None:
            raise ValueError(f"keep_rows is {settings['keep_rows']}; it needs an image to keep them of")
        if settings["keep_rows"]:
            settings["keep"] = picture
        parts: list[Any] = [(prompt, 1.0)] if prompt.strip() or picture is None else []
        if picture is not None and not (parts and settings["keep_rows"]):
            parts.append((picture, image_weight))
        show = self.show if previews else None
        [result] = self.pipe.generate(
            [GenerationRequest(parts, **settings)], is_cancelled=stop.is_set, on_preview=show, previews=previews
        )
        if show is not None:
            self.scope.metrics.delete("preview")  # the outputs are there now
        if result.truncated:
            print(f"The prompt is too long: the model did not read its last {len(result.truncated)} characters.")
        if covered := result.match:
            near = [list(pair) for pair in covered.nearest]
            self.record_metric("coverage", {**asdict(covered), "nearest": near})
            if covered.is_out_of_distribution:  # without a name: the log must not tell what was asked for
                print("This model has seen little like it: `coverage` in the metrics names the nearest it has seen.")
        return result

    def read(self, image: str | os.PathLike[str], stop: threading.Event) -> Image.Image:
        """The picture that a URL stands for, or a file that Cog has fetched already, which no request can name."""
        try:
            data = read_url(image, stop.is_set) if isinstance(image, str) else pathlib.Path(image).read_bytes()
            with self.decoding:
                return load_image(data)
        except (OSError, ValueError) as error:
            raise RequestError("image", f"cannot be used: {error}") from error

    def show(self, pictures: list[Image.Image]) -> None:
        """Send unfinished pictures, side by side, to whoever streams."""
        buffer = io.BytesIO()
        grid(pictures).save(buffer, "WEBP", quality=70)
        self.record_metric("preview", f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}")

    def write(self, result: GenerationOutput, output_format: str, output_quality: int) -> list[Path]:
        """Put the pictures into a fresh folder, best first."""
        folder = tempfile.TemporaryDirectory(prefix="clipgen-")
        self.folders.append(folder)
        files = []
        for i, (picture, receipt) in enumerate(zip(result.images, result.receipts, strict=True), start=1):
            path = f"{folder.name}/{i}.{output_format}"
            files.append(Path(save_image(picture, path, output_quality, receipt.to_metadata())))
        return files


def log(event: str, started: float, private: dict[str, str] | None = None, **facts: Any) -> None:
    """One JSON line in the prediction's log, which Cog keeps under the prediction's id; without what is private."""
    facts = {name: round(value, 4) if isinstance(value, float) else value for name, value in facts.items()}
    if os.environ.get("CLIPGEN_LOG_PROMPTS") == "1":
        facts |= private or {}
    print(json.dumps({"event": event, "wall": round(time.perf_counter() - started, 4), **facts}), flush=True)


# Read now: when Cog loads the predictor it puts plain values in place of the declarations.
DECLARED = inspect.signature(Predictor.predict).parameters
# In the schema the image is a file. To Cog's server it is text, or it would itself fetch whatever the URL names: from
# this machine and its network too, without a limit, and leave what it could not fetch in the temporary folder.
Predictor.predict.__annotations__["image"] = str | None


def check(**inputs: Any) -> None:
    """Enforce the types, bounds and choices that `Predictor.predict` declares.

    Cog does so only in images that `cog build` has made; anywhere else it passes on what it gets.

    Raises:
        ValueError: names the input, its value and what is allowed.
    """
    for name, value in inputs.items():
        field, annotation = DECLARED[name].default, DECLARED[name].annotation
        kind, *others = get_args(annotation) or [annotation]
        if not (value is None and others) and not _allowed(value, kind, field):
            raise ValueError(f"{name} is {str(value)[:100]!r}; it must be {_describe(kind, field)}")


def _allowed(value: Any, kind: type, field: Any) -> bool:
    types: Any = {float: (int, float), Path: (str, os.PathLike)}.get(kind, kind)
    if isinstance(value, bool) or not isinstance(value, types):
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return (
        (field.ge is None or value >= field.ge)
        and (field.le is None or value <= field.le)
        and (field.choices is None or value in field.choices)
    )


def _describe(kind: type, field: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", Path: "a file: a data: or http(s): URL"}
    if field.choices:
        return f"one of {', '.join(field.choices)}"
    if field.le is not None:
        return f"{names[kind]} from {field.ge} to {field.le}"
    return names[kind] + (f", {field.ge} or more" if field.ge is not None else "")
