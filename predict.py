"""The Cog schema: https://cog.run. What it declares is what it enforces; the work is done by `clipgen.pipeline`.

Settings from the environment: CLIPGEN_WEIGHTS, a folder (weights/mini) or a model to fetch at set-up (coco);
CLIPGEN_DEVICE (a GPU if there is one); CLIPGEN_DTYPE (what suits the device).
"""
# No `from __future__ import annotations`: Cog reads the annotations.

import asyncio
import inspect
import json
import math
import os
import pathlib
import tempfile
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

from cog import BasePredictor, Input, Path, concurrent

from clipgen.checkpoints import obtain
from clipgen.images import load_image, save_image
from clipgen.pipeline import ClipGen
from clipgen.request import Request

WEIGHTS = pathlib.Path(__file__).resolve().parent / "weights" / "mini"


class Predictor(BasePredictor):
    """Prompt or image in, images out. Up to 8 requests are accepted at a time and drawn in the order they came."""

    def setup(self) -> None:
        """Load the model. Nothing is downloaded unless CLIPGEN_WEIGHTS names a published model in place of a folder."""
        self.pipe = ClipGen.from_pretrained(
            obtain(os.environ.get("CLIPGEN_WEIGHTS") or WEIGHTS, say=print),
            device=os.environ.get("CLIPGEN_DEVICE") or None,
            dtype=os.environ.get("CLIPGEN_DTYPE") or None,
        )
        self.worker = ThreadPoolExecutor(max_workers=1)  # one model, one thread: the others wait and can be cancelled
        # Cog sends the files after `predict` has returned and deletes none: a folder lives until 32 newer ones exist.
        self.folders: deque[tempfile.TemporaryDirectory] = deque(maxlen=32)

    @concurrent(max=8)
    async def predict(
        self,
        prompt: str = Input(default="", description="What to draw. May be empty when there is an image."),
        image: Path | None = Input(
            default=None, description="An image to draw variations of. With a prompt, both count alike."
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
        output_format: str = Input(default="png", choices=["png", "webp", "jpg"], description="File format."),
        output_quality: int = Input(default=90, ge=1, le=100, description="For webp and jpg; png is lossless."),
    ) -> list[Path]:
        """Draw images; seed, CLIP scores and stage timings are in the prediction's metrics."""
        sampling: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        sampling |= {"num_outputs": num_outputs, "candidates": candidates, "seed": seed}
        check(prompt=prompt, image=image, output_format=output_format, output_quality=output_quality, **sampling)
        parts: list[Any] = [prompt] if prompt.strip() or image is None else []
        if image is not None:
            parts.append(await asyncio.to_thread(load_image, image))
        request = Request(parts, **sampling)
        stop = threading.Event()
        draw = partial(self.pipe.generate, [request], should_stop=stop.is_set)
        try:  # the context carries the prediction's log
            [result] = await asyncio.get_running_loop().run_in_executor(self.worker, copy_context().run, draw)
        finally:  # cancelled: the thread ends at the next token
            stop.set()
        if result.dropped:
            print(f"The prompt is too long for the model, which did not read this part: {result.dropped}")
        self.record_metric("seed", result.seed)
        self.record_metric("seeds", result.seeds)
        self.record_metric("scores", result.scores)
        self.record_metric("seconds", result.seconds)
        folder = tempfile.TemporaryDirectory(prefix="clipgen-")
        self.folders.append(folder)
        settings = json.dumps({"candidates": candidates, **asdict(request.sampling(self.pipe.config.sampling))})
        shared = {"prompt": prompt, "seed": str(result.seed), "settings": settings}
        files = []
        for i, (picture, own) in enumerate(zip(result.images, result.seeds, strict=True), start=1):
            path = f"{folder.name}/{i}.{output_format}"
            files.append(Path(save_image(picture, path, output_quality, shared | {"image_seed": str(own)})))
        return files


# Read now: when Cog loads the predictor it puts plain values in place of the declarations.
DECLARED = inspect.signature(Predictor.predict).parameters


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
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
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
