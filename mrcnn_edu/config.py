"""Every number of a run, in frozen dataclasses: ``ModelConfig``, ``DataConfig``, ``TrainConfig``, and named presets.

Chapter 12 (the whole model) and Chapter 13 (training). Paper: Sections 3.1 and 5, Appendices A and B.

Each field says its unit and, where it is not obvious, its source. Values are checked when they are set, so a mistake
is reported where it was made. A preset states only what differs from the defaults.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from mrcnn_edu.data.coco import CategoryMap


def lookup(kind: str, table: dict[str, Any], name: str) -> Any:
    """``table[name]``, or a ValueError that names what there is and what was probably meant."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.4)
    hint = f", did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(table)}")


def _require(condition: bool, config: Any, name: str, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{type(config).__name__}.{name} must be {allowed}, got {getattr(config, name)!r}")


def _check_types(config: Any) -> None:
    """Each field must hold what its annotation says; a type checker knows, a JSON file or a notebook does not."""
    for name, hint in get_type_hints(type(config)).items():
        value, choices = getattr(config, name), get_args(hint)
        if _fits(value, hint):
            continue
        if get_origin(hint) is Literal:
            _require(all(isinstance(c, str) for c in choices), config, name, " or ".join(map(str, choices)))
            lookup(f"{type(config).__name__}.{name}", {c: c for c in choices}, str(value))
        wanted = re.sub(r"mrcnn_edu\.config\.", "", hint.__name__ if isinstance(hint, type) else str(hint))
        raise TypeError(f"{type(config).__name__}.{name} must be {wanted}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Is this a value of that type? A whole number is a float as well, True is no number, a list no tuple."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if origin is tuple:
        parts = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is not None:  # one of several
        return any(_fits(value, part) for part in parts)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


# ---------------------------------------------------------------------------------------------------------------------
# What the paper leaves open
# ---------------------------------------------------------------------------------------------------------------------

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
        _check_types(self)
        _require(all(s > 0 for s in self.pixel_std), self, "pixel_std", "three positive numbers")
        _require(self.samples_per_bin >= 0, self, "samples_per_bin", "0 (adaptive) or a positive number")
        _require(self.rpn_box_beta >= 0, self, "rpn_box_beta", "at least 0")
        _require(self.box_beta >= 0, self, "box_beta", "at least 0")
        _require(self.frozen_norm_eps >= 0, self, "frozen_norm_eps", "at least 0")


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
        _check_types(self)
        _require(self.width >= 1, self, "width", "at least 1")
        _require(0 <= self.frozen_stages <= 5, self, "frozen_stages", "0 to 5")
        _require(self.channels >= 1, self, "channels", "at least 1")
        _require(self.roi_level_size > 0, self, "roi_level_size", "a positive number of pixels")
        known = ("p2", "p3", "p4", "p5", "p6")
        run = self.levels and self.levels[0] in known and known[known.index(self.levels[0]) :][: len(self.levels)]
        _require(
            bool(run) and tuple(run) == self.levels, self, "levels", "consecutive levels out of p2, p3, p4, p5, p6"
        )
        _require("p5" in self.levels, self, "levels", "a run of levels that includes p5")

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
        _check_types(self)
        _require(all(s > 0 for sizes in self.anchor_sizes for s in sizes), self, "anchor_sizes", "positive pixel sizes")
        _require(
            len(self.anchor_ratios) > 0 and all(r > 0 for r in self.anchor_ratios),
            self,
            "anchor_ratios",
            "positive ratios",
        )
        _require(
            0 <= self.negative_iou <= self.positive_iou <= 1,
            self,
            "negative_iou",
            "0 <= negative_iou <= positive_iou <= 1",
        )
        _require(self.convs >= 1, self, "convs", "at least 1")
        _require(self.batch_per_image >= 1, self, "batch_per_image", "at least 1")
        _require(0 <= self.positive_fraction <= 1, self, "positive_fraction", "0 to 1")
        _require(min(self.pre_nms) >= 1, self, "pre_nms", "two counts of at least 1")
        _require(min(self.post_nms) >= 1, self, "post_nms", "two counts of at least 1")
        _require(0 <= self.nms_threshold <= 1, self, "nms_threshold", "0 to 1")


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
        _check_types(self)
        _require(self.rois_per_image >= 1, self, "rois_per_image", "at least 1")
        _require(0 <= self.positive_fraction <= 1, self, "positive_fraction", "0 to 1")
        _require(0 <= self.positive_iou <= 1, self, "positive_iou", "0 to 1")
        _require(0 <= self.hardest_nms <= 1, self, "hardest_nms", "0 to 1")
        _require(self.pooled_size >= 1, self, "pooled_size", "at least 1")
        _require(all(w >= 1 for w in self.fc), self, "fc", "positive widths")
        _require(all(w >= 1 for w in self.convs), self, "convs", "positive widths")
        _require(all(w > 0 for w in self.delta_weights), self, "delta_weights", "four positive numbers")
        _require(0 <= self.score_threshold <= 1, self, "score_threshold", "0 to 1")
        _require(0 <= self.nms_threshold <= 1, self, "nms_threshold", "0 to 1")
        _require(self.detections_per_image >= 1, self, "detections_per_image", "at least 1")


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
        _check_types(self)
        _require(self.pooled_size >= 1, self, "pooled_size", "at least 1")
        _require(all(c >= 1 for c in self.convs), self, "convs", "positive widths")
        _require(self.deconv is None or self.deconv >= 1, self, "deconv", "None or at least 1")
        _require(len(self.fc) >= 1 and all(w >= 1 for w in self.fc), self, "fc", "one or more positive widths")
        _require(self.size >= 1, self, "size", "at least 1")
        _require(self.rois_per_image is None or self.rois_per_image >= 1, self, "rois_per_image", "None or at least 1")


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
        _check_types(self)
        _require(self.joints >= 1, self, "joints", "at least 1")
        _require(all(label >= 1 for label in self.labels), self, "labels", "class labels of at least 1")
        _require(self.pooled_size >= 1, self, "pooled_size", "at least 1")
        _require(len(self.convs) >= 1 and all(c >= 1 for c in self.convs), self, "convs", "one or more positive widths")
        _require(self.rois_per_image is None or self.rois_per_image >= 1, self, "rois_per_image", "None or at least 1")


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
        _check_types(self)
        _require(self.classes >= 1, self, "classes", "at least 1 foreground class")
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
        _check_types(self)
        _require(len(self.min_size) >= 1 and min(self.min_size) >= 1, self, "min_size", "one or more positive sizes")
        _require(self.max_size >= max(self.min_size), self, "max_size", "at least the largest min_size")
        _require(1 <= self.test_size <= self.max_size, self, "test_size", "1 to max_size")
        _require(0 <= self.flip <= 1, self, "flip", "a probability")
        _require(0 <= self.channel_shuffle <= 1, self, "channel_shuffle", "a probability")
        _require(self.group >= 1, self, "group", "at least 1 (no grouping)")
        _require(self.workers >= 0, self, "workers", "0 or more")


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
        _check_types(self)
        for weight in fields(self):
            _require(0 <= getattr(self, weight.name) < math.inf, self, weight.name, "at least 0")


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
        _check_types(self)
        _require(self.iterations >= 1, self, "iterations", "at least 1")
        _require(self.batch_size >= 1, self, "batch_size", "at least 1")
        _require(self.accumulate >= 1, self, "accumulate", "at least 1")
        _require(0 < self.learning_rate < math.inf, self, "learning_rate", "a positive number")
        _require(0 <= self.momentum < 1, self, "momentum", "0 <= momentum < 1")
        _require(all(0 <= b < 1 for b in self.betas), self, "betas", "two numbers in [0, 1)")
        _require(0 <= self.weight_decay < math.inf, self, "weight_decay", "at least 0")
        _require(list(self.steps) == sorted(set(self.steps)), self, "steps", "increasing iterations")
        _require(0 < self.gamma <= 1, self, "gamma", "0 < gamma <= 1")
        _require(self.warmup_iterations >= 0, self, "warmup_iterations", "0 or more")
        _require(0 < self.warmup_factor <= 1, self, "warmup_factor", "0 < factor <= 1")
        _require(self.clip_norm is None or self.clip_norm > 0, self, "clip_norm", "None or a positive number")
        _require(0 <= self.average < 1, self, "average", "0 (off) to below 1")
        _require(self.log_every >= 1, self, "log_every", "at least 1")
        for name in ("evaluate_every", "validate_every", "checkpoint_every"):
            _require(getattr(self, name) >= 0, self, name, "0 (never) or a positive number")


@dataclass(frozen=True)
class Config:
    """A run: a model, its data and its training."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _check_types(self)


# ---------------------------------------------------------------------------------------------------------------------
# Presets
# ---------------------------------------------------------------------------------------------------------------------

# One map: 5 scales x 3 ratios in every cell; 300 proposals at test time (Section 3.1). The other counts are those of
# the released code: the paper has none.
_ONE_MAP = RPNConfig(anchor_sizes=((32, 64, 128, 256, 512),), pre_nms=(12_000, 6000), post_nms=(2000, 300))

# Figure 4, left, with 64 rois per image and the NMS of Section 4.
_C4 = ModelConfig(
    backbone=BackboneConfig(features="c4"),
    rpn=_ONE_MAP,
    box=BoxHeadConfig(rois_per_image=64, pooled_size=7, res5_stride=1, fc=(), nms_threshold=0.3),
    mask=MaskHeadConfig(pooled_size=7, convs=(), deconv=256),
)
# Section 4.2: stride 32 and the head of Figure 4, right. How many rois and proposals is not said: as for C4, the other
# model with one map.
_C5 = ModelConfig(
    backbone=BackboneConfig(features="c5"),
    rpn=_ONE_MAP,
    box=BoxHeadConfig(rois_per_image=64, nms_threshold=0.3),
)
# What Detectron and detectron2 make of C4 (detectron2 also of DC5): larger rois and a stride of 2, 512 rois, 1000
# proposals, NMS at 0.5.
_RELEASED_ONE_MAP = replace(_ONE_MAP, post_nms=(2000, 1000))
_RELEASED_C4 = replace(
    _C4,
    rpn=_RELEASED_ONE_MAP,
    box=BoxHeadConfig(pooled_size=14, res5_stride=2, fc=()),
    mask=MaskHeadConfig(pooled_size=14, convs=(), deconv=256),
)
_RELEASED_DC5 = ModelConfig(backbone=BackboneConfig(features="dc5"), rpn=_RELEASED_ONE_MAP)
_DETECTRON2_RPN = RPNConfig(post_nms=(1000, 1000))
_DETECTRON2_RESNEXT = replace(DETECTRON2, pixel_std=(57.375, 57.12, 58.395))
_PERSON = ModelConfig(classes=1, mask=None, keypoint=KeypointHeadConfig())  # Section 5
_DETECTRON2_PERSON = replace(_PERSON, rpn=RPNConfig(post_nms=(1500, 1000)))
_DETECTRON2_PERSON_RULES = replace(DETECTRON2, box_beta=0.5)


def _with(model: ModelConfig, architecture: Architecture, conventions: Conventions = PAPER) -> ModelConfig:
    return replace(model, backbone=replace(model.backbone, architecture=architecture), conventions=conventions)


MODELS = {
    # The paper's models ------------------------------------------------------------------------------
    "maskrcnn_resnet50_fpn": ModelConfig(),
    "maskrcnn_resnet101_fpn": _with(ModelConfig(), "resnet101"),
    "maskrcnn_resnext101_32x8d_fpn": _with(ModelConfig(), "resnext101_32x8d"),
    "maskrcnn_resnext101_64x4d_fpn": _with(ModelConfig(), "resnext101_64x4d"),
    "maskrcnn_resnext152_32x8d_fpn": _with(ModelConfig(), "resnext152_32x8d"),  # Appendix B, "deeper"
    "maskrcnn_resnext152_32x8d_fpn_nonlocal": ModelConfig(
        backbone=BackboneConfig(architecture="resnext152_32x8d", non_local=True)
    ),
    "maskrcnn_resnet50_c4": _C4,
    "maskrcnn_resnet101_c4": _with(_C4, "resnet101"),
    "maskrcnn_resnet50_c5": _C5,
    "fasterrcnn_resnet50_fpn": ModelConfig(mask=None),
    "fasterrcnn_resnet101_fpn": replace(_with(ModelConfig(), "resnet101"), mask=None),  # Table 3
    "keypointrcnn_resnet50_fpn": _PERSON,
    "keypointrcnn_resnet101_fpn": _with(_PERSON, "resnet101"),
    "keypointrcnn_resnext101_32x8d_fpn": _with(_PERSON, "resnext101_32x8d"),
    "maskkeypointrcnn_resnet50_fpn": replace(_PERSON, mask=MaskHeadConfig()),  # Table 5, both branches
    # As their weights were published; ``weights.load_detectron2`` and ``load_detectron`` read them ---------
    "maskrcnn_resnet50_c4_detectron1": _with(_RELEASED_C4, "resnet50", replace(DETECTRON1, samples_per_bin=0)),
    "maskrcnn_resnet50_fpn_detectron1": _with(ModelConfig(), "resnet50", DETECTRON1),
    "maskrcnn_resnet101_fpn_detectron1": _with(ModelConfig(), "resnet101", DETECTRON1),
    "maskrcnn_resnext101_32x8d_fpn_detectron1": _with(ModelConfig(), "resnext101_32x8d", DETECTRON1),
    "maskrcnn_resnext101_64x4d_fpn_detectron1": _with(ModelConfig(), "resnext101_64x4d", DETECTRON1),
    "keypointrcnn_resnet50_fpn_detectron1": _with(_PERSON, "resnet50", DETECTRON1),
    "maskrcnn_resnet50_c4_detectron2": _with(_RELEASED_C4, "resnet50", DETECTRON2),
    "maskrcnn_resnet50_dc5_detectron2": _with(_RELEASED_DC5, "resnet50", DETECTRON2),
    "maskrcnn_resnet50_fpn_detectron2": _with(ModelConfig(rpn=_DETECTRON2_RPN), "resnet50", DETECTRON2),
    "maskrcnn_resnet101_fpn_detectron2": _with(ModelConfig(rpn=_DETECTRON2_RPN), "resnet101", DETECTRON2),
    "maskrcnn_resnext101_32x8d_fpn_detectron2": _with(
        ModelConfig(rpn=_DETECTRON2_RPN), "resnext101_32x8d", _DETECTRON2_RESNEXT
    ),
    "keypointrcnn_resnet50_fpn_detectron2": _with(_DETECTRON2_PERSON, "resnet50", _DETECTRON2_PERSON_RULES),
    "keypointrcnn_resnet101_fpn_detectron2": _with(_DETECTRON2_PERSON, "resnet101", _DETECTRON2_PERSON_RULES),
    "keypointrcnn_resnext101_32x8d_fpn_detectron2": _with(
        _DETECTRON2_PERSON, "resnext101_32x8d", replace(_DETECTRON2_RESNEXT, box_beta=0.5)
    ),
    # Small enough to train from scratch on two cores in minutes: a ten-layer backbone, three levels, slim heads.
    "maskrcnn_shapes": ModelConfig(
        classes=6,
        # In so short a training the boxes need the steeper loss that most released codes have. And it has no time to
        # unlearn a shift: a strided 3x3 conv centres cell i on pixel i * stride, which aligned=False takes it for.
        conventions=replace(PAPER, rpn_box_beta=1 / 9, box_beta=1 / 9, aligned=False),
        backbone=BackboneConfig(
            architecture="resnet10",
            width=32,
            stem="3x3",
            norm="group",
            frozen_stages=0,
            levels=("p3", "p4", "p5"),
            channels=64,
        ),
        rpn=RPNConfig(anchor_sizes=((20,), (40,), (80,)), pre_nms=(200, 200), post_nms=(80, 80)),
        box=BoxHeadConfig(rois_per_image=64, fc=(256, 256)),
        mask=MaskHeadConfig(convs=(64, 64, 64), rois_per_image=3),
        keypoint=KeypointHeadConfig(joints=7, labels=(6,), convs=(64, 64, 64), rois_per_image=6),
        head_norm="group",
    ),
}


# A run by name, as a whole: the paper's schedule (the defaults) wherever nothing else is said.
PRESETS = {name: Config(model) for name, model in MODELS.items()} | {
    # Section 5, Implementation Details: shorter sides drawn from 640 to 800 px, 90k iterations.
    "keypointrcnn_resnet50_fpn": Config(
        model=MODELS["keypointrcnn_resnet50_fpn"],
        data=DataConfig(min_size=(640, 672, 704, 736, 768, 800)),
        train=TrainConfig(iterations=90_000, steps=(60_000, 80_000)),
    ),
    # What ``mrcnn-edu demo`` trains: minutes on two cores.
    "maskrcnn_shapes": Config(
        model=MODELS["maskrcnn_shapes"],
        # Tested larger than trained: the same weights find finer boxes, masks and joints (Touvron et al. 2019). Without
        # workers: where every core trains, they would only take turns with it.
        data=DataConfig(min_size=(160,), max_size=288, test_size=208, channel_shuffle=0.5, workers=0),
        train=TrainConfig(
            iterations=2350,
            batch_size=4,
            optimiser="adamw",
            learning_rate=1e-3,
            betas=(0.9, 0.98),
            weight_decay=0.02,
            schedule="cosine",
            warmup_iterations=188,
            # Joints are few and their loss is large: unweighted, it shapes the backbone and the boxes hardly do.
            loss_weights=LossWeights(rpn_box=3.0, box=2.0, keypoint=0.7),
            clip_norm=5.0,
            average=0.998,
            precision="fp32",  # bf16 takes several times as long on processors without instructions for it
            checkpoint_every=500,
        ),
    ),
}


def preset(name: str, conventions: str | None = None, categories: CategoryMap | None = None) -> Config:
    """A named run: model, data and training; under the preset's own conventions where none are named.

    With the ``categories`` of a data set the model gets one class for each, and its keypoint branch (if it has one) one
    joint per keypoint name; the branch is left out when no category has keypoints.

    Raises ValueError for an unknown name, naming the nearest right one.
    """
    config = lookup("preset", PRESETS, name)
    model = config.model
    if conventions is not None:
        model = replace(model, conventions=lookup("conventions", CONVENTIONS, conventions))
    return replace(config, model=model if categories is None else for_categories(model, categories))


def for_categories(model: ModelConfig, categories: CategoryMap) -> ModelConfig:
    """The model with one class per category, and with the keypoint branch that their keypoints need, or none."""
    keypoint = model.keypoint
    if keypoint is not None:
        joints = {label: len(c.keypoints) for label, c in enumerate(categories.categories, start=1) if c.keypoints}
        if len(set(joints.values())) > 1:
            raise ValueError(f"one keypoint branch needs one number of joints, got (label: joints) {joints}")
        keypoint = replace(keypoint, joints=next(iter(joints.values())), labels=tuple(joints)) if joints else None
    return replace(model, classes=len(categories.categories), keypoint=keypoint)


def model_config(name: str, conventions: str | None = None, **changes: Any) -> ModelConfig:
    """A named model with top-level fields changed, ``model_config("...", classes=3)``.

    conventions  a key of ``CONVENTIONS``; None keeps the model's own

    Raises ValueError for an unknown name, naming the nearest right one.
    """
    if conventions is not None:
        changes["conventions"] = lookup("conventions", CONVENTIONS, conventions)
    return replace(lookup("model", MODELS, name), **changes)


# ---------------------------------------------------------------------------------------------------------------------
# To and from JSON
# ---------------------------------------------------------------------------------------------------------------------


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists, strings and numbers."""
    return asdict(config)


def from_json(kind: type, values: dict[str, Any], place: str = "config") -> Any:
    """The config dataclass ``kind`` out of ``to_json``'s dict; unknown names are refused with the nearest right one."""
    if not isinstance(values, dict):
        raise TypeError(f"{place} must be an object with the fields of {kind.__name__}, got {type(values).__name__}")
    known = {f.name: f for f in fields(kind)}
    arguments = {}
    for name, value in values.items():
        lookup(f"field of {place}", known, name)
        nested = _NESTED.get((kind, name))
        if nested is not None and value is not None:
            arguments[name] = from_json(nested, value, f"{place}.{name}")
        else:
            arguments[name] = _tuples(value)
    return kind(**arguments)


_NESTED = {
    (Config, "model"): ModelConfig,
    (Config, "data"): DataConfig,
    (Config, "train"): TrainConfig,
    (TrainConfig, "loss_weights"): LossWeights,
    (ModelConfig, "conventions"): Conventions,
    (ModelConfig, "backbone"): BackboneConfig,
    (ModelConfig, "rpn"): RPNConfig,
    (ModelConfig, "box"): BoxHeadConfig,
    (ModelConfig, "mask"): MaskHeadConfig,
    (ModelConfig, "keypoint"): KeypointHeadConfig,
}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
