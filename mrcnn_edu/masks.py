"""Masks: cut out of a box, and read from or written as polygons and run lengths.

Chapter 2 (run lengths and polygons) and Chapter 11 (mask targets). Paper: Section 3.1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mrcnn_edu.ops import roi_align

MaskTarget = Literal["soft", "binary"]


def crop_masks(
    masks: Tensor, boxes: Tensor, matched: Tensor, size: int, rule: MaskTarget = "binary", aligned: bool = True
) -> Tensor:
    """What each box sees of its instance, on an M x M grid: the training target of the mask head.

    masks    [N, H, W] bool, in the image
    boxes    [R, (x1, y1, x2, y2)], image pixels; what lies outside the image is empty
    matched  [R] int64, the row of ``masks`` each box belongs to
    size     M
    rule     "binary": 1 where at least half of the cell is covered; "soft": the covered share itself (torchvision)
    returns  [R, M, M] float32

    Source: Section 3.1, the target is the intersection between a RoI and its ground-truth mask.
    """
    if len(boxes) == 0:
        return torch.zeros(0, size, size, device=masks.device)
    rois = torch.cat([matched[:, None].to(boxes.dtype), boxes], dim=1)
    cropped = roi_align(masks[:, None].float(), rois, size, 1.0, samples_per_bin=0, aligned=aligned)[:, 0]
    return (cropped >= 0.5).float() if rule == "binary" else cropped
