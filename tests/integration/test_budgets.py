"""Budgets: candidates are generated in waves until the target score is met or the time is over."""

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


def best_of(everything: GenerationOutput, num_generated: int, count: int) -> list[int]:
    """Seeds of the `count` best among the first `num_generated` candidates."""
    return [seed for seed in everything.seeds if seed < 5 + num_generated][:count]


def test_generation_ends_after_the_wave_that_meets_the_target(pipe: ClipGen, everything: GenerationOutput) -> None:
    scores = dict(zip(everything.seeds, everything.scores, strict=True))
    for waves in (1, 2, 3, 4):
        best = best_of(everything, waves * WAVE, 2)
        target = scores[best[1]] - 1e-3  # just below the second-best score after so many waves
        needed = next(n for n in (1, 2, 3, 4) if scores[best_of(everything, n * WAVE, 2)[1]] >= target)
        result = pipe("a lemon", num_outputs=2, candidates=CANDIDATES, seed=5, target_score=target)
        assert result.num_generated == needed * WAVE and result.seeds == best_of(everything, needed * WAVE, 2)
        assert min(result.scores) >= target


def test_unreachable_target_generates_all_candidates(pipe: ClipGen, everything: GenerationOutput) -> None:
    result = pipe("a lemon", num_outputs=3, candidates=CANDIDATES, seed=5, target_score=1.0)
    assert result.num_generated == CANDIDATES and result.seeds == everything.seeds[:3]


def test_every_output_must_meet_the_target(pipe: ClipGen, everything: GenerationOutput) -> None:
    just_one = everything.scores[0] - 1e-6
    assert everything.scores[1] < just_one
    one = pipe("a lemon", num_outputs=1, candidates=CANDIDATES, seed=5, target_score=just_one)
    two = pipe("a lemon", num_outputs=2, candidates=CANDIDATES, seed=5, target_score=just_one)
    assert one.seeds == everything.seeds[:1] and two.num_generated == CANDIDATES


def test_expired_time_budget_ends_after_the_first_wave(pipe: ClipGen, everything: GenerationOutput) -> None:
    result = pipe("a lemon", num_outputs=2, candidates=CANDIDATES, seed=5, seconds=0)
    assert result.num_generated == WAVE and result.seeds == best_of(everything, WAVE, 2)


def test_ample_time_budget_generates_all_candidates(pipe: ClipGen, everything: GenerationOutput) -> None:
    result = pipe("a lemon", num_outputs=2, candidates=CANDIDATES, seed=5, seconds=3600)
    assert result.num_generated == CANDIDATES and result.seeds == everything.seeds[:2]


def test_expired_budget_returns_all_requested_outputs(pipe: ClipGen) -> None:
    count = WAVE + 3
    result = pipe("a lemon", num_outputs=count, candidates=CANDIDATES, seed=5, seconds=0)
    assert len(result.images) == result.num_generated == count


def test_progress_of_a_stopped_budget_ends_at_the_total(pipe: ClipGen) -> None:
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


def test_receipt_counts_the_generated_candidates(pipe: ClipGen) -> None:
    result = pipe("a lemon", candidates=CANDIDATES, seed=5, seconds=0)
    [written] = receipts(pipe, result, "a" * 64)
    assert written.candidates == WAVE and written.image_seed in range(5, 5 + WAVE)


@pytest.mark.parametrize(
    ("field", "value"),
    [("target_score", 1.1), ("target_score", float("nan")), ("seconds", -1), ("seconds", float("inf"))],
)
def test_budget_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(RequestError, match=field):
        GenerationRequest("a", **{field: value})  # type: ignore[arg-type]
