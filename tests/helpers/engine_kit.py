"""A small GPT with peaked distributions, and sequences for it to generate, alone and together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.config import GPTConfig
from clipgen.engine.batch import Batch
from clipgen.engine.cuda_graphs import CUDAGraphRunner
from clipgen.engine.sampling import SamplingTensors, draw_uniforms, guide, sample
from clipgen.engine.sequence import Sequence
from clipgen.models.gpt import GPT
from clipgen.models.kv_cache import KVCache
from clipgen.request import SamplingParams

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=100, block_size=20, n_cond=16)
GUIDED = SamplingParams(top_k=30, top_p=0.9, guidance=3.0)
SAMPLINGS = [GUIDED, SamplingParams(), SamplingParams(top_p=0.8), SamplingParams(temperature=0.0, guidance=2.0)]


def sharp_gpt(config: GPTConfig = SMALL) -> GPT:
    """A GPT with fixed random weights, whose head is scaled up so that its distributions are peaked."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt = GPT(config).eval()
    with torch.no_grad():
        gpt.head.weight.mul_(20)
    return gpt


def make_sequences(
    count: int, params: SamplingParams = GUIDED, first: int = 0, d: int = SMALL.n_cond
) -> list[Sequence]:
    """Sequences number `first` on, whose conditions and seeds follow from their numbers."""
    conditions = [torch.randn(d, generator=torch.Generator().manual_seed(first + i)) for i in range(count)]
    return [Sequence(F.normalize(c, dim=0), first + i, params) for i, c in enumerate(conditions)]


def teacher_forced(gpt: GPT, tokens: Tensor, embedding: Tensor, cache: KVCache | None = None) -> Tensor:
    """Logits (B, L + 1, V) of positions decoded one by one, given the tokens (B, L) before each."""
    cache = cache or gpt.allocate(len(embedding))
    inputs = [gpt.embed_condition(embedding), *gpt.tok_emb(tokens).unbind(1)]
    steps = [gpt.decode_step(x, torch.full((len(x),), t), cache, t + 1) for t, x in enumerate(inputs)]
    return torch.stack(steps, dim=1)


def alone(gpt: GPT, seq: Sequence) -> Tensor:
    """Tokens (T,) of a sequence in a batch of its own."""
    return together(gpt, [(0, [seq])])[0]


def together(
    gpt: GPT, arrivals: list[tuple[int, list[Sequence]]], max_rows: int = 64, graphs: CUDAGraphRunner | None = None
) -> list[Tensor]:
    """Tokens (T,) of each sequence; arrivals are (step, sequences), added to the batch before that step."""
    batch, found, step = Batch(gpt, graphs), {}, 0
    with torch.inference_mode():
        while len(found) < sum(len(sequences) for _, sequences in arrivals):
            batch.add([seq for at, sequences in arrivals if at == step for seq in sequences], max_rows)
            step += 1
            if batch.sequences:
                batch.step()
            finished = batch.finished()
            found |= finished
            batch.remove(set(finished))
    return [found[seq] for _, sequences in arrivals for seq in sequences]


@torch.inference_mode()
def uncached(gpt: GPT, seq: Sequence) -> Tensor:
    """Tokens (T,) of a sequence by one full forward pass per token, without cache or batch."""
    weight, length = gpt.head.weight, gpt.config.block_size
    uniforms = draw_uniforms([seq.seed], length)
    params = SamplingTensors.from_params([seq.params], gpt.config.vocab_size)
    tokens = torch.empty(1, 0, dtype=torch.long)
    for position in range(length):
        logits = gpt(tokens, seq.condition[None].to(weight))[:, -1].float()
        if seq.num_rows == 2:
            logits = guide(logits, gpt(tokens, seq.uncond[None].to(weight))[:, -1].float(), seq.params.guidance)
        tokens = torch.cat([tokens, sample(logits, uniforms[:, position], params)[:, None]], dim=1)
    return tokens[0]
