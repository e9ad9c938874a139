"""A trained model as one program of fixed sizes: what ``torch.export`` needs, and what it then gives.

Chapter 12 (the whole model) and Chapter 18 (your own data).

``MaskRCNN.forward`` answers with as many rows as there are instances and checks what it is given. A program for other
machines wants neither: every tensor in it has one size, whatever the image holds. So ``FixedSize`` says the same with
rows that may be empty, whose score is 0. Its ops are our compiled ones: where the program runs, ``mrcnn_edu.ops`` must
have been imported. There is no ONNX form: its exporter would need these ops written a second time, in ONNX's own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrcnn_edu import boxes as box_ops
from mrcnn_edu.models.mask_head import own_masks
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.models.roi_features import RoIFeatures, as_rois, assign_levels
from mrcnn_edu.models.rpn import Guess
from mrcnn_edu.ops import compiled
from mrcnn_edu.structures import ImageBatch, Size


class FixedSize(nn.Module):
    """Boxes and masks of one image of a fixed size, as tensors of fixed sizes.

    model  in evaluation mode afterwards; without keypoints, whose maps are enlarged to the size of each box
    size   (height, width) of the image, pixels

    Raises ValueError for a model with keypoints or on C4, RuntimeError where the ops are not compiled.
    """

    def __init__(self, model: MaskRCNN, size: Size) -> None:
        super().__init__()
        if model.keypoint_head is not None:
            raise ValueError("a program of fixed sizes has no keypoints; build the model with keypoint=None")
        if model.res5 is not None:
            raise ValueError("a program of fixed sizes needs a feature pyramid or c5, not c4")
        if compiled.MISSING is not None:
            raise RuntimeError(f"a program needs the compiled ops: {compiled.MISSING}")
        self.model, self.size = model.eval(), size

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """The detections of an image.

        pixels   [1, 3, H, W] RGB in [0, 1]
        returns  "boxes" [D, (x1, y1, x2, y2)] in pixels, "scores" [D] best first, "labels" [D] in 1..K and, with a mask
                 head, "mask_probs" [D, M, M] inside the boxes; D is ``detections_per_image``, unused rows have score 0
        """
        features = self.model.backbone(self.model.normalise(ImageBatch(pixels, [self.size], [self.size])))
        rois, real = self._propose(self.model.rpn(features, self.size))
        boxes, scores, labels = self._classify(features, rois, real)
        found = {"boxes": boxes, "scores": scores, "labels": labels}
        if self.model.mask_head is not None:
            branch = self.model.config.mask
            logits = self.model.mask_head(_pool(self.model.mask_features, features, boxes))
            found["mask_probs"] = own_masks(logits, labels.clamp(min=1), branch.classes, branch.loss)
        return found

    def _propose(self, guess: Guess) -> tuple[Tensor, Tensor]:
        """The best boxes [P, 4] of the RPN, and which rows of them are real; as ``rpn.propose``."""
        rpn, rules = self.model.config.rpn, self.model.config.conventions
        numbers = [torch.full((count,), number) for number, count in enumerate(guess.counts)]
        level = torch.cat(numbers).to(guess.objectness.device)
        offset, kept = 0, []
        for logits in guess.objectness[0].split(guess.counts):
            kept.append(logits.topk(min(rpn.pre_nms[1], len(logits))).indices + offset)
            offset += len(logits)
        rows = torch.cat(kept)
        scores = guess.objectness[0, rows].float().sigmoid()
        boxes = box_ops.decode(guess.deltas[0, rows], guess.anchors[rows], plus_one=rules.plus_one)
        boxes = box_ops.clip(boxes, self.size).float()
        real = box_ops.wide_enough(boxes, rules.proposal_min_size) & (box_ops.area(boxes) > 0)
        # a row that is not real is alone in its group, where it keeps no other one out
        groups = torch.where(real, level[rows], len(guess.counts) + torch.arange(len(rows), device=rows.device))
        best = compiled.nms(boxes, scores, groups, float(rpn.nms_threshold), None)
        kept_scores = torch.where(_marked(best, len(rows)) & real, scores, -1.0)
        top = kept_scores.topk(min(rpn.post_nms[1], len(rows)))
        return boxes[top.indices], top.values >= 0

    def _classify(self, features: dict[str, Tensor], rois: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [D, 4], scores [D] and labels [D] of the box head; as ``box_head.detect_boxes``."""
        box, rules = self.model.config.box, self.model.config.conventions
        class_logits, deltas = self.model.box_head(_pool(self.model.box_features, features, rois))
        scores = F.softmax(class_logits.float(), dim=-1)[:, 1:]  # [P, K]
        labels = torch.arange(1, scores.shape[1] + 1, device=rois.device).expand_as(scores).flatten()
        boxes = box_ops.decode(deltas, rois[:, None], box.delta_weights, rules.plus_one).flatten(0, 1)
        boxes, scores = box_ops.clip(boxes, self.size).float(), scores.flatten()  # [P * K, 4], [P * K]
        wide = box_ops.wide_enough(boxes, rules.detection_min_size) & (box_ops.area(boxes) > 0)
        passing = (scores > box.score_threshold) & wide & real.repeat_interleave(self.model.config.classes)
        chosen = passing.nonzero()[:, 0]
        best = compiled.nms(boxes[chosen], scores[chosen], labels[chosen], float(box.nms_threshold), None)
        top = torch.where(_marked(chosen[best], len(scores)), scores, 0.0).topk(
            min(box.detections_per_image, len(scores))
        )
        found = top.values > 0
        return boxes[top.indices] * found[:, None], top.values, labels[top.indices] * found


def _marked(rows: Tensor, count: int) -> Tensor:
    """Which of so many rows are named, [count] bool: a size that does not depend on how many are."""
    marks = torch.zeros(count, dtype=torch.bool, device=rows.device)
    return marks.index_put((rows,), torch.ones((), dtype=torch.bool, device=rows.device))


def _pool(layer: RoIFeatures, features: dict[str, Tensor], boxes: Tensor) -> Tensor:
    """What a head sees of the boxes [N, 4] of the one image; as ``RoIFeatures``, whose checks look at values."""
    rois = as_rois([boxes])
    numbers = [int(level[1:]) for level in layer.strides]
    levels = assign_levels(boxes, numbers[0], numbers[-1], layer.level_size, layer.level_rule, layer.level_epsilon)
    scales = [1 / stride for stride in layer.strides.values()]
    return compiled.roi_features(
        layer.layer, [features[level] for level in layer.strides], rois, levels - numbers[0], (layer.size, layer.size),
        scales, layer.samples_per_bin, layer.aligned, "max" if layer.layer == "roi_pool" else layer.mode,
    )  # fmt: skip


def export_program(model: MaskRCNN, size: Size) -> torch.export.ExportedProgram:
    """The model as a program for one image of (height, width) ``size``; ``torch.export.save`` writes it to a .pt2 file.

    Raises as ``FixedSize`` does, and ValueError for a size that is no multiple of 32.
    """
    if size[0] % 32 or size[1] % 32:
        raise ValueError(f"height and width must be multiples of 32, got {size[0]} x {size[1]}")
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.export.export(FixedSize(model, size), (torch.zeros(1, 3, *size, device=device),), strict=False)


def save_program(model: MaskRCNN, size: Size, path: Path) -> None:
    """Export the model and write it; ``torch.export.load`` reads it where ``mrcnn_edu.ops`` has been imported."""
    torch.export.save(export_program(model, size), path)
