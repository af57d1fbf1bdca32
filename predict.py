"""The Cog predictor (https://cog.run): the inputs, declared for Cog; `clipgen.serving` does the work.

Settings from the environment: CLIPGEN_WEIGHTS, a folder or a model to fetch at set-up (coco, hf://user/repo), by
default weights/coco where it lies beside weights/mini, else weights/mini; CLIPGEN_DEVICE, by default a GPU if there is
one; CLIPGEN_DTYPE, by default what suits the device; CLIPGEN_IMAGE_HOSTS, private hosts that images may come from;
CLIPGEN_LOG_PROMPTS=1 to log prompts, which are private otherwise.

Cog's parser reads this source without running it: no `from __future__ import annotations`, and each description is one
literal on one line, since Cog shows the quotes between two adjacent literals to every client.
"""

from collections.abc import AsyncIterator
from typing import Any

import coglet
from cog import BasePredictor, Input, Path, concurrent, streaming

from clipgen.serving import PredictionService
from clipgen.utils.ctrl_c import heed_ctrl_c


class Predictor(BasePredictor):
    """Prompt or image in, images out. Up to 8 requests are accepted at a time and drawn together."""

    def setup(self) -> None:
        """Load the model and warm it up. Nothing is downloaded unless CLIPGEN_WEIGHTS names a published model."""
        if coglet.server.active:  # Cog's worker hangs for ten seconds where Python's own handler is in place
            heed_ctrl_c()
        self.service = PredictionService.from_environment()

    def healthcheck(self) -> bool:
        """Whether predictions can succeed: not after a CUDA error that stays, or when the compute thread has died."""
        return self.service.pipe.is_healthy

    @streaming
    @concurrent(max=8)
    async def predict(
        self,
        prompt: str = Input(
            default="a robot on a beach",
            description="What to draw. Left as it is or empty beside an image, the image alone is varied.",
        ),
        negative_prompt: str = Input(
            default="", description="What to steer away from; it needs guidance above 1, and more steers farther."
        ),
        image: Path | None = Input(
            default=None,
            accept="image/*",
            description="An image to draw variations of, or to mix with the prompt. Leave it out for none.",
        ),
        image_weight: float = Input(
            default=1.0,
            ge=-100,
            le=100,
            description="How much the image counts where the prompt counts 1. Below 0 moves away from it.",
        ),
        keep_rows: int = Input(
            default=0,
            ge=0,
            le=63,
            description="Rows of tokens to keep from the top of the image; the prompt describes the rest.",
        ),
        num_outputs: int = Input(default=1, ge=1, le=8, description="Images to return, best first."),
        candidates: int = Input(
            default=16, ge=1, le=64, description="Images to draw, of which CLIP picks the best; at least num_outputs."
        ),
        guidance: float | None = Input(
            default=None, ge=0, le=30, description="How closely to follow the prompt; 1 is off. Default: the model's."
        ),
        temperature: float | None = Input(
            default=None, ge=0, le=10, description="Randomness of each token; 0 is greedy. Default: the model's."
        ),
        top_k: int | None = Input(
            default=None, ge=0, description="Sample among the K likeliest tokens; 0 is off. Default: the model's."
        ),
        top_p: float | None = Input(
            default=None,
            ge=0,
            le=1,
            description="Sample among the likeliest tokens that add up to P, above 0; 1 is off. Default: the model's.",
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
            description="How often a streamed prediction shows unfinished images, as data: URLs in the metric preview.",
        ),
        output_format: str = Input(default="png", choices=["png", "webp", "jpg"], description="File format."),
        output_quality: int = Input(default=90, ge=1, le=100, description="For webp and jpg; png is lossless."),
    ) -> AsyncIterator[Path]:
        """Draw images; seed, CLIP scores, coverage and timings by stage are in the prediction's metrics."""
        inputs = {name: value for name, value in locals().items() if name != "self"}
        for file in await self.service.predict(self.record, **inputs):
            yield Path(file)

    def record(self, name: str, value: Any) -> None:
        """Set a metric, or delete it (None), which Cog's `record_metric` refuses to do."""
        if value is None:
            self.scope.metrics.delete(name)
        else:
            self.record_metric(name, value)


# The schema, read from the source above, declares the image as a file. At run time it is text: Cog would fetch whatever
# a URL names itself, from this machine and its network too, without a limit, and leave files behind when that fails.
Predictor.predict.__annotations__["image"] = str | None
