"""GPT: a CLIP embedding to VQGAN tokens, one by one (Wang et al., "CLIP-GEN", arXiv 2203.00386).

Position 0 holds the projected embedding, position t the token t - 1; the logits at position t are those of token t.
Shapes: B batch, T tokens of an image (= block_size), V codebook size, D embedding, C n_embd.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clipgen.config import GPTConfig


@dataclass
class KVCache:
    """Keys and values of all layers, (n_layer, 2, B, n_head, T, head), allocated once and written by position.

    A row may be given to another image at any time: what it held before is neither read nor in need of clearing.
    """

    data: Tensor

    @classmethod
    def allocate(
        cls, config: GPTConfig, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> KVCache:
        """A cache for `batch` sequences of full length; it belongs to the caller and can be used again."""
        head = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch, config.n_head, config.block_size, head)
        return cls(torch.zeros(shape, device=device, dtype=dtype))


class Window:
    """The part of a cache that one step writes and reads: worked out once, the same for all layers."""

    def __init__(self, cache: KVCache, rows: int, positions: int | Tensor, longest: int | None) -> None:
        _, _, slots, heads, length, _ = cache.data.shape
        if rows > slots:
            raise ValueError(f"{rows} rows for a cache of {slots}; allocate one for at least as many")
        if isinstance(positions, int):
            longest = positions + 1
        elif longest is None:
            longest = length
        if not 0 < longest <= length:
            raise ValueError(f"a step up to position {longest - 1} in a cache of {length} positions, 0 to {length - 1}")
        self.data = cache.data[:, :, :rows, :, :longest]
        self.position = positions if isinstance(positions, int) else None
        self.mask: Tensor | None = None  # (B, 1, 1, longest): what each row may see
        if not isinstance(positions, int):
            row_heads = torch.arange(rows * heads, device=positions.device)
            self.flat = cache.data[:, :, :rows].flatten(2, 4)  # (n_layer, 2, B * n_head * T, head)
            self.index = row_heads * length + positions.repeat_interleave(heads)
            self.mask = (torch.arange(longest, device=positions.device) <= positions[:, None])[:, None, None]

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, n_head, head) of this step; returns what the rows see, (B, n_head, longest, head)."""
        keys, values = self.data[layer].unbind(0)
        if self.position is not None:
            keys[:, :, self.position], values[:, :, self.position] = k, v
        else:
            flat_keys, flat_values = self.flat[layer].unbind(0)
            flat_keys.index_copy_(0, self.index, k.flatten(0, 1))
            flat_values.index_copy_(0, self.index, v.flatten(0, 1))
        return keys, values


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every position attends to itself and those before it; all (B, n_head, L, head)."""
    if q.device.type != "cpu" or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # Training on a CPU: at some hundred positions plain products are three times as fast as the fused kernel.
    b, heads, length, size = q.shape
    mask = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1).expand(b * heads, length, length)
    scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=size**-0.5)
    return (scores.softmax(-1).to(v.dtype) @ v.flatten(0, 1)).view(b, heads, length, size)


class Block(nn.Module):
    """Pre-norm transformer block with exact GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        c = config.n_embd
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.norm1 = nn.LayerNorm(c)
        self.qkv = nn.Linear(c, 3 * c)
        self.proj = nn.Linear(c, c)
        self.norm2 = nn.LayerNorm(c)
        self.fc1 = nn.Linear(c, 4 * c)
        self.fc2 = nn.Linear(4 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        """All positions (B, L, C), causally."""
        b, length, c = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, length, 3, self.n_head, c // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, n_head, L, head)
        y = causal_attention(q, k, v).transpose(1, 2).reshape(b, length, c)
        x = x + self._drop(self.proj(y))
        return x + self._drop(self.fc2(self._drop(F.gelu(self.fc1(self.norm2(x))))))

    def advance(self, x: Tensor, window: Window, layer: int) -> Tensor:
        """One position of each row (B, C), which sees those before it in the cache."""
        b, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, 3, self.n_head, c // self.n_head).unbind(1)  # (B, n_head, head)
        keys, values = window.store(layer, k, v)
        y = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=window.mask)
        x = x + self.proj(y.reshape(b, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """The decoder. An embedding of zeros means "no condition": stage 2 trains it, guidance uses it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.block_size, config.n_embd))
        self.cond_proj = nn.Linear(config.n_cond, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        self._init()

    def _init(self) -> None:
        # GPT-2: residual projections start smaller the deeper the network.
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "fc2.weight")) and name.startswith("blocks"):
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.n_layer) ** 0.5)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        # A unit-norm embedding has entries of about 1/sqrt(D): bring the condition to the size of the tokens.
        nn.init.normal_(self.cond_proj.weight, std=0.5)

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Logits of every position at once, for training and as the reference of the cached path.

        Args:
            tokens: the first L tokens of each image, (B, L), L < T.
            embedding: unit-norm CLIP embeddings, (B, D); zeros for no condition.

        Returns:
            (B, L + 1, V): row t are the logits of token t.
        """
        x = torch.cat([self.cond_proj(embedding)[:, None], self.tok_emb(tokens)], dim=1)
        x = x + self.pos_emb[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def prefill(self, embedding: Tensor, cache: KVCache) -> Tensor:
        """Start sequences in a cache: embeddings (B, D) -> logits of token 0, (B, V)."""
        return self.advance(self.cond_proj(embedding), 0, cache)

    def step(self, tokens: Tensor, position: int, cache: KVCache) -> Tensor:
        """Append token `position - 1` (B,), 0 < position < T; returns the logits of token `position`, (B, V)."""
        return self.advance(self.tok_emb(tokens), position, cache)

    def advance(self, x: Tensor, positions: int | Tensor, cache: KVCache, longest: int | None = None) -> Tensor:
        """One step of every row, each at its own place: rows join and leave between steps.

        Args:
            x: (B, C), `cond_proj(embedding)` at position 0, `tok_emb(token)` of the token before at later ones.
            positions: where all rows are, from 0 to T - 1, or (B,) int64 on the device, where each row is.
            cache: of at least B rows; the first B are used, and what others left in them is not seen.
            longest: with a tensor, its largest value + 1 as the host knows it, or any more, up to T, which is what
                None means; no position may lie at or beyond it. With it a step never waits for the device.

        Returns:
            (B, V), the logits of token `positions`. They depend on no other row.

        Raises:
            ValueError: more rows than the cache has, or positions it does not have.
        """
        window = Window(cache, len(x), positions, longest)
        x = x + self.pos_emb[0, positions]
        for layer, block in enumerate(cast(Iterable[Block], self.blocks)):
            x = block.advance(x, window, layer)
        return self.head(self.norm(x))
