"""COCO-format JSON, checked field by field and packed into a few flat arrays.

Chapter 2 (a data set we can trust) and Chapter 18 (your own data). Format: cocodataset.org, "Data format".

A Python list of dicts is copied into every worker process page by page, as soon as reference counts change. Numbers in
flat tensors are not: they have none. So the file is read once, checked, packed, and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from mrcnn_edu.data.coco_json import (
    Category,
    Faults,
    ImageEntry,
    are_numbers,
    brief,
    is_whole,
    new_id,
    read_categories,
    read_images,
    read_json,
)
from mrcnn_edu.masks import check_outlines, check_polygon, compress, polygons_to_mask, rle_counts, rle_size
from mrcnn_edu.structures import Size


@dataclass(frozen=True, eq=False)
class Packed:
    """Many byte strings end to end in one buffer."""

    data: Tensor  # uint8
    offsets: Tensor  # [n + 1] int64

    @classmethod
    def of(cls, strings: Iterable[bytes]) -> Packed:
        """The given strings, in their order."""
        strings = list(strings)
        offsets = np.cumsum([0, *map(len, strings)], dtype=np.int64)
        data = np.frombuffer(b"".join(strings), dtype=np.uint8).copy()
        return cls(torch.from_numpy(data), torch.from_numpy(offsets))

    def __getitem__(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].numpy().tobytes()


@dataclass(frozen=True, eq=False)
class Annotations:
    """A whole annotation file: I images and their A annotations, grouped by image.

    image_ids   [I] int64
    sizes       [I, (h, w)] int64, as the file states them
    files       I file names
    first       [I + 1] int64, where each image's rows begin
    ids         [A] int64
    boxes       [A, (x1, y1, x2, y2)] float32, clipped to the image
    labels      [A] int64, 1..K, positions in ``categories``
    crowd       [A] bool
    keypoints   [A, J, (x, y, v)] float32, zeros where there are none; J may be 0
    regions     A masks as polygons or run lengths, see ``mask``; None for box-only data
    categories  in the order of their ids
    """

    image_ids: Tensor
    sizes: Tensor
    files: Packed
    first: Tensor
    ids: Tensor
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    keypoints: Tensor
    regions: Packed | None
    categories: tuple[Category, ...]

    def mask(self, row: int, size: Size) -> Tensor:
        """The mask ``[h, w]`` bool of one annotation."""
        return _unpack_region(self.regions[row], size)


def read_annotations(
    path: str | Path, strict: bool = True, keypoints: bool = True, images_dir: Path | None = None
) -> tuple[Annotations, list[str]]:
    """Read and check a COCO-format file.

    path        of the JSON file
    strict      raise at the first inconsistency; otherwise drop the faulty part (a polygon, an annotation, an image)
    keypoints   read them where categories name any
    images_dir  folder of the images, whose sizes are then compared as well; None: that is left to who reads them
    returns     the annotations, and one sentence for each part that was dropped

    Raises OSError when the file cannot be read and ValueError, naming file, annotation and field, for what is wrong.
    """
    faults = Faults(str(path), strict)
    content = read_json(Path(path), faults)
    if isinstance(content, dict) and Path(path).name.startswith("image_info"):
        content.setdefault("annotations", [])  # what COCO has of images whose annotations it keeps to itself
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: a COCO file is an object with the list {key!r} among others, found none")
    categories = read_categories(content["categories"], faults)
    images = read_images(content["images"], faults, images_dir)
    reader = _AnnotationReader(faults, categories, images, keypoints)
    reader.read(content["annotations"])
    return _pack(reader), faults.dropped


# ---------------------------------------------------------------------------------------------------------------------
# Annotations
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One checked annotation."""

    id: int
    box: tuple[float, float, float, float]  # x1, y1, x2, y2
    label: int
    crowd: bool
    keypoints: list[float] | None
    region: bytes


class _AnnotationReader:
    """Checks annotations one by one and files their rows with their images."""

    def __init__(
        self, faults: Faults, categories: tuple[Category, ...], images: dict[int, ImageEntry], keypoints: bool
    ) -> None:
        self.faults, self.categories, self.images = faults, categories, images
        self.labels = {category.id: label for label, category in enumerate(categories, start=1)}
        self.joints = {category.id: len(category.keypoints) if keypoints else 0 for category in categories}
        self.rows: dict[int, list[_Row]] = {image_id: [] for image_id in images}
        self.has_masks = False

    def read(self, entries: list[Any]) -> None:
        """Read all annotations. Either all of them need a mask or none: one without, among others with, is a fault."""
        self.has_masks = not entries or any(isinstance(entry, dict) and entry.get("segmentation") for entry in entries)
        known: set[int] = set()
        for index, entry in enumerate(entries):
            number = new_id(entry, "annotation", index, known, self.faults)
            if number is None:
                continue
            known.add(number)
            if is_whole(entry.get("image_id")) and entry["image_id"] in self.faults.images:
                continue
            try:
                image = self._lookup(entry, "image_id", self.images)
                self.rows[entry["image_id"]].append(self._row(entry, image.size))
            except ValueError as error:
                self.faults.add(f"annotation {number}", str(error))

    def _lookup(self, entry: dict[str, Any], field: str, table: dict[int, Any]) -> Any:
        if not is_whole(entry.get(field)) or entry[field] not in table:
            raise ValueError(f"field {field!r} names none of the {len(table)} known, got {brief(entry.get(field))}")
        return table[entry[field]]

    def _row(self, entry: dict[str, Any], size: Size) -> _Row:
        crowd, area = entry.get("iscrowd", 0), entry.get("area", 0)
        if crowd not in (0, 1) or isinstance(crowd, float):
            raise ValueError(f"field 'iscrowd' must be 0 or 1, got {brief(crowd)}")
        if not are_numbers([area], 1) or area < 0:
            raise ValueError(f"field 'area' must be a number of at least 0, got {brief(area)}")
        label = self._lookup(entry, "category_id", self.labels)
        return _Row(
            entry["id"],
            _box(entry.get("bbox"), size),
            label,
            bool(crowd),
            self._keypoints(entry),
            self._region(entry, size) if self.has_masks else b"",
        )

    def _keypoints(self, entry: dict[str, Any]) -> list[float] | None:
        joints, values = self.joints[entry["category_id"]], entry.get("keypoints")
        if not joints:
            return None
        if values is None and not entry.get("num_keypoints"):
            return None
        values = [0] * (3 * joints) if values is None else values
        if not are_numbers(values, 3 * joints):
            raise ValueError(f"field 'keypoints' must hold {joints} times x, y, v, finite, got {brief(values)}")
        visible = values[2::3]
        if not set(visible) <= {0, 1, 2}:
            raise ValueError(f"field 'keypoints': each v must be 0, 1 or 2, got {visible}")
        labelled, stated = joints - visible.count(0), entry.get("num_keypoints")
        if stated is not None and stated != labelled:
            raise ValueError(f"field 'num_keypoints' is {stated!r}, but {labelled} keypoints have v > 0")
        return values

    def _region(self, entry: dict[str, Any], size: Size) -> bytes:
        shape = entry.get("segmentation")
        if isinstance(shape, dict):
            return _pack_rle(shape, size)
        if not isinstance(shape, list) or not shape:
            raise ValueError(f"field 'segmentation' must be polygons or run lengths, got {brief(shape)}")
        parts = []
        for number, part in enumerate(shape):
            try:
                parts.append(_near(check_polygon(part), size))
            except ValueError as error:
                problem = f"field 'segmentation', polygon {number}: {error}"
                if self.faults.strict:
                    raise ValueError(problem) from None
                self.faults.add(f"annotation {entry['id']}", problem)
        if not parts:
            raise ValueError("field 'segmentation' has no usable polygon")
        try:
            check_outlines(parts, size)
        except ValueError as error:
            raise ValueError(f"field 'segmentation': {error}") from None
        gap = np.array([np.nan])  # no checked polygon holds one, so it can stand between two
        return np.concatenate([piece for part in parts for piece in (gap, part.reshape(-1))][1:]).tobytes() + b"p"


def _near(corners: np.ndarray, size: Size) -> np.ndarray:
    """The corners ``[n, (x, y)]``, unless all of them lie beyond the same side of the image."""
    if (corners.max(axis=0) <= 0).any() or (corners.min(axis=0) >= size[::-1]).any():
        raise ValueError(f"has no pixel inside its image of height {size[0]} and width {size[1]}")
    return corners


def _box(box: Any, size: Size) -> tuple[float, float, float, float]:
    """The corners of COCO's [x, y, width, height], clipped to the image."""
    if not are_numbers(box, 4):
        raise ValueError(f"field 'bbox' must be [x, y, width, height], finite, got {brief(box)}")
    x, y, width, height = box
    if not (width > 0 and height > 0):
        raise ValueError(f"field 'bbox' must have a positive width and height, got {box}")
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + width, size[1]), min(y + height, size[0])
    # compared as float32, the type in which the box will be held
    if not (np.float32(x1) < np.float32(x2) and np.float32(y1) < np.float32(y2)):
        raise ValueError(f"field 'bbox' {box} has no extent inside its image of height {size[0]} and width {size[1]}")
    return x1, y1, x2, y2


def _pack_rle(rle: dict[str, Any], size: Size) -> bytes:
    try:
        if rle_size(rle) != size:
            raise ValueError(
                f"run lengths are for {rle['size'][0]} x {rle['size'][1]}, the image is {size[0]} x {size[1]}"
            )
        counts = rle_counts(rle)
        if not counts[1::2].any():
            raise ValueError("the run lengths have no pixel that is set")
        return compress(counts).encode("ascii") + b"r"
    except ValueError as error:
        raise ValueError(f"field 'segmentation': {error}") from error


def _unpack_region(region: bytes, size: Size) -> Tensor:
    if region[-1:] == b"r":  # straight to pycocotools, which is fast but trusting: these runs were checked
        return torch.from_numpy(coco_mask.decode({"size": list(size), "counts": region[:-1]})).to(torch.bool)
    numbers = np.frombuffer(region[:-1], dtype=np.float64)
    parts = np.split(numbers, np.flatnonzero(np.isnan(numbers)))
    return polygons_to_mask([part[np.isfinite(part)] for part in parts], size)


def _pack(reader: _AnnotationReader) -> Annotations:
    rows = [row for rows in reader.rows.values() for row in rows]
    joints = max(reader.joints.values())
    keypoints = np.zeros((len(rows), joints * 3), dtype=np.float32)
    for flat, row in zip(keypoints, rows):
        if row.keypoints is not None:
            flat[:] = row.keypoints
    images = reader.images.values()
    return Annotations(
        image_ids=torch.tensor(list(reader.images), dtype=torch.int64),
        sizes=torch.tensor([image.size for image in images], dtype=torch.int64).reshape(-1, 2),
        files=Packed.of(image.file.encode() for image in images),
        first=torch.from_numpy(np.cumsum([0, *map(len, reader.rows.values())], dtype=np.int64)),
        ids=torch.tensor([row.id for row in rows], dtype=torch.int64),
        boxes=torch.tensor([row.box for row in rows], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([row.label for row in rows], dtype=torch.int64),
        crowd=torch.tensor([row.crowd for row in rows], dtype=torch.bool),
        keypoints=torch.from_numpy(keypoints.reshape(len(rows), joints, 3)),
        regions=Packed.of(row.region for row in rows) if reader.has_masks else None,
        categories=reader.categories,
    )
