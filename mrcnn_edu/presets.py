"""Models and runs by name: the paper's, those whose weights are published, and one to train in minutes.

Chapter 12 (the whole model) and Chapter 13 (training). Paper: Sections 3.1, 4 and 5, Appendices A and B.

A preset states only what differs from the defaults of ``config``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mrcnn_edu.config import (
    Architecture,
    BackboneConfig,
    BoxHeadConfig,
    Config,
    DataConfig,
    KeypointHeadConfig,
    LossWeights,
    MaskHeadConfig,
    ModelConfig,
    RPNConfig,
    TrainConfig,
)
from mrcnn_edu.conventions import CONVENTIONS, DETECTRON1, DETECTRON2, PAPER, Conventions
from mrcnn_edu.fields import lookup

if TYPE_CHECKING:
    from mrcnn_edu.data.coco import CategoryMap

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
            iterations=1900,
            batch_size=4,
            optimiser="adamw",
            learning_rate=1e-3,
            betas=(0.9, 0.98),
            weight_decay=0.02,
            schedule="cosine",
            warmup_iterations=152,
            # The joints' loss is ten times any other: unweighted, it shapes the backbone, and classes are mixed up. The
            # weight of classification alone made some four points of box AP.
            loss_weights=LossWeights(rpn_box=3.0, classification=3.0, box=2.0),
            clip_norm=5.0,
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
