"""GPT: a CLIP embedding to VQGAN tokens, one by one (Wang et al., "CLIP-GEN", arXiv 2203.00386).

Position 0 holds the projected embedding, position t the token t - 1; the logits at position t are those of token t.
Shapes: B batch, T tokens of an image (= block_size), V codebook size, D embedding, C n_embd.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clipgen.config import GPTConfig
from clipgen.models.kv_cache import KVCache, KVCacheView

LEAST_ROWS = 5
"""Packed weights are read fastest for five or six rows, a fifth faster than for one or two, so a step of fewer gets
rows of zeros. (One row alone would also be summed in halves by two threads, and so differ from that row among others.)
"""
BLOCK = 8
"""Where weights are not packed, float32's products give a row the same bits only in blocks of so many."""


class Linear(nn.Linear):
    """nn.Linear that a CPU in reduced precision can run from packed weights, with GELU in the same pass.

    Packed, each row's result is the same to the last bit whatever the other rows are.
    """

    packed: Tensor | None = None

    def pack(self) -> None:
        """Lay the weight out as oneDNN multiplies it, which else is done again at every call; the original goes."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x W' + b, through exact GELU where asked for; (..., in_features) -> (..., out_features)."""
        if self.packed is None:
            y = super().forward(x)
            return F.gelu(y) if gelu else y
        return torch.ops.mkldnn._linear_pointwise.default(
            x, self.packed, self.bias, "gelu" if gelu else "none", [], "none"
        )


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every position attends to itself and those before it; all (B, n_head, L, head)."""
    if q.device.type != "cpu" or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # Training on a CPU: at some hundred positions plain products are three times as fast as the fused kernel.
    b, heads, length, size = q.shape
    mask = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1).expand(b * heads, length, length)
    scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=size**-0.5)
    return (scores.softmax(-1).to(v.dtype) @ v.flatten(0, 1)).view(b, heads, length, size)


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """Rows of zeros after the last of (B, C), up to `rows`."""
    return x if len(x) >= rows else F.pad(x, (0, 0, 0, rows - len(x)))


class Block(nn.Module):
    """Pre-norm transformer block with exact GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        c = config.n_embd
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.norm1 = nn.LayerNorm(c)
        self.qkv = Linear(c, 3 * c)
        self.proj = Linear(c, c)
        self.norm2 = nn.LayerNorm(c)
        self.fc1 = Linear(c, 4 * c)
        self.fc2 = Linear(4 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        """All positions (B, L, C), causally."""
        b, length, c = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, length, 3, self.n_head, c // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, n_head, L, head)
        y = causal_attention(q, k, v).transpose(1, 2).reshape(b, length, c)
        x = x + self._drop(self.proj(y))
        return x + self._drop(self.fc2(self._drop(F.gelu(self.fc1(self.norm2(x))))))

    def decode_step(self, x: Tensor, view: KVCacheView, layer: int) -> Tensor:
        """One position of each row (B, C), which sees those before it in the cache; rows beyond the view's idle."""
        rows, c = view.rows, x.shape[1]
        qkv = self.qkv(self.norm1(x))[:rows].view(rows, 3, self.n_head, c // self.n_head)
        y = view.attend(layer, qkv.to(view.dtype)).reshape(rows, c).to(x.dtype)
        x = x + self.proj(pad_rows(y, len(x)))
        return x + self.fc2(self.fc1(self.norm2(x), gelu=True))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """The decoder. An embedding of zeros means "no condition": stage 2 trains it, guidance uses it."""

    quantised: Literal["int8", "float16"] | None = None
    """What the large weights are, where `clipgen.models.quantise` has replaced them."""
    cache_as: torch.dtype | None = None
    """Precision of keys and values, where it is not that of everything else."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.block_size, config.n_embd))
        self.cond_proj = nn.Linear(config.n_cond, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)
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
            embedding: conditions, (B, D); zeros for no condition.

        Returns:
            (B, L + 1, V): row t are the logits of token t.
        """
        x = torch.cat([self.cond_proj(embedding)[:, None], self.tok_emb(tokens)], dim=1)
        x = x + self.pos_emb[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def prepack(self) -> GPT:
        """Get ready for decoding on a CPU; elsewhere nothing happens. It cannot be trained after that."""
        weight = self.head.weight
        ready = weight.dtype in (torch.bfloat16, torch.float32) and torch.backends.mkldnn.is_available()
        if weight.device.type == "cpu" and ready:
            for module in self.modules():
                if isinstance(module, Linear):
                    module.pack()
        return self

    def allocate(self, rows: int) -> KVCache:
        """A cache for so many sequences, where the model is."""
        weight = self.head.weight
        return KVCache.allocate(self.config, rows, weight.device, self.cache_as or weight.dtype)

    def embed_condition(self, embedding: Tensor) -> Tensor:
        """The inputs at position 0, (B, C), of conditions (B, D); they depend on no other row."""
        rows = -(-len(embedding) // BLOCK) * BLOCK
        return self.cond_proj(pad_rows(embedding, rows))[: len(embedding)]

    def prefill(self, embedding: Tensor, cache: KVCache) -> Tensor:
        """Start sequences in a cache: conditions (B, D) -> logits of token 0, (B, V)."""
        return self.decode_step(self.embed_condition(embedding), 0, cache)

    def step(self, tokens: Tensor, position: int, cache: KVCache) -> Tensor:
        """Append token `position - 1` (B,), 0 < position < T; returns the logits of token `position`, (B, V)."""
        return self.decode_step(self.tok_emb(tokens), position, cache)

    def decode_step(
        self, x: Tensor, positions: int | Tensor, cache: KVCache, max_position: int | None = None
    ) -> Tensor:
        """One step of every row, each at its own place: rows join and leave between steps.

        Args:
            x: (B, C), `embed_condition(embedding)` at position 0, `tok_emb(token)` of the token before at later ones.
            positions: where all rows are, from 0 to T - 1, or (B,) int64 on the device, where each row is.
            cache: of at least B rows; the first B are used, and what others left in them is not seen.
            max_position: with a tensor, its largest value + 1 as the host knows it, or any more, up to T, which is what
                None means; no position may lie at or beyond it. With it a step never waits for the device.

        Returns:
            (B, V), the logits of token `positions`. They depend on no other row.

        Raises:
            ValueError: more rows than the cache has, or positions it does not have.
        """
        length = self.config.block_size
        max_position = positions + 1 if isinstance(positions, int) else length if max_position is None else max_position
        if not 0 < max_position <= length:
            raise ValueError(f"a step up to position {max_position - 1}; there are {length} positions, from 0")
        view = KVCacheView(cache, positions, len(x), max_position)
        x = x + self.pos_emb[0, positions]
        x = pad_rows(x, self._idle(len(x)))
        for layer, block in enumerate(cast(Iterable[Block], self.blocks)):
            x = block.decode_step(x, view, layer)
        return self.head(self.norm(x))[: view.rows]

    def _idle(self, rows: int) -> int:
        """How many rows a step multiplies, those included that nobody wants, so that no row depends on the others."""
        if not isinstance(self.head, Linear) or self.head.bias.device.type != "cpu":
            return rows
        if self.head.packed is not None:
            return max(rows, LEAST_ROWS)
        return -(-rows // BLOCK) * BLOCK if self.head.weight.dtype == torch.float32 else rows
