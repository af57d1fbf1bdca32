"""CUDA graphs of the GPT's step give the tokens of eager steps. CPU tests use stand-ins for graphs."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from engine_kit import sharp_gpt, together

from clipgen.config import GPTConfig
from clipgen.engine.cuda_graphs import POSITION_SPAN, CUDAGraphRunner, GraphCapture, Run, build_graphs, matches_eager
from clipgen.engine.engine import Engine
from clipgen.engine.sequence import Sequence
from clipgen.models.gpt import GPT
from clipgen.request import SamplingParams

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=50, block_size=POSITION_SPAN + 9, n_cond=16)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return sharp_gpt(CONFIG)


def capture_nothing(run: Run) -> Run:
    """Stand-in for a capture on a CPU: a replay repeats the same work over the same memory."""
    return run


def make_sequences(count: int) -> list[Sequence]:
    conditions = F.normalize(torch.randn(count, CONFIG.n_cond, generator=torch.Generator().manual_seed(1)), dim=1)
    samplings = [SamplingParams(guidance=3.0), SamplingParams(top_p=0.8), SamplingParams(temperature=0.0)]
    return [Sequence(c, i, samplings[i % 3]) for i, c in enumerate(conditions)]


def test_sequences_that_join_and_leave_get_the_tokens_of_eager_steps(gpt: GPT) -> None:
    rng = random.Random(0)
    graphs = CUDAGraphRunner(gpt, 12, capture_nothing)
    for _ in range(3):  # three runs over the same memory
        arrivals = [(rng.randrange(90), [seq]) for seq in make_sequences(9)]  # 12 rows at most
        plain = together(gpt, arrivals)
        recorded = together(gpt, arrivals, graphs=graphs)
        assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


def test_step_replays_the_smallest_graph_that_fits(gpt: GPT) -> None:
    used: list[int] = []

    def counted(run: Run) -> Run:
        number = len(recorded)
        recorded.append(run)
        return lambda: (used.append(number), run())[1]

    recorded: list[Run] = []
    graphs = CUDAGraphRunner(gpt, 6, counted)
    sizes = list(graphs.replays)
    assert sizes == [(n, span) for n in (6, 4, 2, 1) for span in (POSITION_SPAN + 9, POSITION_SPAN)]
    with torch.inference_mode():
        for rows, longest in [(1, 1), (2, POSITION_SPAN), (3, POSITION_SPAN + 1), (5, POSITION_SPAN + 9)]:
            at = torch.full((rows,), longest - 1)
            assert len(graphs.decode_step(torch.zeros(rows, CONFIG.n_embd), at, graphs.cache, longest)) == rows
    assert [sizes[number] for number in used] == [
        (1, POSITION_SPAN),
        (2, POSITION_SPAN),
        (4, POSITION_SPAN + 9),
        (6, POSITION_SPAN + 9),
    ]


def test_cache_that_was_not_captured_is_refused(gpt: GPT) -> None:
    graphs = CUDAGraphRunner(gpt, 2, capture_nothing)
    with pytest.raises(ValueError, match="another cache"):
        graphs.decode_step(torch.zeros(1, CONFIG.n_embd), torch.zeros(1, dtype=torch.long), gpt.allocate(2), 1)


def test_graph_that_differs_from_eager_is_detected(gpt: GPT) -> None:
    assert matches_eager(CUDAGraphRunner(gpt, 6, capture_nothing))
    for wrong in range(8):
        recorded: list[Run] = []

        def dead(run: Run, recorded: list[Run] = recorded, wrong: int = wrong) -> Run:
            recorded.append(run)
            return (lambda: None) if len(recorded) == wrong + 1 else run

        assert not matches_eager(CUDAGraphRunner(gpt, 6, dead))


def test_no_graphs_are_built_on_a_cpu(gpt: GPT) -> None:
    assert build_graphs(gpt, 4) is None


@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_engine_on_a_gpu_generates_the_same_tokens_with_and_without_graphs(
    gpt: GPT, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_gpu = GPT(CONFIG).eval()
    on_gpu.load_state_dict(gpt.state_dict())
    on_gpu.to("cuda", dtype)
    sequences = [replace(seq, params=SamplingParams(temperature=0.0)) for seq in make_sequences(5)]
    with caplog.at_level(logging.WARNING):
        recorded = Engine(on_gpu).generate(sequences).tokens
    assert not caplog.records
    monkeypatch.setattr("clipgen.engine.engine.build_graphs", lambda gpt, rows: None)
    plain = Engine(on_gpu).generate(sequences).tokens
    assert (recorded == plain).float().mean() > (0.99 if dtype == torch.float32 else 0.9)


class Streams:
    """Stands in for torch.cuda's streams: which exist, and which is current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[object] = []
        self.current: object = self.stream()
        self.fails = False
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.stream())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "current", stream))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "stream", self.enter)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)

    def stream(self) -> object:
        self.made.append(SimpleNamespace(wait_stream=lambda other: None))
        return self.made[-1]

    @contextmanager
    def enter(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def capture(self, graph: object, pool: object, stream: object, **_: object) -> Iterator[None]:
        self.current = stream
        yield
        if self.fails:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.current = self.made[0]


def test_all_captures_share_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    capture = GraphCapture(torch.device("cuda"))
    for _ in range(5):
        capture(lambda: None)
    assert len(streams.made) == 2  # the caller's and the capture's


def test_failed_capture_returns_to_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    caller, streams.fails = streams.current, True
    with pytest.raises(RuntimeError, match="during capture"):
        GraphCapture(torch.device("cuda"))(lambda: None)
    assert streams.current is caller
