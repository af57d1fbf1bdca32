"""Emoji renders as sprites, and the positions of their heads and faces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from clipgen.errors import DataError
from train.mini.colours import Bytes

SIDE = 160
"""Side of a render and of a sprite, px."""


def load_render(renders: Path, style: str, code: str) -> Bytes:
    """One render of `train.mini.renders`, RGBA (SIDE, SIDE, 4).

    Raises:
        DataError: the render does not exist or has another size.
    """
    path = renders / style / f"{code}.png"
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) if path.is_file() else None
    if image is None or image.shape != (SIDE, SIDE, 4):
        raise DataError(f"{path} is not a render of {SIDE} x {SIDE} px; run `make renders` to create all of them")
    return cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA).astype(np.uint8)


def premultiply(image: Bytes) -> Bytes:
    """Premultiply alpha, RGBA (H, W, 4), for scaling and blending. Stays in bytes, as thousands are kept."""
    shares = cv2.cvtColor(image[..., 3], cv2.COLOR_GRAY2RGB)
    colours = cv2.multiply(np.ascontiguousarray(image[..., :3]), shares, scale=1 / 255)
    return cv2.merge([colours, image[..., 3]]).astype(np.uint8, copy=False)


def trim(image: Bytes) -> Bytes:
    """Crop transparent margins."""
    ys, xs = np.nonzero(image[..., 3] > 20)
    return np.ascontiguousarray(image[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])


@dataclass(frozen=True)
class Anchors:
    """Positions for attachments on a sprite, in its pixels.

    Attributes:
        box: bounding box of the opaque area: left, top, right, bottom.
        face: centre of the largest inscribed circle, preferably in the upper half.
        radius: radius of that circle.
        top: upper end of the head.
    """

    box: tuple[float, float, float, float]
    face: tuple[float, float]
    radius: float
    top: float


def find_anchors(alpha: Bytes) -> Anchors:
    """Find the anchors of a sprite from its outline, alpha (H, W): the largest inscribed circle is the face."""
    inside = (alpha > 128).astype(np.uint8)
    ys, xs = np.nonzero(inside)
    left, right, top, bottom = xs.min(), xs.max(), ys.min(), ys.max()
    distance = cv2.distanceTransform(np.pad(inside, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.ogrid[: alpha.shape[0], : alpha.shape[1]]
    # Of circles of similar size, prefer the one in the middle and slightly above.
    liked = distance - 0.03 * np.abs(y - (top + 0.42 * (bottom - top))) - 0.03 * np.abs(x - (left + right) / 2)
    cy, cx = np.unravel_index(int(liked.argmax()), distance.shape)
    radius = float(np.clip(distance[cy, cx], 30, 58))
    columns = range(max(0, int(cx - radius / 3)), min(alpha.shape[1], int(cx + radius / 3) + 1))
    tops = [int(np.argmax(inside[:, c])) for c in columns if inside[:, c].any()]
    head = max(float(np.median(tops)), cy - 1.5 * radius)  # excludes stalks and funnels
    return Anchors((float(left), float(top), float(right), float(bottom)), (float(cx), float(cy)), radius, head)
