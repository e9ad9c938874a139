"""Data distillation: a model's own answers on images nobody has labelled, as more training data.

Chapter 14 (keypoints) and Chapter 21 (bells and whistles). Paper: Appendix B, after [35].

A model trained on labelled images looks at unlabelled ones under test-time augmentation. Its best detections, as many
per image as people have labelled, are written as a COCO file; a model is then trained on both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrcnn_edu.data.coco import CategoryMap, CocoDataset
from mrcnn_edu.data.parts import Subset, Union
from mrcnn_edu.masks import rle_encode
from mrcnn_edu.ops import PasteRule, paste_masks
from mrcnn_edu.structures import Detections, Size
from mrcnn_edu.training.checkpoint import write_json


def expected_counts(labelled: CocoDataset | Subset) -> Tensor:
    """Instances per image of each class in labelled data, crowd regions not counted: ``[K]`` float64."""
    counts = torch.zeros(len(labelled.categories) + 1, dtype=torch.float64)
    for index in range(len(labelled)):
        labels, crowd = labelled.labels(index)
        counts += torch.bincount(labels[~crowd], minlength=len(counts))
    return counts[1:] / len(labelled)


def select(predictions: Mapping[int, Detections], expected: Tensor) -> dict[int, Detections]:
    """The best-scored detections, of each class as many per image, on average, as in labelled data.

    predictions  by image id
    expected     [K], from ``expected_counts``
    returns      the same images; of each class the ``round(expected * images)`` best over all of them, fewer where
                 there are not so many

    That is a threshold on the score, one per class, chosen so that the numbers match [35]. Raises ValueError for a
    label outside 1..K.
    """
    scores = torch.cat([torch.zeros(0), *(found.scores for found in predictions.values())])
    labels = torch.cat([torch.zeros(0, dtype=torch.int64), *(found.labels for found in predictions.values())])
    if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= len(expected):
        raise ValueError(f"labels must lie in 1..{len(expected)}, got {int(labels.min())} to {int(labels.max())}")
    kept = torch.zeros(len(scores), dtype=torch.bool)
    for label, share in enumerate(expected.tolist(), start=1):
        rows = (labels == label).nonzero()[:, 0]
        best = scores[rows].argsort(descending=True, stable=True)[: round(share * len(predictions))]
        kept[rows[best]] = True
    parts = kept.split([len(found) for found in predictions.values()])
    return {image_id: found[part] for (image_id, found), part in zip(predictions.items(), parts)}


def write_annotations(
    path: Path | str,
    unlabelled: CocoDataset | Subset,
    chosen: Mapping[int, Detections],
    categories: CategoryMap,
    first_id: int = 1,
    paste: PasteRule = "continuous",
    joint_score: float = 0.0,
) -> Path:
    """Write detections as the annotations of a COCO file, for the images of ``unlabelled`` and in its folder's names.

    chosen       by the image ids of ``unlabelled``; images without an entry have none
    categories   of the model that found them
    first_id     the images get ids from here on, so that they can stand beside labelled ones
    paste        how masks are put into the image, ``conventions.paste`` of the model
    joint_score  joints with a lower score are marked as not labelled (v = 0), the others as visible (v = 2)

    An instance whose mask comes out empty is left out. Raises OSError when the file cannot be written.
    """
    path, images, annotations = Path(path), [], []
    for index, image_id in enumerate(unlabelled.image_ids):
        height, width = unlabelled.size(index)
        number = first_id + index
        images.append({"id": number, "file_name": unlabelled.file_name(index), "height": height, "width": width})
        found = chosen.get(image_id)
        for row in range(0 if found is None else len(found)):
            one = found[row : row + 1]
            entry = _annotation(one, categories, (height, width), paste, joint_score)
            if entry is not None:
                annotations.append({"id": len(annotations) + 1, "image_id": number, **entry})
    write_json(path, {"images": images, "annotations": annotations, "categories": categories.to_json()})
    return path


def _annotation(
    one: Detections, categories: CategoryMap, size: Size, paste: PasteRule, joint_score: float
) -> dict[str, Any] | None:
    """One detection as COCO states an instance; None for a mask without a pixel."""
    label = int(one.labels[0])
    x1, y1, x2, y2 = one.boxes[0].tolist()
    entry: dict[str, Any] = {
        "category_id": categories.category_id(label),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
        "score": float(one.scores[0]),
    }
    if one.mask_probs is not None:
        mask = paste_masks(one.mask_probs, one.boxes, size, rule=paste)[0]
        if not mask.any():
            return None
        entry |= {"segmentation": rle_encode(mask), "area": int(mask.sum())}
    if one.keypoints is not None and categories.categories[label - 1].keypoints:
        x, y, score = one.keypoints[0].unbind(-1)
        known = score >= joint_score
        joints = torch.stack([x * known, y * known, 2.0 * known], dim=-1)
        entry |= {"keypoints": joints.flatten().tolist(), "num_keypoints": int(known.sum())}
    return entry


def distil(
    predictions: Mapping[int, Detections],
    labelled: CocoDataset | Subset,
    unlabelled: CocoDataset | Subset,
    path: Path | str,
    paste: PasteRule = "continuous",
    joint_score: float = 0.0,
) -> Union:
    """Labelled images and, with their predictions as the truth, unlabelled ones: the data to train the next model on.

    predictions  of a model trained on ``labelled``, for the images of ``unlabelled``, by image id: those of
                 ``inference.predict_dataset`` with an ``Augmentation``
    unlabelled   its own annotations, if it has any, are not looked at
    path         of the COCO file that is written; other arguments as in ``write_annotations``

    Source: Appendix B, after [35].
    """
    chosen = select(predictions, expected_counts(labelled))
    first = max(labelled.image_ids) + 1
    write_annotations(path, unlabelled, chosen, labelled.categories, first, paste, joint_score)
    return with_distilled(labelled, unlabelled, path)


def with_distilled(labelled: CocoDataset | Subset, unlabelled: CocoDataset | Subset, path: Path | str) -> Union:
    """The union that ``distil`` gives, from the file that it has written."""
    return Union(labelled, CocoDataset(unlabelled.images_dir, path, keypoints=labelled.joints > 0))
