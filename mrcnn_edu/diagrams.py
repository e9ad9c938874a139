"""Pictures of what happens inside the model: anchors, proposals, and the grids of the RoI layers.

Chapter 5 (anchors), Chapter 6 (proposals) and Chapter 8 (RoIPool, RoIWarp, RoIAlign). Paper: Figures 1 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from mrcnn_edu.canvas import INK, PALETTE, Colour, Picture, frame, halo, show, shrink, stage
from mrcnn_edu.config import RoILayer
from mrcnn_edu.inference import ImageSource, as_image
from mrcnn_edu.matching import IGNORED, NEGATIVE, POSITIVE
from mrcnn_edu.ops.vectorized import axis_samples, quantise
from mrcnn_edu.structures import Proposals, Target

ORANGE, SKY, _, YELLOW, GREEN, VERMILLION, BLUE = PALETTE
WHITE = (1.0, 1.0, 1.0)
TITLES = {"roi_pool": "RoIPool", "roi_warp": "RoIWarp", "roi_align": "RoIAlign"}


def draw_anchors(
    image: ImageSource,
    anchors: Tensor,
    status: Tensor | None = None,
    target: Target | None = None,
    *,
    size: float = 6.0,
    ax: Axes | None = None,
) -> Figure:
    """Anchors over an image, coloured by what they are for training; ground truth in white.

    anchors  [N, (x1, y1, x2, y2)], image pixels; a few dozen can be told apart
    status   [N] int64, POSITIVE (orange), NEGATIVE (blue) or IGNORED (gray, dotted), as ``matching.match`` gives it;
             None draws all alike
    """
    if status is not None and len(status) != len(anchors):
        raise ValueError(f"status needs one entry per anchor, got {len(status)} for {len(anchors)} anchors")
    ax = _ground(image, size, ax)
    status = torch.full((len(anchors),), POSITIVE) if status is None else status.cpu()
    styles = (
        (IGNORED, (0.62, 0.62, 0.62), 0.7, ":"),
        (NEGATIVE, SKY, 0.7, "-"),
        (POSITIVE, ORANGE, 1.6, "-"),
    )
    for value, colour, width, line in styles:
        _frames(ax, anchors[(status == value).to(anchors.device)], [colour], width, line)
    _truth(ax, target)
    return ax.figure


def draw_proposals(
    image: ImageSource,
    proposals: Proposals,
    target: Target | None = None,
    *,
    most: int = 50,
    size: float = 6.0,
    ax: Axes | None = None,
) -> Figure:
    """The best proposals over an image, from dark and thin (low scores) to bright and bold; ground truth in white.

    most  how many of the best to draw
    """
    ax = _ground(image, size, ax)
    best = torch.argsort(proposals.scores, descending=True, stable=True)[:most].flip(0)  # the best end on top
    scores = proposals.scores[best].float().cpu().numpy()
    colours = colormaps["plasma"](0.15 + 0.8 * scores)
    _frames(ax, proposals.boxes[best], colours, 0.5 + 1.3 * scores, "-")
    _truth(ax, target)
    return ax.figure


def draw_rois(
    features: Tensor,
    rois: Tensor,
    output_size: int,
    spatial_scale: float,
    layers: Sequence[RoILayer] = ("roi_pool", "roi_warp", "roi_align"),
    samples_per_bin: int = 2,
    aligned: bool = True,
    *,
    size: float = 4.0,
) -> Figure:
    """How RoI layers cut a RoI into bins on a feature map, one panel per layer.

    White, dashed: the RoI as it is. Coloured: the bins the layer makes of it, after its rounding. Dots: what is read, a
    bilinear sample for RoIWarp and RoIAlign, a whole cell for RoIPool.

    features       [H, W] or [C, H, W] (their mean is shown), one square per cell
    rois           [R, (x1, y1, x2, y2)] float32, image pixels
    output_size    bins per side
    spatial_scale  cells per image pixel
    size           inches, width of one panel; the other arguments as in ``ops.roi_align``
    """
    grid = features.detach().float().cpu()
    grid = (grid.mean(0) if grid.ndim == 3 else grid).numpy()
    rows, columns = grid.shape
    height, header, gap = size * rows / columns, 0.3, 0.15
    figure = Picture(len(layers) * size + (len(layers) - 1) * gap, height + header)
    for index, layer in enumerate(layers):
        ax = stage((rows, columns), size, figure.panel(index * (size + gap), header, size, height))
        show(ax, grid, (rows, columns), cmap="gray", interpolation="nearest", alpha=0.75)
        lines = [[(x, 0), (x, rows)] for x in range(columns + 1)] + [[(0, y), (columns, y)] for y in range(rows + 1)]
        ax.add_collection(LineCollection(lines, colors=[(*_gray(0.5), 0.6)], linewidths=0.5))
        for number, roi in enumerate(rois.float().cpu()):
            colour = (ORANGE, SKY, YELLOW, GREEN)[number % 4]
            _draw_bins(ax, layer, roi, output_size, spatial_scale, (rows, columns), samples_per_bin, aligned, colour)
            frame(ax, (roi * spatial_scale).tolist(), WHITE, 1.3, linestyle=(0, (4, 2)), path_effects=halo(WHITE, 2.6))
        ax.set_title(
            {"roi_pool": "RoIPool", "roi_warp": "RoIWarp", "roi_align": "RoIAlign"}[layer], color=INK, fontsize=10
        )
    return figure


def _draw_bins(
    ax: Axes,
    layer: RoILayer,
    roi: Tensor,
    bins: int,
    scale: float,
    size: tuple[int, int],
    samples_per_bin: int,
    aligned: bool,
    colour: Colour,
) -> None:
    """The bins of one RoI and what is read in each, on a map on which cell i covers [i, i + 1)."""
    edges, points = [], []
    for low, high, cells in ((roi[0:1], roi[2:3], size[1]), (roi[1:2], roi[3:4], size[0])):
        positions, counts = axis_samples(layer, low, high, scale, bins, cells, samples_per_bin, aligned)
        read = [place[:count] + 0.5 for place, count in zip(positions[0], counts[0].tolist())]  # 0.5: centre of a cell
        points.append(read)
        edges.append(_bin_edges(layer, read, low, high, scale, bins, aligned))
    for row in range(bins):
        for column in range(bins):
            (x1, x2), (y1, y2) = edges[0][column], edges[1][row]
            inset = 0.1 if layer == "roi_pool" else 0.0  # bins of whole cells overlap: leave each one visible
            box = (x1 + inset, y1 + inset, x2 - inset, y2 - inset)
            frame(ax, box, colour, 1.2, path_effects=halo(colour, 2.4))
            y, x = torch.meshgrid(points[1][row], points[0][column], indexing="ij")
            ax.plot(
                x.flatten().numpy(), y.flatten().numpy(), linestyle="none", marker="o", markersize=3.2,
                markerfacecolor=colour, markeredgecolor="black", markeredgewidth=0.5, zorder=6,
            )  # fmt: skip


def _bin_edges(
    layer: RoILayer, read: list[Tensor], low: Tensor, high: Tensor, scale: float, bins: int, aligned: bool
) -> list[tuple[float, float]]:
    """Where each bin starts and ends along one axis, in cells."""
    if layer == "roi_pool":
        return [(float(r[0]) - 0.5, float(r[-1]) + 0.5) if len(r) else (0.0, 0.0) for r in read]
    if layer == "roi_warp":
        first, length = (float(value) for value in quantise(low, high, scale))
    else:
        first, length = float(low) * scale + (0.0 if aligned else 0.5), float(high - low) * scale
        length = length if aligned else max(length, 1.0)
    return [(first + index * length / bins, first + (index + 1) * length / bins) for index in range(bins)]


def _ground(image: ImageSource, size: float, ax: Axes | None) -> Axes:
    """The image, a little dimmed, so that thin lines stand out."""
    pixels = as_image(image)
    full = (pixels.shape[1], pixels.shape[2])
    ax = stage(full, size, ax)
    dimmed = shrink(pixels, 1600).permute(1, 2, 0).numpy() * 0.6
    show(ax, dimmed.astype(np.uint8), full)
    return ax


def _frames(ax: Axes, boxes: Tensor, colours: Sequence[Colour], widths: float | np.ndarray, line: str) -> None:
    """Many boxes [N, 4] at once."""
    x1, y1, x2, y2 = boxes.detach().float().cpu().numpy().reshape(-1, 4).T
    corners = np.stack([x1, y1, x2, y1, x2, y2, x1, y2, x1, y1], axis=-1).reshape(-1, 5, 2)
    ax.add_collection(LineCollection(corners, colors=colours, linewidths=widths, linestyles=line), autolim=False)


def _truth(ax: Axes, target: Target | None) -> None:
    for box in target.boxes.tolist() if target is not None else []:
        frame(ax, box, WHITE, 1.2, linestyle=(0, (4, 2)), path_effects=halo(WHITE, 2.4))


def _gray(level: float) -> Colour:
    return (level, level, level)
