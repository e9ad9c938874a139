"""Every number of a run, in frozen dataclasses: ``ModelConfig``, ``DataConfig`` and ``TrainConfig`` in a ``Config``.

Chapter 12 (the whole model) and Chapter 13 (training). Paper: Sections 3.1 and 5, Appendices A and B.

Each field says its unit and, where it is not obvious, its source. The defaults are the paper's Mask R-CNN with
ResNet-50-FPN; named runs are in ``presets``, what codes decide differently in ``conventions``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from mrcnn_edu.conventions import PAPER, Conventions
from mrcnn_edu.fields import check_types, require

# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------

Architecture = Literal[
    "resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "resnext152_32x8d",
]  # fmt: skip


@dataclass(frozen=True)
class BackboneConfig:
    """ResNet or ResNeXt, and what is read from it: the paper's network-depth-features (Section 3, Architecture)."""

    architecture: Architecture = "resnet50"
    width: int = 64  # channels of the stem; each stage doubles it
    stem: Literal["7x7", "3x3"] = "7x7"  # "7x7": conv and max pool (stride 4); "3x3": two 3x3 convs of stride 2
    # "frozen": statistics and affine part fixed, for pretrained weights; "group": for few images from scratch
    norm: Literal["frozen", "batch", "group"] = "frozen"
    frozen_stages: int = 2  # 0: train everything, 1: freeze the stem, 2: the stem and c2, ... 5: up to c5
    # "fpn": a pyramid; "c4": stride 16, res5 is the roi head; "c5": stride 32; "dc5": c5 dilated, stride 16
    features: Literal["fpn", "c4", "c5", "dc5"] = "fpn"
    non_local: bool = False  # a non-local block before the last block of c4 (Appendix B, [43])
    levels: tuple[str, ...] = ("p2", "p3", "p4", "p5", "p6")  # of the pyramid, finest first; p6 is a thinned p5
    channels: int = 256  # of every pyramid level
    roi_level_size: float = 224.0  # px; a roi of this size is read from p4, half of it from p3 (FPN [27], equation 1)

    def __post_init__(self) -> None:
        check_types(self)
        require(self.width >= 1, self, "width", "at least 1")
        require(0 <= self.frozen_stages <= 5, self, "frozen_stages", "0 to 5")
        require(self.channels >= 1, self, "channels", "at least 1")
        require(self.roi_level_size > 0, self, "roi_level_size", "a positive number of pixels")
        known = ("p2", "p3", "p4", "p5", "p6")
        run = self.levels and self.levels[0] in known and known[known.index(self.levels[0]) :][: len(self.levels)]
        require(bool(run) and tuple(run) == self.levels, self, "levels", "consecutive levels out of p2, p3, p4, p5, p6")
        require("p5" in self.levels, self, "levels", "a run of levels that includes p5")

    @property
    def maps(self) -> tuple[str, ...]:
        """The maps the RPN looks at: the pyramid's levels, or the one map that stands for it."""
        return self.levels if self.features == "fpn" else ("c4" if self.features == "c4" else "c5",)


@dataclass(frozen=True)
class RPNConfig:
    """The region proposal network: anchors, matching, sampling and filtering (Section 3.1, after [36] and [27])."""

    anchor_sizes: tuple[tuple[float, ...], ...] = ((32,), (64,), (128,), (256,), (512,))  # px, sqrt(area), per level
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    convs: int = 1  # 3x3 convs before the two outputs
    positive_iou: float = 0.7  # anchors at or above are positives, as is each box's best anchor
    negative_iou: float = 0.3  # anchors below are negatives
    batch_per_image: int = 256  # anchors drawn per image for the loss
    positive_fraction: float = 0.5  # at most, of those
    pre_nms: tuple[int, int] = (2000, 1000)  # best anchors kept per level before NMS, in (training, inference)
    post_nms: tuple[int, int] = (2000, 1000)  # proposals kept per image after NMS, in (training, inference)
    nms_threshold: float = 0.7  # IoU, within one level

    def __post_init__(self) -> None:
        check_types(self)
        require(all(s > 0 for sizes in self.anchor_sizes for s in sizes), self, "anchor_sizes", "positive pixel sizes")
        require(
            len(self.anchor_ratios) > 0 and all(r > 0 for r in self.anchor_ratios),
            self,
            "anchor_ratios",
            "positive ratios",
        )
        require(
            0 <= self.negative_iou <= self.positive_iou <= 1,
            self,
            "negative_iou",
            "0 <= negative_iou <= positive_iou <= 1",
        )
        require(self.convs >= 1, self, "convs", "at least 1")
        require(self.batch_per_image >= 1, self, "batch_per_image", "at least 1")
        require(0 <= self.positive_fraction <= 1, self, "positive_fraction", "0 to 1")
        require(min(self.pre_nms) >= 1, self, "pre_nms", "two counts of at least 1")
        require(min(self.post_nms) >= 1, self, "post_nms", "two counts of at least 1")
        require(0 <= self.nms_threshold <= 1, self, "nms_threshold", "0 to 1")


RoILayer = Literal["roi_align", "roi_warp", "roi_pool"]
RoIMode = Literal["mean", "max"]


def _one_pooling(box: BoxHeadConfig, branch: MaskHeadConfig | KeypointHeadConfig, name: str) -> None:
    """On C4 all branches begin with one res5, which sees each roi once."""
    for field_ in ("pooled_size", "layer", "mode"):
        if getattr(box, field_) != getattr(branch, field_):
            raise ValueError(
                f"{name}.{field_} must be box.{field_} on C4, where the branches share res5 (Figure 4, left), got "
                f"{getattr(branch, field_)!r} and {getattr(box, field_)!r}"
            )


@dataclass(frozen=True)
class BoxHeadConfig:
    """The second stage: sampling rois, classifying them and refining their boxes (Section 3.1, Figure 4)."""

    rois_per_image: int = 512  # N in Section 3.1: 512 for FPN, 64 for C4
    positive_fraction: float = 0.25  # positives : negatives of 1 : 3
    positive_iou: float = 0.5
    sampling: Literal["random", "hardest"] = "random"  # "hardest": the largest losses of all rois, OHEM [38]
    hardest_nms: float = 0.7  # IoU above which only the harder of two rois is a candidate [38]
    pooled_size: int = 7
    layer: RoILayer = "roi_align"
    mode: RoIMode = "mean"  # over the samples of a bin; roi_pool always takes the max
    convs: tuple[int, ...] = ()  # widths of 3x3 convs before them; the paper has none
    fc: tuple[int, ...] = (1024, 1024)  # widths of the hidden fully connected layers; () on C4
    res5_stride: Literal[1, 2] = 1  # on C4: 1 for rois of 7 x 7 (Figure 4, left), 2 for 14 x 14 (all released code)
    delta_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)  # of the box coder
    score_threshold: float = 0.05  # detections below are dropped
    nms_threshold: float = 0.5  # IoU, within one class; 0.3 in Sections 3 and 4, 0.5 in Section 5 and Appendix B
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        check_types(self)
        require(self.rois_per_image >= 1, self, "rois_per_image", "at least 1")
        require(0 <= self.positive_fraction <= 1, self, "positive_fraction", "0 to 1")
        require(0 <= self.positive_iou <= 1, self, "positive_iou", "0 to 1")
        require(0 <= self.hardest_nms <= 1, self, "hardest_nms", "0 to 1")
        require(self.pooled_size >= 1, self, "pooled_size", "at least 1")
        require(all(w >= 1 for w in self.fc), self, "fc", "positive widths")
        require(all(w >= 1 for w in self.convs), self, "convs", "positive widths")
        require(all(w > 0 for w in self.delta_weights), self, "delta_weights", "four positive numbers")
        require(0 <= self.score_threshold <= 1, self, "score_threshold", "0 to 1")
        require(0 <= self.nms_threshold <= 1, self, "nms_threshold", "0 to 1")
        require(self.detections_per_image >= 1, self, "detections_per_image", "at least 1")


@dataclass(frozen=True)
class MaskHeadConfig:
    """The mask branch: a small fully convolutional network per roi (Section 3, Figure 4), or a rival (Table 2)."""

    pooled_size: int = 14
    layer: RoILayer = "roi_align"
    mode: RoIMode = "mean"
    branch: Literal["fcn", "mlp"] = "fcn"  # Table 2e
    convs: tuple[int, ...] = (256, 256, 256, 256)  # "fcn": widths of the 3x3 convs; () on C4
    deconv: int | None = None  # "fcn": width of the deconv; None keeps that of the last conv
    fc: tuple[int, ...] = (1024, 1024)  # "mlp": widths of its hidden layers
    size: int = 28  # "mlp": M; that of "fcn" is twice what it is given, 28 for FPN and 14 for C4
    classes: Literal["specific", "agnostic"] = "specific"  # a mask per class, or one for all (Section 4.2)
    loss: Literal["sigmoid", "softmax"] = "sigmoid"  # each class for itself, or all and the background competing (2b)
    rois_per_image: int | None = None  # at most so many positives train the branch; None: all of them

    def __post_init__(self) -> None:
        check_types(self)
        require(self.pooled_size >= 1, self, "pooled_size", "at least 1")
        require(all(c >= 1 for c in self.convs), self, "convs", "positive widths")
        require(self.deconv is None or self.deconv >= 1, self, "deconv", "None or at least 1")
        require(len(self.fc) >= 1 and all(w >= 1 for w in self.fc), self, "fc", "one or more positive widths")
        require(self.size >= 1, self, "size", "at least 1")
        require(self.rois_per_image is None or self.rois_per_image >= 1, self, "rois_per_image", "None or at least 1")


@dataclass(frozen=True)
class KeypointHeadConfig:
    """The keypoint branch: a one-hot M x M map per joint (Section 5, Implementation Details)."""

    joints: int = 17  # J
    labels: tuple[int, ...] = ()  # the classes that have keypoints, out of 1..K; empty: all of them
    pooled_size: int = 14
    layer: RoILayer = "roi_align"
    mode: RoIMode = "mean"
    convs: tuple[int, ...] = (512,) * 8
    rois_per_image: int | None = None  # at most so many positives train the branch; None: all of them

    def __post_init__(self) -> None:
        check_types(self)
        require(self.joints >= 1, self, "joints", "at least 1")
        require(all(label >= 1 for label in self.labels), self, "labels", "class labels of at least 1")
        require(self.pooled_size >= 1, self, "pooled_size", "at least 1")
        require(len(self.convs) >= 1 and all(c >= 1 for c in self.convs), self, "convs", "one or more positive widths")
        require(self.rois_per_image is None or self.rois_per_image >= 1, self, "rois_per_image", "None or at least 1")


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. ``models.mask_rcnn.build_model`` turns it into modules on one page."""

    classes: int = 80  # K, foreground classes only
    conventions: Conventions = PAPER
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    rpn: RPNConfig = field(default_factory=RPNConfig)
    box: BoxHeadConfig = field(default_factory=BoxHeadConfig)
    mask: MaskHeadConfig | None = field(default_factory=MaskHeadConfig)  # None: Faster R-CNN
    keypoint: KeypointHeadConfig | None = None
    head_norm: Literal["none", "batch", "group"] = "none"  # after each layer of pyramid and heads; layer norm for fc

    def __post_init__(self) -> None:
        check_types(self)
        require(self.classes >= 1, self, "classes", "at least 1 foreground class")
        levels, sizes = self.backbone.maps, len(self.rpn.anchor_sizes)
        if len(levels) != sizes:
            raise ValueError(
                f"rpn.anchor_sizes needs one entry per backbone level, got {sizes} for the {len(levels)} levels "
                f"{', '.join(levels)}"
            )
        for name in ("mask", "keypoint"):
            branch = getattr(self, name)
            if self.backbone.features == "c4" and branch is not None:
                _one_pooling(self.box, branch, name)
        if self.keypoint is not None and any(label > self.classes for label in self.keypoint.labels):
            raise ValueError(f"keypoint.labels must lie in 1..{self.classes}, got {self.keypoint.labels}")


# ---------------------------------------------------------------------------------------------------------------------
# Data and training
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they are brought to size."""

    train_images: str = ""  # folder of training images
    train_annotations: str = ""  # COCO-format JSON file
    val_images: str = ""  # folder of validation images
    val_annotations: str = ""
    min_size: tuple[int, ...] = (800,)  # px, shorter side; several: one is drawn per training image (scale jitter)
    max_size: int = 1333  # px, longer side
    test_size: int = 800  # px, shorter side at inference
    flip: float = 0.5  # probability of mirroring a training image
    channel_shuffle: float = 0.0  # probability of permuting its colour channels
    group: int = 2  # training images of one orientation (upright or wide) come in so many at a time: less padding
    workers: int = 2  # loader processes; 0 loads in the training process
    strict: bool = True  # refuse an inconsistent annotation file; False drops the faulty parts and reports them

    def __post_init__(self) -> None:
        check_types(self)
        require(len(self.min_size) >= 1 and min(self.min_size) >= 1, self, "min_size", "one or more positive sizes")
        require(self.max_size >= max(self.min_size), self, "max_size", "at least the largest min_size")
        require(1 <= self.test_size <= self.max_size, self, "test_size", "1 to max_size")
        require(0 <= self.flip <= 1, self, "flip", "a probability")
        require(0 <= self.channel_shuffle <= 1, self, "channel_shuffle", "a probability")
        require(self.group >= 1, self, "group", "at least 1 (no grouping)")
        require(self.workers >= 0, self, "workers", "0 or more")


@dataclass(frozen=True)
class LossWeights:
    """How much each loss counts in the sum that training minimises; the paper adds them as they are (Section 3)."""

    objectness: float = 1.0
    rpn_box: float = 1.0
    classification: float = 1.0
    box: float = 1.0
    mask: float = 1.0
    keypoint: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        for weight in fields(self):
            require(0 <= getattr(self, weight.name) < math.inf, self, weight.name, "at least 0")


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained. The defaults are the paper's: 160k iterations of 16 images, 0.02 (Section 3.1)."""

    iterations: int = 160_000
    batch_size: int = 16  # images per iteration, over all processes
    accumulate: int = 1  # parts into which each process divides its share: fewer GPUs keep the batch
    optimiser: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.02
    momentum: float = 0.9  # of SGD
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    weight_decay: float = 1e-4
    norm_decay: bool = True  # are scales and shifts of normalisation layers subject to weight decay
    schedule: Literal["step", "cosine"] = "step"
    steps: tuple[int, ...] = (120_000,)  # iterations at which "step" multiplies the rate by gamma
    gamma: float = 0.1
    warmup_iterations: int = 1000  # the paper states none; every released code has one
    warmup_factor: float = 1e-3  # the rate starts at this share of itself
    loss_weights: LossWeights = field(default_factory=LossWeights)
    clip_norm: float | None = None  # the gradient's norm is cut to this
    average: float = 0.0  # decay of a moving average of the weights, used for evaluation; 0: none
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast of the forward pass
    channels_last: bool = True  # memory layout of images and weights
    sync_norm: bool = False  # batch norms see the images of all processes; on GPUs only
    compile: bool = False  # torch.compile of backbone and heads
    seed: int = 0
    log_every: int = 20  # iterations
    evaluate_every: int = 0  # iterations; 0: only at the end
    validate_every: int = 0  # iterations between validation losses; 0: none
    checkpoint_every: int = 2500  # iterations

    def __post_init__(self) -> None:
        check_types(self)
        require(self.iterations >= 1, self, "iterations", "at least 1")
        require(self.batch_size >= 1, self, "batch_size", "at least 1")
        require(self.accumulate >= 1, self, "accumulate", "at least 1")
        require(0 < self.learning_rate < math.inf, self, "learning_rate", "a positive number")
        require(0 <= self.momentum < 1, self, "momentum", "0 <= momentum < 1")
        require(all(0 <= b < 1 for b in self.betas), self, "betas", "two numbers in [0, 1)")
        require(0 <= self.weight_decay < math.inf, self, "weight_decay", "at least 0")
        require(list(self.steps) == sorted(set(self.steps)), self, "steps", "increasing iterations")
        require(0 < self.gamma <= 1, self, "gamma", "0 < gamma <= 1")
        require(self.warmup_iterations >= 0, self, "warmup_iterations", "0 or more")
        require(0 < self.warmup_factor <= 1, self, "warmup_factor", "0 < factor <= 1")
        require(self.clip_norm is None or self.clip_norm > 0, self, "clip_norm", "None or a positive number")
        require(0 <= self.average < 1, self, "average", "0 (off) to below 1")
        require(self.log_every >= 1, self, "log_every", "at least 1")
        for name in ("evaluate_every", "validate_every", "checkpoint_every"):
            require(getattr(self, name) >= 0, self, name, "0 (never) or a positive number")


@dataclass(frozen=True)
class Config:
    """A run: a model, its data and its training."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_types(self)
