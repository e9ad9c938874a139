"""Anchors: the fixed grid of boxes from which the region proposal network starts.

Chapter 5 (anchors, matching, sampling, box coding). Paper: Section 3.1, 5 scales and 3 aspect ratios, after [27, 36].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mrcnn_edu.structures import Size

Rounding = Literal["none", "corners", "grid"]


def cell_anchors(
    sizes: tuple[float, ...], ratios: tuple[float, ...], rounding: Rounding = "none", stride: int = 1
) -> Tensor:
    """The anchors of one cell, around the origin.

    sizes     square roots of the areas, in pixels
    ratios    height / width
    rounding  "none": exact areas; "corners": corners to whole pixels (torchvision: 46 x 22 for 32 at 1 : 2);
              "grid": sides rounded on a stride-sized box, then scaled (Detectron: 48 x 24 for 32 at 1 : 2)
    stride    pixels per cell, used by "grid" only
    returns   [A, (x1, y1, x2, y2)] float32, sizes outermost
    """
    scale = torch.tensor(sizes, dtype=torch.float32)[:, None]  # [S, 1]
    ratio = torch.tensor(ratios, dtype=torch.float32)[None, :]  # [1, number of ratios]
    root = ratio.sqrt()
    if rounding == "grid":
        width = torch.round(stride / root)
        height = torch.round(width * ratio)  # half a pixel must stay one: 23 / 2 is 11.5, 23 * root**2 is less
        width, height = width * scale / stride, height * scale / stride
    else:
        width, height = (1 / root) * scale, root * scale
    corners = torch.stack([-width, -height, width, height], dim=-1).reshape(-1, 4) / 2
    if rounding == "grid":
        # Detectron's boxes hold their last pixel's index and sit on the middle of the cell's pixels
        corners = corners + (stride - 1) / 2 + torch.tensor([0.5, 0.5, -0.5, -0.5])
    return corners.round() if rounding == "corners" else corners


def grid_anchors(cell: Tensor, grid: Size, stride: tuple[int, int]) -> Tensor:
    """The cell's anchors repeated over a map.

    cell     [A, (x1, y1, x2, y2)] around the origin, pixels
    grid     (rows, columns) of the map
    stride   (vertical, horizontal) pixels between cells
    returns  [rows * columns * A, 4], image pixels, row by row, all A anchors of a cell together
    """
    y = torch.arange(grid[0], device=cell.device) * stride[0]
    x = torch.arange(grid[1], device=cell.device) * stride[1]
    y, x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack([x, y, x, y], dim=-1)  # [rows, columns, 4]
    return (shifts[:, :, None] + cell).reshape(-1, 4)


def inside(anchors: Tensor, size: Size, margin: float) -> Tensor:
    """Which anchors ``[N, 4]`` leave an image (height, width) by less than ``margin`` pixels, ``[N]`` bool."""
    height, width = size
    beyond = anchors[:, 2:] - anchors.new_tensor([width, height])
    return (anchors[:, :2] >= -margin).all(dim=1) & (beyond < margin).all(dim=1)
