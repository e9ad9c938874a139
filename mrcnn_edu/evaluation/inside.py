"""How good the masks and keypoints are where the boxes are right: measured inside the true boxes.

Chapter 15 (measuring). Not in the paper, whose AP counts detection and segmentation together. On little data AP varies
by several points from one random seed to the next; what a branch draws into a given box varies far less.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from mrcnn_edu import boxes as box_ops
from mrcnn_edu.augmentation import into_view
from mrcnn_edu.config import DataConfig
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.loading import val_loader
from mrcnn_edu.evaluation.coco import oks_sigmas
from mrcnn_edu.inference import evaluating, to_original
from mrcnn_edu.matching import split_crowd
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.ops import paste_masks
from mrcnn_edu.structures import Detections, ImageBatch, Target


def measure_inside(
    model: MaskRCNN, dataset: CocoDataset, config: DataConfig, batch_size: int = 8, progress: bool = False
) -> dict[str, float | None]:
    """Mean mask IoU and mean object keypoint similarity when the branches are given the true boxes and classes.

    config   gives the size at which the network sees the images
    returns  ``{"mask_iou": ..., "oks": ...}`` in [0, 1], as far as the model has those branches and the data set the
             truth; the means are over instances, crowd regions and instances without a labelled joint left out; None
             where there is no instance

    Source of the similarity: the COCO keypoint evaluation, with the area of the mask, or of the box without masks.
    """
    values: dict[str, list[Tensor]] = {}
    if model.mask_head is not None and dataset.annotations.regions is not None:
        values["mask_iou"] = [torch.zeros(0)]
    if model.keypoint_head is not None and dataset.joints:
        values["oks"] = [torch.zeros(0)]
    index = {image_id: place for place, image_id in enumerate(dataset.image_ids)}
    with tqdm(total=len(dataset), desc="inside boxes", unit="image", disable=not progress) as bar:
        for batch, _, image_ids in val_loader(dataset, config, batch_size):
            targets = [split_crowd(dataset.target(index[image_id]))[0] for image_id in image_ids]
            for found, target, size in zip(inside(model, batch, targets), targets, batch.original_sizes):
                if "mask_iou" in values:
                    masks = paste_masks(found.mask_probs, target.boxes, size, rule=model.config.conventions.paste)
                    values["mask_iou"].append(mask_iou(masks, target.masks))
                if "oks" in values:
                    values["oks"].append(similarity(found.keypoints, target, oks_sigmas(dataset.joints)))
            bar.update(len(image_ids))
    joined = {name: torch.cat(parts) for name, parts in values.items()}
    return {name: part.mean().item() if len(part) else None for name, part in joined.items()}


def inside(model: MaskRCNN, batch: ImageBatch, targets: list[Target]) -> list[Detections]:
    """What the mask and keypoint branches draw into true boxes, in the pixels of the original images, on the CPU.

    targets  one per image, in the pixels of the original images
    """
    device = model.pixel_mean.device
    given = []
    for target, size, original in zip(targets, batch.sizes, batch.original_sizes):
        boxes = into_view(target.boxes, original, size, mirrored=False)
        given.append(Detections(boxes, torch.ones(len(boxes)), target.labels).to(device))
    with evaluating(model), torch.inference_mode():
        batch = batch.to(device)
        features = model.backbone(model.normalise(batch))
        if model.mask_head is not None:
            given = model.detect_masks(features, given)
        if model.keypoint_head is not None:
            given = model.detect_keypoints(features, given)
    return [to_original(found.to("cpu"), *sizes) for found, *sizes in zip(given, batch.sizes, batch.original_sizes)]


def mask_iou(masks: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union ``[N]`` of masks ``[N, H, W]`` bool with their true ones; 0 for two empty masks."""
    shared, union = (masks & truth).flatten(1).sum(dim=1), (masks | truth).flatten(1).sum(dim=1)
    return shared / union.clamp(min=1)


def similarity(keypoints: Tensor, target: Target, sigmas: tuple[float, ...]) -> Tensor:
    """COCO's object keypoint similarity of ``keypoints [N, J, (x, y, score)]``, one per instance with labelled joints.

    sigmas  how far annotators differ, per joint, relative to the root of the area
    """
    area = box_ops.area(target.boxes) if target.masks is None else target.masks.flatten(1).sum(dim=1)
    labelled = target.keypoints[..., 2] > 0  # [N, J]
    distance = (keypoints[..., :2] - target.keypoints[..., :2]).square().sum(dim=-1)
    spread = (2 * torch.tensor(sigmas)).square() * area[:, None].clamp(min=1)
    closeness = (-distance / (2 * spread)).exp() * labelled
    counts = labelled.sum(dim=1)
    return closeness.sum(dim=1)[counts > 0] / counts[counts > 0]
