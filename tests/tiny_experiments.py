"""The paper's experiments on images of 64 pixels, by models of some thousand weights: seconds for minutes."""

from __future__ import annotations

from dataclasses import replace

from mrcnn_edu import recipes
from mrcnn_edu.config import BoxHeadConfig, Config, KeypointHeadConfig, MaskHeadConfig


def tiny(config: Config) -> Config:
    """A toy in which nothing is wide, on images of 64 pixels; what kind of model it is stays."""
    chosen, side = config.model, round(64 * config.data.max_size / recipes.TOY_SIDE)

    def slim(branch: BoxHeadConfig | MaskHeadConfig | KeypointHeadConfig | None):
        if branch is None:
            return None
        widths = {name: (8,) * len(getattr(branch, name)) for name in ("fc", "convs") if hasattr(branch, name)}
        return replace(branch, rois_per_image=8, **widths)

    mask = slim(chosen.mask)
    if mask is not None and mask.deconv is not None:
        mask = replace(mask, deconv=8)
    grouped = chosen.backbone.architecture.startswith("resnext")
    backbone = replace(chosen.backbone, width=16 if grouped else 8, channels=8)
    rpn = replace(chosen.rpn, pre_nms=(20, 20), post_nms=(10, 10))
    small = replace(chosen, backbone=backbone, rpn=rpn, box=slim(chosen.box), mask=mask, keypoint=slim(chosen.keypoint))
    data = replace(config.data, min_size=(side,), max_size=side, test_size=side, workers=0)
    return Config(small, data, replace(config.train, batch_size=2))
