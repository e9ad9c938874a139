"""Detections as COCO-results lists, the format of the evaluation server, and back from a file: always checked.

Chapter 15 (measuring). Source: "Results Format" at cocodataset.org.

A result is ``{"image_id", "category_id", "score"}`` with one of ``"bbox": [x, y, w, h]`` (pixels),
``"segmentation": {"size", "counts"}`` (compressed run lengths) or ``"keypoints": [x1, y1, s1, x2, ...]`` (pixels).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from mrcnn_edu.data.coco import CategoryMap, CocoDataset
from mrcnn_edu.masks import rle_counts, rle_encode, rle_size
from mrcnn_edu.ops import PasteRule, paste_masks
from mrcnn_edu.structures import Detections, Size

Kind = Literal["box", "mask", "keypoint"]
Result = dict[str, Any]

FIELDS: dict[str, str] = {"box": "bbox", "mask": "segmentation", "keypoint": "keypoints"}
FILES: dict[str, str] = {"box": "results-bbox.json", "mask": "results-segm.json", "keypoint": "results-keypoints.json"}


def to_coco_results(
    dataset: CocoDataset, predictions: Mapping[int, Detections], kind: Kind, paste: PasteRule = "continuous"
) -> list[Result]:
    """One kind of result for all detections, in the order of the predictions and best first within an image.

    predictions  Detections by image id, in the pixels of the original image; images without an entry have none
    paste        how masks are put into the image, see ``ops.paste_masks``; the model's ``conventions.paste``
    returns      a list of dicts; keypoints only for the classes that have some

    Masks are pasted one at a time, so 100 masks of a 12-megapixel image need the memory of one. Raises ValueError for
    unknown images, labels outside 1..K, numbers that are not finite and detections without the part asked for.
    """
    sizes = dict(zip(dataset.image_ids, dataset.sizes))
    results: list[Result] = []
    for image_id, detections in predictions.items():
        if image_id not in sizes:
            raise ValueError(f"there is no image {image_id!r} in {dataset.annotations_file}, so it has no predictions")
        results += image_results(dataset.categories, image_id, sizes[image_id], detections, kind, paste)
    return results


def image_results(
    categories: CategoryMap, image_id: int, size: Size, detections: Detections, kind: Kind, paste: PasteRule
) -> Iterator[Result]:
    """As ``to_coco_results``, for one image of (height, width) ``size``, which need not belong to a data set."""
    detections = detections.to("cpu")
    part = {"box": detections.boxes, "mask": detections.mask_probs, "keypoint": detections.keypoints}[kind]
    if part is None and len(detections):
        raise ValueError(f"the detections of image {image_id} hold no {kind}s; leave {kind!r} out of the kinds")
    for name, value in (("scores", detections.scores), (FIELDS[kind], part)):
        if len(detections) and not bool(torch.isfinite(value).all()):
            raise ValueError(f"the {name} predicted for image {image_id} hold NaN or infinity")
    classes = len(categories)
    for row in torch.argsort(detections.scores, descending=True, stable=True).tolist():
        label = int(detections.labels[row])
        if not 1 <= label <= classes:
            raise ValueError(f"image {image_id}: labels must lie in 1..{classes}, got {label}")
        category = categories.categories[label - 1]
        result = {"image_id": int(image_id), "category_id": category.id, "score": float(detections.scores[row])}
        if kind == "box":
            x1, y1, x2, y2 = part[row].tolist()
            result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        elif kind == "mask":
            mask = paste_masks(part[row : row + 1], detections.boxes[row : row + 1], size, rule=paste)[0]
            result["segmentation"] = rle_encode(mask)
        elif category.keypoints:
            result["keypoints"] = part[row].reshape(-1).tolist()
        else:
            continue
        yield result


def merge_results(parts: Sequence[list[Result]], image_ids: Sequence[int]) -> list[Result]:
    """The results of several processes as one list, in the order of the images; the first that has an image counts.

    So what a sampler has handed out twice to fill a batch cannot count twice.
    """
    found: dict[int, list[Result]] = {}
    for part in parts:
        own: dict[int, list[Result]] = {}
        for result in part:
            own.setdefault(result["image_id"], []).append(result)
        found = own | found
    return [result for image_id in image_ids for result in found.get(image_id, [])]


def save_results(path: str | os.PathLike, results: list[Result]) -> None:
    """Write results as JSON, readable by ``load_results``, pycocotools and the evaluation server."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(results, file, allow_nan=False)


def load_results(path: str | os.PathLike, dataset: CocoDataset, kind: Kind) -> list[Result]:
    """The results in a file, checked against the data set they were computed on.

    Raises OSError when the file cannot be read and ValueError, naming the file and the entry, for what is no such list.
    """
    with open(path, encoding="utf-8") as file:
        try:
            results = json.load(file, parse_constant=_refuse_constant)
            check_results(dataset, results, kind)
        except (ValueError, RecursionError) as error:  # a JSONDecodeError and a UnicodeDecodeError are ValueErrors
            raise ValueError(f"{os.fspath(path)}: {error}") from error
    return results


def check_results(dataset: CocoDataset, results: Any, kind: Kind) -> None:
    """Raise ValueError, naming the entry and the field, unless this is a list of results of that kind on that data set.

    pycocotools itself takes what it gets: an unknown image is an assertion, a NaN counts as a hit, a mask of another
    size reads memory that is not its own.
    """
    if kind not in FIELDS:
        raise ValueError(f"kind must be 'box', 'mask' or 'keypoint', got {kind!r}")
    if not isinstance(results, list):
        raise ValueError(f"results must be a list of objects, got {type(results).__name__}")
    sizes = dict(zip(dataset.image_ids, dataset.sizes))
    known = {category.id: len(category.keypoints) for category in dataset.categories.categories}
    for index, result in enumerate(results):
        try:
            _check_result(result, kind, sizes, known)
        except ValueError as error:
            raise ValueError(f"result {index}: {error}") from error


def _check_result(result: Any, kind: Kind, sizes: dict[int, Size], known: dict[int, int]) -> None:
    wanted = ("image_id", "category_id", "score", FIELDS[kind])
    if not isinstance(result, dict) or any(key not in result for key in wanted):
        got = sorted(map(str, result)) if isinstance(result, dict) else type(result).__name__
        raise ValueError(f"a {kind} result needs {', '.join(wanted)}, got {got}")
    image_id, category_id = result["image_id"], result["category_id"]
    if type(image_id) is not int or image_id not in sizes:
        raise ValueError(f"image_id {image_id!r} is not among the {len(sizes)} images of the data set")
    if type(category_id) is not int or category_id not in known:
        raise ValueError(f"category_id {category_id!r} is not one of {sorted(known)}")
    if not _finite([result["score"]], 1):
        raise ValueError(f"score must be a finite number, got {result['score']!r}")
    if kind == "box" and not (_finite(result["bbox"], 4) and min(result["bbox"][2:]) >= 0):
        raise ValueError(f"bbox must be four finite numbers x, y, w >= 0, h >= 0, got {result['bbox']!r}")
    if kind == "keypoint" and not (known[category_id] and _finite(result["keypoints"], 3 * known[category_id])):
        raise ValueError(
            f"keypoints must be {3 * known[category_id]} finite numbers for category {category_id} with its "
            f"{known[category_id]} joints, got {str(result['keypoints'])[:60]}"
        )
    if kind == "mask":
        size = rle_size(result["segmentation"])
        if size != tuple(sizes[image_id]):
            raise ValueError(
                f"the mask is {size[0]} x {size[1]} but image {image_id} is {sizes[image_id][0]} x {sizes[image_id][1]}"
            )
        rle_counts(result["segmentation"])


def _finite(values: Any, count: int) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        # a comparison, since NaN fails it and a whole number too large for a float does not stop it
        and all(type(value) in (int, float) and abs(value) < 1e300 for value in values)
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number; results must be finite")
