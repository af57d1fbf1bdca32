"""State of one request during generation: its candidates so far, and the next ones within its budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from clipgen.engine.image_decoder import DecodedImage, ImageDecoder
from clipgen.engine.sequence import Sequence as ImageSequence
from clipgen.request import GenerationRequest, SamplingParams
from clipgen.weights.training_index import IndexMatch

WAVE = 8
"""Candidates generated and ranked between two checks of a request's budget."""


@dataclass(eq=False)
class Job:
    """One request during generation."""

    request: GenerationRequest
    seed: int
    params: SamplingParams
    embedding: Tensor  # (D,), the GPT's condition, which candidates are ranked by as well
    negative_embedding: Tensor | None  # (D,)
    prefix_tokens: Tensor | None
    match: IndexMatch | None
    num_generated: int = 0
    best: list[tuple[int, DecodedImage]] = field(default_factory=list)
    """Seeds and images of the best candidates so far, at most the requested number, best first."""

    def add(self, seed: int, image: DecodedImage) -> None:
        """Count a candidate, and keep it if it is one of the best."""
        self.num_generated += 1
        self.best = sorted([*self.best, (seed, image)], key=lambda candidate: -candidate[1].score)
        del self.best[self.request.num_outputs :]

    def sequence(self, seed: int) -> ImageSequence:
        """A candidate's sequence for the engine."""
        return ImageSequence(self.embedding, seed, self.params, self.prefix_tokens, self.negative_embedding)

    def next_wave(self, start: float) -> range:
        """The seeds to generate next: all without a budget, else a few until time is up or the target is met."""
        request, have = self.request, self.num_generated
        if request.target_score is None and request.seconds is None:
            return range(self.seed + have, self.seed + request.num_candidates)
        if have:
            is_late = request.seconds is not None and time.perf_counter() - start >= request.seconds
            is_met = request.target_score is not None and self.best[-1][1].score >= request.target_score
            if is_late or is_met:
                return range(0)
        size = max(WAVE, request.num_outputs)
        return range(self.seed + have, self.seed + min(have + size, request.num_candidates))


def preview_interval(grid: int, previews: int) -> int:
    """Steps between two previews: whole rows of `grid` tokens."""
    return grid * -(-grid // (previews + 1))


def previewer(
    image_decoder: ImageDecoder,
    on_preview: Callable[[list[Image.Image]], None],
    wave: Sequence[tuple[Job, int]],
) -> Callable[[Tensor], None]:
    """Decode the tokens so far of each job's first candidates for `on_preview`."""
    shown = [i for i, (job, seed) in enumerate(wave) if seed - job.seed < job.request.num_outputs]

    def on_tokens(tokens: Tensor) -> None:
        if shown and bool((tokens[shown] < 0).any()):
            on_preview(image_decoder.preview(tokens[shown]))

    return on_tokens
