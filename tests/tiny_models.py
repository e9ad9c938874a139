"""Models of every kind, so small that a step takes a fraction of a second."""

from __future__ import annotations

from dataclasses import replace

import torch

from mrcnn_edu.config import ModelConfig
from mrcnn_edu.structures import ImageBatch, Target

SIDE = 64  # px, of the images
BOX = (8.0, 12.0, 40.0, 44.0)


def shrink(config: ModelConfig) -> ModelConfig:
    """The same model with narrow layers, few anchors and few rois; its depth and every choice stay as they are."""
    mask, keypoint = config.mask, config.keypoint
    if mask is not None:
        deconv = None if mask.deconv is None else 8
        mask = replace(mask, convs=(8,) * len(mask.convs), deconv=deconv, fc=(16,) * len(mask.fc))
    if keypoint is not None:
        keypoint = replace(keypoint, convs=(8,) * len(keypoint.convs))
    count = len(config.rpn.anchor_sizes[0])
    return replace(
        config,
        classes=min(config.classes, 6),
        backbone=replace(config.backbone, width=16, channels=16, norm="batch", frozen_stages=0),
        rpn=replace(
            config.rpn,
            anchor_sizes=tuple((16.0 + 8 * level,) * count for level in range(len(config.rpn.anchor_sizes))),
            pre_nms=(40, 40),
            post_nms=(20, 20),
        ),
        box=replace(
            config.box, rois_per_image=16, fc=(16,) * len(config.box.fc), detections_per_image=5, score_threshold=0.0
        ),
        mask=mask,
        keypoint=keypoint,
    )


def images(count: int = 2) -> ImageBatch:
    """Noise with a bright block where the object is."""
    pixels = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) / 2
    x1, y1, x2, y2 = map(int, BOX)
    pixels[:, :, y1:y2, x1:x2] += 0.5
    return ImageBatch.collate(list(pixels))


def truth(config: ModelConfig) -> Target:
    """One object, with the mask and the keypoints that the model wants."""
    label = config.keypoint.labels[0] if config.keypoint is not None and config.keypoint.labels else 1
    x1, y1, x2, y2 = map(int, BOX)
    masks = keypoints = None
    if config.mask is not None:
        masks = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
        masks[:, y1:y2, x1:x2] = True
    if config.keypoint is not None:
        keypoints = torch.full((1, config.keypoint.joints, 3), 20.0)
        keypoints[..., 2] = 2
    return Target(torch.tensor([BOX]), torch.tensor([label]), masks, keypoints)
