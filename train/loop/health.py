"""Is a training still worth its hours? Said plainly when not, and stopped before a good checkpoint is gone."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from clipgen.errors import ClipGenError

Scalars = Mapping[str, float | Tensor]


class TrainingError(ClipGenError):
    """A training that makes no sense to go on with; the message says since when and what to try."""


@dataclass(frozen=True)
class Sign:
    """One way to go wrong.

    Attributes:
        shown: whether a log line shows it; lines without the numbers it needs do not.
        text: what is wrong, with the line's numbers in braces.
        advice: what to try.
    """

    shown: Callable[[Mapping[str, float]], bool]
    text: str
    advice: str


def collapsed_codes(codebook_size: int) -> Sign:
    """Few codes are used: their perplexity is below a hundredth of the codebook, or below two."""
    least = max(2.0, codebook_size / 100)
    return Sign(
        lambda line: line.get("perplexity", math.inf) < least,
        f"the codes collapse: those in use are worth {{perplexity:.1f}} of {codebook_size}",
        "use model.vqgan.l2_codes=true, a smaller stage1.revive_every above 0, or a lower stage1.lr",
    )


def discriminator_wins() -> Sign:
    """Hinge losses near 0: every patch is recognised with certainty, so that the generator learns nothing from it."""
    return Sign(
        lambda line: line.get("discriminator", math.inf) < 0.05,
        "the discriminator wins: it tells every picture from its reconstruction, loss {discriminator:.3f}",
        "lower stage1.disc_lr or start it later (stage1.disc_start), or use stage1.disc_regularisation=lecam or r1",
    )


def worse_than_guessing(vocab_size: int) -> Sign:
    """A cross-entropy above that of giving every token the same probability, ln V."""
    most = math.log(vocab_size)
    return Sign(
        lambda line: line.get("loss", 0.0) > 1.05 * most,
        f"the GPT does worse than guessing: loss {{loss:.3f}}, blind guesses have {most:.3f}",
        "use a lower stage2.lr, a longer stage2.warmup, or a lower stage2.grad_clip",
    )


@dataclass
class Health:
    """Looks at every log line. All processes look at the same numbers, so that all of them stop.

    Attributes:
        patience: lines in a row that show a sign before training stops; 0 never stops for one.
        signs: what to look for, beside numbers that are not finite.
        says: whether this process prints.
    """

    patience: int
    signs: list[Sign]
    says: bool = True
    _since: dict[int, tuple[int, int]] = field(default_factory=dict)  # sign -> first step, lines

    def check(self, step: int, scalars: Scalars) -> None:
        """Note one log line.

        Raises:
            TrainingError: a number is not finite, or a sign has been there for `patience` lines.
        """
        check_finite(step, scalars)
        line = {name: float(value) for name, value in scalars.items()}
        for number, sign in enumerate(self.signs):
            if not sign.shown(line):
                self._since.pop(number, None)
                continue
            first, lines = self._since.get(number, (step, 0))
            self._since[number] = first, lines + 1
            text = sign.text.format(**line)
            if lines + 1 == self.patience:
                raise TrainingError(
                    f"step {step}: {text}, since step {first}. To go on from a checkpoint, {sign.advice}; "
                    "patience=0 goes on in any case"
                )
            if not lines and self.says:
                print(f"warning: step {step}: {text}; if that stays, {sign.advice}", file=sys.stderr, flush=True)


def check_finite(step: int, values: Scalars) -> None:
    """Stop a training whose numbers have become NaN or infinite, before it is saved over a good checkpoint.

    Raises:
        TrainingError: one of the values is not finite.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"step {step}: {', '.join(bad)} not finite, so the weights are lost; the last checkpoint is from before. "
            "Go on from it with a lower lr, a lower grad_clip, or precision=no"
        )
