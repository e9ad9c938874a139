"""The ops as loops a reader can check by eye: the definition that the faster forms are proved equal to.

Chapter 7 (NMS), Chapter 8 (RoI layers) and Chapter 11 (pasting). Paper: Section 3, RoIAlign and Table 2c.

Plain Python numbers per RoI, bin and sample; only the channels of a cell stay together as a tensor, so that gradients
flow to the features. Slow on purpose: use it on maps of a few hundred cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mrcnn_edu.ops.checks import MAX_SAMPLES

# ---------------------------------------------------------------------------------------------------------------------
# The three RoI layers
# ---------------------------------------------------------------------------------------------------------------------


def roi_features(
    layer: str,
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: tuple[int, int],
    scales: Sequence[float],
    samples_per_bin: int,
    aligned: bool,
    mode: str,
) -> Tensor:
    """RoIPool, RoIWarp or RoIAlign of rois [R, 5], each on the map its level names: [R, C, P, P]."""
    pooled = [
        pool_one(layer, features[level], roi, output_size, scales[level], samples_per_bin, aligned, mode)
        for roi, level in zip(rois.tolist(), levels.tolist())
    ]
    return torch.stack(pooled) if pooled else features[0].new_zeros(0, features[0].shape[1], *output_size)


def pool_one(
    layer: str,
    features: Tensor,
    roi: Sequence[float],
    output_size: tuple[int, int],
    scale: float,
    samples_per_bin: int,
    aligned: bool,
    mode: str,
) -> Tensor:
    """One RoI (image, x1, y1, x2, y2): [C, P, P].

    Every layer asks two questions per bin: where are its samples, and is their mean or their maximum taken?
    """
    image, x1, y1, x2, y2 = roi
    exact = torch.promote_types(features.dtype, torch.float32)  # half precision is summed in float32
    cells = features[int(image)].to(exact)  # [C, H, W]
    rows = sample_positions(layer, y1, y2, scale, output_size[0], cells.shape[1], samples_per_bin, aligned)
    columns = sample_positions(layer, x1, x2, scale, output_size[1], cells.shape[2], samples_per_bin, aligned)
    bins = []
    for ys in rows:
        for xs in columns:
            if layer == "roi_pool":
                samples = [cells[:, int(y), int(x)] for y in ys for x in xs]
            else:
                samples = [interpolate(cells, y, x) for y in ys for x in xs]
            if not samples:
                bins.append(torch.zeros_like(cells[:, 0, 0]))
            elif mode == "max":
                bins.append(torch.stack(samples).max(dim=0).values)  # the first of equal samples gets the gradient
            else:
                bins.append(torch.stack(samples).mean(dim=0))
    return torch.stack(bins, dim=1).view(-1, *output_size).to(features.dtype)


def sample_positions(
    layer: str, low: float, high: float, scale: float, bins: int, cells: int, samples_per_bin: int, aligned: bool
) -> list[list[float]]:
    """Where each bin samples the map along one axis, in cell indices: cell i has its centre at position i.

    low, high  the RoI's two edges, image pixels
    returns    one list of positions per bin

    Source: Section 3 and Table 2c; RoIPool rounds the RoI and its bins, RoIWarp the RoI only, RoIAlign nothing.
    """
    if layer == "roi_pool":
        first, length = quantise(low, high, scale)
        positions = []
        for b in range(bins):
            begin = first + b * length // bins  # rounded down
            end = first - (-(b + 1) * length // bins)  # rounded up
            positions.append([float(cell) for cell in range(max(begin, 0), min(end, cells))])
        return positions

    if layer == "roi_warp":
        first, length = quantise(low, high, scale)
        start = first - 0.5  # a cell reaches half a cell to each side of its centre
    else:
        shift = 0.5 if aligned else 0.0
        start = low * scale - shift
        length = high * scale - shift - start
        if not aligned:
            length = max(length, 1.0)

    size = length / bins
    count = samples_per_bin if samples_per_bin > 0 else min(max(math.ceil(size), 0), MAX_SAMPLES)
    return [[start + b * size + (i + 0.5) * size / count for i in range(count)] for b in range(bins)]


def quantise(low: float, high: float, scale: float) -> tuple[int, int]:
    """The RoI in whole cells, as RoIPool [12] rounds it: its first cell, and how many (at least one)."""
    first, last = (round_half_away(min(max(edge * scale, -(2**30)), 2**30)) for edge in (low, high))
    return first, max(last - first + 1, 1)


def round_half_away(value: float) -> int:
    """To the nearest integer, halves away from zero as in C (Python's ``round`` sends them to the even neighbour)."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def interpolate(cells: Tensor, y: float, x: float) -> Tensor:
    """The map [C, H, W] at position (y, x) between its cells: [C].

    Within one cell around the map the border continues; further out there is nothing, and the value is 0.
    """
    height, width = cells.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros_like(cells[:, 0, 0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    above = cells[:, top, left] * (1 - across) + cells[:, top, right] * across
    below = cells[:, bottom, left] * (1 - across) + cells[:, bottom, right] * across
    return above * (1 - down) + below * down


# ---------------------------------------------------------------------------------------------------------------------
# Non-maximum suppression
# ---------------------------------------------------------------------------------------------------------------------


def nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, threshold: float, max_keep: int | None) -> Tensor:
    """Walk from the best box to the worst; keep a box unless a kept one of its group overlaps it too much."""
    best_first = torch.sort(scores, descending=True, stable=True).indices.tolist()
    kept: list[int] = []
    for candidate in best_first:
        if max_keep is not None and len(kept) == max_keep:
            break
        rivals = [k for k in kept if groups is None or groups[k] == groups[candidate]]
        if not any(iou(boxes[k], boxes[candidate]) > threshold for k in rivals):
            kept.append(candidate)
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)


def iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boxes [4], in float32 as all implementations have it; 0 without any area."""
    width = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])).clamp(min=0)
    height = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])).clamp(min=0)
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    if not union.isfinite() and a.dtype == torch.float32:  # areas beyond float32's range
        return iou(a.double(), b.double())
    return float(shared / union) if union > 0 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Pasting
# ---------------------------------------------------------------------------------------------------------------------


def paste(mask_probs: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float | None, rule: str) -> Tensor:
    """Ask for every pixel of the image whether it belongs to the box and, if so, what the mask says there."""
    canvas = torch.zeros(len(boxes), *size)
    for n, (mask, box) in enumerate(zip(mask_probs.float().cpu(), boxes.cpu())):
        if rule == "integer":
            mask, box = F.pad(mask, (1, 1, 1, 1)), grow(box, mask.shape[0])
        x1, y1, x2, y2 = box.tolist()
        side = mask.shape[0]
        for y in range(size[0]):
            for x in range(size[1]):
                row = mask_position(y, y1, y2, side, rule)
                column = mask_position(x, x1, x2, side, rule)
                if row is not None and column is not None:
                    canvas[n, y, x] = interpolate(mask[None], row, column)
    canvas = canvas.to(mask_probs.device)
    return canvas if threshold is None else canvas >= threshold


def crops(
    mask_probs: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float | None, rule: str
) -> list[tuple[int, int, Tensor]]:
    """The part of each pasted mask that may be set: its first row, first column, and the pixels [h, w]."""
    windows = []
    for canvas, mask, box in zip(paste(mask_probs, boxes, size, threshold, rule), mask_probs, boxes):
        x1, y1, x2, y2 = (grow(box, mask.shape[0]) if rule == "integer" else box).tolist()
        rows = [y for y in range(size[0]) if mask_position(y, y1, y2, 1, rule) is not None]
        columns = [x for x in range(size[1]) if mask_position(x, x1, x2, 1, rule) is not None]
        windows.append((min(rows, default=0), min(columns, default=0), canvas[rows][:, columns]))
    return windows


def mask_position(pixel: int, low: float, high: float, side: int, rule: str) -> float | None:
    """Where a pixel of the image lies in the mask along one axis, in cell indices; None outside the box."""
    if rule == "integer":  # low and high are the indices of the first and the last pixel
        if not low <= pixel <= high:
            return None
        extent = max(high - low + 1, 1)
    else:
        if not low <= pixel + 0.5 < high:  # the pixel's centre
            return None
        extent = high - low
    return min(max((pixel + 0.5 - low) * side / extent - 0.5, 0), side - 1)


def grow(box: Tensor, side: int) -> Tensor:
    """The box made larger by the ring of zeros around the mask, then cut to whole pixels (torchvision's rule)."""
    half = (box[2:] - box[:2]) * 0.5 * ((side + 2) / side)
    centre = (box[2:] + box[:2]) * 0.5
    return torch.cat([centre - half, centre + half]).trunc()
