"""Images made of images: a grid with labels, and an animation. The font is PIL's own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clipgen.errors import DataError
from clipgen.images.pixels import grid, to_rgb
from clipgen.utils.files import replacing

LABEL = 14
"""Font size of the labels, px."""
MARGIN = 6


def labelled_grid(
    images: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str], title: str = ""
) -> Image.Image:
    """Lay images of one size out row by row, with labels (or "") above the columns and beside the rows, and a title.

    Raises:
        DataError: the number of images is not that of the cells.
    """
    if len(images) != len(columns) * len(rows):
        raise DataError(f"{len(images)} images do not fill {len(rows)} x {len(columns)} cells")
    font = ImageFont.load_default(LABEL)
    cells = grid(images, len(columns), gap=2)
    left = int(max(font.getlength(label) for label in rows)) + 2 * MARGIN if any(rows) else 0
    cell_width, cell_height = images[0].width + 2, images[0].height + 2
    line = LABEL + 2 * MARGIN
    top = line * (bool(title) + any(columns))
    sheet = Image.new("RGB", (left + cells.width, top + cells.height), "white")
    sheet.paste(cells, (left, top))
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, line / 2), shorten(title, font, sheet.width - 2 * MARGIN), "black", font, anchor="lm")
    for i, label in enumerate(columns):
        place = (left + i * cell_width + images[0].width / 2, top - line / 2)
        draw.text(place, shorten(label, font, cell_width), "black", font, anchor="mm")
    for i, label in enumerate(rows):
        draw.text((MARGIN, top + i * cell_height + images[0].height / 2), label, "black", font, anchor="lm")
    return sheet


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Cut a text off to fit into `width` pixels, with "..." where something is missing."""
    if font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(1, len(text)), width, key=lambda length: font.getlength(text[:length] + "..."))
    return text[:fitting] + "..." if fitting else ""


def save_gif(images: Sequence[Image.Image], path: str | Path, seconds: float = 0.25, comment: str = "") -> Path:
    """Write a looping GIF of images of one size, forward and back; the ends are shown twice as long.

    Raises:
        DataError: there are no images, or the file cannot be written.
    """
    if not images:
        raise DataError("an animation needs at least one image")
    path = Path(path)
    frames = [to_rgb(image) for image in (*images, *images[-2:0:-1])]
    times = [int(1000 * seconds) * (2 if i in (0, len(images) - 1) else 1) for i in range(len(frames))]
    options = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            frames[0].save(temporary, "GIF", comment=comment.encode("ascii", "replace"), **options)
    except OSError as error:
        raise DataError(f"cannot write '{path}': {error}") from error
    return path
