"""A small GPT with decided opinions, and pictures for it to draw, alone and together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.config import GPTConfig
from clipgen.engine.batch import Batch, Picture
from clipgen.engine.cuda_graphs import Graphs
from clipgen.models.gpt import GPT
from clipgen.request import SamplingParams

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=100, block_size=20, n_cond=16)
GUIDED = SamplingParams(top_k=30, top_p=0.9, guidance=3.0)
SAMPLINGS = [GUIDED, SamplingParams(), SamplingParams(top_p=0.8), SamplingParams(temperature=0.0, guidance=2.0)]


def sharp_gpt(config: GPTConfig = SMALL) -> GPT:
    """Random weights, always the same, whose logits lie apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt = GPT(config).eval()
    with torch.no_grad():
        gpt.head.weight.mul_(20)
    return gpt


def some(count: int, sampling: SamplingParams = GUIDED, first: int = 0, d: int = SMALL.n_cond) -> list[Picture]:
    """Pictures whose conditions and seeds follow from their numbers."""
    conditions = [torch.randn(d, generator=torch.Generator().manual_seed(first + i)) for i in range(count)]
    return [Picture(F.normalize(c, dim=0), first + i, sampling) for i, c in enumerate(conditions)]


def alone(gpt: GPT, picture: Picture) -> Tensor:
    """The tokens of a picture that has a batch for itself."""
    return together(gpt, [(0, [picture])])[0]


def together(
    gpt: GPT, arrivals: Sequence[tuple[int, list[Picture]]], most: int = 64, graphs: Graphs | None = None
) -> list[Tensor]:
    """The tokens of pictures that join a batch before the steps given."""
    batch, found, step = Batch(gpt, graphs), {}, 0
    with torch.inference_mode():
        while len(found) < sum(len(pictures) for _, pictures in arrivals):
            batch.join([p for at, pictures in arrivals if at == step for p in pictures], most)
            step += 1
            if batch.pictures:
                batch.step()
            finished = batch.finished()
            found |= finished
            batch.leave(set(finished))
    return [found[picture] for _, pictures in arrivals for picture in pictures]
