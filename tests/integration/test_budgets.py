"""Budgets: candidates come in waves, and no further one is begun when the target is met or the time is over."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipgen import ClipGen
from clipgen.errors import RequestError
from clipgen.job import WAVE
from clipgen.outputs.metadata import receipts
from clipgen.request import GenerationOutput, GenerationRequest

CANDIDATES = 4 * WAVE


@pytest.fixture(scope="module")
def pipe(tiny_weights: Path) -> ClipGen:
    return ClipGen.from_pretrained(tiny_weights, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def everything(pipe: ClipGen) -> GenerationOutput:
    """All candidates, best first."""
    return pipe("a lemon", num_outputs=CANDIDATES, seed=5)


def best_of(everything: GenerationOutput, drawn: int, count: int) -> list[int]:
    """Seeds of the best among the first candidates."""
    return [seed for seed in everything.seeds if seed < 5 + drawn][:count]


def test_a_target_that_is_met_ends_it_after_that_wave(pipe: ClipGen, everything: GenerationOutput) -> None:
    scores = dict(zip(everything.seeds, everything.scores, strict=True))
    for waves in (1, 2, 3, 4):
        best = best_of(everything, waves * WAVE, 2)
        target = scores[best[1]] - 1e-3  # what the second best of so many waves reaches
        needed = next(n for n in (1, 2, 3, 4) if scores[best_of(everything, n * WAVE, 2)[1]] >= target)
        result = pipe("a lemon", num_outputs=2, candidates=CANDIDATES, seed=5, target_score=target)
        assert result.num_generated == needed * WAVE and result.seeds == best_of(everything, needed * WAVE, 2)
        assert min(result.scores) >= target


def test_a_target_out_of_reach_draws_all_and_gives_the_best(pipe: ClipGen, everything: GenerationOutput) -> None:
    result = pipe("a lemon", num_outputs=3, candidates=CANDIDATES, seed=5, target_score=1.0)
    assert result.num_generated == CANDIDATES and result.seeds == everything.seeds[:3]


def test_all_outputs_must_meet_the_target(pipe: ClipGen, everything: GenerationOutput) -> None:
    just_one = everything.scores[0] - 1e-6
    assert everything.scores[1] < just_one
    one = pipe("a lemon", num_outputs=1, candidates=CANDIDATES, seed=5, target_score=just_one)
    two = pipe("a lemon", num_outputs=2, candidates=CANDIDATES, seed=5, target_score=just_one)
    assert one.seeds == everything.seeds[:1] and two.num_generated == CANDIDATES


def test_time_that_is_over_leaves_the_first_wave(pipe: ClipGen, everything: GenerationOutput) -> None:
    result = pipe("a lemon", num_outputs=2, candidates=CANDIDATES, seed=5, seconds=0)
    assert result.num_generated == WAVE and result.seeds == best_of(everything, WAVE, 2)


def test_time_that_is_not_over_leaves_all(pipe: ClipGen, everything: GenerationOutput) -> None:
    result = pipe("a lemon", num_outputs=2, candidates=CANDIDATES, seed=5, seconds=3600)
    assert result.num_generated == CANDIDATES and result.seeds == everything.seeds[:2]


def test_outputs_are_never_fewer_than_asked_for(pipe: ClipGen) -> None:
    count = WAVE + 3
    result = pipe("a lemon", num_outputs=count, candidates=CANDIDATES, seed=5, seconds=0)
    assert len(result.images) == result.num_generated == count


def test_progress_ends_at_the_end_all_the_same(pipe: ClipGen) -> None:
    seen: list[tuple[int, int]] = []
    pipe("a", candidates=CANDIDATES, seconds=0, progress=lambda *at: seen.append(at))
    total = 16 * CANDIDATES
    assert seen[-1] == (total, total) and {all for _, all in seen} == {total}
    assert seen == sorted(seen)


def test_each_request_of_a_call_has_its_own_budget(pipe: ClipGen, everything: GenerationOutput) -> None:
    hasty, patient = pipe.generate(
        [
            GenerationRequest("a lemon", candidates=CANDIDATES, seed=5, target_score=-1.0),
            GenerationRequest("a lemon", candidates=CANDIDATES, seed=5),
        ]
    )
    assert hasty.num_generated == WAVE and patient.num_generated == CANDIDATES
    assert patient.seeds == everything.seeds[:1]


def test_the_receipt_counts_what_was_drawn(pipe: ClipGen) -> None:
    result = pipe("a lemon", candidates=CANDIDATES, seed=5, seconds=0)
    [written] = receipts(pipe, result, "a" * 64)
    assert written.candidates == WAVE and written.image_seed in range(5, 5 + WAVE)


@pytest.mark.parametrize(
    ("field", "value"),
    [("target_score", 1.1), ("target_score", float("nan")), ("seconds", -1), ("seconds", float("inf"))],
)
def test_budgets_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(RequestError, match=field):
        GenerationRequest("a", **{field: value})  # type: ignore[arg-type]
