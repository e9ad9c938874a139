"""Parts of a data set, and several as one: what ``train`` and ``distil`` take in place of a ``CocoDataset``.

Chapter 14 (keypoints) and Chapter 18 (your own data). Paper: Section 5, "all COCO trainval35k images that contain
annotated keypoints", and Appendix B, labelled with unlabelled images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.utils.data import Dataset

from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.structures import Size, Target


class Subset(Dataset):
    """Some images of a data set, by their indices and in that order."""

    def __init__(self, whole: CocoDataset, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, list(indices)
        self.categories, self.joints, self.flip_pairs = whole.categories, whole.joints, whole.flip_pairs
        self.images_dir, self.annotations_file, self.has_masks = (
            whole.images_dir,
            whole.annotations_file,
            whole.has_masks,
        )
        if not all(0 <= index < len(whole) for index in self.indices):
            raise ValueError(f"indices must lie in 0..{len(whole) - 1}, got {min(self.indices)} to {max(self.indices)}")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self.whole[self.indices[index]]

    def image_id(self, index: int) -> int:
        """The id the annotation file gives the image."""
        return self.whole.image_id(self.indices[index])

    def size(self, index: int) -> Size:
        """(height, width) of one image in pixels."""
        return self.whole.size(self.indices[index])

    def file_name(self, index: int) -> str:
        """The image's path below the image folder."""
        return self.whole.file_name(self.indices[index])

    def labels(self, index: int) -> tuple[Tensor, Tensor]:
        """The labels [N] and crowd flags [N] of one image."""
        return self.whole.labels(self.indices[index])

    @property
    def image_ids(self) -> list[int]:
        """The ids of the images, in order."""
        return [self.whole.image_id(index) for index in self.indices]

    @property
    def sizes(self) -> list[Size]:
        """(height, width) of the images."""
        return [self.whole.size(index) for index in self.indices]


def with_keypoints(whole: CocoDataset) -> Subset:
    """The images that contain at least one labelled keypoint (Section 5)."""
    table = whole.annotations
    rows = (table.keypoints[..., 2] > 0).any(dim=1).tolist()
    first = table.first.tolist()
    return Subset(whole, [index for index in range(len(whole)) if any(rows[first[index] : first[index + 1]])])


class Union(Dataset):
    """Several data sets of the same categories as one, for ``train``: the images of the first, then of the second, ...

    Where one of them has no masks, none has.

    Raises ValueError for other categories, and for an image id that occurs twice.
    """

    def __init__(self, *parts: CocoDataset | Subset) -> None:
        if not parts:
            raise ValueError("a union needs at least one data set")
        self.parts = parts
        self.categories, self.joints, self.flip_pairs = parts[0].categories, parts[0].joints, parts[0].flip_pairs
        for part in parts[1:]:
            if part.categories.to_json() != self.categories.to_json():
                raise ValueError(
                    f"{part.annotations_file} has other categories than {parts[0].annotations_file}: "
                    f"{part.categories.names}, not {self.categories.names}"
                )
        self._masks = all(part.has_masks for part in parts)
        self._places = [(part, index) for part in parts for index in range(len(part))]
        self.image_ids = [image_id for part in parts for image_id in part.image_ids]
        if len(set(self.image_ids)) < len(self.image_ids):
            raise ValueError("an image id occurs in two of the data sets; write_annotations has a first_id")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        part, place = self._places[index]
        image, target = part[place]
        return image, target if self._masks else replace(target, masks=None)

    def image_id(self, index: int) -> int:
        """The id of an image in its own file."""
        return self.image_ids[index]

    @property
    def sizes(self) -> list[Size]:
        """(height, width) of all images."""
        return [size for part in self.parts for size in part.sizes]
