"""Pasting in whole-tensor PyTorch: predicted masks resized to their boxes, a few tensor operations per mask.

Chapter 11 (the mask head). Paper: Section 3.1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def paste(mask_probs: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float | None, rule: str) -> Tensor:
    """Masks in the image [N, h, w]: bool, or float32 probabilities without a threshold."""
    canvas = torch.zeros(
        len(boxes), *size, dtype=torch.float32 if threshold is None else torch.bool, device=boxes.device
    )
    for n, (y, x, crop) in enumerate(crops(mask_probs, boxes, size, threshold, rule)):
        canvas[n, y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    return canvas


def crops(
    mask_probs: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float | None, rule: str
) -> list[tuple[int, int, Tensor]]:
    """The part of each pasted mask that may be set: its first row, first column, and the pixels [h, w]."""
    masks = mask_probs.float()
    if rule == "integer":
        boxes = _grown(boxes, masks.shape[1])
        masks = F.pad(masks, (1, 1, 1, 1))
    windows = []
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist()):
        top, rows, row_part = _paste_axis(y1, y2, size[0], mask.shape[0], rule, mask.device)
        left, columns, column_part = _paste_axis(x1, x2, size[1], mask.shape[0], rule, mask.device)
        lines = torch.lerp(mask[rows[0]], mask[rows[1]], row_part[:, None])
        crop = torch.lerp(lines[:, columns[0]], lines[:, columns[1]], column_part)
        windows.append((top, left, crop if threshold is None else crop >= threshold))
    return windows


def _grown(boxes: Tensor, side: int) -> Tensor:
    """Boxes grown by the share that one cell of padding adds to the mask, cut to whole pixels (float64)."""
    scale = (side + 2) / side
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    return torch.cat([centre - half, centre + half], dim=1).double().trunc()


def _paste_axis(low: float, high: float, pixels: int, cells: int, rule: str, device: torch.device):
    """First pixel, the two mask cells [2, n] around each pixel of the box along one axis, and the second's weight."""
    if rule == "integer":  # the box holds the indices of its first and last pixel
        extent = max(high - low + 1, 1)
        begin, end = max(low, 0), min(high + 1, pixels)
        ratio, shift = cells / extent, low
    else:  # a pixel belongs to the box when its centre does
        begin, end = max(math.ceil(low - 0.5), 0), min(math.ceil(high - 0.5), pixels)
        ratio, shift = cells / max(high - low, 1e-30), low
    begin, end = int(min(begin, pixels)), int(max(end, 0))
    pixel = torch.arange(begin, max(begin, end), device=device, dtype=torch.float64)
    position = ((pixel + 0.5 - shift).float() * ratio - 0.5).clamp(0, cells - 1)
    first = position.floor()
    index = torch.stack([first, (first + 1).clamp(max=cells - 1)]).long()
    return begin, index, position - first
