"""Test-time augmentation: one image seen at several sizes and in the mirror, and one answer from all of it.

Chapter 12 (the whole model) and Chapter 21 (bells and whistles). Paper: Appendix B, "Test-time augmentation".

Boxes first: those of all views are thrown together and thinned by NMS. Then every view is asked for the masks and the
keypoint maps of the boxes that are left, and their mean is the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mrcnn_edu import boxes as box_ops
from mrcnn_edu import keypoints as keypoint_ops
from mrcnn_edu.data.transforms import FlipPairs, resize
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.models.unshared import Unshared, look
from mrcnn_edu.ops import batched_nms
from mrcnn_edu.structures import Detections, ImageBatch, Size, Target


@dataclass(frozen=True)
class Augmentation:
    """Which views of an image are combined; the defaults are those of Appendix B.

    sizes       px, the shorter sides
    max_size    px, the longer side; the paper names none, Detectron has 2000
    flip        see each size in the mirror as well
    flip_pairs  joints that change places in a mirror, ``CocoDataset.flip_pairs``; a model with keypoints needs them
    vote        box voting: a kept box becomes the mean, weighted by score, of all boxes of its class that overlap it
                with at least this IoU (Detectron has 0.9); None: no voting
    """

    sizes: tuple[int, ...] = tuple(range(400, 1201, 100))
    max_size: int = 2000
    flip: bool = True
    flip_pairs: FlipPairs | None = None
    vote: float | None = None

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"Augmentation.sizes must be one or more positive sizes in pixels, got {self.sizes}")
        if self.max_size < max(self.sizes):
            raise ValueError(f"Augmentation.max_size must be at least the largest size, got {self.max_size}")
        if self.vote is not None and not 0 < self.vote <= 1:
            raise ValueError(f"Augmentation.vote must be an IoU above 0 and up to 1, or None, got {self.vote}")


def check_augmentable(model: nn.Module, augmentation: Augmentation) -> None:
    """Raise TypeError or ValueError for a model that cannot be asked twice, or whose joints have no mirror image."""
    if not isinstance(model, MaskRCNN | Unshared):
        raise TypeError(f"test-time augmentation needs a MaskRCNN, got {type(model).__name__}")
    if model.keypoint_head is not None and augmentation.flip and augmentation.flip_pairs is None:
        raise ValueError(
            "mirrored keypoints need flip_pairs, the joints that change places; CocoDataset.flip_pairs has them, "
            "() says that there are none"
        )


def detect_views(model: MaskRCNN | Unshared, image: Tensor, augmentation: Augmentation) -> tuple[Detections, Size]:
    """What the model finds in all views of an image together, in the pixels of the largest view; and that view's size.

    image  [3, H, W], uint8 or float in [0, 1]

    With one size and no mirror this is exactly what the model finds by itself. The views' features are all kept until
    the masks are done: 1.4 GB for a ResNet-FPN, an image of 4 : 3 and the sizes of Appendix B.
    """
    check_augmentable(model, augmentation)
    batches = views(image, augmentation)
    frame = max((batch.sizes[0] for batch in batches), key=math.prod)
    maps, parts, proposer = [], [], None
    if isinstance(model, Unshared):
        model, proposer = model.detector, model.proposer
    for batch in batches:
        batch = batch.to(model.pixel_mean.device)
        features, proposals = look(model, batch)
        if proposer is not None:
            _, proposals = look(proposer, batch)
        found = model.detect(features, proposals, batch, boxes_only=True)[0]
        parts.append(replace(found, boxes=out_of_view(found.boxes, batch.sizes[0], frame, batch.mirrored[0])))
        maps.append(features)
    box = model.config.box
    merged = merge_boxes(parts, box.nms_threshold, box.detections_per_image, augmentation.vote)
    asked = [
        replace(merged, boxes=into_view(merged.boxes, frame, batch.sizes[0], batch.mirrored[0])) for batch in batches
    ]
    mirrored = [batch.mirrored[0] for batch in batches]
    if model.mask_head is not None:
        probs = [model.detect_masks(features, [part])[0].mask_probs for features, part in zip(maps, asked)]
        merged = replace(merged, mask_probs=mean_masks(probs, mirrored))
    if model.keypoint_head is not None:
        logits = [model.keypoint_maps(features, [part])[0] for features, part in zip(maps, asked)]
        rows, mean = logits[0][0], mean_maps([part for _, part in logits], mirrored, augmentation.flip_pairs or ())
        keypoints = torch.zeros(len(merged), mean.shape[1], 3, device=mean.device)
        keypoints[rows] = keypoint_ops.decode(mean, merged.boxes[rows])
        merged = replace(merged, keypoints=keypoints)
    return merged, frame


# ---------------------------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------------------------


def views(image: Tensor, augmentation: Augmentation) -> list[ImageBatch]:
    """An image ``[3, H, W]`` at every size, and mirrored, each as a batch of one."""
    original = (image.shape[1], image.shape[2])
    batches = []
    for size in augmentation.sizes:
        resized, _ = resize(image, Target.empty((1, 1)), size, augmentation.max_size)
        for mirrored in (False, True) if augmentation.flip else (False,):
            pixels = resized.flip(-1) if mirrored else resized
            batches.append(replace(ImageBatch.collate([pixels], [original]), mirrored=[mirrored]))
    return batches


def into_view(boxes: Tensor, original: Size, size: Size, mirrored: bool) -> Tensor:
    """Boxes ``[N, 4]`` of an image (height, width) in the pixels of that image resized to ``size``, then mirrored."""
    boxes = box_ops.clip(box_ops.resize(boxes, original, size), size)
    return box_ops.flip(boxes, size[1]) if mirrored else boxes


def out_of_view(boxes: Tensor, size: Size, original: Size, mirrored: bool) -> Tensor:
    """The inverse of ``into_view``: boxes ``[N, 4]`` of a view of ``size`` in the pixels of the ``original``."""
    boxes = box_ops.flip(boxes, size[1]) if mirrored else boxes
    return box_ops.clip(box_ops.resize(boxes, size, original), original)


# ---------------------------------------------------------------------------------------------------------------------
# Merging
# ---------------------------------------------------------------------------------------------------------------------


def merge_boxes(parts: Sequence[Detections], threshold: float, most: int, vote: float | None = None) -> Detections:
    """The detections of several views of one image, in common pixels, as those of one: their union, thinned by NMS.

    threshold  IoU of the NMS within one class; most detections are kept
    vote       see ``Augmentation``
    """
    union = Detections.cat([Detections(part.boxes, part.scores, part.labels) for part in parts])
    kept = union[batched_nms(union.boxes, union.scores, union.labels, threshold, max_keep=most)]
    return kept if vote is None else replace(kept, boxes=voted_boxes(kept, union, vote))


def voted_boxes(kept: Detections, union: Detections, threshold: float) -> Tensor:
    """Each kept box as the mean, weighted by score, of all boxes of its class with at least this IoU: ``[N, 4]``.

    Source: Gidaris and Komodakis, ICCV 2015, Section 4.
    """
    votes = (box_ops.iou(kept.boxes, union.boxes) >= threshold) & (kept.labels[:, None] == union.labels)
    weights = votes * union.scores  # [N, M]; each box votes for itself, so no row is empty
    return (weights @ union.boxes) / weights.sum(dim=1, keepdim=True)


def mean_masks(probs: Sequence[Tensor], mirrored: Sequence[bool]) -> Tensor:
    """The mean ``[N, M, M]`` of the views' mask probabilities, those of mirrored views turned back."""
    return torch.stack([part.flip(-1) if mirror else part for part, mirror in zip(probs, mirrored)]).mean(dim=0)


def mean_maps(logits: Sequence[Tensor], mirrored: Sequence[bool], pairs: FlipPairs) -> Tensor:
    """The mean ``[N, J, M, M]`` of the views' keypoint logits; in a mirrored view left and right change names."""
    order = keypoint_ops.mirror_order(logits[0].shape[1], pairs)
    turned = [part[:, order].flip(-1) if mirror else part for part, mirror in zip(logits, mirrored)]
    return torch.stack(turned).mean(dim=0)
