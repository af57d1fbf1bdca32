"""Pictures under way in one KV cache, each at its own position: they join and leave between steps.

A picture holds one row of the cache, or two under guidance: the second has no condition, or a negative one. The rows
in use are always the first of the cache, so a step works on no others: where rows leave, the last ones move into the
gaps.

Same seed, same tokens, whoever else is there. On CPUs this holds bit for bit: a step of `GPT.decode_step`
gives a row the same whatever the others are; sums over keys and over likely tokens run over multiples of CHUNK and
WIDTH, where what is masked adds exact zeros. The limits: GPUs choose kernels by the size of the batch, and with several
threads attention in float32 rounds by where its scratch memory lies; a draw within that rounding comes out as another
token.

Shapes: n pictures, R rows, T tokens of a picture, V codebook size, D embedding, C n_embd.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipgen.engine.cuda_graphs import Graphs
from clipgen.engine.sampling import SamplingTensors, choose, draw_uniforms, guide
from clipgen.models.gpt import GPT
from clipgen.request import SamplingParams

CHUNK, WIDTH = 16, 64


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture to draw. Two are equal only when they are the same object."""

    condition: Tensor
    """(n_things * D,): `condition_of` embeddings."""
    seed: int
    sampling: SamplingParams
    kept: Tensor | None = None
    """(K,) int64, K < T: its first tokens, where they are given."""
    negative: Tensor | None = None
    """(n_things * D,): what guidance moves away from in place of no condition."""

    @property
    def width(self) -> int:
        """Rows that it takes."""
        return 1 if self.sampling.guidance == 1 else 2

    @property
    def other(self) -> Tensor:
        """(n_things * D,), the condition of its second row: the negative one, or zeros, which is none."""
        return torch.zeros_like(self.condition) if self.negative is None else self.negative


class Batch:
    """The pictures under way. The host counts their tokens itself and never waits for the device."""

    def __init__(self, gpt: GPT, graphs: Graphs | None = None) -> None:
        self.gpt = gpt
        self.advance = gpt.decode_step if graphs is None else graphs.advance
        weight, config = gpt.head.weight, gpt.config
        self.device, self.length, self.vocab_size = weight.device, config.block_size, config.vocab_size
        self.pictures: list[Picture] = []
        self.done: list[int] = []  # tokens of each
        self.rows: list[tuple[Picture, bool]] = []  # whose each row is, and whether it is their second
        self.cache = gpt.allocate(0) if graphs is None else graphs.cache
        self.x = torch.empty(0, config.n_embd, device=weight.device, dtype=weight.dtype)  # next input of each row
        self.tokens = torch.empty(0, self.length, dtype=torch.long, device=weight.device)
        self.uniforms = torch.empty(0, self.length, device=weight.device)

    def join(self, joining: Sequence[Picture], most: int) -> None:
        """Let pictures in. The cache grows by doubling, to `most` rows, or as many as are needed."""
        if not joining:
            return
        new = [(picture, False) for picture in joining]
        new += [(picture, True) for picture in joining if picture.width == 2]
        self._grow(len(self.rows) + len(new), most)
        conditions = torch.stack([p.other if is_second else p.condition for p, is_second in new]).to(self.x)
        inputs = self.gpt.embed_condition(conditions)
        self.x = torch.cat([self.x[: len(self.rows)], inputs])
        tokens = torch.zeros(len(joining), self.length, dtype=torch.long, device=self.device)
        for row, picture in zip(tokens, joining, strict=True):
            if picture.kept is not None:
                row[: len(picture.kept)] = picture.kept
        self.tokens = torch.cat([self.tokens, tokens])
        uniforms = draw_uniforms([picture.seed for picture in joining], self.length)
        self.uniforms = torch.cat([self.uniforms, uniforms.to(self.device)])
        self.pictures += joining
        self.done += [0] * len(joining)
        self.rows += new
        self._plan()

    def leave(self, leaving: Collection[Picture]) -> None:
        """Let pictures out, finished or not; their rows are free."""
        if not leaving:
            return
        stay = [row for row, (picture, _) in enumerate(self.rows) if picture not in leaving]
        movers = [row for row in stay if row >= len(stay)]
        order = [row if self.rows[row][0] not in leaving else movers.pop() for row in range(len(stay))]
        for row, source in enumerate(order):
            if row != source:
                self.cache.data[:, :, row] = self.cache.data[:, :, source]
        self.rows = [self.rows[row] for row in order]
        self.x = self.x[self._index(order)]
        keep = [i for i, picture in enumerate(self.pictures) if picture not in leaving]
        self.pictures, self.done = [self.pictures[i] for i in keep], [self.done[i] for i in keep]
        self.tokens, self.uniforms = self.tokens[self._index(keep)], self.uniforms[self._index(keep)]
        if self.pictures:
            self._plan()

    def step(self) -> None:
        """Draw the next token of every picture; there must be one."""
        longest = min(-(-(max(self.done) + 1) // CHUNK) * CHUNK, self.length)
        at = self.at[:, None]
        logits = self.advance(self.x, self.at[self.owner], self.cache, longest).float()
        guided = logits[self.first]
        if self.guided:
            guided = guide(guided, logits[self.second], self.knobs.guidance[:, None])
        token = choose(guided, self.uniforms.gather(1, at).squeeze(1), self.knobs)
        if self.keeps:
            token = torch.where(self.at < self.kept, self.tokens.gather(1, at).squeeze(1), token)
        self.tokens.scatter_(1, at, token[:, None])
        self.x = self.gpt.tok_emb(token[self.owner])
        self.at += 1
        self.done = [done + 1 for done in self.done]

    def finished(self) -> dict[Picture, Tensor]:
        """The tokens (T,) of pictures that have all; they still have to leave."""
        complete = [i for i, done in enumerate(self.done) if done == self.length]
        return {self.pictures[i]: self.tokens[i].clone() for i in complete}

    def _grow(self, rows: int, most: int) -> None:
        have, used = self.cache.data.shape[2], len(self.rows)
        if rows > have:
            cache = self.gpt.allocate(max(rows, min(2 * have, most)))
            cache.data[:, :, :used] = self.cache.data[:, :, :used]
            self.cache = cache

    def _plan(self) -> None:
        """What stays the same from step to step until pictures join or leave."""
        place = {picture: i for i, picture in enumerate(self.pictures)}
        owner = [place[picture] for picture, _ in self.rows]
        first, second = [0] * len(place), [0] * len(place)
        for row, (picture, is_second) in enumerate(self.rows):
            (second if is_second else first)[place[picture]] = row
            if picture.width == 1:  # guidance between a row and itself is that row
                second[place[picture]] = row
        self.first, self.second = self._index(first), self._index(second)
        self.owner = self._index(owner)
        self.at = self._index(self.done)
        self.kept = self._index([0 if p.kept is None else len(p.kept) for p in self.pictures])
        self.keeps = any(p.kept is not None for p in self.pictures)
        self.guided = any(p.width == 2 for p in self.pictures)
        knobs = SamplingTensors.of([p.sampling for p in self.pictures], self.vocab_size, self.device)
        self.knobs = replace(knobs, width=min(_rounded(knobs.width, WIDTH), self.vocab_size))

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(self.device)


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
