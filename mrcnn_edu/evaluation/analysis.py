"""What goes wrong where: which class is taken for which, and what kind of mistake each detection is.

Chapter 15 (measuring). Source of the kinds of error: Hoiem et al. 2012, "Diagnosing error in object detectors", as the
COCO toolkit names them.

AP tells how much is wrong; these tell what. Both read COCO-results lists, so any detector's results can be looked at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from mrcnn_edu.data.annotations import Faults, read_json
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.evaluation.coco import ground_truth
from mrcnn_edu.evaluation.results import FIELDS, Result, check_results

HIT = 0.5  # IoU from which an instance counts as found
NEAR = 0.1  # IoU from which a mistake has to do with an instance
ERRORS = ("correct", "localisation", "similar", "other", "background", "missed")


@dataclass(frozen=True)
class Scene:
    """One image: detections, best first, and single instances, with labels 1..K.

    overlap  [D, G] IoU of detections with instances
    hidden   [D] bool, more than half inside a crowd region
    """

    found: list[int]
    truth: list[int]
    overlap: np.ndarray
    hidden: np.ndarray


def confusion(
    dataset: CocoDataset,
    results: list[Result],
    kind: Literal["box", "mask"] = "box",
    score_threshold: float = 0.5,
) -> np.ndarray:
    """Which class is taken for which, [K + 1, K + 1] int64: row is the truth, column the detection, 0 is nothing.

    Detections of at least the score take, best first, the free instance they overlap most, of whatever class, if the
    IoU is 0.5 or more. What is found where nothing is stands in row 0, what is not found in column 0.
    """
    table = np.zeros((len(dataset.categories) + 1,) * 2, dtype=np.int64)
    for scene in scenes(dataset, results, kind, score_threshold):
        free = np.ones(len(scene.truth), dtype=bool)
        for label, overlap, hidden in zip(scene.found, scene.overlap, scene.hidden):
            best = _best(overlap, free, HIT)
            if best is not None:
                free[best] = False
                table[scene.truth[best], label] += 1
            elif not hidden:
                table[0, label] += 1
        for index in free.nonzero()[0]:
            table[scene.truth[index], 0] += 1
    return table


def errors(
    dataset: CocoDataset,
    results: list[Result],
    kind: Literal["box", "mask"] = "box",
    groups: Mapping[str, str] | None = None,
) -> dict[str, dict[str, int]]:
    """What each class's detections are, ``{class: {"correct": 12, ...}}`` with the keys of ``ERRORS``.

    groups   which group a class belongs to, by name; None: its "supercategory" in the annotation file

    Of each class the best detections are looked at, as many as it has instances. ``correct`` ones take, best first, a
    free instance of their class with an IoU of 0.5. The others are by what they touch with an IoU of 0.1: their own
    class is a matter of ``localisation`` (or found twice), one of the same group ``similar``, any ``other`` one, or
    nothing but ``background``. ``missed`` instances were found by none of these detections.
    """
    names = dataset.categories.names
    group = [None, *(_groups(dataset) if groups is None else [groups.get(name) for name in names])]
    counts = {name: dict.fromkeys(ERRORS, 0) for name in names}
    for scene in scenes(dataset, _best_of_each_class(dataset, results), kind):
        free, truth = np.ones(len(scene.truth), dtype=bool), np.array(scene.truth, dtype=np.int64)
        same_group = np.array([[group[a] is not None and group[a] == group[b] for b in truth] for a in scene.found])
        for row, (label, overlap, hidden) in enumerate(zip(scene.found, scene.overlap, scene.hidden)):
            own, near = truth == label, overlap >= NEAR
            best = _best(overlap, free & own, HIT)
            if best is not None:
                free[best] = False
                verdict = "correct"
            elif (near & own).any():
                verdict = "localisation"
            elif near.any():
                verdict = "similar" if (near & same_group[row]).any() else "other"
            elif hidden:
                continue
            else:
                verdict = "background"
            counts[names[label - 1]][verdict] += 1
        for index in free.nonzero()[0]:
            counts[names[truth[index] - 1]]["missed"] += 1
    return counts


def scenes(
    dataset: CocoDataset, results: list[Result], kind: Literal["box", "mask"] = "box", score_threshold: float = 0.0
) -> Iterator[Scene]:
    """The images one by one, results of at least the score beside the truth."""
    check_results(dataset, results, kind)
    label, field = {c.id: number for number, c in enumerate(dataset.categories.categories, start=1)}, FIELDS[kind]
    truth, found = defaultdict(list), defaultdict(list)
    for annotation in ground_truth(dataset, masks=kind == "mask"):
        truth[annotation["image_id"]].append(annotation)
    for result in sorted(results, key=lambda result: -result["score"]):
        if result["score"] >= score_threshold:
            found[result["image_id"]].append(result)
    for image_id in dataset.image_ids:
        shapes = [result[field] for result in found[image_id]]
        single, crowd = ([a for a in truth[image_id] if a["iscrowd"] == flag] for flag in (0, 1))
        covered = _overlap(shapes, [a[field] for a in crowd], crowd=1)
        yield Scene(
            [label[result["category_id"]] for result in found[image_id]],
            [label[annotation["category_id"]] for annotation in single],
            _overlap(shapes, [annotation[field] for annotation in single], crowd=0),
            covered.max(axis=1, initial=0.0) > 0.5,
        )


def _overlap(found: list[Any], truth: list[Any], crowd: int) -> np.ndarray:
    """IoU [D, G] of boxes or run lengths; the share of the detection inside where the truth is a crowd."""
    if not found or not truth:
        return np.zeros((len(found), len(truth)))
    if isinstance(found[0], list):
        found, truth = (np.array(boxes, dtype=np.float64) for boxes in (found, truth))
    return np.asarray(coco_mask.iou(found, truth, [crowd] * len(truth)))


def _best(overlap: np.ndarray, allowed: np.ndarray, least: float) -> int | None:
    """The allowed instance that is overlapped most, if that is enough."""
    if not allowed.any():
        return None
    best = int(np.where(allowed, overlap, -1.0).argmax())
    return best if overlap[best] >= least else None


def _best_of_each_class(dataset: CocoDataset, results: list[Result]) -> list[Result]:
    """Of each class the best results, as many as it has instances."""
    single = dataset.annotations.labels[~dataset.annotations.crowd].numpy()
    instances = np.bincount(single, minlength=len(dataset.categories) + 1)
    left = {c.id: int(instances[number]) for number, c in enumerate(dataset.categories.categories, start=1)}
    kept = []
    for result in sorted(results, key=lambda result: -result["score"]):
        if left[result["category_id"]] > 0:
            left[result["category_id"]] -= 1
            kept.append(result)
    return kept


def _groups(dataset: CocoDataset) -> list[str | None]:
    """The supercategory of each class, in label order; None where the file names none."""
    file = Path(dataset.annotations_file)
    entries = read_json(file, Faults(str(file), strict=False))["categories"]
    named = {entry.get("id"): entry.get("supercategory") for entry in entries if isinstance(entry, dict)}
    return [named.get(category.id) for category in dataset.categories.categories]
