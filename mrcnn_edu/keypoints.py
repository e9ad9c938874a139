"""Keypoints as one-hot maps inside a box, and back.

Chapter 14 (keypoints). Paper: Section 5, Implementation Details.

A box is divided into M x M cells; cell c covers ``[c, c + 1)`` and its centre is ``c + 0.5`` (Heckbert's rule).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def encode(keypoints: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The cell each keypoint falls into.

    keypoints  [R, J, (x, y, v)], image pixels
    boxes      [R, (x1, y1, x2, y2)], image pixels
    size       M
    returns    cells [R, J] int64, row * M + column (0 where not visible); visible [R, J] bool: labelled (v > 0) and
               inside the box, its right and lower border included
    """
    corner, side = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]  # [R, 1, 2]
    xy = keypoints[..., :2]
    cell = ((xy - corner) * (size / side)).floor()
    cell = torch.where(xy == boxes[:, None, 2:], size - 1.0, cell)
    visible = ((cell >= 0) & (cell < size)).all(dim=-1) & (keypoints[..., 2] > 0)
    column, row = torch.where(visible[..., None], cell, 0).long().unbind(-1)
    return row * size + column, visible


def decode(logits: Tensor, boxes: Tensor) -> Tensor:
    """The most likely position of each joint.

    logits   [N, J, M, M]
    boxes    [N, (x1, y1, x2, y2)], image pixels
    returns  [N, J, (x, y, score)]: image pixels, and the probability of the softmax over the box's M * M cells there

    Each map is enlarged to the box's size in whole pixels (bicubic) and its peak taken, so that positions are as fine
    as pixels and not as coarse as cells.
    """
    count, joints = logits.shape[:2]
    found = torch.zeros(count, joints, 3, device=logits.device)
    logits = logits.float()
    total = logits.flatten(2).logsumexp(dim=-1)  # [N, J]
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    pixels = sides.ceil().long().tolist()
    for index, (width, height) in enumerate(pixels):
        enlarged = F.interpolate(logits[index, None], (height, width), mode="bicubic", align_corners=False)[0]
        peak, place = enlarged.flatten(1).max(dim=1)  # [J]
        cell = torch.stack([place % width, place // width], dim=-1)  # [J, (column, row)]
        step = sides[index] / sides[index].ceil()
        found[index, :, :2] = (cell + 0.5) * step + boxes[index, :2]
        found[index, :, 2] = (peak - total[index]).exp().clamp(max=1)
    return found


def resize(keypoints: Tensor, ratio_x: float, ratio_y: float) -> Tensor:
    """Keypoints ``[..., (x, y, v)]`` of an image stretched by the two ratios; the third column is kept."""
    return keypoints * keypoints.new_tensor([ratio_x, ratio_y, 1.0])


def flip(keypoints: Tensor, width: int, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    """Keypoints ``[N, J, (x, y, v)]`` of the mirrored image: x becomes width - x, left and right change names.

    pairs  indices of the joints that are each other's mirror image, such as left and right hand
    """
    x, y, v = keypoints[:, mirror_order(keypoints.shape[1], pairs)].unbind(-1)
    return torch.stack([torch.where(v > 0, width - x, x), y, v], dim=-1)


def mirror_order(joints: int, pairs: tuple[tuple[int, int], ...]) -> list[int]:
    """For each of J joints the one whose place it takes in a mirror; itself, unless it is in one of the pairs."""
    order = list(range(joints))
    for left, right in pairs:
        order[left], order[right] = right, left
    return order
