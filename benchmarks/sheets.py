"""Figures of the quality report: the images of every prompt with marks, and remarks on failures."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from clipgen.images.pixels import grid

CELL = 112
"""Side of an image, px."""
_RIGHT, _WRONG = (40, 160, 70), (205, 60, 50)
_GAP = 2


def draw_row(images: Sequence[Image.Image], right: Sequence[bool], text: str, remark: str = "") -> Image.Image:
    """Images side by side, a green or red bar under each, and below the prompt and a remark in red."""
    width = len(images) * (CELL + _GAP)
    row = Image.new("RGB", (width + 12, CELL + (44 if remark else 28)), "white")
    pen, font = ImageDraw.Draw(row), ImageFont.load_default(size=13)
    for i, (image, is_right) in enumerate(zip(images, right, strict=True)):
        left = i * (CELL + _GAP)
        row.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (left, 0))
        pen.rectangle((left, CELL + 1, left + CELL - 1, CELL + 4), fill=_RIGHT if is_right else _WRONG)
    pen.text((0, CELL + 7), _shorten(text, font, width), fill="black", font=font)
    if remark:
        pen.text((0, CELL + 23), _shorten(remark, font, width), fill=_WRONG, font=font)
    return row


def draw_sheet(rows: Sequence[Image.Image], columns: int = 3) -> Image.Image:
    """Rows of `draw_row` in columns."""
    return grid(rows, columns=columns, gap=0)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, or as much of it as fits into a width in px."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
