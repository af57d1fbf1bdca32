"""GPT: a CLIP embedding to VQGAN tokens, one by one (Wang et al., "CLIP-GEN", arXiv 2203.00386).

Position 0 holds the projected embedding, position t the token t - 1; the logits at position t are those of token t.
Shapes: B batch, T tokens of an image (= block_size), V codebook size, D embedding, C n_embd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clipgen.config import GPTConfig


@dataclass
class KVCache:
    """Keys and values of all layers, (n_layer, 2, B, n_head, T, head), allocated once and written by position."""

    data: Tensor

    @classmethod
    def allocate(
        cls, config: GPTConfig, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> KVCache:
        """A cache for `batch` sequences of full length; it belongs to the caller and can be used again."""
        head = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch, config.n_head, config.block_size, head)
        return cls(torch.zeros(shape, device=device, dtype=dtype))

    def write(self, layer: int, position: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, n_head, 1, head) of one position; returns all up to it, (B, n_head, position + 1, head)."""
        keys, values = self.data[layer, 0], self.data[layer, 1]
        keys[:, :, position : position + 1] = k
        values[:, :, position : position + 1] = v
        return keys[:, :, : position + 1], values[:, :, : position + 1]


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

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0, position: int = 0) -> Tensor:
        """All positions (B, L, C), causally, or, with a cache, one position (B, 1, C) after the cached ones."""
        b, length, c = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, length, 3, self.n_head, c // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, n_head, L, head)
        if cache is not None:
            k, v = cache.write(layer, position, k, v)
        y = F.scaled_dot_product_attention(q, k, v) if cache is not None else causal_attention(q, k, v)
        x = x + self._drop(self.proj(y.transpose(1, 2).reshape(b, length, c)))
        return x + self._drop(self.fc2(self._drop(F.gelu(self.fc1(self.norm2(x))))))

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
        return self._advance(self.cond_proj(embedding), 0, cache)

    def step(self, tokens: Tensor, position: int, cache: KVCache) -> Tensor:
        """Append token `position - 1` (B,), 0 < position < T; returns the logits of token `position`, (B, V)."""
        return self._advance(self.tok_emb(tokens), position, cache)

    def _advance(self, x: Tensor, position: int, cache: KVCache) -> Tensor:
        x = (x + self.pos_emb[0, position])[:, None]  # (B, 1, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer, position)
        return self.head(self.norm(x[:, 0]))
