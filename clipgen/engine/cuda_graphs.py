"""CUDA graphs of the GPT's step: on a GPU, launching a step's kernels one by one takes longer than running them.

A graph replays fixed sizes over fixed memory. So there are a few, for 1, 2, 4, ... rows and for every POSITION_SPAN
positions, over one cache; a step uses the smallest graph that holds it and leaves its other rows idle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from clipgen.models.gpt import GPT
from clipgen.models.kv_cache import KVCache
from clipgen.utils.text import first_line

POSITION_SPAN = 64
"""Positions of the cache by which one graph sees more than the next smaller one."""

log = logging.getLogger(__name__)

Run = Callable[[], None]


class GraphCapture:
    """Captures CUDA graphs that share one memory pool, since no two of them ever run at the same time.

    One stream serves all warm-ups and captures: every further stream would keep a cuBLAS workspace of its own (up to
    1 GB in all on Hopper).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """Capture `run`, which may neither wait for the device nor return memory that it allocates."""
        caller_stream = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller_stream)
        try:
            with torch.cuda.stream(self.stream):  # load kernels and allocate workspaces before capturing
                run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                run()
        finally:  # a failed capture does not leave its stream by itself
            torch.cuda.set_stream(caller_stream)
        caller_stream.wait_stream(self.stream)
        return graph.replay


class CUDAGraphRunner:
    """`GPT.decode_step` for up to `max_num_rows` rows, captured.

    Args:
        gpt: in eval mode; its weights must stay where they are.
        max_num_rows: capacity of its cache.
        capture: turns a function that only writes to memory that stays into one that replays it.
    """

    @torch.inference_mode()
    def __init__(self, gpt: GPT, max_num_rows: int, capture: Callable[[Run], Run]) -> None:
        self.gpt, self.max_num_rows, self.cache = gpt, max_num_rows, gpt.allocate(max_num_rows)
        weight, config = gpt.head.weight, gpt.config
        self.x = torch.zeros(max_num_rows, config.n_embd, device=weight.device, dtype=weight.dtype)
        self.positions = torch.zeros(max_num_rows, dtype=torch.long, device=weight.device)
        self.logits = torch.empty(max_num_rows, config.vocab_size, device=weight.device, dtype=weight.dtype)
        self.rows = [2**k for k in range((max_num_rows - 1).bit_length())] + [max_num_rows]
        self.spans = [*range(POSITION_SPAN, config.block_size, POSITION_SPAN), config.block_size]
        # Largest first: it sizes the memory pool.
        sizes = [(rows, span) for rows in reversed(self.rows) for span in reversed(self.spans)]
        self.replays = {size: capture(self._step_of_size(*size)) for size in sizes}

    def decode_step(self, x: Tensor, positions: Tensor, cache: KVCache, max_position: int) -> Tensor:
        """Run `GPT.decode_step` on this runner's cache. The next step overwrites the logits (B, V).

        Raises:
            ValueError: another cache is given.
        """
        if cache is not self.cache:
            raise ValueError("these graphs were captured over another cache")
        count = len(x)
        rows = next(n for n in self.rows if n >= count)
        span = next(n for n in self.spans if n >= max_position)
        self.x[:count], self.positions[:count] = x, positions
        self.positions[count:rows] = 0  # idle rows write to the start of cache rows that nobody holds
        self.replays[rows, span]()
        return self.logits[:count]

    def _step_of_size(self, rows: int, span: int) -> Run:
        def run() -> None:
            self.logits[:rows] = self.gpt.decode_step(self.x[:rows], self.positions[:rows], self.cache, span)

        return run


def build_graphs(gpt: GPT, max_num_rows: int) -> CUDAGraphRunner | None:
    """Capture graphs on the GPT's GPU; None on a CPU, and where graphs fail or give other logits than eager code."""
    device = gpt.head.weight.device
    if device.type != "cuda":
        return None
    try:
        with torch.cuda.device(device):
            graphs = CUDAGraphRunner(gpt, max_num_rows, GraphCapture(device))
            is_right = matches_eager(graphs)
    except RuntimeError as error:  # out of memory, too
        log.warning("no CUDA graphs, so decoding is slower: %s", first_line(error))
        return None
    if not is_right:
        log.warning("no CUDA graphs, so decoding is slower: their logits differ from eager ones")
        return None
    return graphs


@torch.inference_mode()
def matches_eager(graphs: CUDAGraphRunner) -> bool:
    """Whether each captured step gives the GPT's own logits, up to rounding."""
    gpt = graphs.gpt
    size = gpt.config.n_cond
    conditions = torch.eye(size)[torch.arange(graphs.max_num_rows) % size]
    inputs = gpt.embed_condition(conditions.to(graphs.x))
    for rows, span in graphs.replays:
        positions = torch.full((rows,), span - 1, device=inputs.device)
        graphs.logits.fill_(torch.nan)  # so that logits which a larger graph left here do not pass
        found = graphs.decode_step(inputs[:rows], positions, graphs.cache, span).float().clone()
        expected = gpt.decode_step(inputs[:rows], positions, graphs.cache, span).float()
        if not bool((found - expected).abs().max() <= 0.02 * expected.abs().max()):
            return False
    return True
