"""The key-value cache of decoding: allocated once by the caller, written by position, shared by all layers.

Shapes: B rows, T positions, S positions of a segment, L positions that a step reads.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipgen.config import GPTConfig
from clipgen.models.capabilities import can_fuse_attention

SEGMENT, VECTOR = 128, 16
"""Positions that lie together on a CPU, and those that its vector instructions sum at once, at most. A step reads whole
segments: what is masked adds exact zeros to sums whose order stays the same."""


@dataclass
class KVCache:
    """Keys and values of all layers.

    A row can be given to another image at any time: what it held before is masked and need not be cleared.
    """

    data: Tensor
    """(n_layer, 2, B, segments, n_head, S, head): position t is place t % S of segment t // S."""
    fused: bool
    """Whether attention runs in one fused kernel, for which each row is a single segment."""

    @classmethod
    def allocate(
        cls, config: GPTConfig, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> KVCache:
        """A cache for `batch` sequences of full length; it belongs to the caller and can be used again."""
        head = config.n_embd // config.n_head
        fused = torch.device(device).type != "cpu" or can_fuse_attention(dtype, head)
        segments = 1 if fused else -(-config.block_size // SEGMENT)
        size = -(-config.block_size // (segments * VECTOR)) * VECTOR  # equal: the fewest are read in vain
        shape = (config.n_layer, 2, segments, batch, config.n_head, size, head)
        return cls(torch.zeros(shape, device=device, dtype=dtype).transpose(2, 3), fused)


class KVCacheView:
    """What one decoding step writes to a cache and reads from it, worked out once for all layers.

    Args:
        cache: of at least B rows; the first B are used.
        positions: (B,) int64 on the cache's device, where each row writes; it sees what lies before, and itself.
        max_position: the largest position + 1, or more, as the host knows it.

    Raises:
        ValueError: more rows than the cache has.
    """

    def __init__(self, cache: KVCache, positions: Tensor, max_position: int) -> None:
        data = cache.data
        _, _, capacity, _, n_head, size, _ = data.shape
        self.rows, self.dtype, self.fused = len(positions), data.dtype, cache.fused
        if self.rows > capacity:
            raise ValueError(f"{self.rows} rows for a cache of {capacity}; allocate one for at least as many")
        length = max_position
        if data.device.type == "cpu":
            step = SEGMENT if self.fused else size
            length = min(-(-max_position // step) * step, size if self.fused else data.shape[3] * size)
        visible = torch.arange(length, device=data.device) <= positions[:, None]
        mask = torch.zeros(visible.shape, dtype=data.dtype, device=data.device).masked_fill_(~visible, -torch.inf)
        if self.fused:
            self.mask = mask[:, None, None]
            self.read = data[:, :, : self.rows, 0, :, :length].unbind(0)  # per layer (2, B, n_head, L, head)
        else:
            self.masks = repeat(mask, "b l -> (b h) 1 l", h=n_head).split(size, dim=-1)
            segments = [s.flatten(2, 3) for s in data[:, :, : self.rows, : length // size].unbind(3)]
            # Per segment and layer: keys (B * n_head, head, S), values (B * n_head, S, head).
            self.keys = [rearrange(s[:, 0], "layer bh s head -> layer bh head s").unbind(0) for s in segments]
            self.values = [s[:, 1].unbind(0) for s in segments]
        # In memory segments come before rows: the flat index of each row and head's place.
        row_and_head = torch.arange(self.rows * n_head, device=data.device)
        place = repeat(positions, "b -> (b h)", h=n_head)
        self.index = (row_and_head + place // size * capacity * n_head) * size + place % size
        self.write = data.transpose(2, 3).flatten(2, 5).unbind(0)  # per layer (2, segments * B * n_head * S, head)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Store this step's keys and values, then attend to all; qkv (B, 3, n_head, head) -> (B, n_head, head)."""
        q, new = qkv[:, 0], qkv[:, 1:].transpose(0, 1)
        self.write[layer].index_copy_(1, self.index, new.flatten(1, 2))
        if self.fused:
            k, v = self.read[layer].unbind(0)
            return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=self.mask)[:, :, 0]
        query, scale = q.reshape(-1, 1, q.shape[-1]), q.shape[-1] ** -0.5
        scores = [
            torch.baddbmm(mask, query, keys[layer], alpha=scale)
            for mask, keys in zip(self.masks, self.keys, strict=True)
        ]
        # In reduced precision softmax computes in float32 and rounds at the end.
        weights = torch.cat(scores, dim=-1).softmax(-1).split(scores[0].shape[-1], dim=-1)
        y = torch.bmm(weights[0], self.values[0][layer])
        for weight, values in zip(weights[1:], self.values[1:], strict=True):
            y = torch.baddbmm(y, weight, values[layer])
        return y.view(q.shape)


def single_query_backends(device: torch.device) -> AbstractContextManager[None]:
    """Restrict attention on GPUs to kernels that cost nothing for a new cache length.

    On Hopper PyTorch prefers cuDNN, which builds a plan on the host for every shape: tens to hundreds of milliseconds
    for each of up to T lengths, in a cache without bound. The memory-efficient kernel is the one that a T4 uses, too.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
