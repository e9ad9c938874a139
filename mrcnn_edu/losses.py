"""The losses of both stages, as pure functions of tensors.

Chapter 12 (the whole model and its losses); one by one in Chapter 6 (anchors), Chapter 10 (boxes), Chapter 11 (masks)
and Chapter 14 (keypoints). Paper: Section 3, ``L = L_cls + L_box + L_mask``, and Section 5.

Where nothing can be learned (no positive, no visible joint) a loss is zero but still depends on the predictions, so
that every parameter has a gradient and every process of a distributed run the same graph.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

RPN_LOSSES = ("objectness", "rpn_box")
HEAD_LOSSES = ("classification", "box", "mask", "keypoint")
ALL_LOSSES = RPN_LOSSES + HEAD_LOSSES


def any_of(names: Collection[str], only: Collection[str]) -> bool:
    """Is one of the names among those wanted?"""
    return not set(names).isdisjoint(only)


def objectness_loss(logits: Tensor, positive: Tensor, divisor: float) -> Tensor:
    """Binary cross entropy of the drawn anchors.

    logits    [S]
    positive  [S] bool
    divisor   the anchors to average over
    """
    return F.binary_cross_entropy_with_logits(logits, positive.float(), reduction="sum") / divisor


def box_loss(deltas: Tensor, target: Tensor, beta: float, divisor: float) -> Tensor:
    """Smooth L1 between deltas ``[P, (dx, dy, dw, dh)]`` of positives: square below ``beta``, linear above; 0 is L1.

    divisor  all drawn boxes, negatives too, so that images with few positives do not weigh more [12]
    """
    if beta == 0:
        return F.l1_loss(deltas, target, reduction="sum") / divisor
    return F.smooth_l1_loss(deltas, target, beta=beta, reduction="sum") / divisor


def classification_loss(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy over K + 1 classes, ``class_logits [S, K + 1]`` and ``labels [S]`` in 0..K (0 is background)."""
    if len(labels) == 0:
        return 0 * class_logits.sum()
    return F.cross_entropy(class_logits, labels)


def roi_losses(class_logits: Tensor, deltas: Tensor, labels: Tensor, target: Tensor, beta: float) -> Tensor:
    """Each roi's own loss ``[S]``, L_cls + [label >= 1] L_box, by which the hardest are chosen [38].

    class_logits  [S, K + 1]
    deltas        [S, K, 4]
    labels        [S] in 0..K
    target        [S, 4], whatever it is for negatives
    """
    rows = torch.arange(len(labels), device=labels.device)
    own = deltas[rows, (labels - 1).clamp(min=0)]  # [S, 4]
    if beta == 0:
        box = F.l1_loss(own, target, reduction="none")
    else:
        box = F.smooth_l1_loss(own, target, beta=beta, reduction="none")
    classification = F.cross_entropy(class_logits, labels, reduction="none")
    return classification + torch.where(labels > 0, box.sum(dim=1), 0)


def mask_loss(mask_logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """Average binary cross entropy on the mask of each positive's own class; the other K - 1 masks do not contribute.

    mask_logits  [P, K, M, M]
    target       [P, M, M] in [0, 1]
    labels       [P] in 1..K
    """
    if len(labels) == 0:
        return 0 * mask_logits.sum()
    own = mask_logits[torch.arange(len(labels), device=labels.device), labels - 1]  # [P, M, M]
    return F.binary_cross_entropy_with_logits(own, target)


def multinomial_mask_loss(mask_logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """Average cross entropy of a softmax over all classes and the background at each pixel: masks compete (Table 2b).

    mask_logits  [P, K + 1, M, M], the background at index 0
    target       [P, M, M] in [0, 1], the share of each pixel that is of the positive's class; the rest is background
    labels       [P] in 1..K
    """
    if len(labels) == 0:
        return 0 * mask_logits.sum()
    log_probs = mask_logits.log_softmax(dim=1)
    own = log_probs[torch.arange(len(labels), device=labels.device), labels]  # [P, M, M]
    return -(target * own + (1 - target) * log_probs[:, 0]).mean()


def keypoint_loss(keypoint_logits: Tensor, cells: Tensor, visible: Tensor) -> Tensor:
    """Cross entropy of a softmax over the M * M cells, averaged over the visible joints (Section 5).

    keypoint_logits  [P, J, M, M]
    cells            [P, J] int64, the true cell, row * M + column
    visible          [P, J] bool, joints that are labelled and inside their roi
    """
    if not visible.any():
        return 0 * keypoint_logits.sum()
    return F.cross_entropy(keypoint_logits.flatten(2)[visible], cells[visible])
