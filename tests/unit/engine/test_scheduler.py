"""Which sequences run next."""

from __future__ import annotations

import torch
from engine_kit import make_sequences

from clipgen.engine.scheduler import RequestGroup, Scheduler
from clipgen.request import SamplingParams


def test_guided_request_is_not_overtaken_by_a_stream_of_unguided_ones() -> None:
    scheduler = Scheduler()
    scheduler.max_num_rows = scheduler.max_num_seqs = 4
    plain = SamplingParams(guidance=1.0)

    def arrive(first: int) -> None:
        scheduler.groups.append(RequestGroup(make_sequences(1, plain, first=first)))

    for i in range(4):
        arrive(i)
    assert len(scheduler.schedule()) == 4
    guided = RequestGroup(make_sequences(1))
    scheduler.groups.append(guided)
    for finished in range(2):  # one ends and one arrives at a time, so no two rows are ever free at once by chance
        arrive(4 + finished)
        seq = next(iter(scheduler.running))
        scheduler.remove({scheduler.finish(seq, torch.zeros(0))})
        admitted = scheduler.schedule()
    assert admitted == guided.sequences
