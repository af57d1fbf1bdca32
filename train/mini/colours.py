"""Colours of things and of grounds, and a thing in another colour."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 45),
    "orange": (245, 140, 35),
    "yellow": (250, 215, 55),
    "green": (70, 170, 70),
    "blue": (45, 105, 220),
    "purple": (135, 70, 190),
    "pink": (250, 145, 190),
    "brown": (130, 85, 50),
    "black": (38, 38, 42),
    "white": (240, 240, 240),
    "gray": (140, 140, 145),
}
"""Colours that things can have, sRGB in [0, 255]."""

GROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    **COLOURS,
    "white": (255, 255, 255),
    "black": (22, 22, 25),
    "light blue": (165, 212, 245),
    "teal": (50, 165, 165),
    "beige": (238, 222, 190),
}
"""Colours that grounds can have, sRGB in [0, 255]."""

_DARK_LINE = 28.0
"""Lightness, CIE L*, below which what is drawn is a line or a pupil, which stays dark."""


def floats(image: NDArray[Any]) -> Floats:
    """Cast to float32, for type checkers: OpenCV's stubs give no dtype."""
    return image.astype(np.float32, copy=False)


def _lab(rgb: Bytes) -> Floats:
    return floats(cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB))


def recolour(image: Bytes, colour: str) -> Bytes:
    """A sprite, RGBA (H, W, 4), all of it in one colour of COLOURS; light and shade stay.

    Lightness is moved so that its median is the colour's, and its range fits; the hue is the colour's everywhere, so
    that nothing is half one colour, half another. Pupils and lines stay dark, and highlights light.
    """
    lab, alpha = _lab(image[..., :3]), image[..., 3]
    target = _lab(np.array([[COLOURS[colour]]], np.uint8))[0, 0]
    light = lab[..., 0]
    body = (alpha > 128) & (light > _DARK_LINE)
    middle = float(np.median(light[body])) if body.any() else 60.0
    spread = float(np.percentile(np.abs(light[body] - middle), 90)) if body.any() else 20.0
    room = 15.0 if colour in ("white", "black") else 22.0
    moved = target[0] + (light - middle) * min(0.9, room / max(spread, 1.0))
    dark = np.clip((light - 12.0) / (_DARK_LINE - 12.0), 0, 1)  # 0 in lines, 1 in the body
    if middle < 40:  # a dark thing has no darker lines
        dark = np.ones_like(dark)
    new = np.clip(moved, 6, 97) * dark + np.minimum(light, 18.0) * (1 - dark)
    # Near white and near black there is no room for a strong colour.
    strength = np.clip((100 - new) / max(100 - target[0], 1.0), 0, 1) ** 0.5 * np.clip(new / target[0], 0, 1.15)
    out = np.dstack([new, target[1] * strength, target[2] * strength]).astype(np.float32)
    rgb = np.clip(cv2.cvtColor(out, cv2.COLOR_LAB2RGB), 0, 1) * 255
    return np.dstack([rgb.round().astype(np.uint8), alpha])
