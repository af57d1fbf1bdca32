"""How a scene is painted: each style turns a rendered frame into one that looks as if made by hand.

Frames are RGB floats (S, S, 3) in [0, 1].
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from train.mini.colours import Floats, floats

PATCH = 8
"""Pixels of a token's patch: what repeats every patch and moves by patches keeps its tokens."""


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[Floats, Floats]:
    """The y and the x of every pixel, (S, S) each."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return y, x


def _grey(frame: Floats) -> Floats:
    return floats(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))


@lru_cache(maxsize=8)
def _texture(size: int, sigma: float) -> Floats:
    """Smooth noise of unit deviation, always the same: for grounds, whose tokens do not move."""
    noise = np.random.default_rng(0).normal(size=(2 * size, 2 * size)).astype(np.float32)
    noise = floats(cv2.GaussianBlur(noise, (0, 0), sigma))
    return (noise / noise.std()).astype(np.float32)[:size, :size]


@lru_cache(maxsize=8)
def _weave(size: int, *waves: tuple[int, int, float]) -> Floats:
    """Sum of waves of unit amplitude, each `right` and `down` times a patch and with a phase, in radians.

    It repeats every patch, so that what moves by patches keeps its tokens.
    """
    y, x = _grid(size)
    turn = 2 * np.pi / PATCH
    return floats(sum(np.sin(turn * (right * x + down * y) + phase) for right, down, phase in waves))


def sketch(frame: Floats, paper: Floats) -> Floats:
    """Pencil: soft lines, hatched shade, on paper of a colour (3,)."""
    grey = cv2.GaussianBlur(_grey(frame), (0, 0), 0.8)
    around = cv2.GaussianBlur(1 - grey, (0, 0), 2.9)
    lines = np.clip(grey / np.maximum(1e-3, 1 - around), 0, 1)
    lines = np.clip((lines - 0.62) / 0.36, 0, 1) ** 1.8
    hatch = 1.2 * _weave(len(frame), (1, 1, 0.0))
    shade = np.clip(1.02 - grey, 0, 1) * 0.62
    tone = np.clip(lines * (1 - shade * (0.72 + 0.3 * hatch)), 0.16, 1)[..., None]
    return np.clip(paper * tone + (1 - tone) * 0.05, 0, 1).astype(np.float32)


def line_art(frame: Floats, alpha: Floats, paper: Floats) -> Floats:
    """Ink: thick black outlines of a flat drawing, nothing filled; alpha (S, S) is where things are."""
    layers = np.dstack([(frame * 255).astype(np.uint8), (alpha * 255).astype(np.uint8)])
    edges = cv2.morphologyEx(layers, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)).max(-1)
    ink = np.clip((edges.astype(np.float32) - 36) / 60, 0, 1)
    ink = np.maximum(ink, np.clip((0.3 - _grey(frame)) / 0.15, 0, 1))  # what is black stays black
    ink = np.clip(cv2.GaussianBlur(ink, (0, 0), 0.7) * 1.25, 0, 1)[..., None]
    return (paper * (1 - ink) + 0.04 * ink).astype(np.float32)


def _kuwahara(frame: Floats, reach: int) -> Floats:
    """Each pixel the mean of the calmest of four windows about it (Kuwahara et al. 1976): flat dabs, sharp edges."""
    size, side = len(frame), reach + 1
    grey = _grey(frame)
    stacked = cv2.copyMakeBorder(
        np.dstack([frame, grey, grey * grey]), reach, reach, reach, reach, cv2.BORDER_REPLICATE
    )
    means = floats(cv2.blur(stacked, (side, side)))
    means[..., 4] -= means[..., 3] ** 2  # the variance
    half = reach // 2 + 1
    out, best = np.empty_like(frame), np.full(grey.shape, np.inf, np.float32)
    for top, left in ((-half, -half), (-half, half), (half, -half), (half, half)):
        window = means[reach + top : reach + top + size, reach + left : reach + left + size]
        calmer = window[..., 4] < best
        np.copyto(out, window[..., :3], where=calmer[..., None])
        np.minimum(best, window[..., 4], out=best)
    return out


def oil_painting(frame: Floats) -> Floats:
    """Dabs of thick paint in coarse strokes, strong colours."""
    size = len(frame)
    strokes = 0.6 * _weave(size, (1, 2, 0.0), (2, 1, 2.5))
    y, x = _grid(size)
    moved = cv2.remap(frame, x + strokes, y + strokes, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    dabs = _kuwahara(floats(moved), 4)
    grey = _grey(dabs)[..., None]
    rich = grey + (dabs - grey) * 1.25
    return np.clip((rich - 0.5) * 1.05 + 0.47 + 0.04 * strokes[..., None], 0, 1).astype(np.float32)


def watercolor(frame: Floats, alpha: Floats) -> Floats:
    """Thin washes that pool at their edges and let the paper shine through, on a frayed patch of ground."""
    size = len(frame)
    blotches = _texture(size, 9.0)
    grain = _weave(size, (1, 2, 0.0), (3, -1, 1.0))
    y, x = _grid(size)
    bend_x, bend_y = 0.7 * _weave(size, (0, 1, 0.0)), 0.7 * _weave(size, (1, 0, 1.0))
    soft = cv2.remap(frame, x + bend_x, y + bend_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    soft = cv2.blur(soft, (3, 3))
    shape = cv2.remap(alpha, x + bend_x, y + bend_y, cv2.INTER_LINEAR)
    pooled = cv2.morphologyEx(shape, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    # More paint: darker. On the ground there is less of it, in blotches.
    paint = 0.72 + (0.16 * blotches - 0.22) * (1 - shape) + 0.35 * cv2.GaussianBlur(pooled, (0, 0), 1.0)
    rim = np.minimum(np.minimum(x, size - 1 - x), np.minimum(y, size - 1 - y)) - 4.5 - 3.0 * blotches
    paint = np.clip(paint * np.maximum(np.clip(rim / 3, 0, 1), shape), 0, 1.25)[..., None]
    paper = np.array((0.995, 0.985, 0.96), np.float32)
    washed = paper * (1 - paint) + soft * paint
    return np.clip(washed + 0.01 * grain[..., None], 0, 1).astype(np.float32)


def pixel_art(frame: Floats, alpha: Floats) -> Floats:
    """Large squares of few colours, things outlined in black."""
    size = len(frame)
    cells = size // 4
    small = floats(cv2.resize(frame, (cells, cells), interpolation=cv2.INTER_AREA))
    shape = (cv2.resize(alpha, (cells, cells), interpolation=cv2.INTER_AREA) > 0.5).astype(np.uint8)
    grey = _grey(small)[..., None]
    small = floats(np.round(np.clip(grey + (small - grey) * 1.15, 0, 1) * 5) / 5)
    small[(cv2.dilate(shape, np.ones((3, 3), np.uint8)) > shape)] = 0.06
    return floats(cv2.resize(floats(small), (size, size), interpolation=cv2.INTER_NEAREST))
