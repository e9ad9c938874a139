"""Average precision as Cityscapes defines it: masks only, with rules of its own for groups, small and void regions.

Chapter 18 (real data). Paper: Section 4.5. Source: "Instance-Level Semantic Labeling" at
cityscapes-dataset.com and its evaluation script.

It differs from COCO's in four ways. Recall and precision are those of all thresholds on the score, joined by straight
lines, where COCO takes the best precision at 101 recalls. An overlap must be larger than the threshold, not equal.
Instances under 100 pixels do not count. And a detection that finds nothing is forgiven when more of it than the
threshold lies where nothing can be said: in a group, a small instance, or on classes left out of the evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mrcnn_edu.data.cityscapes import CLASSES, CityscapesDataset
from mrcnn_edu.evaluation.coco import Evaluation, Metrics, Number
from mrcnn_edu.evaluation.results import Result, check_results
from mrcnn_edu.masks import rle_decode

THRESHOLDS = tuple(0.5 + 0.05 * step for step in range(10))  # of the overlap
SMALLEST = 100  # pixels of an instance that counts
# Ids of the classes that the evaluation leaves out: unlabelled, static, ground, parking, rails, bridge, caravan
VOID = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)


@dataclass(frozen=True)
class Found:
    """One detection: its score, its overlap with each region of its class in its image, and what is excused.

    overlaps  {region: IoU}, regions by their value in the image
    excused   share of its pixels on void, groups and small instances
    """

    score: float
    overlaps: dict[int, float]
    excused: float


def evaluate_results(dataset: CityscapesDataset, results: Sequence[Result]) -> Evaluation:
    """Cityscapes' AP and AP50 of a COCO-results list of masks, as the paper's Table 7 has them.

    Raises ValueError for results that do not fit the data set.
    """
    check_results(dataset, list(results), "mask")
    by_image: dict[int, list[Result]] = {}
    for result in results:
        by_image.setdefault(result["image_id"], []).append(result)
    images: dict[int, list[tuple[list[int], list[Found]]]] = {number: [] for number in CLASSES}
    instances = 0
    for index, image_id in enumerate(dataset.image_ids):
        for number, regions, found in _match(dataset.instances(index), by_image.get(image_id, [])):
            images[number].append((regions, found))
            instances += len(regions)
    aps = {number: [average_precision(parts, t) for t in THRESHOLDS] for number, parts in images.items()}
    per_class = {name: _numbers([aps[number]]) for number, name in CLASSES.items()}
    metrics = Metrics(_numbers(list(aps.values())), per_class, np.zeros((0, 101, len(CLASSES))))
    return Evaluation({"mask": metrics}, len(dataset), instances, {"mask": len(results)}, (), (), "cityscapes")


def average_precision(images: Sequence[tuple[list[int], list[Found]]], threshold: float) -> Number:
    """The AP of one class at one overlap, from each image's (instances that count, detections); None without instances.

    Of the detections that overlap an instance by more than the threshold the best is right, the others are wrong.
    """
    right, wrong, missed = [], [], 0
    for regions, found in images:
        for region in regions:
            scores = sorted((one.score for one in found if one.overlaps.get(region, 0.0) > threshold), reverse=True)
            right += scores[:1]
            wrong += scores[1:]
            missed += not scores
        for one in found:
            if max(one.overlaps.values(), default=0.0) <= threshold and one.excused <= threshold:
                wrong.append(one.score)
    if not right and not missed:
        return None
    thresholds = np.unique([*right, *wrong])[::-1]
    true, false = (np.array([(np.array(scores) >= t).sum() for t in thresholds]) for scores in (right, wrong))
    recall = np.concatenate([[0.0], true / (len(right) + missed)])
    precision = np.concatenate([[1.0], true / np.maximum(true + false, 1)])
    return float(((precision[1:] + precision[:-1]) / 2 * np.diff(recall)).sum())


def _match(instances: np.ndarray, results: Sequence[Result]) -> list[tuple[int, list[int], list[Found]]]:
    """For each class of one image: the instances that count, and the detections with their overlaps."""
    sizes = dict(zip(*(part.tolist() for part in np.unique(instances, return_counts=True))))
    void = np.isin(instances, VOID)
    classes = []
    for number in CLASSES:
        regions = {value for value in sizes if value == number or value // 1000 == number}
        counting = [value for value in regions if value >= 1000 and sizes[value] >= SMALLEST]
        found = []
        for result in results:
            if result["category_id"] != number:
                continue
            mask = rle_decode(result["segmentation"]).numpy()
            if not mask.any():
                continue
            inside = dict(zip(*(part.tolist() for part in np.unique(instances[mask], return_counts=True))))
            pixels = int(mask.sum())
            shared = {value: inside[value] for value in regions if value in inside}
            overlaps = {value: count / (pixels + sizes[value] - count) for value, count in shared.items()}
            excused = int(void[mask].sum()) + sum(count for value, count in shared.items() if value not in counting)
            found.append(Found(float(result["score"]), overlaps, excused / pixels))
        classes.append((number, sorted(counting), found))
    return classes


def _numbers(aps: list[list[Number]]) -> dict[str, Number]:
    """AP, the mean over classes and thresholds, and AP50; None where no class has an instance."""
    measured = [row for row in aps if row[0] is not None]
    if not measured:
        return {"AP": None, "AP50": None}
    return {"AP": float(np.mean(measured)), "AP50": float(np.mean([row[0] for row in measured]))}
