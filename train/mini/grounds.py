"""What is behind things: colours, gradients and places, drawn at random."""

from __future__ import annotations

import random
from functools import cache

import numpy as np

from train.mini.colours import GROUND_COLOURS, Floats

_VIEWS = 4
"""Views of each place: few, so that the GPT can learn them."""


def draw_ground(ground: str, second: str | None, size: int, rng: random.Random) -> Floats:
    """A ground, RGB (size, size, 3) in [0, 1]: a colour, two from top to bottom, or a place."""
    if ground in _PLACES:
        return _place(ground, size, rng.randrange(_VIEWS))
    top = _colour(ground)
    if second is None:
        return np.full((size, size, 3), top, np.float32)
    return _gradient(size, top, _colour(second))


@cache
def _place(name: str, size: int, view: int) -> Floats:
    return _PLACES[name](size, random.Random(view))


def _colour(name: str) -> Floats:
    return np.array(GROUND_COLOURS[name], np.float32) / np.float32(255)


def _gradient(size: int, top: Floats, bottom: Floats) -> Floats:
    share = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    return np.repeat(top * (1 - share) + bottom * share, size, axis=1)


def _rgb(*values: int) -> Floats:
    return np.array(values, np.float32) / np.float32(255)


def _below(canvas: Floats, heights: Floats, rgb: Floats) -> None:
    """Paint what is below a height, px from the top, of every column."""
    rows = np.arange(len(canvas), dtype=np.float32)[:, None]
    cover = np.clip(rows - heights[None] + 0.5, 0, 1)[..., None]
    canvas += cover * (rgb - canvas)


def _waves(size: int, rng: random.Random, height: float, swing: float, bends: float) -> Floats:
    x = np.linspace(0, 2 * np.pi, size, dtype=np.float32)
    return size * (height + swing * np.sin(bends * x + rng.uniform(0, 6.3))).astype(np.float32)


def _blob(canvas: Floats, x: float, y: float, radius: float, rgb: Floats) -> None:
    """A disc with soft edges; OpenCV's own are ragged on floats."""
    size = len(canvas)
    x, y, radius = x * size, y * size, radius * size
    left, top = max(0, int(x - radius - 1)), max(0, int(y - radius - 1))
    window = canvas[top : max(0, int(y + radius + 2)), left : max(0, int(x + radius + 2))]
    rows, columns = np.ogrid[top : top + window.shape[0], left : left + window.shape[1]]
    cover = np.clip(radius + 0.5 - np.hypot(rows - y, columns - x), 0, 1).astype(np.float32)[..., None]
    window += cover * (rgb - window)


def _cloud(canvas: Floats, x: float, y: float, scale: float) -> None:
    for dx, dy, radius in ((-0.1, 0.01, 0.055), (0, -0.02, 0.08), (0.1, 0.01, 0.06), (0.03, 0.02, 0.06)):
        _blob(canvas, x + dx * scale, y + dy * scale, radius * scale, _rgb(255, 255, 255))


def _beach(size: int, rng: random.Random) -> Floats:
    canvas = _gradient(size, _rgb(120, 195, 245), _rgb(190, 230, 250))
    horizon = rng.uniform(0.38, 0.5)
    _below(canvas, _waves(size, rng, horizon, 0, 1), _rgb(40, 130, 200))
    shore = _waves(size, rng, horizon + 0.17, 0.02, 1.5)
    _below(canvas, shore - size * 0.03, _rgb(225, 245, 250))
    _below(canvas, shore, _rgb(240, 215, 150))
    return canvas


def _meadow(size: int, rng: random.Random) -> Floats:
    canvas = _gradient(size, _rgb(125, 195, 245), _rgb(205, 235, 250))
    horizon = rng.uniform(0.42, 0.55)
    _below(canvas, _waves(size, rng, horizon, 0.05, 1), _rgb(130, 195, 90))
    _below(canvas, _waves(size, rng, horizon + 0.16, 0.04, 1.3), _rgb(85, 165, 65))
    for _ in range(12):
        x, y = rng.random(), rng.uniform(horizon + 0.24, 0.98)
        _blob(canvas, x, y, 0.018, _rgb(*rng.choice(((250, 250, 250), (250, 220, 70), (240, 120, 160)))))
    return canvas


def _desert(size: int, rng: random.Random) -> Floats:
    canvas = _gradient(size, _rgb(250, 190, 110), _rgb(255, 232, 180))
    _blob(canvas, rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.2), 0.08, _rgb(255, 250, 210))
    horizon = rng.uniform(0.45, 0.55)
    _below(canvas, _waves(size, rng, horizon, 0.06, 1), _rgb(230, 165, 85))
    _below(canvas, _waves(size, rng, horizon + 0.2, 0.05, 0.8), _rgb(205, 135, 60))
    return canvas


def _snow(size: int, rng: random.Random) -> Floats:
    canvas = _gradient(size, _rgb(130, 160, 205), _rgb(185, 205, 230))
    _below(canvas, _waves(size, rng, rng.uniform(0.5, 0.6), 0.05, 1), _rgb(240, 245, 252))
    for _ in range(26):
        _blob(canvas, rng.random(), rng.random(), rng.uniform(0.012, 0.022), _rgb(255, 255, 255))
    return canvas


def _sea(size: int, rng: random.Random) -> Floats:
    canvas = _gradient(size, _rgb(60, 165, 215), _rgb(10, 50, 120))
    for _ in range(10):
        x, y, radius = rng.random(), rng.random(), rng.uniform(0.015, 0.035)
        _blob(canvas, x, y, radius, _rgb(185, 230, 250))
        _blob(canvas, x, y, radius * 0.6, _rgb(60, 140, 205))
    _below(canvas, _waves(size, rng, 0.93, 0.025, 1.5), _rgb(200, 180, 120))
    return canvas


def _sky(size: int, rng: random.Random) -> Floats:
    canvas = _gradient(size, _rgb(75, 155, 235), _rgb(175, 220, 250))
    for x, y in ((0.15, 0.15), (0.8, 0.3), (0.2, 0.8), (0.85, 0.85)):
        _cloud(canvas, x + rng.uniform(-0.08, 0.08), y + rng.uniform(-0.06, 0.06), rng.uniform(0.9, 1.4))
    return canvas


def _night_sky(size: int, rng: random.Random) -> Floats:
    canvas = _gradient(size, _rgb(12, 14, 45), _rgb(45, 35, 95))
    for _ in range(34):
        _blob(canvas, rng.random(), rng.random(), rng.uniform(0.007, 0.016), _rgb(255, 250, rng.randint(200, 255)))
    return canvas


def _city(size: int, rng: random.Random) -> Floats:
    canvas = _gradient(size, _rgb(250, 175, 130), _rgb(255, 225, 180))
    x = 0
    while x < size:
        width, top = round(size * rng.uniform(0.12, 0.2)), round(size * rng.uniform(0.2, 0.55))
        wall = _rgb(*rng.choice(((90, 95, 130), (110, 100, 130), (75, 85, 115))))
        canvas[top:, x : x + width] = wall
        step = max(5, size // 16)
        for y in range(top + step // 2, size, step):
            for window in range(x + step // 2, min(x + width, size) - step // 3, step):
                canvas[y : y + step // 2, window : window + step // 2] = _rgb(250, 225, 130)
        x += width
    canvas[round(size * 0.86) :] = _rgb(85, 85, 92)
    return canvas


_PLACES = {
    "beach": _beach,
    "meadow": _meadow,
    "desert": _desert,
    "snow": _snow,
    "sea": _sea,
    "sky": _sky,
    "night sky": _night_sky,
    "city": _city,
}
