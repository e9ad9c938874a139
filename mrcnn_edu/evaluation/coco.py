"""Average precision as COCO defines it, for boxes, masks and keypoints: pycocotools' numbers, without its traps.

Chapter 15 (measuring). Paper: Section 4, "COCO metrics including AP (averaged over IoU thresholds)".

pycocotools does the counting, or faster-coco-eval where it is installed, which gives the same numbers to the last digit
four to twelve times as fast. Everything they are given is checked and renumbered first: pycocotools reads an annotation
id of 0 as "no match", loses annotations with the same id, fails on an empty list and counts a NaN box as a hit.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mrcnn_edu.data.annotations import Faults, read_json
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.evaluation.results import Kind, Result, check_results, to_coco_results
from mrcnn_edu.masks import rle_encode
from mrcnn_edu.ops import PasteRule
from mrcnn_edu.structures import Detections

Number = float | None  # None where there is no ground truth to measure on
Counter = Literal["pycocotools", "faster-coco-eval", "cityscapes"]

# How far annotators of COCO's 17 joints differ from each other, relative to the square root of an instance's area.
COCO_SIGMAS = (
    0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072,
    0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089,
)  # fmt: skip
COCO_NAMES = {"box": "bbox", "mask": "segm", "keypoint": "keypoints"}
SIZE_LIMITS = (32.0, 96.0)  # px: "small" is below 32 x 32, "large" above 96 x 96


@dataclass(frozen=True)
class Metrics:
    """The numbers of one kind, each in [0, 1], or None where the data set has nothing of that sort.

    numbers    AP (mean over IoU 0.50:0.05:0.95 and over classes), AP50, AP75, APs, APm, APl (by the instance's area),
               and the recalls AR1, AR10, AR100 (at most so many detections per image), ARs, ARm, ARl; for keypoints, at
               most 20 detections per image and no small instances: AP, AP50, AP75, APm, APl, AR, AR50, AR75, ARm, ARl
    per_class  the same numbers for each class by name
    precision  [T, R, K]: of T = 10 IoU thresholds, R = 101 levels of recall and K classes; -1 where nothing is to find
    """

    numbers: dict[str, Number]
    per_class: dict[str, dict[str, Number]]
    precision: np.ndarray = field(repr=False, compare=False)

    def __getitem__(self, name: str) -> Number:
        return self.numbers[name]


@dataclass(frozen=True)
class Evaluation:
    """What was measured, by kind, and on what.

    kinds        {"box" | "mask" | "keypoint": Metrics}
    images       how many were evaluated
    instances    annotations of the ground truth, crowd regions not counted
    detections   {kind: how many}
    size_limits  px, the sides that divide small from medium and medium from large; empty where nobody asks
    sigmas       of the object keypoint similarity, one per joint; empty without keypoints
    counter      who counted
    """

    kinds: dict[str, Metrics]
    images: int
    instances: int
    detections: dict[str, int]
    size_limits: tuple[float, ...]
    sigmas: tuple[float, ...]
    counter: Counter

    def __getitem__(self, kind: str) -> Metrics:
        return self.kinds[kind]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for ``json.dump``."""
        kinds = {kind: {**metrics.numbers, "per_class": metrics.per_class} for kind, metrics in self.kinds.items()}
        return {
            **kinds,
            "images": self.images,
            "instances": self.instances,
            "detections": self.detections,
            "size_limits": list(self.size_limits),
            "sigmas": list(self.sigmas),
            "counter": self.counter,
        }


def evaluate(
    dataset: CocoDataset,
    predictions: Mapping[int, Detections],
    kinds: Sequence[Kind] | None = None,
    area_scale: float = 1.0,
    sigmas: Sequence[float] | None = None,
    paste: PasteRule = "continuous",
) -> Evaluation:
    """COCO's AP and AR of predictions on a data set.

    predictions  Detections by image id, in the pixels of the original images; an image left out has no detections
    kinds        what to measure out of "box", "mask", "keypoint"; None: all that the data set and the predictions have
    area_scale   the sides 32 and 96 px that divide small, medium and large are multiplied by this; for images much
                 smaller than COCO's, in which nothing is 96 px large
    sigmas       of the keypoints, one per joint; COCO's own for 17 joints, else their mean for every joint (0.067)
    paste        how masks are put into the image, see ``ops.paste_masks``

    Nothing predicted gives 0. Raises ValueError for predictions that do not fit the data set or are not finite.
    """
    kinds = available_kinds(dataset, predictions) if kinds is None else kinds
    results = {kind: to_coco_results(dataset, predictions, kind, paste) for kind in kinds}
    return evaluate_results(dataset, results, area_scale, sigmas)


def available_counter() -> Counter:
    """Who counts: faster-coco-eval where it is installed, else pycocotools."""
    return "faster-coco-eval" if find_spec("faster_coco_eval") is not None else "pycocotools"


def available_kinds(dataset: CocoDataset, predictions: Mapping[int, Detections]) -> tuple[Kind, ...]:
    """Boxes, and masks and keypoints where both the data set and every detection have them."""
    found = [detections for detections in predictions.values() if len(detections)]
    kinds: list[Kind] = ["box"]
    if dataset.annotations.regions is not None and all(part.mask_probs is not None for part in found):
        kinds.append("mask")
    if dataset.joints and all(part.keypoints is not None for part in found):
        kinds.append("keypoint")
    return tuple(kinds)


def evaluate_results(
    dataset: CocoDataset,
    results: Mapping[Kind, list[Result]],
    area_scale: float = 1.0,
    sigmas: Sequence[float] | None = None,
    counter: Counter | None = None,
) -> Evaluation:
    """As ``evaluate``, from COCO-results lists by kind, such as ``load_results`` reads; the lists are not changed.

    counter  who counts; None: ``available_counter``
    """
    counter = available_counter() if counter is None else counter
    if not 0 < area_scale < np.inf:
        raise ValueError(f"area_scale must be a positive number, got {area_scale}")
    for kind, entries in results.items():
        check_results(dataset, entries, kind)
    if "mask" in results and dataset.annotations.regions is None:
        raise ValueError(f"{dataset.annotations_file} has no masks; leave 'mask' out of the kinds")
    sigmas = oks_sigmas(dataset.joints, sigmas) if "keypoint" in results else ()
    limits = (SIZE_LIMITS[0] * area_scale, SIZE_LIMITS[1] * area_scale)
    truth = ground_truth(dataset, masks="mask" in results)
    measured = {
        kind: _measure(dataset, truth, entries, kind, limits, sigmas, counter) for kind, entries in results.items()
    }
    return Evaluation(
        kinds=measured,
        images=len(dataset),
        instances=sum(not annotation["iscrowd"] for annotation in truth),
        detections={kind: len(entries) for kind, entries in results.items()},
        size_limits=limits,
        sigmas=sigmas,
        counter=counter,
    )


def ground_truth(dataset: CocoDataset, masks: bool = True) -> list[dict[str, Any]]:
    """The annotations the data set has accepted, as pycocotools wants them: boxes and areas as the file states them.

    masks  with "segmentation" as run lengths

    The data set's own boxes are clipped to the image and in float32, which is right for training, but a ground truth
    must not depend on how we read it: so bbox, area and keypoints come from the file. A missing area is that of the
    mask, or else of the box. Raises OSError or ValueError when the file has changed since the data set was made.
    """
    table, file = dataset.annotations, dataset.annotations_file
    entries: dict[int, dict[str, Any]] = {}
    for entry in read_json(file, Faults(str(file), strict=False)).get("annotations", []):
        if isinstance(entry, dict) and type(entry.get("id")) is int:
            entries.setdefault(entry["id"], entry)
    truth = []
    for index, image_id in enumerate(dataset.image_ids):
        for row in range(*table.first[index : index + 2].tolist()):
            entry = entries.get(int(table.ids[row]), {})
            if entry.get("image_id") != image_id:
                raise ValueError(f"{file} has changed since it was read: annotation {int(table.ids[row])} is gone")
            rle = rle_encode(table.mask(row, dataset.size(index))) if masks and table.regions is not None else None
            truth.append(_annotation(entry, rle, dataset.joints))
    return truth


def _annotation(entry: dict[str, Any], rle: dict[str, Any] | None, joints: int) -> dict[str, Any]:
    """What the three kinds of evaluation read of one annotation."""
    area = entry.get("area")
    if area is None:
        area = entry["bbox"][2] * entry["bbox"][3] if rle is None else int(coco_mask.area(rle))
    keypoints = list(entry.get("keypoints") or [0] * (3 * joints))
    return {
        "image_id": entry["image_id"],
        "category_id": entry["category_id"],
        "bbox": list(entry["bbox"]),
        "area": area,
        "iscrowd": int(entry.get("iscrowd", 0)),
        "segmentation": rle,
        "keypoints": keypoints,
        "num_keypoints": sum(v > 0 for v in keypoints[2::3]),
    }


def oks_sigmas(joints: int, sigmas: Sequence[float] | None = None) -> tuple[float, ...]:
    """The given sigmas, checked; without any COCO's own for 17 joints, else their mean for every joint."""
    if joints == 0:
        raise ValueError("the data set has no keypoints; leave 'keypoint' out of the kinds")
    if sigmas is None:
        return COCO_SIGMAS if joints == len(COCO_SIGMAS) else (float(np.mean(COCO_SIGMAS)),) * joints
    if len(sigmas) != joints or not all(0 < sigma < np.inf for sigma in sigmas):
        raise ValueError(f"sigmas must be {joints} positive numbers, one per joint, got {list(sigmas)}")
    return tuple(map(float, sigmas))


def _measure(
    dataset: CocoDataset,
    truth: list[dict[str, Any]],
    results: list[Result],
    kind: Kind,
    limits: tuple[float, float],
    sigmas: tuple[float, ...],
    counter: Counter,
) -> Metrics:
    """One kind, for the classes that have it."""
    categories = [c for c in dataset.categories.categories if kind != "keypoint" or c.keypoints]
    images = [{"id": i, "height": h, "width": w} for i, (h, w) in zip(dataset.image_ids, dataset.sizes)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports to the terminal
        parts = [_as_coco(images, categories, entries, counter) for entries in (truth, _with_area(results, kind))]
        evaluator = _classes(counter)[1](*parts, COCO_NAMES[kind])
        parameters = evaluator.params
        small, large = limits[0] ** 2, limits[1] ** 2
        ranges = [[0, 1e10], [0, small], [small, large], [large, 1e10]]
        parameters.areaRng = ranges if kind != "keypoint" else [ranges[0], *ranges[2:]]
        if kind == "keypoint":
            parameters.kpt_oks_sigmas = np.array(sigmas)
        evaluator.evaluate()
        evaluator.accumulate()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]  # [T, R, K, A, D], [T, K, A, D]
    places = {category_id: place for place, category_id in enumerate(evaluator.params.catIds)}
    per_class = {}
    for category in categories:
        name = category.name if category.name not in per_class else f"{category.name} ({category.id})"
        place = [places[category.id]]
        per_class[name] = _summary(precision[:, :, place], recall[:, place], kind)
    order = [places[category.id] for category in categories]
    return Metrics(_summary(precision, recall, kind), per_class, precision[:, :, order, 0, -1])


def _summary(precision: np.ndarray, recall: np.ndarray, kind: Kind) -> dict[str, Number]:
    """The 12 numbers (10 for keypoints) from precision [T, R, K, A, D] and recall [T, K, A, D].

    T IoU thresholds, R recall levels, K classes, A area ranges (all first), D limits of detections per image.
    """
    sizes = ("m", "l") if kind == "keypoint" else ("s", "m", "l")
    numbers = {
        "AP": _mean(precision[..., 0, -1]),
        "AP50": _mean(precision[0, ..., 0, -1]),
        "AP75": _mean(precision[5, ..., 0, -1]),
        **{f"AP{size}": _mean(precision[..., index, -1]) for index, size in enumerate(sizes, start=1)},
    }
    if kind == "keypoint":
        numbers |= {"AR": _mean(recall[..., 0, -1])}
        numbers |= {"AR50": _mean(recall[0, ..., 0, -1]), "AR75": _mean(recall[5, ..., 0, -1])}
    else:
        numbers |= {f"AR{most}": _mean(recall[..., 0, place]) for place, most in enumerate((1, 10, 100))}
    return numbers | {f"AR{size}": _mean(recall[..., index, -1]) for index, size in enumerate(sizes, start=1)}


def _mean(values: np.ndarray) -> Number:
    """The mean over what was measured; pycocotools marks by -1 what has no ground truth."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else None


def _classes(counter: Counter) -> tuple[type, type]:
    """The classes that hold annotations and that count."""
    if counter == "pycocotools":
        return COCO, COCOeval
    faster = import_module("faster_coco_eval")
    return faster.COCO, faster.COCOeval_faster


def _as_coco(
    images: list[dict[str, Any]], categories: Sequence[Any], annotations: list[dict[str, Any]], counter: Counter
) -> Any:
    """The counter's view of a ground truth or of results, numbered from 1: pycocotools takes 0 for "no match"."""
    coco = _classes(counter)[0]()
    coco.dataset = {
        "images": images,
        "categories": [{"id": category.id, "name": category.name} for category in categories],
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco


def _with_area(results: list[Result], kind: Kind) -> list[dict[str, Any]]:
    """Results with the area by which pycocotools counts unmatched ones as small, medium or large."""
    if kind == "box":
        areas = [result["bbox"][2] * result["bbox"][3] for result in results]
    elif kind == "mask":
        areas = [coco_mask.area(result["segmentation"]) for result in results]  # of a list of over 255 it fails
    else:
        corners = [(result["keypoints"][0::3], result["keypoints"][1::3]) for result in results]
        areas = [(max(x) - min(x)) * (max(y) - min(y)) for x, y in corners]
    return [{**result, "area": float(area), "iscrowd": 0} for result, area in zip(results, areas)]
