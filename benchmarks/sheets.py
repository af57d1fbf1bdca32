"""Figures of the quality report: the images of every prompt with marks, and the failures with their cause."""

from __future__ import annotations

from collections.abc import Sequence

from assess import Drawn
from measures import NEAREST
from PIL import Image, ImageDraw, ImageFont

from clipgen.images.pixels import grid

CELL = 112
"""Side of an image, px."""
_RIGHT, _WRONG = (40, 160, 70), (205, 60, 50)


def draw_grid(drawn: Sequence[Drawn], columns: int = 3) -> Image.Image:
    """Images of each prompt side by side, with a green or red bar under each, and the prompt below."""
    blocks = []
    for d in drawn:
        row = grid([_cell(image) for image in d.images], columns=len(d.images))
        block = Image.new("RGB", (row.width + 14, CELL + 30), "white")
        block.paste(row)
        pen = ImageDraw.Draw(block)
        for i, rank in enumerate(d.ranks):
            left = i * (CELL + 2)
            pen.rectangle((left, CELL + 1, left + CELL - 1, CELL + 4), fill=_RIGHT if rank < NEAREST else _WRONG)
        pen.text((0, CELL + 7), d.prompt.text, fill="black", font=ImageFont.load_default(size=14))
        blocks.append(block)
    return grid(blocks, columns=columns, gap=0)


def draw_failures(drawn: Sequence[Drawn], columns: int = 5) -> Image.Image | None:
    """Best-scored image of each prompt where it is wrong, and what it was taken for; None without failures."""
    blocks = []
    for d in drawn:
        wrong_look = bool(d.look) and not d.look[0]
        if d.ranks[0] < NEAREST and not wrong_look:
            continue
        block = Image.new("RGB", (2 * CELL + 60, CELL + 48), "white")
        block.paste(_cell(d.images[0]))
        pen, font = ImageDraw.Draw(block), ImageFont.load_default(size=13)
        pen.text((0, CELL + 4), d.prompt.text, fill="black", font=font)
        reason = "not the style or background asked for" if wrong_look else f"taken for: {d.nearest[0]}"
        pen.text((0, CELL + 22), reason[:44], fill=_WRONG, font=font)
        blocks.append(block)
    return grid(blocks, columns=columns, gap=0) if blocks else None


def _cell(image: Image.Image) -> Image.Image:
    return image.resize((CELL, CELL), Image.Resampling.LANCZOS)
