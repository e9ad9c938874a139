"""What the paper leaves open and each code decided for itself: ``Conventions``, and four presets of them.

Chapter 12 (the whole model). Paper: Section 3.1; the released codes where it says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mrcnn_edu.fields import check_types, require

PixelRange = Literal[1, 255]


@dataclass(frozen=True)
class Conventions:
    """What the paper does not fix and every implementation decided for itself.

    The defaults are the ``paper`` preset: the paper's words where it has some, the plainest choice where it has none.
    """

    # Pixels -------------------------------------------------------------------------------------------
    channel_order: Literal["rgb", "bgr"] = "rgb"  # the order in which the network sees the three channels
    pixel_range: PixelRange = 1  # the network sees 0..1 or 0..255; mean and std are in this range
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # in channel_order
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    # Backbone -----------------------------------------------------------------------------------------
    stride_in: Literal["1x1", "3x3"] = "1x1"  # which conv of a bottleneck has the stride; 1x1 in He et al. [19]
    frozen_norm_eps: float = 1e-5  # added to the variance of a frozen batch norm
    # Anchors ------------------------------------------------------------------------------------------
    anchor_rounding: Literal["none", "corners", "grid"] = "none"  # "corners": to whole pixels; "grid": as Detectron
    anchor_stride: Literal["level", "image/grid"] = "level"  # "image/grid": height // rows, 61 instead of 64 at times
    straddle: float | None = None  # anchors further outside the image than this (px) are not trained; None: all are
    # Boxes --------------------------------------------------------------------------------------------
    plus_one: bool = False  # widths are x2 - x1 + 1 in the box coder
    proposal_min_size: float = 0.0  # proposals narrower than this (px) are dropped
    detection_min_size: float = 0.0  # final boxes narrower than this (px) are dropped
    crowd_overlap: float | None = 0.7  # negatives with this share inside a crowd region are ignored; None: crowd unused
    # RoI features -------------------------------------------------------------------------------------
    level_rule: Literal["plain", "inside", "outside"] = "plain"  # place of epsilon: floor(4 + log2(s/224 + in)) + out
    level_epsilon: float = 0.0
    aligned: bool = True  # subtract the half pixel between a pixel's index and its centre
    samples_per_bin: int = 2  # per side, so 2 means the paper's four points; 0 adapts to the bin's size
    # Losses -------------------------------------------------------------------------------------------
    rpn_box_beta: float = 1.0  # where smooth L1 turns from square to linear; 0 is plain L1
    box_beta: float = 1.0
    rpn_loss_divisor: Literal["sampled", "batch"] = "sampled"  # anchors really drawn, or rpn.batch_per_image x images
    # Masks and keypoints ------------------------------------------------------------------------------
    mask_target: Literal["binary", "soft"] = "binary"  # cells at least half covered; the covered share
    mask_target_aligned: bool = True  # as ``aligned``, for cutting the target out of the ground-truth mask
    paste: Literal["continuous", "integer"] = "continuous"  # "integer": boxes grow by (M+2)/M, then are rounded
    keypoint_rois: Literal["visible", "all"] = "visible"  # positives that train the keypoint head
    # Classes and optimiser ----------------------------------------------------------------------------
    background: Literal["first", "last"] = "first"  # the background's place in *published* weights; here it is always 0
    bias_lr_factor: float = 1.0  # learning rate of biases relative to weights
    bias_decay: bool = True  # are biases subject to weight decay

    def __post_init__(self) -> None:
        check_types(self)
        require(all(s > 0 for s in self.pixel_std), self, "pixel_std", "three positive numbers")
        require(self.samples_per_bin >= 0, self, "samples_per_bin", "0 (adaptive) or a positive number")
        require(self.rpn_box_beta >= 0, self, "rpn_box_beta", "at least 0")
        require(self.box_beta >= 0, self, "box_beta", "at least 0")
        require(self.frozen_norm_eps >= 0, self, "frozen_norm_eps", "at least 0")


PAPER = Conventions()

# Facebook's own Caffe2 code, released with the paper.
DETECTRON1 = Conventions(
    channel_order="bgr",
    pixel_range=255,
    pixel_mean=(102.9801, 115.9465, 122.7717),
    pixel_std=(1.0, 1.0, 1.0),
    anchor_rounding="grid",
    straddle=0.0,
    plus_one=True,
    proposal_min_size=1.0,
    level_rule="inside",
    level_epsilon=1e-6,
    aligned=False,
    rpn_box_beta=1 / 9,
    rpn_loss_divisor="batch",
    paste="integer",
    bias_lr_factor=2.0,
    bias_decay=False,
)

DETECTRON2 = Conventions(
    channel_order="bgr",
    pixel_range=255,
    pixel_mean=(103.53, 116.28, 123.675),
    pixel_std=(1.0, 1.0, 1.0),
    crowd_overlap=None,
    level_rule="inside",
    level_epsilon=1e-8,
    samples_per_bin=0,
    rpn_box_beta=0.0,
    box_beta=0.0,
    rpn_loss_divisor="batch",
    background="last",
)  # its "binary" mask targets are those it has for bitmaps; polygons it draws at M x M, and so does Detectron

TORCHVISION = Conventions(
    stride_in="3x3",
    anchor_rounding="corners",
    anchor_stride="image/grid",
    proposal_min_size=1e-3,
    detection_min_size=1e-2,
    crowd_overlap=None,
    level_rule="outside",
    level_epsilon=1e-6,
    aligned=False,
    rpn_box_beta=1 / 9,
    box_beta=1 / 9,
    mask_target="soft",
    mask_target_aligned=False,
    paste="integer",
    keypoint_rois="all",
)

CONVENTIONS = {"paper": PAPER, "detectron1": DETECTRON1, "detectron2": DETECTRON2, "torchvision": TORCHVISION}
