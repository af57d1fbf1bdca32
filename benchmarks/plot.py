"""Line plots as PNG files, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from clipgen.images.pixels import save_image

COLOURS = ((30, 100, 200), (210, 60, 40), (30, 150, 70), (150, 80, 190), (230, 140, 20), (90, 90, 90), (0, 160, 170))
MARGIN = 60

Series = Mapping[str, Sequence[tuple[float, float]]]


def plot(series: Series, title: str, path: Path, logarithmic: bool = False, size: tuple[int, int] = (720, 440)) -> None:
    """Draw series of points (x, y) into a frame, with a legend beside it.

    Args:
        logarithmic: use logarithmic axes and label each point.
    """
    scale = math.log2 if logarithmic else float
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    points = [point for line in series.values() for point in line]
    low = [min(scale(point[i]) for point in points) for i in (0, 1)]
    span = [max(max(scale(point[i]) for point in points) - low[i], 1e-9) for i in (0, 1)]
    names = 130
    frame = (MARGIN, MARGIN, size[0] - MARGIN - names, size[1] - MARGIN)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = ((scale(point[i]) - low[i]) / span[i] for i in (0, 1))
        return frame[0] + x * (frame[2] - frame[0]), frame[3] - y * (frame[3] - frame[1])

    pen.rectangle(frame, outline=(200, 200, 200))
    pen.text((MARGIN, 20), title, fill="black")
    for i, (name, line) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        pen.line([place(point) for point in line], fill=colour, width=2)
        pen.text((frame[2] + 10, frame[1] + 16 * i), name, fill=colour)
        for point in line if logarithmic else []:
            x, y = place(point)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            pen.text((x - 12, y - 18), f"{point[1]:.3g}", fill=colour)
    if logarithmic:
        for value in {point[0] for point in points}:
            pen.text((place((value, points[0][1]))[0] - 10, frame[3] + 8), f"{value:g}", fill="black")
    else:
        for y, value in ((frame[1], low[1] + span[1]), (frame[3], low[1])):
            pen.text((8, y - 6), f"{value:.3g}", fill="black")
        for x, value in ((frame[0], low[0]), (frame[2], low[0] + span[0])):
            pen.text((x - 10, frame[3] + 8), f"{value:g}", fill="black")
    save_image(image, path)
