"""A fixed-size piece of the features for every roi.

Chapter 8 (RoIPool, RoIWarp, RoIAlign) and Chapter 4 (which level a roi is read from). Paper: Section 3, RoIAlign.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mrcnn_edu.config import BoxHeadConfig, KeypointHeadConfig, MaskHeadConfig
from mrcnn_edu.conventions import Conventions
from mrcnn_edu.ops import pool_levels


def assign_levels(
    boxes: Tensor,
    finest: int,
    coarsest: int,
    level_size: float = 224.0,
    rule: Literal["plain", "inside", "outside"] = "plain",
    epsilon: float = 0.0,
) -> Tensor:
    """The pyramid level ``k = floor(4 + log2(s / level_size))`` of each box, s being the root of its area.

    boxes    [R, (x1, y1, x2, y2)], image pixels
    finest, coarsest  the range k is limited to, 2 for p2
    rule     where ``epsilon`` keeps a box of exactly 224 pixels from falling one level down: nowhere, "inside" the
             logarithm (Detectron, detectron2), or "outside" (torchvision)
    returns  [R] int64

    Source: FPN [27], equation 1.
    """
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    relative = (width * height).sqrt() / level_size
    if rule == "inside":
        relative = relative + epsilon
    level = 4 + relative.log2()
    if rule == "outside":
        level = level + epsilon
    return level.floor().clamp(finest, coarsest).long()


def as_rois(boxes: list[Tensor]) -> Tensor:
    """Boxes per image, ``[[R_i, 4]]``, as one table of rois ``[R, (image, x1, y1, x2, y2)]`` float32."""
    return torch.cat(
        [torch.cat([torch.full_like(part[:, :1], image), part], dim=1) for image, part in enumerate(boxes)]
    ).float()


class RoIFeatures(nn.Module):
    """Features [R, C, P, P] of rois, each read from the pyramid level that fits its size, or from the only map.

    layer    "roi_align", or the layers it replaced: "roi_pool" and "roi_warp"
    size     P
    strides  pixels per cell of the levels to read from, ``{"p2": 4, ...}`` or ``{"c4": 16}``
    mode     "mean" or "max" over a bin's samples; "roi_pool" takes the max in either case
    The other arguments are those of ``ops.roi_align`` and ``assign_levels``.
    """

    def __init__(
        self,
        layer: Literal["roi_align", "roi_warp", "roi_pool"],
        size: int,
        strides: dict[str, int],
        samples_per_bin: int = 2,
        aligned: bool = True,
        level_size: float = 224.0,
        level_rule: Literal["plain", "inside", "outside"] = "plain",
        level_epsilon: float = 0.0,
        mode: Literal["mean", "max"] = "mean",
    ) -> None:
        super().__init__()
        self.layer, self.size, self.strides, self.mode = layer, size, strides, mode
        self.samples_per_bin, self.aligned = samples_per_bin, aligned
        self.level_size, self.level_rule, self.level_epsilon = level_size, level_rule, level_epsilon

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """Features of all boxes of all images, image after image; ``boxes`` is ``[[R_i, 4]]`` in image pixels."""
        rois = as_rois(boxes)
        numbers = [int(level[1:]) for level in self.strides]
        levels = assign_levels(
            rois[:, 1:], numbers[0], numbers[-1], self.level_size, self.level_rule, self.level_epsilon
        )
        return pool_levels(
            self.layer,
            [features[level] for level in self.strides],
            rois,
            levels - numbers[0],
            self.size,
            [1 / stride for stride in self.strides.values()],
            samples_per_bin=self.samples_per_bin,
            aligned=self.aligned,
            mode=self.mode,
        )

    def extra_repr(self) -> str:
        return f"{self.layer} ({self.mode}), {self.size} x {self.size} from {', '.join(self.strides)}"


def build_roi_features(
    branch: BoxHeadConfig | MaskHeadConfig | KeypointHeadConfig,
    strides: dict[str, int],
    level_size: float,
    rules: Conventions,
) -> RoIFeatures:
    """The RoI layer of one branch; p6 is for the RPN's largest anchors only (FPN [27])."""
    return RoIFeatures(
        branch.layer,
        branch.pooled_size,
        {level: stride for level, stride in strides.items() if level != "p6"},
        rules.samples_per_bin,
        rules.aligned,
        level_size,
        rules.level_rule,
        rules.level_epsilon,
        branch.mode,
    )
