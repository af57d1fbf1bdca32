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
from einops import rearrange
from torch import Tensor

from clipgen.config import GPTConfig
from clipgen.models.capabilities import can_prepack
from clipgen.models.kv_cache import KVCache, KVCacheView, single_query_backends
from clipgen.models.linear import Linear, RowCounts, quantise_linears

LEAST_ROWS = 5
"""oneDNN reads prepacked bfloat16 weights fastest for 5 or 6 rows (without AMX), so smaller steps are padded."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every position to itself and those before it; all (B, n_head, L, head)."""
    if q.device.type != "cpu" or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # Training on a CPU: at some hundred positions plain products are three times as fast as the fused kernel.
    b, heads, length, size = q.shape
    mask = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1).expand(b * heads, length, length)
    keys = rearrange(k, "b h l head -> (b h) head l")
    scores = torch.baddbmm(mask, q.flatten(0, 1), keys, alpha=size**-0.5)
    return (scores.softmax(-1).to(v.dtype) @ v.flatten(0, 1)).view(b, heads, length, size)


class Block(nn.Module):
    """Pre-norm transformer block with exact GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        c = config.n_embd
        self.n_head = config.n_head
        self.dropout, self.qk_norm = config.dropout, config.qk_norm
        self.norm1 = nn.LayerNorm(c)
        self.qkv = Linear(c, 3 * c)
        head = c // config.n_head
        self.norm_q = nn.RMSNorm(head, eps=1e-6) if config.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(head, eps=1e-6) if config.qk_norm else nn.Identity()
        self.proj = Linear(c, c)
        self.norm2 = nn.LayerNorm(c)
        self.fc1 = Linear(c, 4 * c)
        self.fc2 = Linear(4 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        """All positions (B, L, C), causally."""
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b l (n h head) -> n b h l head", n=3, h=self.n_head)
        y = rearrange(causal_attention(self.norm_q(q), self.norm_k(k), v), "b h l head -> b l (h head)")
        x = x + self._drop(self.proj(y))
        return x + self._drop(self.fc2(self._drop(F.gelu(self.fc1(self.norm2(x))))))

    def decode_step(self, x: Tensor, view: KVCacheView, layer: int) -> Tensor:
        """One position of each row, (B, C); rows beyond those of the view are padding."""
        rows, c = view.rows, x.shape[1]
        qkv = self.qkv(self.norm1(x))[:rows].view(rows, 3, self.n_head, c // self.n_head)
        if self.qk_norm:
            q, k, v = qkv.unbind(1)
            qkv = torch.stack([self.norm_q(q), self.norm_k(k), v], dim=1)
        y = view.attend(layer, qkv.to(view.dtype)).reshape(rows, c).to(x.dtype)
        if len(x) > rows:
            y = F.pad(y, (0, 0, 0, len(x) - rows))
        x = x + self.proj(y)
        return x + self.fc2(self.fc1(self.norm2(x), gelu=True))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """The decoder. An embedding of zeros means "no condition": stage 2 trains it, guidance uses it."""

    quantised: Literal["int8", "float16"] | None = None
    """Type of the large weights after `quantise`."""
    cache_dtype: torch.dtype | None = None
    """Type of keys and values, where it differs from that of the activations."""
    row_counts: RowCounts | None = None
    condition_row_counts: RowCounts | None = None
    """How steps and conditions are padded on a CPU, once weights are ready for decoding."""

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
        """Make ready for decoding on a CPU; elsewhere nothing happens. The model cannot be trained after that."""
        weight = self.head.weight
        if weight.device.type == "cpu":
            packs = can_prepack(weight.dtype)
            if packs:
                for module in self.modules():
                    if isinstance(module, Linear):
                        module.prepack()
            self._count_rows(LEAST_ROWS if packs and weight.dtype == torch.bfloat16 else 1)
        return self

    def quantise(self, weights: Literal["int8", "float16"], cache: torch.dtype) -> GPT:
        """Replace the large weights by smaller ones, in place; after that the model can only decode, on a CPU.

        Args:
            weights: "int8", or "float16", which needs a CPU with FBGEMM (`capabilities.has_half_products`).
            cache: type of keys and values. Everything else that is not quantised becomes float32, in which the products
                return their sums.
        """
        quantise_linears(self, weights)
        self.quantised, self.cache_dtype = weights, cache
        self._count_rows(1)
        return self

    def _count_rows(self, least: int) -> None:
        # Blocks have equal shapes, so one shows how rows are summed. Rounding to bfloat16 hides most differences.
        blocks = self.blocks if self.head.weight.dtype == torch.bfloat16 else self.blocks[:1]
        layers = [m for b in cast(Iterable[Block], blocks) for m in (b.qkv, b.proj, b.fc1, b.fc2)]
        self.row_counts = RowCounts([*layers, self.head], least)
        self.condition_row_counts = RowCounts([self.cond_proj])

    def allocate(self, rows: int) -> KVCache:
        """A cache for this many sequences, on the model's device."""
        weight = self.head.weight
        return KVCache.allocate(self.config, rows, weight.device, self.cache_dtype or weight.dtype)

    def embed_condition(self, embedding: Tensor) -> Tensor:
        """The inputs at position 0, (B, C), of conditions (B, D)."""
        counts = self.condition_row_counts
        return self.cond_proj(counts.pad(embedding) if counts else embedding)[: len(embedding)]

    def decode_step(self, x: Tensor, positions: Tensor, cache: KVCache, max_position: int | None = None) -> Tensor:
        """Decode one position of every row; each row has its own, so rows can join and leave between steps.

        Args:
            x: (B, C), `embed_condition(embedding)` at position 0, `tok_emb(previous token)` at later ones.
            positions: (B,) int64 on the device, from 0 to T - 1.
            cache: of at least B rows; the first B are used, and what they held before is not seen.
            max_position: the largest position + 1, or more, up to T, which None means. The host knows it, so a step
                never waits for the device.

        Returns:
            (B, V), the logits of token `positions`. After `prepack` or `quantise` a row does not depend on the others:
            on CPUs where `row_counts` finds a way to the last bit, elsewhere within rounding.

        Raises:
            ValueError: more rows than the cache has, or positions beyond T.
        """
        length = self.config.block_size
        max_position = length if max_position is None else max_position
        if not 0 < max_position <= length:
            raise ValueError(f"a step up to position {max_position - 1}; there are {length} positions, from 0")
        view = KVCacheView(cache, positions, max_position)
        x = x + self.pos_emb[0, positions]
        if self.row_counts is not None:
            x = self.row_counts.pad(x)
        with single_query_backends(x.device):
            for layer, block in enumerate(cast(Iterable[Block], self.blocks)):
                x = block.decode_step(x, view, layer)
        return self.head(self.norm(x))[: view.rows]
