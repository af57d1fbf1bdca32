"""Sequences that share one KV cache, each at its own position: they are added and removed between steps.

A sequence holds one row of the cache, or two under guidance: the second is unconditional, or has a negative condition.
The rows in use are always the first ones: when rows are removed, the last rows move into the gaps.

Same seed, same tokens, whatever else is in the batch; `docs/seeds.md` says where this holds to the bit and where
within rounding. For that, sums over keys and over likely tokens run over multiples of POSITION_BLOCK and TOP_K_BLOCK,
where masked entries add exact zeros.

Shapes: T tokens of an image.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from clipgen.engine.cuda_graphs import CUDAGraphRunner
from clipgen.engine.sampling import SamplingTensors, draw_uniforms, guide, sample
from clipgen.engine.sequence import Sequence
from clipgen.models.gpt import GPT

POSITION_BLOCK = 16


class Batch:
    """The sequences being decoded. The host counts their tokens itself, so a step never waits for the device."""

    def __init__(self, gpt: GPT, graphs: CUDAGraphRunner | None = None) -> None:
        self.gpt = gpt
        self.decode_step = gpt.decode_step if graphs is None else graphs.decode_step
        weight, config = gpt.head.weight, gpt.config
        self.device, self.length, self.vocab_size = weight.device, config.block_size, config.vocab_size
        self.sequences: list[Sequence] = []
        self.num_tokens: list[int] = []  # of each sequence, so far
        self.rows: list[tuple[Sequence, bool]] = []  # the sequence of each row, and whether it is its uncond row
        self.cache = gpt.allocate(0) if graphs is None else graphs.cache
        self.x = torch.empty(0, config.n_embd, device=weight.device, dtype=weight.dtype)  # next input of each row
        self.tokens = torch.empty(0, self.length, dtype=torch.long, device=weight.device)
        self.uniforms = torch.empty(0, self.length, device=weight.device)
        self.is_finite = torch.empty(0, dtype=torch.bool, device=weight.device)  # no NaN or infinity in its logits

    def add(self, sequences: Collection[Sequence], max_rows: int) -> None:
        """Add sequences. The cache grows by doubling up to `max_rows`, or to as many rows as are needed."""
        if not sequences:
            return
        added = [(seq, False) for seq in sequences] + [(seq, True) for seq in sequences if seq.num_rows == 2]
        self._grow_cache(len(self.rows) + len(added), max_rows)
        conditions = torch.stack([seq.uncond if is_uncond else seq.condition for seq, is_uncond in added]).to(self.x)
        self.x = torch.cat([self.x[: len(self.rows)], self.gpt.embed_condition(conditions)])
        tokens = torch.zeros(len(sequences), self.length, dtype=torch.long, device=self.device)
        for row, seq in zip(tokens, sequences, strict=True):
            if seq.prefix_tokens is not None:
                row[: len(seq.prefix_tokens)] = seq.prefix_tokens
        uniforms = draw_uniforms([seq.seed for seq in sequences], self.length).to(self.device)
        self.tokens = torch.cat([self.tokens, tokens])
        self.uniforms = torch.cat([self.uniforms, uniforms])
        self.is_finite = torch.cat([self.is_finite, self.is_finite.new_ones(len(sequences))])
        self.sequences += sequences
        self.num_tokens += [0] * len(sequences)
        self.rows += added
        self._index_rows()

    def remove(self, sequences: Collection[Sequence]) -> None:
        """Remove sequences, finished or not; their rows become free."""
        if not sequences:
            return
        stay = [row for row, (seq, _) in enumerate(self.rows) if seq not in sequences]
        movers = [row for row in stay if row >= len(stay)]
        order = [row if self.rows[row][0] not in sequences else movers.pop() for row in range(len(stay))]
        for row, source in enumerate(order):
            if row != source:
                self.cache.data[:, :, row] = self.cache.data[:, :, source]
        self.rows = [self.rows[row] for row in order]
        self.x = self.x[self._to_device(order)]
        keep = [i for i, seq in enumerate(self.sequences) if seq not in sequences]
        self.sequences = [self.sequences[i] for i in keep]
        self.num_tokens = [self.num_tokens[i] for i in keep]
        index = self._to_device(keep)
        self.tokens, self.uniforms, self.is_finite = self.tokens[index], self.uniforms[index], self.is_finite[index]
        if self.sequences:
            self._index_rows()

    def step(self) -> None:
        """Sample the next token of every sequence; there must be at least one."""
        max_position = min(_round_up(max(self.num_tokens) + 1, POSITION_BLOCK), self.length)
        position = self.positions[:, None]
        logits = self.decode_step(self.x, self.positions[self.row_to_seq], self.cache, max_position).float()
        guided = logits[self.cond_rows]
        if self.is_guided:
            guided = guide(guided, logits[self.uncond_rows], self.params.guidance[:, None])
        self.is_finite &= guided.sum(dim=-1).isfinite()
        token = sample(guided, self.uniforms.gather(1, position).squeeze(1), self.params)
        if self.has_prefix:
            given = self.tokens.gather(1, position).squeeze(1)
            token = torch.where(self.positions < self.prefix_lengths, given, token)
        self.tokens.scatter_(1, position, token[:, None])
        self.x = self.gpt.tok_emb(token[self.row_to_seq])
        self.positions += 1
        self.num_tokens = [count + 1 for count in self.num_tokens]

    def finished(self) -> dict[Sequence, Tensor]:
        """The tokens (T,) of the sequences that are complete; they still have to be removed."""
        complete = [i for i, count in enumerate(self.num_tokens) if count == self.length]
        return {self.sequences[i]: self.tokens[i].clone() for i in complete}

    def non_finite(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Return the sequences with non-finite logits. Synchronizes with the device."""
        flags = dict(zip(self.sequences, self.is_finite.tolist(), strict=True))
        return [seq for seq in sequences if not flags[seq]]

    def _grow_cache(self, rows: int, max_rows: int) -> None:
        capacity, used = self.cache.data.shape[2], len(self.rows)
        if rows > capacity:
            cache = self.gpt.allocate(max(rows, min(2 * capacity, max_rows)))
            cache.data[:, :, :used] = self.cache.data[:, :, :used]
            self.cache = cache

    def _index_rows(self) -> None:
        """Compute what stays the same from step to step until sequences are added or removed."""
        place = {seq: i for i, seq in enumerate(self.sequences)}
        cond, uncond = [0] * len(place), [0] * len(place)
        for row, (seq, is_uncond) in enumerate(self.rows):
            (uncond if is_uncond else cond)[place[seq]] = row
            if seq.num_rows == 1:  # guidance between a row and itself is that row
                uncond[place[seq]] = row
        self.cond_rows, self.uncond_rows = self._to_device(cond), self._to_device(uncond)
        self.row_to_seq = self._to_device([place[seq] for seq, _ in self.rows])
        self.positions = self._to_device(self.num_tokens)
        prefixes = [0 if seq.prefix_tokens is None else len(seq.prefix_tokens) for seq in self.sequences]
        self.prefix_lengths, self.has_prefix = self._to_device(prefixes), any(prefixes)
        self.is_guided = any(seq.num_rows == 2 for seq in self.sequences)
        params = [seq.params for seq in self.sequences]
        self.params = SamplingTensors.from_params(params, self.vocab_size, self.device)

    def _to_device(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(self.device)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
