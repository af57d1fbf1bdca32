"""Attachments that emoji lack: hair, faces, glasses, moustaches and the like, drawn large and thick.

Every function draws one variant on a square of CANVAS px, RGBA. The final size sets the line width: a token of
the tokenizer is 8 px wide, and a thing's face about 50, so a line must be 25 of CANVAS px wide to be visible.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import cv2
import numpy as np

from train.mini.colours import Bytes

CANVAS = 320
Ink = tuple[int, int, int, int]

HAIR_COLOURS: dict[str, tuple[int, int, int]] = {
    "brown": (110, 66, 36),
    "black": (42, 36, 38),
    "blond": (240, 200, 95),
    "red": (205, 75, 25),
    "white": (228, 226, 222),
    "blue": (50, 105, 225),
    "green": (65, 165, 70),
    "pink": (245, 120, 180),
}
HAIR_CUTS = ("curly", "long", "spiky")


def _canvas() -> Bytes:
    return np.zeros((CANVAS, CANVAS, 4), np.uint8)


def _shade(rgb: tuple[int, int, int], factor: float) -> Ink:
    r, g, b = (int(np.clip(v * factor, 0, 255)) for v in rgb)
    return r, g, b, 255


def _polygon(canvas: Bytes, points: list[tuple[float, float]], ink: Ink) -> None:
    cv2.fillPoly(canvas, [np.array(points).round().astype(np.int32)], ink, cv2.LINE_AA)


def _curve(canvas: Bytes, points: list[tuple[float, float]], ink: Ink, width: int) -> None:
    cv2.polylines(canvas, [np.array(points).round().astype(np.int32)], False, ink, width, cv2.LINE_AA)


def hair(rng: random.Random, cut: str, colour: str) -> Bytes:
    """A wig whose forehead is at the canvas's middle: the face shows below it."""
    canvas, rgb = _canvas(), HAIR_COLOURS[colour]
    {"curly": _curly, "long": _long, "spiky": _spiky}[cut](canvas, rgb, rng)
    return canvas


def _curly(canvas: Bytes, rgb: tuple[int, int, int], rng: random.Random) -> None:
    cv2.ellipse(canvas, (160, 168), (118, 100), 0, 180, 360, _shade(rgb, 0.85), -1, cv2.LINE_AA)
    for ring, count in ((112, 15), (80, 11), (46, 7)):
        for turn in np.linspace(np.pi * 0.98, np.pi * 2.02, count):
            x = 160 + 1.08 * ring * np.cos(turn) + rng.uniform(-5, 5)
            y = 166 + 0.98 * ring * np.sin(turn) + rng.uniform(-5, 5)
            size = rng.uniform(23, 29)
            cv2.circle(canvas, (round(x), round(y)), round(size), _shade(rgb, rng.uniform(0.9, 1.15)), -1, cv2.LINE_AA)
            cv2.ellipse(
                canvas, (round(x), round(y)), (round(size * 0.6),) * 2, 0, 20, 230, _shade(rgb, 0.62), 6, cv2.LINE_AA
            )


def _long(canvas: Bytes, rgb: tuple[int, int, int], rng: random.Random) -> None:
    for side in (-1, 1):
        for i in range(13):
            out = i / 12
            wave = rng.uniform(-5, 5)
            points = [
                (160 - side * 6, 52 + 8 * out),
                (160 + side * (40 + 45 * out), 64 + 12 * (1 - out)),
                (160 + side * (84 + 32 * out), 130 + wave),
                (160 + side * (82 + 42 * out), 215 + wave),
                (160 + side * (74 + 56 * out) + wave, 290 + 8 * out),
            ]
            _curve(canvas, points, _shade(rgb, (0.68, 0.95, 1.15)[i % 3] * rng.uniform(0.96, 1.04)), 17)
    fringe = [
        (160.0, 46.0),
        (246.0, 92.0),
        (252.0, 150.0),
        (214.0, 112.0),
        (160.0, 96.0),
        (106.0, 112.0),
        (68.0, 150.0),
        (74.0, 92.0),
    ]
    _polygon(canvas, fringe, _shade(rgb, 1.0))
    for x in (110, 135, 185, 210):
        _curve(canvas, [(160, 52), ((160 + x) / 2, 66), (x, 104)], _shade(rgb, 0.68), 6)


def _spiky(canvas: Bytes, rgb: tuple[int, int, int], rng: random.Random) -> None:
    for row, (inner, outer, count) in enumerate(((86, 158, 9), (60, 122, 8))):
        for turn in np.linspace(np.pi * 1.0, np.pi * 2.0, count):
            reach = outer * rng.uniform(0.92, 1.05)
            across = np.array([-np.sin(turn), np.cos(turn)]) * (26 - 4 * row)
            base = np.array([160 + 1.1 * inner * np.cos(turn), 176 + inner * np.sin(turn)])
            tip = np.array([160 + reach * np.cos(turn + rng.uniform(-0.08, 0.08)), 176 + reach * np.sin(turn)])
            _polygon(canvas, [tuple(base - across), tuple(tip), tuple(base + across)], _shade(rgb, (0.78, 1.1)[row]))
            _curve(canvas, [tuple(base), tuple(tip)], _shade(rgb, 0.6), 5)
    _polygon(
        canvas,
        [(70, 178), (86, 104), (160, 84), (234, 104), (250, 178), (206, 150), (160, 142), (114, 150)],
        _shade(rgb, 0.95),
    )


def face(rng: random.Random) -> Bytes:
    """Two large eyes and a smile, open or closed."""
    canvas, look = _canvas(), rng.choice((-8, 0, 8))
    for side in (-1, 1):
        eye = (160 + side * 62, 108)
        cv2.ellipse(canvas, eye, (42, 52), 0, 0, 360, (255, 255, 255, 255), -1, cv2.LINE_AA)
        cv2.ellipse(canvas, eye, (42, 52), 0, 0, 360, (35, 28, 28, 255), 10, cv2.LINE_AA)
        cv2.circle(canvas, (eye[0] + look, eye[1] + 8), 25, (25, 22, 22, 255), -1, cv2.LINE_AA)
        cv2.circle(canvas, (eye[0] + look + 9, eye[1] - 3), 8, (255, 255, 255, 255), -1, cv2.LINE_AA)
    if rng.random() < 0.6:
        cv2.ellipse(canvas, (160, 190), (84, 74), 0, 0, 180, (110, 18, 28, 255), -1, cv2.LINE_AA)
        cv2.ellipse(canvas, (160, 193), (68, 24), 0, 0, 180, (255, 255, 255, 255), -1, cv2.LINE_AA)
    else:
        cv2.ellipse(canvas, (160, 180), (84, 70), 0, 8, 172, (45, 24, 24, 255), 24, cv2.LINE_AA)
    return canvas


def glasses(rng: random.Random) -> Bytes:
    """Glasses with thick round or square frames."""
    canvas, ink = _canvas(), (*rng.choice(((25, 25, 28), (120, 60, 25))), 255)
    is_round = rng.random() < 0.6
    cv2.line(canvas, (130, 150), (190, 150), ink, 24, cv2.LINE_AA)
    for side in (-1, 1):
        centre = (160 + side * 84, 160)
        cv2.line(canvas, (centre[0] + side * 50, 140), (160 + side * 156, 128), ink, 20, cv2.LINE_AA)
        for colour, width in (((215, 238, 252, 235), -1), (ink, 24)):
            if is_round:
                cv2.circle(canvas, centre, 58, colour, width, cv2.LINE_AA)
            else:
                cv2.rectangle(canvas, (centre[0] - 60, 112), (centre[0] + 60, 206), colour, width, cv2.LINE_AA)
        cv2.line(canvas, (centre[0] - 22, 178), (centre[0] + 18, 136), (255, 255, 255, 255), 10, cv2.LINE_AA)
    return canvas


def sunglasses(rng: random.Random) -> Bytes:
    """Sunglasses with black lenses that meet in the middle."""
    canvas = _canvas()
    cv2.rectangle(canvas, (6, 112), (314, 138), (18, 18, 20, 255), -1, cv2.LINE_AA)
    for side in (-1, 1):
        x = 160 + side * 80
        lens = [(x - 66, 116), (x + 66, 116), (x + 58, 190), (x + 24, 222), (x - 24, 222), (x - 58, 190)]
        _polygon(canvas, [(float(a), float(b)) for a, b in lens], (18, 18, 20, 255))
        _curve(canvas, [(x - 34, 140), (x - 14, 184)], (120, 130, 150, 255), 16)
    return canvas


def moustache(rng: random.Random) -> Bytes:
    """A handlebar moustache."""
    canvas, rgb = _canvas(), rng.choice(((38, 28, 26), (100, 58, 30)))
    t = np.linspace(0, 1, 24)
    middle = 158 - 30 * np.sin(t * np.pi) + 62 * t - 120 * np.maximum(0, t - 0.55) ** 1.5
    half = 46 * (1 - t) ** 0.6 + 5
    for side in (-1, 1):
        upper = list(zip(160 + side * 142 * t, middle - half * 0.7, strict=True))
        lower = list(zip(160 + side * 142 * t, middle + half, strict=True))
        _polygon(canvas, upper + lower[::-1], _shade(rgb, 1.0))
    return canvas


def beard(rng: random.Random) -> Bytes:
    """A full beard, open at the mouth."""
    canvas, rgb = _canvas(), rng.choice(((110, 66, 36), (60, 46, 42), (225, 222, 218)))
    cv2.ellipse(canvas, (160, 110), (140, 175), 0, 0, 180, _shade(rgb, 1.0), -1, cv2.LINE_AA)
    cv2.ellipse(canvas, (160, 110), (104, 62), 0, 0, 180, (0, 0, 0, 0), -1)
    cv2.ellipse(canvas, (160, 192), (56, 26), 0, 0, 360, (150, 40, 50, 255), -1, cv2.LINE_AA)
    for x in (70, 110, 160, 210, 250):
        _curve(canvas, [(x, 225), (160 + (x - 160) * 0.75, 268)], _shade(rgb, 0.72), 9)
    return canvas


def cigarette(rng: random.Random) -> Bytes:
    """A thick cigarette with filter, embers and smoke, pointing down to the right of the mouth."""
    canvas = _canvas()
    a, b, c, d = (26, 190), (100, 206), (236, 236), (272, 244)
    for start, end, ink in ((a, b, (225, 140, 55)), (b, c, (250, 250, 250)), (c, d, (245, 70, 20))):
        cv2.line(canvas, start, end, (60, 50, 50, 255), 60, cv2.LINE_AA)
        cv2.line(canvas, start, end, (*ink, 255), 48, cv2.LINE_AA)
    y = np.linspace(0, 1, 30)
    x = 276 + 24 * np.sin(y * 7 + rng.uniform(-1, 1)) * (y + 0.3)
    _curve(canvas, list(zip(x, 205 - 185 * y, strict=True)), (165, 165, 178, 255), 30)
    _curve(canvas, list(zip(x, 205 - 185 * y, strict=True)), (205, 205, 214, 255), 18)
    return canvas


def wings(rng: random.Random) -> Bytes:
    """Angel wings of five feathers on each side."""
    canvas = _canvas()
    for side in (-1, 1):
        for i in range(5):
            root, tip = np.array([160 + side * 20, 150 + 8 * i]), np.array([160 + side * (152 - 15 * i), 56 + 44 * i])
            middle, length = (root + tip) / 2, int(np.linalg.norm(tip - root) / 2)
            angle = float(np.degrees(np.arctan2(tip[1] - root[1], tip[0] - root[0])))
            centre = (int(middle[0]), int(middle[1]))
            cv2.ellipse(canvas, centre, (length, 25), angle, 0, 360, (248, 250, 255, 255), -1, cv2.LINE_AA)
            cv2.ellipse(canvas, centre, (length, 25), angle, 0, 360, (105, 130, 180, 255), 7, cv2.LINE_AA)
    return canvas


def party_hat(rng: random.Random) -> Bytes:
    """A striped cone with a pompom."""
    canvas, rgb = _canvas(), rng.choice(((230, 60, 120), (60, 130, 230), (120, 70, 200)))
    mask = np.zeros((CANVAS, CANVAS), np.uint8)
    cv2.fillPoly(mask, [np.array([[160, 40], [62, 296], [258, 296]], np.int32)], 255, cv2.LINE_AA)
    canvas[..., :3] = rgb
    for y in range(60, 380, 76):
        cv2.line(canvas, (0, y + 50), (CANVAS, y - 30), (255, 220, 60, 255), 26, cv2.LINE_AA)
    canvas[..., 3] = mask
    cv2.circle(canvas, (160, 40), 34, (255, 240, 200, 255), -1, cv2.LINE_AA)
    return canvas


def cowboy_hat(rng: random.Random) -> Bytes:
    """A brown cowboy hat with a wide brim."""
    canvas, rgb = _canvas(), (150, 95, 50)
    _polygon(canvas, [(86, 200), (100, 84), (130, 62), (160, 84), (190, 62), (220, 84), (234, 200)], _shade(rgb, 1.1))
    cv2.line(canvas, (88, 184), (232, 184), (70, 35, 20, 255), 30, cv2.LINE_AA)
    brim = [
        (8.0, 162.0),
        (60.0, 204.0),
        (160.0, 214.0),
        (260.0, 204.0),
        (312.0, 162.0),
        (270.0, 244.0),
        (160.0, 262.0),
        (50.0, 244.0),
    ]
    _polygon(canvas, brim, _shade(rgb, 0.85))
    return canvas


def santa_hat(rng: random.Random) -> Bytes:
    """A red cap that hangs over, with white fur."""
    canvas = _canvas()
    _polygon(
        canvas, [(62, 230), (92, 110), (170, 56), (250, 70), (292, 150), (230, 132), (258, 230)], (215, 35, 45, 255)
    )
    _curve(canvas, [(120, 190), (170, 120), (232, 104)], (165, 20, 30, 255), 10)
    cv2.line(canvas, (62, 240), (258, 240), (250, 250, 250, 255), 56, cv2.LINE_AA)
    cv2.circle(canvas, (288, 166), 32, (250, 250, 250, 255), -1, cv2.LINE_AA)
    return canvas


def horns(rng: random.Random) -> Bytes:
    """Red devil horns."""
    canvas = _canvas()
    for side in (-1, 1):
        outer = [(160 + side * x, y) for x, y in ((48, 240), (110, 236), (148, 170), (142, 60), (112, 140), (70, 190))]
        _polygon(canvas, [(float(x), float(y)) for x, y in outer], (205, 30, 35, 255))
        _curve(canvas, [(160 + side * 96, 216), (160 + side * 128, 150)], (250, 110, 100, 255), 12)
    return canvas


def halo(rng: random.Random) -> Bytes:
    """A golden ring, seen from a little above."""
    canvas = _canvas()
    cv2.ellipse(canvas, (160, 160), (128, 48), 0, 0, 360, (200, 140, 20, 255), 44, cv2.LINE_AA)
    cv2.ellipse(canvas, (160, 158), (128, 48), 0, 0, 360, (255, 220, 70, 255), 28, cv2.LINE_AA)
    return canvas


Draw = Callable[[random.Random], Bytes]
