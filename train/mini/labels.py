"""Facts as class labels, and the heads that predict them from an embedding while CLIP is trained."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from train.mini.attachments import ATTACHMENTS
from train.mini.colours import COLOURS, GROUND_COLOURS
from train.mini.drawing import HAIR_COLOURS, HAIR_CUTS
from train.mini.facts import COLOURLESS, PLACES, RELATIONS, STYLES, Facts
from train.mini.objects import read_objects

UNKNOWN = -100
"""Label for facts that a scene does not have; ignored in the loss (torch's `ignore_index`)."""
_VALUES: dict[str, tuple[str | None, ...]] = {
    "object": tuple(read_objects()),
    "second object": tuple(read_objects()),
    "attachment": (None, *ATTACHMENTS),
    "cut": HAIR_CUTS,
    "hair color": tuple(HAIR_COLOURS),
    "color": (None, *COLOURS),
    "second color": (None, *COLOURS),
    "layout": ("1", "2", "3", *RELATIONS),
    "style": STYLES,
    "ground": (*GROUND_COLOURS, *PLACES),
    "second ground": (*GROUND_COLOURS, *PLACES),
}
_NUMBERS = {name: {value: i for i, value in enumerate(values)} for name, values in _VALUES.items()}
_WEIGHTS = {"object": 1.0, "second object": 1.0, "attachment": 1.0, "color": 0.5, "layout": 0.5}
"""Weights of the heads' losses; 0.3 for the others."""
NAMES = tuple(_VALUES)
"""Names of the heads, in the order of the labels."""
SCALE = 20.0
"""Factor of an embedding before the heads."""


def values(name: str) -> tuple[str | None, ...]:
    """The classes of a head, by number."""
    return _VALUES[name]


def label(facts: Facts) -> list[int]:
    """Class label for each head."""
    first, second = facts.things[0], facts.things[1] if len(facts.things) > 1 else None
    said: dict[str, str | None] = {
        "object": first.object,
        "attachment": first.attachment,
        "color": first.colour,
        "layout": facts.relation or str(facts.count),
        "style": facts.style,
        "ground": facts.ground,
        "second ground": facts.second_ground or facts.ground,
    }
    if second is not None:
        said |= {"second object": second.object, "second color": second.colour}
    if first.kind is not None:
        cut, colour = first.kind
        said |= {"cut": cut} if facts.style in COLOURLESS else {"cut": cut, "hair color": colour}
    return [_NUMBERS[name][said[name]] if name in said else UNKNOWN for name in NAMES]


class Heads(nn.Module):
    """Linear classifiers of an embedding, one for each fact."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(embed_dim, len(_VALUES[name])) for name in NAMES)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Unit-norm embeddings (B, D) -> logits (B, values) of each head."""
        return [head(SCALE * x) for head in self.heads]


def heads_loss(logits: list[Tensor], labels: Tensor) -> Tensor:
    """The weighted sum of the heads' cross-entropies; labels (B, heads)."""
    total = logits[0].new_zeros(())
    for name, row, numbers in zip(NAMES, logits, labels.unbind(1), strict=True):
        known = (numbers != UNKNOWN).sum().clamp(min=1)  # stays on the GPU, unlike a choice of the known rows
        loss = F.cross_entropy(row.float(), numbers, ignore_index=UNKNOWN, reduction="sum") / known
        total = total + _WEIGHTS.get(name, 0.3) * loss
    return total


@torch.no_grad()
def accuracy(logits: list[Tensor], labels: Tensor) -> dict[str, float]:
    """Accuracy of each head over the scenes that have its fact.

    Facts that can be absent, such as attachments, count only where present: most scenes have none, which is easy.
    """
    found = {}
    for i, (name, row) in enumerate(zip(NAMES, logits, strict=True)):
        asked = labels[:, i] > (0 if None in _VALUES[name] else -1)
        if asked.any():
            found[name.replace(" ", "_")] = (row.argmax(-1) == labels[:, i])[asked].float().mean().item()
    return found
