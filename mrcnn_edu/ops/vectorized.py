"""The ops as whole-tensor PyTorch: differentiable, on any device, without a compiler.

Chapter 8 (RoI layers), Chapter 7 (NMS) and Chapter 11 (pasting). Paper: Section 3, RoIAlign and Table 2c.

A RoI layer is separable: bins, samples and bilinear weights are worked out once per axis. A bin's value is then a
weighted sum of a few cells, which is what ``embedding_bag`` computes: the map, channels last, is a table of cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mrcnn_edu.ops.checks import MAX_SAMPLES
from mrcnn_edu.ops.pasting import crops, paste

__all__ = ["crops", "nms", "paste", "roi_features"]

TAPS_AT_ONCE = 1 << 23  # numbers held at one time; more RoIs are taken in several turns


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
    if len(features) == 1:
        return _one_level(layer, features[0], rois, output_size, scales[0], samples_per_bin, aligned, mode)
    parts, rows = [], []
    for level, (map_, scale) in enumerate(zip(features, scales)):
        rows.append((levels == level).nonzero()[:, 0])
        parts.append(_one_level(layer, map_, rois[rows[-1]], output_size, scale, samples_per_bin, aligned, mode))
    return torch.cat(parts)[torch.cat(rows).argsort()]


def _one_level(layer, features, rois, output_size, scale, samples_per_bin, aligned, mode) -> Tensor:
    channels, height, width = features.shape[1:]
    exact = torch.promote_types(features.dtype, torch.float32)  # half precision is summed in float32
    if len(rois) == 0 or channels == 0:
        return features.new_zeros(len(rois), channels, *output_size) + 0 * features.sum()
    image = rois[:, 0].detach().long()
    x1, y1, x2, y2 = rois[:, 1:].detach().to(exact).unbind(1)
    ys = axis_samples(layer, y1, y2, scale, output_size[0], height, samples_per_bin, aligned)
    xs = axis_samples(layer, x1, x2, scale, output_size[1], width, samples_per_bin, aligned)
    cells = features.to(exact).permute(0, 2, 3, 1)  # [B, H, W, C]; free when the map is channels_last
    if mode == "max":
        pooled = _max(layer, cells, image, ys, xs, height, width)
    elif channels <= 4 and height * width < 4 * _most_taps(ys, xs):
        pooled = _mean_of_few_channels(features.to(exact), image, ys, xs)
    else:
        pooled = _mean(cells, image, ys, xs, height, width)
    return pooled.to(features.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# One axis: where the samples are, and which two cells each one lies between
# ---------------------------------------------------------------------------------------------------------------------


def axis_samples(
    layer: str,
    low: Tensor,
    high: Tensor,
    scale: float,
    bins: int,
    cells: int,
    samples_per_bin: int,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    """The sampling positions of every bin along one axis.

    low, high  [R] the RoI's two edges, image pixels
    returns    positions [R, bins, S] in cell indices (cell i has its centre at i) and counts [R, bins]: the first
               ``counts`` of the S positions are samples, the rest repeats the last one

    Source: Section 3 and Table 2c; RoIPool and RoIWarp quantise the RoI, RoIPool its bins as well, RoIAlign nothing.
    """
    bin_index = torch.arange(bins, device=low.device)
    if layer == "roi_pool":
        first, length = quantise(low, high, scale)
        begin = (first[:, None] + torch.div(bin_index * length[:, None], bins, rounding_mode="floor")).clamp(0, cells)
        end = (first[:, None] - torch.div(-(bin_index + 1) * length[:, None], bins, rounding_mode="floor")).clamp(
            0, cells
        )
        counts = (end - begin).clamp(min=0)
        return (begin[..., None] + _sample_index(counts)).to(low.dtype), counts
    if layer == "roi_warp":
        first, length = (edge.to(low.dtype) for edge in quantise(low, high, scale))
        start = first - 0.5
    else:
        start = low * scale - (0.5 if aligned else 0.0)
        length = high * scale - (0.5 if aligned else 0.0) - start
        length = length if aligned else length.clamp(min=1)
    size = length / bins
    if samples_per_bin > 0:
        counts = torch.full_like(start, samples_per_bin, dtype=torch.int64)
    else:
        counts = torch.ceil(size).clamp(0, MAX_SAMPLES).long()
    index = _sample_index(counts[:, None])
    start, size, grid = (value[:, None, None] for value in (start, size, counts.clamp(min=1)))
    positions = start + bin_index[:, None] * size + (index + 0.5) * size / grid
    return positions, counts[:, None].expand(-1, bins)


def _sample_index(counts: Tensor) -> Tensor:
    """0, 1, 2, ... [..., S] for the longest count; shorter ones repeat their last sample."""
    index = torch.arange(max(1, int(counts.max())), device=counts.device)
    return torch.minimum(index, (counts[..., None] - 1).clamp(min=0))


def quantise(low: Tensor, high: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """First cell and number of cells, both [R] int64, of RoI edges rounded to the map as RoIPool [12] does."""
    first, last = (round_half_away(edge * scale).clamp(-(2**30), 2**30).long() for edge in (low, high))
    return first, (last - first + 1).clamp(min=1)


def round_half_away(value: Tensor) -> Tensor:
    """C's ``round``: halves go away from zero (``torch.round`` sends them to the even neighbour)."""
    whole = value.trunc()
    return whole + torch.where((value - whole).abs() >= 0.5, value.sign(), torch.zeros_like(value))


def two_taps(positions: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Linear interpolation along one axis: the two cells [..., 2] int64 around each position, and their weights.

    Beyond the outermost centres the border cell counts in full; more than one cell off the map the value is 0.
    """
    on_map = (positions >= -1) & (positions <= cells)
    positions = positions.clamp(0, cells - 1)
    low = positions.floor()
    part = positions - low
    index = torch.stack([low, (low + 1).clamp(max=cells - 1)], dim=-1).long()
    return index, torch.stack([1 - part, part], dim=-1) * on_map[..., None]


def mean_taps(positions: Tensor, counts: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """The mean over a bin's samples as a weighted sum of cells: indices and weights, both [R, bins, T]."""
    index, weight = two_taps(positions, cells)
    exists = torch.arange(positions.shape[2], device=positions.device) < counts[..., None]
    weight = torch.where(exists[..., None], weight, 0) / counts.clamp(min=1)[..., None, None]
    index, weight = index.flatten(2), weight.flatten(2)
    if positions.shape[2] <= 2:
        return index, weight
    # Neighbouring samples share cells: where that makes the sum shorter, add up the weights of equal cells.
    used = weight > 0
    least = torch.where(used, index, cells).amin(dim=2, keepdim=True)
    most = torch.where(used, index, -1).amax(dim=2, keepdim=True)
    span = max(1, int((most - least).max()) + 1)
    if span >= index.shape[2]:
        return index, weight
    least = least.clamp(max=cells - 1)
    merged = weight.new_zeros(*index.shape[:2], span)
    merged.scatter_add_(2, torch.where(used, index - least, 0), torch.where(used, weight, 0))
    return (least + torch.arange(span, device=index.device)).clamp(max=cells - 1), merged


# ---------------------------------------------------------------------------------------------------------------------
# Two axes: mean and max over the samples of a bin
# ---------------------------------------------------------------------------------------------------------------------

Samples = tuple[Tensor, Tensor]  # what axis_samples returns


def _most_taps(ys: Samples, xs: Samples) -> int:
    """About how many cells the bins of the largest RoI read."""
    return math.prod(bins * (positions + 1) for _, bins, positions in (ys[0].shape, xs[0].shape))


def _turns(ys: Samples, xs: Samples, numbers_per_pair: int) -> list[Tensor | slice]:
    """Rows of RoIs that are worked on together: alike in size, so that little is padding, and bounded in memory."""
    largest = ys[1].amax(dim=1) * xs[1].amax(dim=1)  # samples in the largest bin of each RoI
    bins = ys[1].shape[1] * xs[1].shape[1]
    limit = TAPS_AT_ONCE // max(1, bins * numbers_per_pair)
    if int(largest.max()) * len(largest) <= limit:
        return [slice(None)]
    order = largest.argsort()
    turns, begin, sizes = [], 0, largest[order].tolist()
    for end in range(1, len(sizes) + 1):
        if end == len(sizes) or sizes[end] * (end + 1 - begin) > limit:
            turns.append(order[begin:end])
            begin = end
    return turns


def _some(samples: Samples, rows: Tensor | slice) -> Samples:
    positions, counts = samples[0][rows], samples[1][rows]
    return positions[..., : max(1, int(counts.max()))], counts


def _in_order(parts: list[Tensor], turns: list[Tensor | slice]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.cat(turns).argsort()]


def _mean(cells: Tensor, image: Tensor, ys: Samples, xs: Samples, height: int, width: int) -> Tensor:
    table = cells.reshape(-1, cells.shape[-1])  # one row per cell
    parts, turns = [], _turns(ys, xs, 4)
    for rows in turns:
        y_index, y_weight = mean_taps(*_some(ys, rows), height)
        x_index, x_weight = mean_taps(*_some(xs, rows), width)
        row = (image[rows][:, None, None] * height + y_index) * width  # [r, P, T]
        if table.shape[0] < 2**31:  # short indices are read faster
            row, x_index = row.int(), x_index.int()
        # Every cell of the y axis with every one of the x axis [r, P, P, T * T]: one long dimension is quicker.
        y_taps, x_taps = y_index.shape[2], x_index.shape[2]
        row, y_weight = (part.repeat_interleave(x_taps, dim=2)[:, :, None] for part in (row, y_weight))
        column, x_weight = (part.repeat(1, 1, y_taps)[:, None] for part in (x_index, x_weight))
        index, weight = row + column, y_weight * x_weight
        bags = F.embedding_bag(index.flatten(0, 2), table, mode="sum", per_sample_weights=weight.flatten(0, 2))
        parts.append(bags.view(*index.shape[:3], -1))
    return _in_order(parts, turns).permute(0, 3, 1, 2)


def _mean_of_few_channels(features: Tensor, image: Tensor, ys: Samples, xs: Samples) -> Tensor:
    """The same as two matrix products per RoI, rows then columns: better where a cell holds a number or two."""
    height, width = features.shape[2:]
    parts, turns = [], torch.arange(len(image), device=image.device).split(max(1, TAPS_AT_ONCE // features[0].numel()))
    for rows in turns:
        matrices = []
        for (positions, counts), cells in ((_some(ys, rows), height), (_some(xs, rows), width)):
            index, weight = mean_taps(positions, counts, cells)
            matrices.append(weight.new_zeros(*index.shape[:2], cells).scatter_add_(2, index, weight)[:, None])
        rows_first = matrices[0] @ features[image[rows]]  # [r, 1, P, H] @ [r, C, H, W]
        parts.append(rows_first @ matrices[1].transpose(2, 3))
    return torch.cat(parts)


def _max(layer: str, cells: Tensor, image: Tensor, ys: Samples, xs: Samples, height: int, width: int) -> Tensor:
    table = cells.reshape(-1, cells.shape[-1])
    taps = 1 if layer == "roi_pool" else 2  # per axis; RoIPool's samples are the cells themselves
    parts, turns = [], _turns(ys, xs, taps**2 + cells.shape[-1])
    for rows in turns:
        y, x = _some(ys, rows), _some(xs, rows)
        index, weight = _tap_grid(image[rows], y[0], x[0], height, width, taps)  # [r, P, P, S * S, taps * taps]
        with torch.no_grad():
            values = F.embedding_bag(
                index.flatten(0, 3), table, mode="sum", per_sample_weights=weight.flatten(0, 3)
            ).view(*index.shape[:4], -1)
            winner = values.max(dim=3).indices  # the first of equal ones, [r, P, P, C]
        # Only the winning sample of each channel takes part in the gradient: read it once more.
        best = 0
        for tap in range(index.shape[-1]):
            cell = index[..., tap].gather(3, winner).flatten(0, 2)
            best = best + table.gather(0, cell) * weight[..., tap].gather(3, winner).flatten(0, 2)
        has_samples = (y[1] > 0)[:, :, None] & (x[1] > 0)[:, None, :]
        parts.append(torch.where(has_samples[..., None], best.view(winner.shape), 0))
    return _in_order(parts, turns).permute(0, 3, 1, 2)


def _tap_grid(image: Tensor, y: Tensor, x: Tensor, height: int, width: int, taps: int) -> tuple[Tensor, Tensor]:
    """Rows of the table of cells around every sample of every bin, and their weights: [r, P, P, S * S, taps * taps]."""
    y_index, y_weight = (part[..., :taps] for part in two_taps(y, height))  # [r, P, S, taps]
    x_index, x_weight = (part[..., :taps] for part in two_taps(x, width))
    row = image[:, None, None, None] * height + y_index
    index = row[:, :, None, :, None, :, None] * width + x_index[:, None, :, None, :, None, :]
    weight = y_weight[:, :, None, :, None, :, None] * x_weight[:, None, :, None, :, None, :]
    return index.flatten(5).flatten(3, 4), weight.flatten(5).flatten(3, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Non-maximum suppression
# ---------------------------------------------------------------------------------------------------------------------

BLOCK = 512  # boxes looked at together


def nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, threshold: float, max_keep: int | None) -> Tensor:
    """Indices [n] int64, best first, of the boxes that no better kept box of their group overlaps too much."""
    order = torch.sort(scores, descending=True, stable=True).indices
    limit = len(order) if max_keep is None else min(max_keep, len(order))
    kept = order[:0]
    for block in order.split(BLOCK):
        if len(kept) >= limit:
            break
        block = block[~_suppress(boxes, groups, kept, block, threshold).any(dim=0)]
        # Within the block: whoever is suppressed by a kept box is not kept, until nothing changes any more.
        among = _suppress(boxes, groups, block, block, threshold).triu(diagonal=1)
        keep = torch.ones(len(block), dtype=torch.bool, device=boxes.device)
        while True:
            updated = ~(among & keep[:, None]).any(dim=0)
            if bool((updated == keep).all()):
                break
            keep = updated
        kept = torch.cat([kept, block[keep]])
    return kept[:limit]


def _suppress(boxes: Tensor, groups: Tensor | None, better: Tensor, worse: Tensor, threshold: float) -> Tensor:
    overlap = _iou(boxes[better], boxes[worse]).double() > threshold
    return overlap if groups is None else overlap & (groups[better][:, None] == groups[worse])


def _iou(a: Tensor, b: Tensor) -> Tensor:
    shared, union = _shared_and_union(a, b)
    if not bool(union.isfinite().all()):  # areas beyond float32's range
        shared, union = _shared_and_union(a.double(), b.double())
    return torch.where(union > 0, shared / union, 0)


def _shared_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a_area, b_area = ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in (a, b))
    side = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=0)
    shared = side[..., 0] * side[..., 1]
    return shared, a_area[:, None] + b_area - shared
