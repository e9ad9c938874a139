"""The keypoint head: in which cell of this roi is each joint?

Chapter 14 (keypoints). Paper: Section 5, Implementation Details.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrcnn_edu.keypoints import encode
from mrcnn_edu.losses import keypoint_loss
from mrcnn_edu.models.mask_head import conv_stack
from mrcnn_edu.models.resnet import Norm
from mrcnn_edu.structures import Samples, Target


class KeypointHead(nn.Module):
    """Pooled features [R, C, P, P] to keypoint logits [R, J, M, M] with M = 4 P, one map per joint.

    A stack of 3x3 convs, a 4x4 deconv of stride 2, and a bilinear enlargement by 2: the high resolution is what
    localises a joint.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], joints: int, norm: Norm | None = None) -> None:
        super().__init__()
        self.convs = conv_stack(channels, widths, norm)
        self.deconv = nn.ConvTranspose2d(widths[-1], joints, 4, stride=2, padding=1)
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.deconv.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        small = self.deconv(self.convs(pooled))  # [R, J, 28, 28]
        return F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)


def keypoint_rows(samples: Samples, target: Target, labels: tuple[int, ...], rule: Literal["visible", "all"]) -> Tensor:
    """The rows of the positives that train the branch: of a class with keypoints, by rule with a visible one inside.

    labels  the classes that have keypoints; empty means all
    """
    if target.keypoints is None:
        raise ValueError("a model with a keypoint head needs Target.keypoints to train; build it with keypoint=None")
    rows = rows_with_keypoints(samples.labels, labels)
    if rule == "visible":
        _, visible = encode(target.keypoints[samples.matched[rows]], samples.boxes[rows], 1)
        rows = rows[visible.any(dim=1)]
    return rows


def rows_with_keypoints(labels: Tensor, allowed: tuple[int, ...]) -> Tensor:
    """The rows of ``labels [N]`` whose class has keypoints: is one of the allowed, or any where none is named."""
    chosen = labels > 0
    if allowed:
        chosen = chosen & torch.isin(labels, torch.tensor(allowed, device=labels.device))
    return chosen.nonzero()[:, 0]


def keypoint_head_loss(keypoint_logits: Tensor, positives: list[Samples], targets: list[Target]) -> Tensor:
    """The keypoint loss of all images' samples; ``keypoint_logits [P, J, M, M]``, image after image."""
    size = keypoint_logits.shape[-1]
    coded = []
    for part, target in zip(positives, targets):
        coded.append(encode(target.keypoints[part.matched], part.boxes, size))
    cells, visible = (torch.cat(parts) for parts in zip(*coded))
    return keypoint_loss(keypoint_logits, cells, visible)
