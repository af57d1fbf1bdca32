"""Keys and values of the positions decoded so far, in memory that the caller owns and that is written by position.

Shapes: B rows, T tokens of an image (= block_size).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.config import GPTConfig

SEGMENT = 128
"""Most positions of a cache that lie together on a CPU: a step reads whole segments, as few as it needs."""


@dataclass
class KVCache:
    """Keys and values of all layers, allocated once and written by position.

    A row may be given to another image at any time: what it held before is not seen, and need not be cleared.
    """

    data: Tensor
    """(n_layer, 2, B, segments, n_head, S, head): position t is place t % S of segment t // S."""

    @classmethod
    def allocate(
        cls, config: GPTConfig, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> KVCache:
        """A cache for `batch` sequences of full length; it belongs to the caller and can be used again."""
        segments = -(-config.block_size // SEGMENT) if torch.device(device).type == "cpu" else 1
        size = -(-config.block_size // segments)
        shape = (config.n_layer, 2, segments, batch, config.n_head, size, config.n_embd // config.n_head)
        return cls(torch.zeros(shape, device=device, dtype=dtype).transpose(2, 3))


class KVCacheView:
    """What one step writes to a cache and reads of it: worked out once, the same for all layers."""

    def __init__(self, cache: KVCache, positions: int | Tensor, rows: int, max_position: int) -> None:
        data, device = cache.data, cache.data.device
        _, _, slots, _, heads, size, _ = data.shape
        if rows > slots:
            raise ValueError(f"{rows} rows for a cache of {slots}; allocate one for at least as many")
        self.rows, self.dtype = rows, data.dtype
        self.whole = device.type != "cpu"  # one segment, of which a part can be read
        length = max_position if self.whole else -(-max_position // size) * size
        seen = torch.arange(length, device=device) <= (positions if isinstance(positions, int) else positions[:, None])
        mask = torch.zeros(seen.shape, dtype=data.dtype, device=device).masked_fill_(~seen, -torch.inf)
        if self.whole:
            self.mask = None if isinstance(positions, int) else mask[:, None, None]
            self.read = data[:, :, :rows, 0, :, :max_position].unbind(0)  # per layer (2, B, n_head, L, head)
        else:
            mask = mask.view(-1, 1, length).expand(rows, heads, length).reshape(rows * heads, 1, length)
            self.masks = mask.split(size, dim=-1)
            segments = [s.flatten(2, 3) for s in data[:, :, :rows, : length // size].unbind(3)]
            # Of each segment the layers': keys (B * n_head, head, S), values (B * n_head, S, head).
            self.keys = [segment[:, 0].transpose(-1, -2).unbind(0) for segment in segments]
            self.values = [segment[:, 1].unbind(0) for segment in segments]
        self.index: Tensor | None = None
        if isinstance(positions, int):
            self.write = data[:, :, :rows, positions // size, :, positions % size].unbind(0)  # (2, B, n_head, head)
        else:
            place = positions[:, None].expand(rows, heads).flatten()
            row = torch.arange(rows * heads, device=device) + place // size * slots * heads
            self.index = row * size + place % size
            self.write = data.transpose(2, 3).flatten(2, 5).unbind(0)  # (2, segments * slots * n_head * S, head)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Keep the keys and values of this step and look at all; qkv (B, 3, n_head, head) -> (B, n_head, head)."""
        q, new = qkv[:, 0], qkv[:, 1:].transpose(0, 1)
        if self.index is None:
            self.write[layer].copy_(new)
        else:
            self.write[layer].index_copy_(1, self.index, new.flatten(1, 2))
        if self.whole:
            k, v = self.read[layer].unbind(0)
            return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=self.mask)[:, :, 0]
        # A query each: products of whole segments run at the speed of the memory, the fused kernel at a fifth of it.
        query, scale = q.reshape(-1, 1, q.shape[-1]), q.shape[-1] ** -0.5
        scores = [
            torch.baddbmm(mask, query, keys[layer], alpha=scale)
            for mask, keys in zip(self.masks, self.keys, strict=True)
        ]
        # In reduced precision softmax computes in float32 and rounds at the end.
        if len(scores) == 1:
            return torch.bmm(scores[0].softmax(-1), self.values[0][layer]).view(q.shape)
        parts = torch.cat(scores, dim=-1).softmax(-1).split(scores[0].shape[-1], dim=-1)
        y = torch.bmm(parts[0], self.values[0][layer])
        for part, values in zip(parts[1:], self.values[1:], strict=True):
            y = torch.baddbmm(y, part, values[layer])
        return y.view(q.shape)
