"""A folder of images and a COCO-format file as a data set of (image, target) pairs.

Chapter 2 (a data set we can trust) and Chapter 18 (your own data). Paper: Section 4 (COCO).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mrcnn_edu.data.annotations import read_annotations
from mrcnn_edu.data.coco_json import Category
from mrcnn_edu.data.images import file_inside, read_image
from mrcnn_edu.structures import Size, Target

__all__ = ["Category", "CategoryMap", "CocoDataset", "read_image"]


@dataclass(frozen=True)
class CategoryMap:
    """The two-way map between a file's category ids, which may have gaps, and labels 1..K, which have none.

    The category at position i has label i + 1. Stored with every checkpoint, so that labels keep their meaning.
    """

    categories: tuple[Category, ...]

    def __post_init__(self) -> None:
        ids = [category.id for category in self.categories]
        if len(set(ids)) < len(ids):
            raise ValueError(f"category ids must differ, got {ids}")

    def __len__(self) -> int:
        return len(self.categories)

    @property
    def names(self) -> list[str]:
        """The K class names; that of a label is ``names[label - 1]``."""
        return [category.name for category in self.categories]

    def label(self, category_id: int) -> int:
        """The label 1..K of a category id; ValueError for an unknown one."""
        for label, category in enumerate(self.categories, start=1):
            if category.id == category_id:
                return label
        raise ValueError(f"unknown category id {category_id}; known: {[c.id for c in self.categories]}")

    def category_id(self, label: int) -> int:
        """The category id of a label 1..K; ValueError for any other number."""
        if not 1 <= label <= len(self.categories):
            raise ValueError(f"labels go from 1 to {len(self.categories)}, got {label}")
        return self.categories[label - 1].id

    def to_json(self) -> list[dict[str, Any]]:
        """The categories as in a COCO file, in label order."""
        return [
            {
                "id": c.id,
                "name": c.name,
                "keypoints": list(c.keypoints),
                "skeleton": [list(limb) for limb in c.skeleton],
            }
            for c in self.categories
        ]

    @classmethod
    def from_json(cls, values: list[dict[str, Any]]) -> CategoryMap:
        """The inverse of ``to_json``."""
        return cls(
            tuple(
                Category(v["id"], v["name"], tuple(v["keypoints"]), tuple((a, b) for a, b in v["skeleton"]))
                for v in values
            )
        )


class CocoDataset(Dataset):
    """Images and targets by index: ``image [3, H, W] uint8, Target = dataset[i]``.

    images_dir        folder that holds every image the file names
    annotations_file  COCO-format JSON: boxes, polygons and run lengths, crowds, keypoints, in any mixture
    strict            refuse an inconsistent file, and an image of another size when it is read; otherwise look at all
                      files at once, drop what is faulty and say so in ``report``
    keypoints         read them, if any category has them

    Images without annotations stay: they teach the background. Raises OSError or ValueError, naming the file, the
    annotation and the field.
    """

    def __init__(
        self, images_dir: str | Path, annotations_file: str | Path, strict: bool = True, keypoints: bool = True
    ) -> None:
        self.images_dir, self.annotations_file = Path(images_dir), Path(annotations_file)
        if not self.images_dir.is_dir():
            raise NotADirectoryError(f"the image folder {self.images_dir} does not exist or is no folder")
        look_in = None if strict else self.images_dir  # strict reading says it when an image is read
        self.annotations, self.report = read_annotations(self.annotations_file, strict, keypoints, look_in)
        self.categories = CategoryMap(self.annotations.categories)
        self.has_masks = self.annotations.regions is not None
        self.joints: int = self.annotations.keypoints.shape[1]
        try:
            self.flip_pairs = flip_pairs(self.categories) if self.joints else ()
        except ValueError as error:
            raise ValueError(f"{self.annotations_file}: {error}") from None

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image = read_image(self.path(index))
        size, stated = tuple(image.shape[1:]), self.size(index)
        if size != stated:
            raise ValueError(
                f"{self.annotations_file}: image {self.image_id(index)} is stated as {stated[0]} x {stated[1]} pixels "
                f"(height x width), but {self.path(index)} is {size[0]} x {size[1]} once upright"
            )
        return image, self.target(index)

    def target(self, index: int) -> Target:
        """The ground truth of one image, in its original pixels, without reading the image."""
        table, size = self.annotations, self.size(index)
        first, last = table.first[index : index + 2].tolist()
        rows = slice(first, last)
        masks = None
        if table.regions is not None:
            masks = torch.empty(last - first, *size, dtype=torch.bool)
            for row, mask in enumerate(masks, start=first):
                mask[:] = table.mask(row, size)
        return Target(
            boxes=table.boxes[rows].clone(),
            labels=table.labels[rows].clone(),
            masks=masks,
            keypoints=table.keypoints[rows].clone() if self.joints else None,
            crowd=table.crowd[rows].clone(),
        )

    def path(self, index: int) -> Path:
        """The image file; ValueError when its name leads out of the image folder."""
        return file_inside(self.images_dir, self.file_name(index))

    def file_name(self, index: int) -> str:
        """The image's path below the image folder, as the annotation file gives it."""
        return self.annotations.files[index].decode()

    def labels(self, index: int) -> tuple[Tensor, Tensor]:
        """The labels [N] and crowd flags [N] of one image, without drawing its masks."""
        rows = slice(*self.annotations.first[index : index + 2].tolist())
        return self.annotations.labels[rows], self.annotations.crowd[rows]

    def image_id(self, index: int) -> int:
        """The id the annotation file gives the image."""
        return int(self.annotations.image_ids[index])

    def size(self, index: int) -> Size:
        """(height, width) of one image in pixels, as the annotation file states it."""
        height, width = self.annotations.sizes[index].tolist()
        return height, width

    @property
    def image_ids(self) -> list[int]:
        """The ids of all images, in the data set's order."""
        return self.annotations.image_ids.tolist()

    @property
    def sizes(self) -> list[Size]:
        """(height, width) of all images."""
        return [(height, width) for height, width in self.annotations.sizes.tolist()]


def flip_pairs(categories: CategoryMap) -> tuple[tuple[int, int], ...]:
    """Joints that change places in a mirror, counted from 0: those whose names differ by left and right alone.

    Raises ValueError when a left joint has no right one, or when two categories disagree.
    """
    found = {_mirror_pairs(category) for category in categories.categories if category.keypoints}
    if len(found) > 1:
        raise ValueError(
            f"categories with keypoints must agree on which are left and right, got the pairs {sorted(found)}; "
            "keypoints=False leaves them out"
        )
    return found.pop() if found else ()


def _mirror_pairs(category: Category) -> tuple[tuple[int, int], ...]:
    pairs = []
    for index, name in enumerate(category.keypoints):
        left = re.search(r"(?<![a-z])left(?![a-z])", name, flags=re.IGNORECASE)
        if left is None:
            continue
        right = {"left": "right", "LEFT": "RIGHT"}.get(left[0], "Right")
        other = name[: left.start()] + right + name[left.end() :]
        if other not in category.keypoints:
            raise ValueError(f"category {category.name!r} has a keypoint {name!r} but no {other!r}")
        pairs.append((index, category.keypoints.index(other)))
    return tuple(pairs)
