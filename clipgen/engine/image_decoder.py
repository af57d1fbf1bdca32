"""Tokens to pixels and scores. What other threads bring while one thread paints is painted together next.

Shapes: n pictures, T tokens, D embedding, C H W. Pixels are in [-1, 1].
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from clipgen.errors import Cancelled
from clipgen.images.pixels import clip_from_pixels, from_pixels
from clipgen.models.clip import Clip
from clipgen.models.vqgan import VQGAN
from clipgen.utils.compute_thread import ComputeThread
from clipgen.utils.memory import MOST_PICTURES, fitting, in_batches, pixel_bytes


@dataclass(frozen=True)
class DecodedImage:
    """One picture."""

    pixels: Tensor
    """(3, H, W) float32 on the CPU."""
    score: float
    """Cosine of its CLIP embedding and the prompt's."""
    seconds: tuple[float, float]
    """Its share of the time to decode its batch, and to rank it."""


@dataclass(eq=False)
class _Item:
    tokens: Tensor
    condition: Tensor
    result: DecodedImage | None = None
    error: Exception | None = None


class ImageDecoder:
    """The VQGAN's decoder and CLIP's image tower, for any number of threads at once, in batches that fit."""

    def __init__(self, vqgan: VQGAN, clip: Clip, worker: ComputeThread | None = None) -> None:
        self.vqgan, self.clip = vqgan, clip
        self._worker = worker or ComputeThread()
        self._turn = threading.Lock()  # held by the thread that paints
        self._waiting: deque[_Item] = deque()  # as they came; its single operations are thread-safe

    def paint(
        self, tokens: Tensor, conditions: Tensor, is_cancelled: Callable[[], bool] | None = None
    ) -> list[DecodedImage]:
        """Decode tokens (n, T) and rank the pictures against conditions (n, D), unit norm.

        Args:
            is_cancelled: asked before each batch.

        Raises:
            Cancelled: `is_cancelled` said so.
            InsufficientMemoryError: not even one picture fits.
        """
        own = [_Item(*pair) for pair in zip(tokens, conditions, strict=True)]
        self._waiting.extend(own)
        with self._turn:
            try:
                while any(item.result is None and item.error is None for item in own):
                    if is_cancelled is not None and is_cancelled():
                        raise Cancelled
                    self._worker.run(self._paint_next)
            except BaseException:
                for item in own:  # whoever comes to it passes it over
                    item.error = Cancelled()
                raise
        for item in own:
            if item.error is not None:
                raise item.error
        return [item.result for item in own if item.result is not None]

    def preview(self, tokens: Tensor) -> list[Image.Image]:
        """Unfinished pictures: whole rows of tokens (n, T) are painted, what has -1 is neutral grey."""
        return self._worker.run(self._preview, tokens)

    def _preview(self, tokens: Tensor) -> list[Image.Image]:
        grid = self.vqgan.config.grid
        rows = [int((row >= 0).sum()) // grid for row in tokens]
        filled = tokens.clamp(min=0).unflatten(1, (grid, grid)).clone()
        for image, count in zip(filled, rows, strict=True):
            image[count:] = image[max(count - 1, 0)]  # the decoder looks across the border
        device = self.vqgan.post_quant_conv.weight.device
        pixels = self.vqgan.decode_tokens(filled.flatten(1).to(device)).float().clamp(-1, 1).cpu()
        side = self.vqgan.config.image_size // grid
        for image, count in zip(pixels, rows, strict=True):
            image[:, count * side :] = 0
        return from_pixels(pixels)

    def _paint_next(self) -> None:
        """Paint those who came first, whosever they are."""
        weight = self.vqgan.post_quant_conv.weight
        size = fitting(pixel_bytes(self.vqgan.config, weight.dtype), weight.device, MOST_PICTURES)
        items: list[_Item] = []
        while self._waiting and len(items) < size:
            item = self._waiting.popleft()
            if item.error is None:
                items.append(item)
        left = list(items)
        try:
            for results in in_batches(self._run, items, size, "decoding pixels"):
                for result in results:
                    left.pop(0).result = result
        except Exception as error:
            for item in left:
                item.error = error

    def _run(self, items: Sequence[_Item]) -> list[DecodedImage]:
        started = time.perf_counter()
        images = self.vqgan.decode_tokens(torch.stack([item.tokens for item in items])).float().clamp(-1, 1)
        self._wait()
        decoded = time.perf_counter()
        found = self.clip.encode_image(clip_from_pixels(images, self.clip.image_size))
        cosines = (found * torch.stack([item.condition for item in items])).sum(-1).tolist()
        ranked = time.perf_counter()
        seconds = ((decoded - started) / len(items), (ranked - decoded) / len(items))
        return [DecodedImage(image, cosine, seconds) for image, cosine in zip(images.cpu(), cosines, strict=True)]

    def _wait(self) -> None:
        if self.clip.device.type == "cuda":
            torch.cuda.synchronize()
