"""Tokens to pixels and CLIP scores. What several callers submit is decoded in shared batches.

Shapes: n images, T tokens, D embedding, C H W. Pixels are in [-1, 1].
"""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from PIL import Image
from torch import Tensor

from clipgen.errors import Cancelled, EngineError
from clipgen.images.pixels import clip_from_pixels, from_pixels
from clipgen.models.clip import Clip
from clipgen.models.vqgan import VQGAN
from clipgen.utils.compute_thread import ComputeThread, synchronize
from clipgen.utils.memory import MAX_DECODE_BATCH, in_batches, max_batch_size, pixel_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodedImage:
    """One image and its score."""

    pixels: Tensor
    """(3, H, W) float32 on the CPU."""
    score: float
    """Cosine of its CLIP embedding and the prompt's."""
    seconds: tuple[float, float]
    """Its share of the time to decode its batch, and to rank it."""


@dataclass(eq=False)
class _Item:
    tokens: Tensor
    embedding: Tensor
    result: DecodedImage | None = None
    error: Exception | None = None


class ImageDecoder:
    """The VQGAN's decoder and CLIP's image tower for any number of threads, in batches that fit into memory."""

    def __init__(self, vqgan: VQGAN, clip: Clip, compute: ComputeThread | None = None) -> None:
        self.vqgan, self.clip = vqgan, clip
        self._compute = compute or ComputeThread()
        self._waiting: deque[_Item] = deque()  # of all callers; only the compute thread takes items out

    def decode(
        self, tokens: Tensor, embeddings: Tensor, is_cancelled: Callable[[], bool] | None = None
    ) -> list[DecodedImage]:
        """Decode tokens (n, T) and score the images against the prompts' embeddings (n, D), unit norm.

        Args:
            is_cancelled: called before each batch.

        Raises:
            Cancelled: `is_cancelled` returned True.
            InsufficientMemoryError: not even one image fits.
            EngineError: pixels are not finite, even in float32.
        """
        own = [_Item(*pair) for pair in zip(tokens, embeddings, strict=True)]
        self._waiting.extend(own)
        try:
            while any(item.result is None and item.error is None for item in own):
                if is_cancelled is not None and is_cancelled():
                    raise Cancelled
                self._compute.run(self._decode_waiting)
        except BaseException:
            for item in own:  # the next batch skips them
                item.error = Cancelled()
            raise
        for item in own:
            if item.error is not None:
                raise item.error
        return [item.result for item in own if item.result is not None]

    def preview(self, tokens: Tensor) -> list[Image.Image]:
        """Decode the complete rows of unfinished images, the rest grey. Tokens are (n, T), -1 where there is none."""
        return self._compute.run(self._preview, tokens)

    def _preview(self, tokens: Tensor) -> list[Image.Image]:
        grid = self.vqgan.config.grid
        complete = [int((row >= 0).sum()) // grid for row in tokens]
        filled = rearrange(tokens.clamp(min=0), "n (h w) -> n h w", h=grid).clone()
        for image, rows in zip(filled, complete, strict=True):
            image[rows:] = image[max(rows - 1, 0)]  # the decoder looks across the border
        flat = rearrange(filled, "n h w -> n (h w)").to(self.clip.device)
        pixels = torch.cat(list(in_batches(self._decode_rows, list(flat), self._batch_size(), "decoding previews")))
        side = self.vqgan.config.image_size // grid
        for image, rows in zip(pixels, complete, strict=True):
            image[:, rows * side :] = 0
        return from_pixels(pixels)

    def _decode_rows(self, rows: Sequence[Tensor]) -> Tensor:
        return self.vqgan.decode_tokens(torch.stack(list(rows))).float().clamp(-1, 1).cpu()

    def _batch_size(self) -> int:
        weight = self.vqgan.post_quant_conv.weight
        return max_batch_size(pixel_bytes(self.vqgan.config, weight.dtype), weight.device, MAX_DECODE_BATCH)

    def _decode_waiting(self) -> None:
        """Decode one batch of the longest-waiting items of all callers."""
        size = self._batch_size()
        items: list[_Item] = []
        while self._waiting and len(items) < size:
            item = self._waiting.popleft()
            if item.error is None:
                items.append(item)
        open_items = deque(items)
        try:
            for results in in_batches(self._run, items, size, "decoding pixels"):
                for result in results:
                    open_items.popleft().result = result
        except Exception as error:
            self._compute.check_device(error)
            for item in open_items:
                item.error = error

    def _run(self, items: Sequence[_Item]) -> list[DecodedImage]:
        start = time.perf_counter()
        images = self._decode_finite(torch.stack([item.tokens for item in items]))
        synchronize(self.clip.device)
        decoded = time.perf_counter()
        found = self.clip.encode_image(clip_from_pixels(images, self.clip.image_size))
        wanted = torch.stack([item.embedding for item in items])
        # An overflow in CLIP must not decide the order: NaN ranks last.
        scores = einsum(found, wanted, "n d, n d -> n").nan_to_num(nan=-1.0).tolist()
        ranked = time.perf_counter()
        seconds = ((decoded - start) / len(items), (ranked - decoded) / len(items))
        return [DecodedImage(image, score, seconds) for image, score in zip(images.cpu(), scores, strict=True)]

    def _decode_finite(self, tokens: Tensor) -> Tensor:
        """Decode tokens (n, T) to float32 pixels (n, 3, H, W); what overflows in float16 is redone in float32."""
        pixels = self.vqgan.decode_tokens(tokens).float()
        is_finite = pixels.isfinite().flatten(1).all(dim=1)
        if not bool(is_finite.all()):
            if self.vqgan.post_quant_conv.weight.dtype == torch.float32:
                raise EngineError("the VQGAN's pixels are not finite: its weights are damaged")
            log.warning("%d of %d images overflowed and are decoded in float32", int((~is_finite).sum()), len(tokens))
            again = copy.deepcopy(self.vqgan).float().decode_tokens(tokens[~is_finite])
            if not bool(again.isfinite().all()):
                raise EngineError("the VQGAN's pixels are not finite, in float32 either: its weights are damaged")
            pixels[~is_finite] = again
        return pixels.clamp(-1, 1)
