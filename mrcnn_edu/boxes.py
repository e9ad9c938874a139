"""Boxes as plain tensors ``[N, (x1, y1, x2, y2)]`` and the free functions that measure, clip and code them.

Chapter 1 (boxes and IoU) and Chapter 5 (box coding). Paper: Section 3, with the coder of Fast R-CNN [12].

Coordinates are continuous image pixels: pixel i covers ``[i, i + 1)`` and a box is ``x2 - x1`` wide. ``plus_one=True``
is the older rule of Detectron, whose boxes hold the indices of their first and last pixel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mrcnn_edu.structures import Size

# exp() of a predicted log-scale is capped here: a proposal may grow at most from 16 to 1000 pixels in one step.
MAX_LOG_SCALE = math.log(1000 / 16)


def area(boxes: Tensor) -> Tensor:
    """Areas ``[N]`` in square pixels of boxes ``[N, (x1, y1, x2, y2)]``; a box turned inside out has area 0."""
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Shared areas ``[..., N, M]`` in square pixels between boxes a ``[..., N, 4]`` and b ``[..., M, 4]``."""
    top_left = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])  # [..., N, M, 2]
    bottom_right = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    return width * height


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union ``[..., N, M]`` in [0, 1] of boxes a ``[..., N, 4]`` and b ``[..., M, 4]``.

    Two empty boxes have none. What stands before the rows, such as images of a batch, is broadcast.
    """
    shared = intersection(a, b)
    union = area(a)[..., :, None] + area(b)[..., None, :] - shared
    return shared / torch.where(union > 0, union, torch.ones_like(union))


def ioa(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over the area of a, ``[N, M]``: the share of each box of a ``[N, 4]`` inside each of b ``[M, 4]``.

    An empty box has none of itself inside anything.
    """
    own = area(a)[:, None]
    return intersection(a, b) / torch.where(own > 0, own, torch.ones_like(own))


def clip(boxes: Tensor, size: Size) -> Tensor:
    """The boxes ``[..., 4]`` cut off at the border of an image of the given (height, width)."""
    height, width = size
    x = boxes[..., 0::2].clamp(0, width)
    y = boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def wide_enough(boxes: Tensor, least: float) -> Tensor:
    """Which boxes ``[N, 4]`` are at least ``least`` pixels wide and high, ``[N]`` bool; NaN is not."""
    return (boxes[:, 2] - boxes[:, 0] >= least) & (boxes[:, 3] - boxes[:, 1] >= least)


def resize(boxes: Tensor, size: Size, new_size: Size) -> Tensor:
    """Boxes ``[N, 4]`` of an image (height, width) in the pixels of that image resized to ``new_size``."""
    ratio_y, ratio_x = (torch.tensor(float(n), device=boxes.device) / o for n, o in zip(new_size, size))
    return boxes * torch.stack([ratio_x, ratio_y, ratio_x, ratio_y])


def flip(boxes: Tensor, width: int) -> Tensor:
    """Boxes ``[N, 4]`` of the mirrored image: x becomes width - x."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def centre_form(boxes: Tensor, plus_one: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, centre y, width and height, each ``[N]``, of boxes ``[N, (x1, y1, x2, y2)]``."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1 + int(plus_one), y2 - y1 + int(plus_one)
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height


def encode(
    boxes: Tensor, anchors: Tensor, weights: tuple[float, float, float, float] = (1, 1, 1, 1), plus_one: bool = False
) -> Tensor:
    """The deltas that turn anchors into boxes, the regression targets of both stages.

    boxes, anchors  [N, (x1, y1, x2, y2)], image pixels, widths and heights positive
    weights         multiply dx, dy, dw, dh so that each has roughly unit variance
    returns         deltas [N, (dx, dy, dw, dh)]: shift in anchor sizes, log of the growth

    Source: Fast R-CNN [12], after R-CNN's appendix C.
    """
    x, y, w, h = centre_form(boxes, plus_one)
    anchor_x, anchor_y, anchor_w, anchor_h = centre_form(anchors, plus_one)
    dx = weights[0] * (x - anchor_x) / anchor_w
    dy = weights[1] * (y - anchor_y) / anchor_h
    dw = weights[2] * torch.log(w / anchor_w)
    dh = weights[3] * torch.log(h / anchor_h)
    return torch.stack([dx, dy, dw, dh], dim=-1)


def decode(
    deltas: Tensor, anchors: Tensor, weights: tuple[float, float, float, float] = (1, 1, 1, 1), plus_one: bool = False
) -> Tensor:
    """The boxes that deltas describe, the inverse of ``encode`` up to a cap on the growth.

    deltas   [..., (dx, dy, dw, dh)], any float dtype
    anchors  [..., (x1, y1, x2, y2)] float32, broadcast against the deltas
    returns  boxes [..., 4] float32, image pixels, not clipped
    """
    anchor_x, anchor_y, anchor_w, anchor_h = centre_form(anchors, plus_one)
    deltas = deltas.float() if deltas.dtype in (torch.float16, torch.bfloat16) else deltas
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(deltas.unbind(-1), weights))
    x, y = anchor_x + dx * anchor_w, anchor_y + dy * anchor_h
    half_w = 0.5 * anchor_w * torch.exp(dw.clamp(max=MAX_LOG_SCALE))
    half_h = 0.5 * anchor_h * torch.exp(dh.clamp(max=MAX_LOG_SCALE))
    return torch.stack([x - half_w, y - half_h, x + half_w - int(plus_one), y + half_h - int(plus_one)], dim=-1)
