"""Mask R-CNN: read this file first.

Chapter 12 (the whole model). Paper: Section 3; Figures 1 and 4.

``forward`` is the whole story: features, a guess per anchor, proposals, and then either losses or detections. Which of
the two is decided by the arguments, never by the training flag, so a validation loss costs nothing extra to write.
``build_model`` is the page that shows every module with every number.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mrcnn_edu import keypoints as keypoint_ops
from mrcnn_edu.config import (
    CONVENTIONS,
    BoxHeadConfig,
    KeypointHeadConfig,
    MaskHeadConfig,
    ModelConfig,
    lookup,
    model_config,
)
from mrcnn_edu.matching import split_crowd
from mrcnn_edu.models.backbone import Backbone
from mrcnn_edu.models.box_head import BoxHead, at_most, box_head_losses, detect_boxes, sample_rois
from mrcnn_edu.models.fpn import FPN
from mrcnn_edu.models.keypoint_head import KeypointHead, keypoint_head_loss, keypoint_samples
from mrcnn_edu.models.mask_head import MaskHead, mask_head_loss, own_masks
from mrcnn_edu.models.resnet import FrozenBatchNorm, ResNet
from mrcnn_edu.models.roi_features import RoIFeatures
from mrcnn_edu.models.rpn import RPN, Guess, propose, rpn_losses
from mrcnn_edu.structures import Detections, ImageBatch, Proposals, Target, check_target


class MaskRCNN(nn.Module):
    """Faster R-CNN with a mask branch, a keypoint branch, or both.

    The modules come from ``build_model``; ``config`` holds the numbers of matching, sampling and filtering. A head that
    is None is left out: without both, this is Faster R-CNN.
    """

    def __init__(
        self,
        config: ModelConfig,
        backbone: Backbone,
        rpn: RPN,
        box_features: RoIFeatures,
        box_head: BoxHead,
        mask_features: RoIFeatures | None = None,
        mask_head: MaskHead | None = None,
        keypoint_features: RoIFeatures | None = None,
        keypoint_head: KeypointHead | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.rpn = rpn
        self.box_features, self.box_head = box_features, box_head
        self.mask_features, self.mask_head = mask_features, mask_head
        self.keypoint_features, self.keypoint_head = keypoint_features, keypoint_head
        mean, std = config.conventions.pixel_mean, config.conventions.pixel_std
        self.register_buffer("pixel_mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(
        self, batch: ImageBatch, targets: list[Target] | None = None, proposals: list[Proposals] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses when targets are given, detections when not; the training flag never decides.

        batch      B images in the network's frame
        targets    one per image, in the pixels of ``batch.pixels``
        proposals  one per image, to use in place of the RPN's own (stage-wise training, tests)
        returns    the losses "objectness", "rpn_box", "classification", "box" and, where there are such heads, "mask"
                   and "keypoint"; or one Detections per image, in the pixels of ``batch.pixels``

        Raises ValueError for targets or proposals that do not fit the batch or the model.
        """
        self.check(batch, targets, proposals)
        features = self.backbone(self.normalise(batch))  # {"p2": [B, 256, H/4, W/4], ...}
        guess = self.rpn(features, batch.pixels.shape[-2:])  # anchors, objectness, deltas
        if proposals is None:
            proposals = self.propose(guess, batch, training=targets is not None)
        if targets is None:
            return self.detect(features, proposals, batch)
        return self.losses(features, guess, proposals, batch, targets)

    def normalise(self, batch: ImageBatch) -> Tensor:
        """Pixels as the backbone wants them: channel order, range, mean and deviation; zero where padded."""
        pixels = batch.pixels
        if self.config.conventions.channel_order == "bgr":
            pixels = pixels.flip(1)
        pixels = (pixels * self.config.conventions.pixel_range - self.pixel_mean) / self.pixel_std
        height, width = pixels.shape[-2:]
        for image, (h, w) in zip(pixels, batch.sizes):
            if h < height:
                image[:, h:] = 0
            if w < width:
                image[:, :, w:] = 0
        return pixels

    def propose(self, guess: Guess, batch: ImageBatch, training: bool = False) -> list[Proposals]:
        """The RPN's best boxes of each image; while training more of them, and more varied, are kept."""
        rpn, rules = self.config.rpn, self.config.conventions
        return propose(
            guess,
            batch.sizes,
            rpn.pre_nms[0 if training else 1],
            rpn.post_nms[0 if training else 1],
            rpn.nms_threshold,
            rules.proposal_min_size,
            rules.plus_one,
        )

    def losses(
        self,
        features: dict[str, Tensor],
        guess: Guess,
        proposals: list[Proposals],
        batch: ImageBatch,
        targets: list[Target],
    ) -> dict[str, Tensor]:
        """Every loss of both stages; their sum is what training minimises (Section 3, L = L_cls + L_box + L_mask)."""
        rpn, box, rules = self.config.rpn, self.config.box, self.config.conventions
        targets, crowds = zip(*map(split_crowd, targets))
        losses = rpn_losses(
            guess,
            targets,
            crowds,
            batch.sizes,
            rpn.positive_iou,
            rpn.negative_iou,
            rpn.batch_per_image,
            rpn.positive_fraction,
            rules.rpn_box_beta,
            rules.rpn_loss_divisor,
            rules.straddle,
            rules.crowd_overlap,
            rules.plus_one,
        )
        samples = [
            sample_rois(
                found, target, crowd, box.rois_per_image, box.positive_fraction, box.positive_iou, rules.crowd_overlap
            )
            for found, target, crowd in zip(proposals, targets, crowds)
        ]
        class_logits, deltas = self.box_head(self.box_features(features, [part.boxes for part in samples]))
        losses |= box_head_losses(
            class_logits, deltas, samples, targets, box.delta_weights, rules.box_beta, rules.plus_one
        )
        if self.mask_head is not None:
            chosen = [at_most(part[part.labels > 0], self.config.mask.rois_per_image) for part in samples]
            mask_logits = self.mask_head(self.mask_features(features, [part.boxes for part in chosen]))
            losses["mask"] = mask_head_loss(mask_logits, chosen, targets, rules.mask_target, rules.mask_target_aligned)
        if self.keypoint_head is not None:
            branch = self.config.keypoint
            chosen = [
                at_most(keypoint_samples(part, target, branch.labels, rules.keypoint_rois), branch.rois_per_image)
                for part, target in zip(samples, targets)
            ]
            logits = self.keypoint_head(self.keypoint_features(features, [part.boxes for part in chosen]))
            losses["keypoint"] = keypoint_head_loss(logits, chosen, targets)
        return losses

    def detect(self, features: dict[str, Tensor], proposals: list[Proposals], batch: ImageBatch) -> list[Detections]:
        """Detections of each image: the box head on all proposals, the other heads on its best detections only.

        That order differs from training, where all heads see the same rois: it is faster, and the masks come out better
        because the boxes already are (Section 3.1, Inference).
        """
        box, rules = self.config.box, self.config.conventions
        rois = [found.boxes for found in proposals]
        counts = [len(part) for part in rois]
        class_logits, deltas = self.box_head(self.box_features(features, rois))
        detections = [
            detect_boxes(
                *parts,
                box.delta_weights,
                box.score_threshold,
                box.nms_threshold,
                box.detections_per_image,
                rules.detection_min_size,
                rules.plus_one,
            )
            for parts in zip(class_logits.split(counts), deltas.split(counts), rois, batch.sizes)
        ]
        if self.mask_head is not None:
            detections = self.detect_masks(features, detections)
        if self.keypoint_head is not None:
            detections = self.detect_keypoints(features, detections)
        return detections

    def detect_masks(self, features: dict[str, Tensor], detections: list[Detections]) -> list[Detections]:
        """The detections with ``mask_probs``, the mask of each one's predicted class."""
        mask_logits = self.mask_head(self.mask_features(features, [found.boxes for found in detections]))
        parts = mask_logits.split([len(found) for found in detections])
        return [replace(found, mask_probs=own_masks(part, found.labels)) for found, part in zip(detections, parts)]

    def detect_keypoints(self, features: dict[str, Tensor], detections: list[Detections]) -> list[Detections]:
        """The detections with ``keypoints``; zeros for classes that have none."""
        branch, complete = self.config.keypoint, []
        rows = [
            torch.isin(found.labels, torch.tensor(branch.labels, device=found.labels.device)).nonzero()[:, 0]
            if branch.labels
            else torch.arange(len(found), device=found.labels.device)
            for found in detections
        ]
        boxes = [found.boxes[chosen] for found, chosen in zip(detections, rows)]
        logits = self.keypoint_head(self.keypoint_features(features, boxes))
        for found, chosen, part in zip(detections, rows, logits.split([len(chosen) for chosen in rows])):
            keypoints = torch.zeros(len(found), branch.joints, 3, device=part.device)
            keypoints[chosen] = keypoint_ops.decode(part, found.boxes[chosen])
            complete.append(replace(found, keypoints=keypoints))
        return complete

    def check(self, batch: ImageBatch, targets: list[Target] | None, proposals: list[Proposals] | None) -> None:
        """Refuse what does not fit: wrong counts, labels outside 1..K, boxes without area or not finite."""
        for name, parts in (("targets", targets), ("proposals", proposals)):
            if parts is not None and len(parts) != len(batch):
                raise ValueError(f"{name} must hold one entry per image, got {len(parts)} for {len(batch)} images")
        joints = self.config.keypoint.joints if self.config.keypoint is not None else None
        for index, target in enumerate(targets or []):
            check_target(target, batch.sizes[index], self.config.classes, joints, f"targets[{index}]")


def build_model(model: str | ModelConfig = "maskrcnn_resnet50_fpn", conventions: str | None = None) -> MaskRCNN:
    """A model with random weights, by name or by config; every module and every number stands on this page.

    model        a key of ``config.MODELS``, or a ModelConfig
    conventions  "paper", "detectron1", "detectron2" or "torchvision"; None keeps the config's own

    Raises ValueError for an unknown name, with the nearest right one.
    """
    config = model if isinstance(model, ModelConfig) else model_config(model)
    if conventions is not None:
        config = replace(config, conventions=lookup("conventions", CONVENTIONS, conventions))
    rules, body = config.conventions, config.backbone

    def norm(channels: int) -> nn.Module:
        return FrozenBatchNorm(channels, rules.frozen_norm_eps) if body.norm == "frozen" else nn.BatchNorm2d(channels)

    conv_norm = nn.BatchNorm2d if config.head_norm == "batch" else None
    fc_norm = nn.LayerNorm if config.head_norm == "batch" else None  # a step may have a single roi, which is no batch

    # ResNeXt, unlike ResNet, has always had its stride in the grouped 3x3
    stride_in = "3x3" if body.architecture.startswith("resnext") else rules.stride_in
    resnet = ResNet(body.architecture, norm, body.width, body.stem, stride_in)
    resnet.freeze(body.frozen_stages)
    fpn = FPN(resnet.channels, body.channels, body.levels, conv_norm)
    backbone = Backbone(resnet, fpn)
    rpn = RPN(
        body.channels,
        backbone.strides,
        config.rpn.anchor_sizes,
        config.rpn.anchor_ratios,
        rules.anchor_rounding,
        exact_stride=rules.anchor_stride == "level",
    )

    def roi_features(branch: BoxHeadConfig | MaskHeadConfig | KeypointHeadConfig) -> RoIFeatures:
        levels = {level: stride for level, stride in backbone.strides.items() if level != "p6"}
        return RoIFeatures(
            branch.layer,
            branch.pooled_size,
            levels,
            rules.samples_per_bin,
            rules.aligned,
            body.roi_level_size,
            rules.level_rule,
            rules.level_epsilon,
        )

    heads: dict[str, nn.Module] = {
        "box_features": roi_features(config.box),
        "box_head": BoxHead(body.channels, config.box.pooled_size, config.box.fc, config.classes, fc_norm),
    }
    if config.mask is not None:
        heads["mask_features"] = roi_features(config.mask)
        heads["mask_head"] = MaskHead(body.channels, config.mask.convs, config.classes, conv_norm)
    if config.keypoint is not None:
        heads["keypoint_features"] = roi_features(config.keypoint)
        heads["keypoint_head"] = KeypointHead(body.channels, config.keypoint.convs, config.keypoint.joints, conv_norm)
    return MaskRCNN(config, backbone, rpn, **heads)
