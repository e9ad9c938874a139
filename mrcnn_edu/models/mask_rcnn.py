"""Mask R-CNN: read this file first.

Chapter 12 (the whole model). Paper: Section 3; Figures 1 and 4.

``forward`` is the whole story: features, a guess per anchor, proposals, and then either losses or detections. Which of
the two is decided by the arguments, never by the training flag, so a validation loss costs nothing extra to write.
``build_model`` is the page that shows every module with every number.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from mrcnn_edu import keypoints as keypoint_ops
from mrcnn_edu.config import BoxHeadConfig, KeypointHeadConfig, MaskHeadConfig, ModelConfig
from mrcnn_edu.conventions import CONVENTIONS
from mrcnn_edu.fields import lookup
from mrcnn_edu.losses import ALL_LOSSES, HEAD_LOSSES, RPN_LOSSES, any_of
from mrcnn_edu.matching import split_crowds
from mrcnn_edu.models.backbone import Backbone, Res5, build_backbone
from mrcnn_edu.models.box_head import (
    BoxHead,
    at_most,
    box_head_losses,
    candidate_rois,
    detect_boxes,
    hardest_rois,
    positive_rows,
    sample_rois_of_images,
)
from mrcnn_edu.models.keypoint_head import KeypointHead, keypoint_head_loss, keypoint_rows, rows_with_keypoints
from mrcnn_edu.models.mask_head import MaskHead, MLPMaskHead, build_mask_head, mask_head_loss, own_masks
from mrcnn_edu.models.resnet import FrozenBatchNorm, group_norm
from mrcnn_edu.models.roi_features import RoIFeatures, build_roi_features
from mrcnn_edu.models.rpn import RPN, Guess, propose, rpn_losses
from mrcnn_edu.presets import model_config
from mrcnn_edu.structures import Detections, ImageBatch, Proposals, Samples, Target, check_targets


class MaskRCNN(nn.Module):
    """Faster R-CNN with a mask branch, a keypoint branch, or both.

    The modules come from ``build_model``; ``config`` holds the numbers of matching, sampling and filtering. A head that
    is None is left out: without both, this is Faster R-CNN. With ``res5`` (C4) the fifth stage of the ResNet stands
    between the roi features and every head.
    """

    def __init__(
        self,
        config: ModelConfig,
        backbone: Backbone,
        rpn: RPN,
        box_features: RoIFeatures,
        box_head: BoxHead,
        mask_features: RoIFeatures | None = None,
        mask_head: MaskHead | MLPMaskHead | None = None,
        keypoint_features: RoIFeatures | None = None,
        keypoint_head: KeypointHead | None = None,
        res5: Res5 | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.rpn = rpn
        self.res5 = res5
        self.box_features, self.box_head = box_features, box_head
        self.mask_features, self.mask_head = mask_features, mask_head
        self.keypoint_features, self.keypoint_head = keypoint_features, keypoint_head
        mean, std = config.conventions.pixel_mean, config.conventions.pixel_std
        self.register_buffer("pixel_mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(
        self,
        batch: ImageBatch,
        targets: list[Target] | None = None,
        proposals: list[Proposals] | None = None,
        only: Collection[str] | None = None,
        boxes_only: bool = False,
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses when targets are given, detections when not; the training flag never decides.

        batch      B images in the network's frame
        targets    one per image, in the pixels of ``batch.pixels``
        proposals  one per image, to use in place of the RPN's own (stage-wise training, tests)
        only       the losses to compute, where the model is trained in stages; None: all. What they do not need is not
                   run: with ``RPN_LOSSES`` no head, with saved proposals and without ``RPN_LOSSES`` no RPN
        boxes_only detections without masks and keypoints, from a model that has them (Section 4.3)
        returns    the losses "objectness", "rpn_box", "classification", "box" and, where there are such heads, "mask"
                   and "keypoint"; or one Detections per image, in the pixels of ``batch.pixels``

        Raises ValueError for targets or proposals that do not fit the batch or the model.
        """
        self.check(batch, targets, proposals)
        training, only = targets is not None, ALL_LOSSES if only is None else only
        features = self.backbone(self.normalise(batch))  # {"p2": [B, 256, H/4, W/4], ...}
        guess = None
        if proposals is None or (training and any_of(RPN_LOSSES, only)):
            guess = self.rpn(features, batch.pixels.shape[-2:])  # anchors, objectness, deltas
        if proposals is None and (not training or any_of(HEAD_LOSSES, only)):
            proposals = self.propose(guess, batch, training)
        if not training:
            return self.detect(features, proposals, batch, boxes_only)
        return self.losses(features, guess, proposals, batch, targets, only)

    def normalise(self, batch: ImageBatch) -> Tensor:
        """Pixels as the backbone wants them: channel order, range, mean and deviation; zero where padded."""
        pixels = batch.pixels
        if self.config.conventions.channel_order == "bgr":
            pixels = pixels.flip(1)
        if self.config.conventions.pixel_range != 1:
            pixels = pixels * self.config.conventions.pixel_range
        pixels = (pixels - self.pixel_mean).div_(self.pixel_std)  # in place: new memory costs more than the arithmetic
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
        guess: Guess | None,
        proposals: list[Proposals] | None,
        batch: ImageBatch,
        targets: list[Target],
        only: Collection[str] = ALL_LOSSES,
    ) -> dict[str, Tensor]:
        """The losses of both stages; their sum is what training minimises (Section 3, L = L_cls + L_box + L_mask)."""
        targets, crowds = split_crowds(targets)
        losses: dict[str, Tensor] = {}
        if any_of(RPN_LOSSES, only):
            losses |= self.first_stage(guess, batch, targets, crowds)
        if any_of(HEAD_LOSSES, only):
            losses |= self.second_stage(features, proposals, targets, crowds)
        return {name: loss for name, loss in losses.items() if name in only}

    def first_stage(
        self, guess: Guess, batch: ImageBatch, targets: Sequence[Target], crowds: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The RPN's losses; targets hold single instances, crowds the boxes of each image's crowd regions."""
        rpn, rules = self.config.rpn, self.config.conventions
        return rpn_losses(
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

    def second_stage(
        self,
        features: dict[str, Tensor],
        proposals: list[Proposals],
        targets: Sequence[Target],
        crowds: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """The losses of the heads, all on the same sampled rois."""
        box, rules = self.config.box, self.config.conventions
        samples = self.sample(features, proposals, targets, crowds)
        maps = self.roi_maps(self.box_features, features, [part.boxes for part in samples])
        class_logits, deltas = self.box_head(maps)
        losses = box_head_losses(
            class_logits, deltas, samples, targets, box.delta_weights, rules.box_beta, rules.plus_one
        )
        if self.mask_head is not None:
            branch = self.config.mask
            rows = [at_most(positives, branch.rois_per_image) for positives in positive_rows(samples)]
            chosen = [part[some] for part, some in zip(samples, rows)]
            logits = self.mask_head(self.maps_of(rows, self.mask_features, features, samples, maps))
            losses["mask"] = mask_head_loss(
                logits, chosen, targets, rules.mask_target, rules.mask_target_aligned, branch.classes, branch.loss
            )
        if self.keypoint_head is not None:
            branch = self.config.keypoint
            rows = [
                at_most(keypoint_rows(part, target, branch.labels, rules.keypoint_rois), branch.rois_per_image)
                for part, target in zip(samples, targets)
            ]
            chosen = [part[some] for part, some in zip(samples, rows)]
            logits = self.keypoint_head(self.maps_of(rows, self.keypoint_features, features, samples, maps))
            losses["keypoint"] = keypoint_head_loss(logits, chosen, targets)
        return losses

    def sample(
        self, features: dict[str, Tensor], proposals: list[Proposals], targets: list[Target], crowds: list[Tensor]
    ) -> list[Samples]:
        """The rois of each image that the heads train on: drawn at random, or the hardest of all."""
        box, rules = self.config.box, self.config.conventions
        images = list(zip(proposals, targets, crowds))
        if box.sampling == "random":
            numbers = (box.rois_per_image, box.positive_fraction, box.positive_iou, rules.crowd_overlap)
            return sample_rois_of_images(images, *numbers)
        candidates = [candidate_rois(*image, box.positive_iou, rules.crowd_overlap) for image in images]
        with torch.no_grad():
            boxes = [part.boxes for part in candidates]
            class_logits, deltas = self.box_head(self.roi_maps(self.box_features, features, boxes))
        counts = [len(part) for part in candidates]
        numbers = (box.rois_per_image, box.hardest_nms, box.delta_weights, rules.box_beta, rules.plus_one)
        return [
            hardest_rois(*parts, *numbers)
            for parts in zip(class_logits.split(counts), deltas.split(counts), candidates, targets)
        ]

    def roi_maps(self, pool: RoIFeatures, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """What a head sees of all boxes of all images: their pooled features, which on C4 go through res5 first."""
        pooled = pool(features, boxes)
        return pooled if self.res5 is None else self.res5(pooled)

    def maps_of(
        self,
        rows: list[Tensor],
        pool: RoIFeatures,
        features: dict[str, Tensor],
        samples: list[Samples],
        box_maps: Tensor,
    ) -> Tensor:
        """What a branch sees of some rows of the samples: on C4 it is what the box head saw, elsewhere pooled anew."""
        if self.res5 is None:
            return pool(features, [part.boxes[some] for part, some in zip(samples, rows)])
        return torch.cat([part[some] for part, some in zip(box_maps.split([len(part) for part in samples]), rows)])

    def detect(
        self, features: dict[str, Tensor], proposals: list[Proposals], batch: ImageBatch, boxes_only: bool = False
    ) -> list[Detections]:
        """Detections of each image: the box head on all proposals, the other heads on its best detections only.

        That order differs from training, where all heads see the same rois: it is faster, and the masks come out better
        because the boxes already are (Section 3.1, Inference).
        """
        box, rules = self.config.box, self.config.conventions
        rois = [found.boxes for found in proposals]
        class_logits, deltas = self.box_head(self.roi_maps(self.box_features, features, rois))
        detections = detect_boxes(
            class_logits,
            deltas,
            rois,
            batch.sizes,
            box.delta_weights,
            box.score_threshold,
            box.nms_threshold,
            box.detections_per_image,
            rules.detection_min_size,
            rules.plus_one,
        )
        if boxes_only:
            return detections
        if self.mask_head is not None:
            detections = self.detect_masks(features, detections)
        if self.keypoint_head is not None:
            detections = self.detect_keypoints(features, detections)
        return detections

    def detect_masks(self, features: dict[str, Tensor], detections: list[Detections]) -> list[Detections]:
        """The detections with ``mask_probs``, the mask of each one's predicted class."""
        branch = self.config.mask
        boxes = [found.boxes for found in detections]
        mask_logits = self.mask_head(self.roi_maps(self.mask_features, features, boxes))
        parts = mask_logits.split([len(found) for found in detections])
        return [
            replace(found, mask_probs=own_masks(part, found.labels, branch.classes, branch.loss))
            for found, part in zip(detections, parts)
        ]

    def detect_keypoints(self, features: dict[str, Tensor], detections: list[Detections]) -> list[Detections]:
        """The detections with ``keypoints``; zeros for classes that have none."""
        complete = []
        for found, (chosen, logits) in zip(detections, self.keypoint_maps(features, detections)):
            keypoints = torch.zeros(len(found), self.config.keypoint.joints, 3, device=logits.device)
            keypoints[chosen] = keypoint_ops.decode(logits, found.boxes[chosen])
            complete.append(replace(found, keypoints=keypoints))
        return complete

    def keypoint_maps(self, features: dict[str, Tensor], detections: list[Detections]) -> list[tuple[Tensor, Tensor]]:
        """For each image the rows of its detections that have keypoints, and their keypoint logits [n, J, M, M]."""
        rows = [rows_with_keypoints(found.labels, self.config.keypoint.labels) for found in detections]
        boxes = [found.boxes[chosen] for found, chosen in zip(detections, rows)]
        logits = self.keypoint_head(self.roi_maps(self.keypoint_features, features, boxes))
        return list(zip(rows, logits.split([len(chosen) for chosen in rows])))

    def optimize(self, precision: Literal["fp32", "bf16"] = "fp32", graphs: bool = False) -> MaskRCNN:
        """A new model with the same detections in less time and nothing else; this one, in evaluation mode, stays.

        precision  of the weights and the maps; boxes and rois are float32 in either case. "bf16" is the faster one
                   where the processor has instructions for it, and rounds scores to some three digits
        graphs     on a GPU record the backbone for each size of batch that comes, see ``graphed``

        Raises ValueError for a model in training mode, one that is optimised already, and another precision.
        """
        from mrcnn_edu.models.optimized import optimized  # which is built on this module

        return optimized(self, precision, graphs)

    def check(self, batch: ImageBatch, targets: list[Target] | None, proposals: list[Proposals] | None) -> None:
        """Refuse what does not fit: wrong counts, labels outside 1..K, boxes without area or not finite."""
        for name, parts in (("targets", targets), ("proposals", proposals)):
            if parts is not None and len(parts) != len(batch):
                raise ValueError(f"{name} must hold one entry per image, got {len(parts)} for {len(batch)} images")
        joints = self.config.keypoint.joints if self.config.keypoint is not None else None
        if targets:
            check_targets(targets, batch.sizes, self.config.classes, joints)


def build_model(model: str | ModelConfig = "maskrcnn_resnet50_fpn", conventions: str | None = None) -> MaskRCNN:
    """A model with random weights, by name or by config; every module and every number stands on this page.

    model        a key of ``presets.MODELS``, or a ModelConfig
    conventions  "paper", "detectron1", "detectron2" or "torchvision"; None keeps the config's own

    Raises ValueError for an unknown name, with the nearest right one.
    """
    config = model if isinstance(model, ModelConfig) else model_config(model)
    if conventions is not None:
        config = replace(config, conventions=lookup("conventions", CONVENTIONS, conventions))
    rules, body = config.conventions, config.backbone

    norms = {"batch": nn.BatchNorm2d, "group": group_norm, "none": None}

    def frozen(channels: int) -> nn.Module:
        return FrozenBatchNorm(channels, rules.frozen_norm_eps)

    norm, conv_norm = frozen if body.norm == "frozen" else norms[body.norm], norms[config.head_norm]
    # A step may have a single roi, which is no batch; behind convs with a norm the layers need none
    fc_norm = nn.LayerNorm if config.head_norm != "none" and not config.box.convs else None

    backbone = build_backbone(body, norm, conv_norm, rules.stride_in)
    rpn = RPN(
        backbone.channels,
        backbone.strides,
        config.rpn.anchor_sizes,
        config.rpn.anchor_ratios,
        rules.anchor_rounding,
        exact_stride=rules.anchor_stride == "level",
        convs=config.rpn.convs,
    )

    def roi_features(branch: BoxHeadConfig | MaskHeadConfig | KeypointHeadConfig) -> RoIFeatures:
        return build_roi_features(branch, backbone.strides, body.roi_level_size, rules)

    box, mask, keypoint = config.box, config.mask, config.keypoint
    res5, channels = None, backbone.channels
    if body.features == "c4":
        res5 = Res5(body.architecture, channels, body.width, norm, box.res5_stride, rules.stride_in)
        channels = res5.channels
    heads: dict[str, nn.Module | None] = {
        "res5": res5,
        "box_features": roi_features(box),
        "box_head": BoxHead(
            channels, box.pooled_size, box.fc, config.classes, fc_norm, res5 is not None, box.convs, conv_norm
        ),
    }
    if mask is not None:
        side = mask.pooled_size if res5 is None else res5.side(mask.pooled_size)
        heads["mask_features"] = roi_features(mask)
        heads["mask_head"] = build_mask_head(mask, channels, side, config.classes, conv_norm, fc_norm)
    if keypoint is not None:
        heads["keypoint_features"] = roi_features(keypoint)
        heads["keypoint_head"] = KeypointHead(channels, keypoint.convs, keypoint.joints, conv_norm)
    return MaskRCNN(config, backbone, rpn, **heads)
