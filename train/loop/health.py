"""Detection of trainings that have gone wrong: warnings first, then an error."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from clipgen.errors import ClipGenError

Scalars = Mapping[str, float | Tensor]


class TrainingError(ClipGenError):
    """A training that is not worth continuing; the message says since when and what to try."""


@dataclass(frozen=True)
class Symptom:
    """One way for a training to go wrong.

    Attributes:
        present: whether a log line shows it; False for lines without the scalars it needs.
        message: what is wrong, a format string of the line's scalars.
        advice: what to change when continuing from an earlier checkpoint.
        restart: what only a new training can change; may be empty.
    """

    present: Callable[[Mapping[str, float]], bool]
    message: str
    advice: str
    restart: str = ""

    @property
    def remedies(self) -> str:
        """Everything to try."""
        return self.advice + (f"; or start again with {self.restart}" if self.restart else "")


def collapsed_codes(codebook_size: int) -> Symptom:
    """Few codes are used: their perplexity is below a hundredth of the codebook, or below two."""
    threshold = max(2.0, codebook_size / 100)
    return Symptom(
        lambda line: line.get("perplexity", math.inf) < threshold,
        f"the codebook collapses: perplexity {{perplexity:.1f}} of {codebook_size} codes",
        "use a lower stage1.lr, or before stage1.disc_start a smaller stage1.revive_every above 0",
        "model.vqgan.l2_codes=true",
    )


def discriminator_wins() -> Symptom:
    """The hinge loss is near 0: every patch is recognised with certainty, so the generator learns nothing from it."""
    return Symptom(
        lambda line: line.get("discriminator", math.inf) < 0.05,
        "the discriminator wins: it tells every image from its reconstruction, loss {discriminator:.3f}",
        "lower stage1.disc_lr or start it later (stage1.disc_start)",
        "stage1.disc_regularisation=lecam stage1.disc_regularisation_weight=0.01, or r1 and 10",
    )


def worse_than_guessing(vocab_size: int) -> Symptom:
    """The cross-entropy is above ln V, that of a uniform distribution over the tokens."""
    uniform = math.log(vocab_size)
    return Symptom(
        lambda line: line.get("loss", 0.0) > 1.05 * uniform,
        f"the GPT does worse than guessing: loss {{loss:.3f}}, uniform guesses have {uniform:.3f}",
        "use a lower stage2.lr, a longer stage2.warmup, or a lower stage2.grad_clip",
    )


@dataclass
class Health:
    """Checks every log line. All processes see the same scalars, so that all of them stop together.

    Attributes:
        patience: consecutive lines with a symptom before training stops; 0 only warns.
        symptoms: what to look for, besides values that are not finite.
        verbose: whether this process prints warnings.
    """

    patience: int
    symptoms: list[Symptom]
    verbose: bool = True
    _since: dict[int, tuple[int, int]] = field(default_factory=dict)  # symptom -> first step, number of lines

    def check(self, step: int, scalars: Scalars) -> None:
        """Check one log line.

        Raises:
            TrainingError: a value is not finite, or a symptom has persisted for `patience` lines.
        """
        check_finite(step, scalars)
        line = {name: float(value) for name, value in scalars.items()}
        for number, symptom in enumerate(self.symptoms):
            if not symptom.present(line):
                self._since.pop(number, None)
                continue
            first, lines = self._since.get(number, (step, 0))
            self._since[number] = first, lines + 1
            message = symptom.message.format(**line)
            if lines + 1 == self.patience:
                raise TrainingError(
                    f"step {step}: {message}, since step {first}. To continue from an earlier checkpoint "
                    f"(--resume-step), {symptom.remedies}; patience=0 never stops for this"
                )
            if not lines and self.verbose:
                print(
                    f"warning: step {step}: {message}; if that persists, {symptom.remedies}",
                    file=sys.stderr,
                    flush=True,
                )


def check_finite(step: int, values: Scalars) -> None:
    """Check that values are finite, before a training that diverged is saved over a good checkpoint.

    Raises:
        TrainingError: one of the values is NaN or infinite.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"step {step}: {', '.join(bad)} not finite, so the weights are lost; the last checkpoint is intact. "
            "Continue from it with a lower lr, a lower grad_clip, or precision=no"
        )
