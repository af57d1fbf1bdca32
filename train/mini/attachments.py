"""What can be put on a thing, and where it goes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import cv2

from train.mini import drawing
from train.mini.colours import Bytes
from train.mini.drawing import HAIR_COLOURS, HAIR_CUTS
from train.mini.objects import Object
from train.mini.sprites import SIDE


@dataclass(frozen=True)
class Attachment:
    """Something put on things.

    Attributes:
        source: the emoji that shows it, or how it is drawn; of hair neither.
        at: where its centre goes: the face's centre, or the top of the head.
        right, down: from there, in radii of the face.
        width: in radii.
        behind: whether the thing hides it.
        variants: how many different ones are drawn.
    """

    source: str | drawing.Draw | None
    at: Literal["face", "top"]
    right: float
    down: float
    width: float
    behind: bool = False
    variants: int = 1


ATTACHMENTS: dict[str, Attachment] = {
    "hair": Attachment(None, "top", 0, 0.42, 2.5, variants=2),
    "face": Attachment(drawing.face, "face", 0, 0.05, 1.5, variants=6),
    "glasses": Attachment(drawing.glasses, "face", 0, -0.1, 2.15, variants=4),
    "sunglasses": Attachment(drawing.sunglasses, "face", 0, -0.1, 2.1),
    "top hat": Attachment("1f3a9", "top", 0, -0.42, 2.0),
    "cowboy hat": Attachment(drawing.cowboy_hat, "top", 0, -0.25, 2.5),
    "cap": Attachment("1f9e2", "top", 0, -0.1, 2.1),
    "crown": Attachment("1f451", "top", 0, -0.32, 1.8),
    "party hat": Attachment(drawing.party_hat, "top", 0, -0.5, 1.3, variants=3),
    "santa hat": Attachment(drawing.santa_hat, "top", 0.1, -0.3, 2.1),
    "horns": Attachment(drawing.horns, "top", 0, -0.1, 2.1),
    "halo": Attachment(drawing.halo, "top", 0, -0.5, 2.0),
    "bow": Attachment("1f380", "top", 0.3, 0.1, 1.5),
    "moustache": Attachment(drawing.moustache, "face", 0, 0.38, 1.9, variants=2),
    "beard": Attachment(drawing.beard, "face", 0, 0.62, 1.9, variants=3),
    "headphones": Attachment("1f3a7", "face", 0, -0.35, 2.7),
    "cigarette": Attachment(drawing.cigarette, "face", 0.85, 0.25, 2.0, variants=3),
    "wings": Attachment(drawing.wings, "face", 0, -0.05, 4.0, behind=True),
}
_HAIRY = {"boy", "girl", "man", "woman", "clown", "santa claus", "lion"}
_BEARDED = {"santa claus", "lion"}
_WINGED = {"bat", "butterfly", "bee", "duck", "eagle", "parrot", "swan"}


def can_have(thing: Object, attachment: str) -> bool:
    """Whether an object can have an attachment, such as a face only if it has none."""
    if attachment == "face":
        return not thing.has_face
    taken = {"hair": _HAIRY, "beard": _BEARDED, "moustache": _BEARDED, "wings": _WINGED}
    return thing.name not in taken.get(attachment, ())


def kinds_of(attachment: str) -> list[tuple[str, str] | None]:
    """Cuts and colours that it comes in; [None] for what comes in one."""
    return [(cut, colour) for cut in HAIR_CUTS for colour in HAIR_COLOURS] if attachment == "hair" else [None]


def draw_variants(attachment: str, kind: tuple[str, str] | None) -> list[Bytes]:
    """All variants of a drawn attachment, RGBA (SIDE, SIDE, 4); always the same ones."""
    found, rng = ATTACHMENTS[attachment], random.Random(f"{attachment} {kind}")
    images = []
    for _ in range(found.variants):
        if kind is not None:
            large = drawing.hair(rng, *kind)
        else:
            assert callable(found.source)
            large = found.source(rng)
        images.append(cv2.resize(large, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(large.dtype))
    return images
