"""The pens of ``data.shapes``: six shapes as signed distances, four textures, clutter, and the paint that mixes them.

Chapter 2 (a data set we can trust).

A distance is in pixels and negative inside the shape. It gives the mask (negative at the pixel's centre) and the soft
edge (half covered where it is zero) at once.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mrcnn_edu.structures import Size

CLASSES = ("circle", "square", "triangle", "star", "ring", "figure")  # labels 1..6
FIGURE = 6
JOINTS = ("head", "neck", "hip", "left_hand", "right_hand", "left_foot", "right_foot")
SKELETON = ((1, 2), (2, 3), (2, 4), (2, 5), (3, 6), (3, 7))  # limbs as pairs of joints, counted from 1
FLIP_PAIRS = ((3, 4), (5, 6))  # joints that change places in a mirror, counted from 0

# How hard the scenes are to learn from. Random colours on both sides of an edge teach nothing until a network has found
# out that only the edge matters; the gentler the values, the sooner that moment comes.
TILT = 0.25  # radians a shape leans at most to either side
CONTRAST = 0.4  # of the full range, by which at least one channel of a shape differs from what it is painted on
TEXTURE = 0.2  # how far a texture's second colour goes from the first towards another random one


# ---------------------------------------------------------------------------------------------------------------------
# Shapes as signed distances
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Stamp:
    """A shape ready to be painted: its distances in the window of the image it touches."""

    rows: slice
    columns: slice
    half: float  # px, half the shape's extent
    distance: np.ndarray  # [h, w] px, negative inside
    mask: np.ndarray  # [h, w] bool
    x: np.ndarray  # [1, w] px from the shape's centre
    y: np.ndarray  # [h, 1]
    outline: np.ndarray | None = None  # [n, (x, y)] corners, image pixels; None for what no one polygon describes
    joints: np.ndarray | None = None  # [7, (x, y)], image pixels


def stamp(label: int, x: float, y: float, half: float, rng: np.random.Generator, size: Size) -> Stamp:
    """A shape of the given class around (x, y), upright but for a random tilt."""
    reach = half + 2
    rows, columns = _window(y - reach, y + reach, size[0]), _window(x - reach, x + reach, size[1])
    dx, dy = _centres(columns)[None, :] - np.float32(x), _centres(rows)[:, None] - np.float32(y)
    angle = rng.uniform(-TILT, TILT)
    cos, sin = math.cos(angle), math.sin(angle)
    shape = _SHAPES[CLASSES[label - 1]]
    distance, outline, joints = shape(cos * dx + sin * dy, cos * dy - sin * dx, half, rng)
    turn = np.array([[cos, sin], [-sin, cos]])  # from the shape's own axes to the image's
    outline = None if outline is None else outline @ turn + (x, y)
    joints = None if joints is None else joints @ turn + (x, y)
    return Stamp(rows, columns, half, distance, distance < 0, dx, dy, outline, joints)


def _window(low: float, high: float, extent: int) -> slice:
    """The pixels of 0..extent - 1 between two coordinates."""
    start = min(max(0, math.floor(low)), extent)
    return slice(start, max(start, min(extent, math.ceil(high))))


def _centres(pixels: slice) -> np.ndarray:
    return np.arange(pixels.start, pixels.stop, dtype=np.float32) + np.float32(0.5)


Drawn = tuple[np.ndarray, "np.ndarray | None", "np.ndarray | None"]  # distance, outline, joints, in the shape's axes


def _regular(count: int, radius: float) -> np.ndarray:
    angles = 2 * math.pi * np.arange(count) / count - math.pi / 2  # the first corner on top
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _circle(x: np.ndarray, y: np.ndarray, half: float, rng: np.random.Generator) -> Drawn:
    # a polygon with as much area as the circle: its corners lie a little outside
    return np.hypot(x, y) - half, _regular(32, half * 1.0033), None


def _square(x: np.ndarray, y: np.ndarray, half: float, rng: np.random.Generator) -> Drawn:
    side = 0.8 * half
    return np.maximum(np.abs(x), np.abs(y)) - side, side * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]), None


def _triangle(x: np.ndarray, y: np.ndarray, half: float, rng: np.random.Generator) -> Drawn:
    slanted = (math.sqrt(3) / 2) * np.abs(x) - 0.5 * y  # the two sides that meet at (0, -half)
    return np.maximum(slanted, y) - half / 2, _regular(3, half), None


def _star(x: np.ndarray, y: np.ndarray, half: float, rng: np.random.Generator) -> Drawn:
    inner = half * rng.uniform(0.42, 0.55)
    tenth = math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + tenth) % (2 * tenth) - tenth)  # folded to one half of one of the five tips
    radius = np.hypot(x, y)
    notch_x, notch_y = inner * math.cos(tenth), inner * math.sin(tenth)
    edge = math.hypot(notch_y, half - notch_x)  # from the notch to the tip
    across, along = notch_y / edge, (half - notch_x) / edge
    distance = (radius * np.cos(angle) - half) * across + radius * np.sin(angle) * along
    outline = _regular(10, 1.0) * np.where(np.arange(10) % 2 == 0, half, inner)[:, None]
    return distance, outline, None


def _ring(x: np.ndarray, y: np.ndarray, half: float, rng: np.random.Generator) -> Drawn:
    thickness = max(half * rng.uniform(0.14, 0.22), 0.9)  # half of it
    return np.abs(np.hypot(x, y) - (half - thickness)) - thickness, None, None


def _figure(x: np.ndarray, y: np.ndarray, half: float, rng: np.random.Generator) -> Drawn:
    """A figure that faces us, so its left hand is at our right."""
    limb = max(rng.uniform(0.09, 0.13) * half, 0.9)
    head_radius = max(rng.uniform(0.2, 0.26) * half, 1.5)
    head = np.array([0.0, head_radius - half])
    neck = np.array([0.0, head[1] + 1.25 * head_radius])
    hip = np.array([0.0, neck[1] + rng.uniform(0.5, 0.62) * half])
    arm, leg = 0.58 * half, half - limb - hip[1]
    joints = [head, neck, hip]
    for side in (1, -1):
        lift = rng.uniform(-1.2, 0.9)  # radians above the horizontal
        joints.append(neck + arm * np.array([side * math.cos(lift), -math.sin(lift)]))
    for side in (1, -1):
        spread = rng.uniform(0.12, 0.65)  # radians from straight down
        joints.append(hip + leg * np.array([side * math.sin(spread), math.cos(spread)]))
    distance = np.hypot(x, y - float(head[1])) - head_radius
    for start, end in SKELETON:
        thickness = 1.5 * limb if (start, end) == (2, 3) else limb
        distance = np.minimum(distance, _capsule(x, y, joints[start - 1], joints[end - 1]) - thickness)
    return distance, None, np.stack(joints)


_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, float, np.random.Generator], Drawn]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "figure": _figure,
}


def _capsule(x: np.ndarray, y: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distances of points to the segment from start to end."""
    (sx, sy), (ex, ey) = (map(float, point) for point in (start, end))
    dx, dy = ex - sx, ey - sy
    along = np.clip(((x - sx) * dx + (y - sy) * dy) / max(dx * dx + dy * dy, 1e-6), 0, 1)
    return np.hypot(x - sx - along * dx, y - sy - along * dy)


# ---------------------------------------------------------------------------------------------------------------------
# Paint
# ---------------------------------------------------------------------------------------------------------------------


def paint(pixels: np.ndarray, stamp: Stamp, rng: np.random.Generator) -> None:
    """Blend a textured shape over ``pixels [3, H, W]`` float32, in place, soft over one pixel at its edge."""
    window = pixels[:, stamp.rows, stamp.columns]
    if window.size == 0:
        return
    first, second = _colours(rng, window.mean(axis=(1, 2)))
    opacity = np.clip(0.5 - stamp.distance, 0, 1)
    window += opacity * (_texture(rng, stamp.x, stamp.y, stamp.half, first, second) - window)


def background(rng: np.random.Generator, size: Size) -> np.ndarray:
    """An empty scene ``[3, H, W]`` float32 in [0, 1]."""
    height, width = size
    x = np.arange(width, dtype=np.float32)[None, :] - width / 2
    y = np.arange(height, dtype=np.float32)[:, None] - height / 2
    first, second = _colours(rng, None)
    paint = _texture(rng, x, y, min(height, width) / 2, first, second)
    return np.array(np.broadcast_to(paint, (3, height, width)), dtype=np.float32)


def draw_line(pixels: np.ndarray, rng: np.random.Generator) -> None:
    """Clutter without a label: a straight line somewhere on ``pixels [3, H, W]`` float32, in place."""
    height, width = pixels.shape[1:]
    start, end = rng.uniform(-0.1, 1.1, (2, 2)) * (width, height)
    thickness = rng.uniform(0.3, 1.6) * min(height, width) / 160
    low, high = np.minimum(start, end) - thickness - 1, np.maximum(start, end) + thickness + 1
    columns, rows = _window(low[0], high[0], width), _window(low[1], high[1], height)
    x, y = _centres(columns)[None, :], _centres(rows)[:, None]
    opacity = np.clip(0.5 + thickness - _capsule(x, y, start, end), 0, 1)
    window = pixels[:, rows, columns]
    window += opacity * (_colours(rng, None)[0][:, None, None] - window)


def _colours(rng: np.random.Generator, around: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Two related random colours ``[3]`` in [0, 1], the first of them unlike what is ``around``."""
    while True:
        colours = [
            np.array(
                colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.15, 0.9), rng.uniform(0.25, 1.0)), dtype=np.float32
            )
            for _ in range(2)
        ]
        if around is None or np.abs(colours[0] - around).max() > CONTRAST:
            return colours[0], colours[0] + TEXTURE * (colours[1] - colours[0])


def _texture(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, half: float, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """A solid, striped, cloudy or gradient mixture of two colours, ``[3, h, w]``, or ``[3, 1, 1]`` where it is even."""
    first, second = first[:, None, None], second[:, None, None]
    kind = rng.integers(0, 4)
    if kind == 0:
        return first
    angle = rng.uniform(0, 2 * math.pi)
    along = math.cos(angle) * x + math.sin(angle) * y  # px from the centre
    if kind == 1:
        period = max(4.0, half * rng.uniform(0.25, 0.8))
        share = np.clip(0.5 + period / 5 * np.sin(2 * math.pi / period * along + rng.uniform(0, 6)), 0, 1)
    elif kind == 2:
        coarse = rng.random((rng.integers(3, 7), rng.integers(3, 7)), dtype=np.float32)
        share = np.clip(np.asarray(Image.fromarray(coarse).resize(along.shape[::-1], Image.Resampling.BICUBIC)), 0, 1)
    else:
        share = np.clip(0.5 + 0.5 * along / half, 0, 1)
    return first + share * (second - first)
