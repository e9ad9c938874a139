"""Which ground truth each box answers for, and which boxes are drawn to train on.

Chapter 5 (anchors, matching, sampling, box coding). Paper: Section 3.1, Training, after Fast and Faster R-CNN [12, 36].
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrcnn_edu.boxes import ioa
from mrcnn_edu.structures import Target

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


def match(iou: Tensor, positive: float, negative: float, keep_best: bool = False) -> tuple[Tensor, Tensor]:
    """Each box's ground truth and whether it counts as positive, negative or neither.

    iou        [..., G, N] in [0, 1] between G ground-truth boxes and N boxes, of one image or of several
    positive   boxes at or above are POSITIVE
    negative   boxes below are NEGATIVE; those in between are IGNORED
    keep_best  also make POSITIVE every box that some ground truth overlaps most, however little (ties included), so
               that no object goes without an anchor
    returns    matched [..., N] int64, the row of largest IoU; status [..., N] int64

    With four boxes over one truth, ``match([[.8, .5, .1, 0]], .7, .3)`` gives statuses ``[1, -1, 0, 0]``.
    """
    if iou.numel() == 0:
        nothing = torch.zeros((*iou.shape[:-2], iou.shape[-1]), dtype=torch.int64, device=iou.device)
        return nothing, nothing + NEGATIVE
    best, matched = iou.max(dim=-2)  # [..., N]
    found = best >= positive
    if keep_best:
        most = iou.amax(dim=-1, keepdim=True)  # [..., G, 1]
        found = found | ((iou == most) & (most > 0)).any(dim=-2)
    status = torch.full_like(matched, IGNORED).masked_fill_(best < negative, NEGATIVE).masked_fill_(found, POSITIVE)
    return matched, status


def sample(
    status: Tensor, count: int, positive_fraction: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A random minibatch of positives and negatives.

    status             [N] int64, POSITIVE, NEGATIVE or IGNORED
    count              boxes to draw in all
    positive_fraction  at most this share are positives; missing positives are replaced by negatives
    returns            row indices of the positives and of the negatives, each increasing
    """
    positives, negatives = (status == POSITIVE).nonzero()[:, 0], (status == NEGATIVE).nonzero()[:, 0]
    most = min(len(positives), int(count * positive_fraction))
    positives = _draw(positives, most, generator)
    return positives, _draw(negatives, min(len(negatives), count - most), generator)


def _draw(rows: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    order = torch.randperm(len(rows), generator=generator, device=rows.device)
    return rows[order[:count]].sort().values


def sample_images(status: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """``sample`` for each image of a batch, on a GPU for all of them at once.

    status   [B, N] int64; where an image has fewer rows the rest is IGNORED
    returns  of all that were drawn, image after image and positives first: image [S] and row [S], both int64, and
             whether it is a positive [S] bool
    """
    if status.is_cuda:
        return _sample_at_once(status, count, positive_fraction)
    drawn = [part for image in status for part in sample(image, count, positive_fraction)]
    kind = torch.arange(len(drawn)).repeat_interleave(torch.tensor([len(part) for part in drawn]))
    return kind // 2, torch.cat(drawn), kind % 2 == 0


def _sample_at_once(status: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that lots fall on: a handful of launches for all images, and a single wait for how many they are."""
    lots = torch.rand(status.shape, device=status.device)
    most, rows = min(int(count * positive_fraction), status.shape[1]), min(count, status.shape[1])
    lot, positives = lots.masked_fill(status != POSITIVE, -1).topk(most)
    other_lot, negatives = lots.masked_fill(status != NEGATIVE, -1).topk(rows)
    taken = lot >= 0
    missing = count - taken.sum(dim=1, keepdim=True)
    filled = (other_lot >= 0) & (torch.arange(rows, device=status.device) < missing)
    image, place = torch.cat([taken, filled], dim=1).nonzero().unbind(1)
    return image, torch.cat([positives, negatives], dim=1)[image, place], place < most


def split_crowd(target: Target) -> tuple[Target, Tensor]:
    """The single instances of a target, and the boxes ``[M, 4]`` of its crowd regions."""
    if target.crowd is None or not target.crowd.any():
        return target, target.boxes[:0]
    return target[~target.crowd], target.boxes[target.crowd]


def split_crowds(targets: list[Target]) -> tuple[list[Target], list[Tensor]]:
    """``split_crowd`` for each target of a batch; a GPU is waited for once where there is no crowd."""
    crowds = [target.crowd for target in targets if target.crowd is not None]
    if crowds and torch.cat(crowds).any():
        singles, regions = zip(*map(split_crowd, targets))
        return list(singles), list(regions)
    return targets, [target.boxes[:0] for target in targets]


def ignore_crowd(status: Tensor, boxes: Tensor, crowd: Tensor, overlap: float | None) -> Tensor:
    """``status [N]`` with those negatives ignored that lie to at least ``overlap`` of their area in a crowd region.

    A crowd is many uncounted instances: what lies in it is no background. None leaves the status as it is.
    """
    if overlap is None or len(crowd) == 0:
        return status
    hidden = (ioa(boxes, crowd) >= overlap).any(dim=1)
    return torch.where(hidden & (status == NEGATIVE), IGNORED, status)
