"""CUDA graphs of the GPT's step: on a GPU, launching a step's kernels one by one takes longer than they run.

A graph is a recording for fixed sizes over fixed memory. So there are a few, for 1, 2, 4, ... rows and for every SPAN
positions, over one cache; a step takes the smallest that holds it, its other rows idle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from clipgen.models.gpt import GPT
from clipgen.models.kv_cache import KVCache

SPAN = 64
"""Positions of the cache by which one graph sees more than the next smaller one."""

log = logging.getLogger(__name__)

Run = Callable[[], None]


class Recorder:
    """Makes CUDA graphs that share their memory: no two of them run at the same time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """A recording of `run`, which must neither wait for the device nor give out memory that it allocates."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are loaded and workspaces made before anything is recorded
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            run()
        return graph.replay


class Graphs:
    """`GPT.decode_step` for up to `rows` rows, recorded.

    Args:
        gpt: in eval mode; its weights must stay where they are.
        rows: the most at once; the cache has so many.
        record: what makes a recording of a function that only writes to memory that stays.
    """

    @torch.inference_mode()
    def __init__(self, gpt: GPT, rows: int, record: Callable[[Run], Run]) -> None:
        self.gpt, self.cache = gpt, gpt.allocate(rows)
        weight, config = gpt.head.weight, gpt.config
        self.x = torch.zeros(rows, config.n_embd, device=weight.device, dtype=weight.dtype)
        self.at = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.logits = torch.empty(rows, config.vocab_size, device=weight.device, dtype=weight.dtype)
        self.rows = [2**k for k in range((rows - 1).bit_length())] + [rows]
        self.spans = [*range(SPAN, config.block_size, SPAN), config.block_size]
        sizes = [(n, span) for n in reversed(self.rows) for span in reversed(self.spans)]  # the largest makes room
        self.replays = {size: record(self._run(*size)) for size in sizes}

    def advance(self, x: Tensor, positions: Tensor, cache: KVCache, longest: int) -> Tensor:
        """As `GPT.decode_step`, on this cache only. The logits (B, V) are overwritten by the next step."""
        if cache is not self.cache:
            raise ValueError("these graphs were recorded over another cache")
        count = len(x)
        rows = next(n for n in self.rows if n >= count)
        span = next(n for n in self.spans if n >= longest)
        self.x[:count], self.at[:count] = x, positions
        self.at[count:rows] = 0  # idle rows write to the start of rows of the cache that nobody has
        self.replays[rows, span]()
        return self.logits[:count]

    def _run(self, rows: int, span: int) -> Run:
        def run() -> None:
            self.logits[:rows] = self.gpt.decode_step(self.x[:rows], self.at[:rows], self.cache, span)

        return run


def build_graphs(gpt: GPT, rows: int) -> Graphs | None:
    """Graphs where there is a GPU and they give what the GPT gives; None elsewhere."""
    device = gpt.head.weight.device
    if device.type != "cuda":
        return None
    try:
        with torch.cuda.device(device):
            graphs = Graphs(gpt, rows, Recorder())
            right = agree(graphs)
    except RuntimeError as error:  # out of memory, too
        log.warning("no CUDA graphs, so decoding is slower: %s", str(error).splitlines()[0])
        return None
    if not right:
        log.warning("no CUDA graphs, so decoding is slower: they do not give what the model gives")
        return None
    return graphs


@torch.inference_mode()
def agree(graphs: Graphs) -> bool:
    """Whether each recorded step comes out as the GPT's own, but for rounding."""
    gpt = graphs.gpt
    width = gpt.config.condition_size
    conditions = torch.eye(width)[torch.arange(len(graphs.x)) % width]
    inputs = gpt.embed_condition(conditions.to(graphs.x))
    for rows, span in graphs.replays:
        at = torch.full((rows,), span - 1, device=inputs.device)
        graphs.logits.fill_(torch.nan)  # what a larger graph has left here would pass
        found = graphs.advance(inputs[:rows], at, graphs.cache, span).float().clone()
        expected = gpt.decode_step(inputs[:rows], at, graphs.cache, span).float()
        if not bool((found - expected).abs().max() <= 0.02 * expected.abs().max()):
            return False
    return True
