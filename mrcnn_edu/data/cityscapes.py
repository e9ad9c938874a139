"""Cityscapes' ``gtFine`` files as a data set of (image, target) pairs: the eight classes that have instances.

Chapter 18 (real data). Paper: Section 4.5 and Appendix A. Format: github.com/mcordts/cityscapesScripts.

Beside each picture lies a 16-bit PNG of its size whose pixels say what they belong to: ``1000 id + n`` is the n-th
instance of class ``id``; the ``id`` alone is a region without instances, such as road, or a group not told apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mrcnn_edu.data.coco import CategoryMap
from mrcnn_edu.data.coco_json import Category
from mrcnn_edu.data.images import MAX_PIXELS, read_image
from mrcnn_edu.masks import to_boxes
from mrcnn_edu.structures import Size, Target

CLASSES = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
PICTURE, INSTANCES = "_leftImg8bit.png", "_gtFine_instanceIds.png"


class CityscapesDataset(Dataset):
    """Images and targets by index, as ``CocoDataset`` has them: ``image [3, H, W] uint8, Target = dataset[i]``.

    root   folder with leftImg8bit/<split>/<city>/ and gtFine/<split>/<city>/
    split  "train" (2975 images) or "val" (500)

    The category ids are Cityscapes' own, the image ids count the files in order from 1. Groups are crowd regions.
    Raises OSError, naming the file, for folders and files that are missing or damaged.
    """

    joints = 0
    flip_pairs: tuple[tuple[int, int], ...] = ()

    def __init__(self, root: str | Path, split: str = "val") -> None:
        self.images_dir = Path(root) / "leftImg8bit" / split
        self.annotations_file = Path(root) / "gtFine" / split
        for folder in (self.images_dir, self.annotations_file):
            if not folder.is_dir():
                raise NotADirectoryError(
                    f"Cityscapes is laid out as leftImg8bit/{split} and gtFine/{split}: no {folder}"
                )
        self._truth = sorted(self.annotations_file.glob(f"*/*{INSTANCES}"))
        if not self._truth:
            raise FileNotFoundError(f"no */*{INSTANCES} in {self.annotations_file}")
        self.categories = CategoryMap(tuple(Category(number, name) for number, name in CLASSES.items()))
        self.sizes: list[Size] = [_size(path) for path in self._truth]
        self.report: list[str] = []

    def __len__(self) -> int:
        return len(self._truth)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image = read_image(self.path(index))
        if tuple(image.shape[1:]) != self.size(index):
            raise OSError(f"{self.path(index)} has another size than {self._truth[index]}")
        return image, self.target(index)

    def target(self, index: int) -> Target:
        """The ground truth of one image, in its original pixels, without reading the image."""
        instances = self.instances(index)
        values = [v for v in np.unique(instances).tolist() if v in CLASSES or v // 1000 in CLASSES]
        masks = torch.from_numpy(instances[None] == np.array(values, dtype=np.int64).reshape(-1, 1, 1))
        label = {number: position for position, number in enumerate(CLASSES, start=1)}
        return Target(
            boxes=to_boxes(masks),
            labels=torch.tensor([label[v if v < 1000 else v // 1000] for v in values], dtype=torch.int64),
            masks=masks,
            crowd=torch.tensor([v < 1000 for v in values], dtype=torch.bool),
        )

    def instances(self, index: int) -> np.ndarray:
        """What each pixel of one image belongs to, [H, W] int64: ``1000 id + n`` or ``id``."""
        path = self._truth[index]
        try:
            with Image.open(path, formats=("PNG",)) as image:
                values = np.array(image)
        except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
            raise OSError(f"cannot read the instances in {path}: {error}") from error
        if values.ndim != 2:
            raise OSError(f"{path} must have one channel of 16 bits, got {list(values.shape)} of {values.dtype}")
        return values.astype(np.int64)

    def path(self, index: int) -> Path:
        """The image file."""
        truth = self._truth[index]
        return self.images_dir / truth.parent.name / truth.name.replace(INSTANCES, PICTURE)

    def image_id(self, index: int) -> int:
        """The position among the sorted files, counted from 1."""
        return index + 1

    def size(self, index: int) -> Size:
        """(height, width) of one image in pixels."""
        return self.sizes[index]

    @property
    def image_ids(self) -> list[int]:
        """The ids of all images, in the data set's order."""
        return list(range(1, len(self) + 1))


def _size(path: Path) -> Size:
    """(height, width) of a PNG, from its first bytes."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            width, height = image.size
    except Exception as error:
        raise OSError(f"cannot read the instances in {path}: {error}") from error
    if width * height > MAX_PIXELS:
        raise OSError(f"{path} claims {width} x {height} pixels, more than the {MAX_PIXELS} allowed")
    return height, width
