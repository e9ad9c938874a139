"""Resizing, mirroring and recolouring an image together with everything that is known about it.

Chapter 2 (a data set we can trust) and Chapter 21 (bells and whistles). Paper: Section 3.1 (shorter side 800 px) and
Appendix B (scale jitter).

Each is a pure function of an image ``[3, H, W]`` and its Target; chance enters in ``Augment`` alone, by a generator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mrcnn_edu import boxes as box_ops
from mrcnn_edu import keypoints as keypoint_ops
from mrcnn_edu.config import DataConfig
from mrcnn_edu.structures import Size, Target

FlipPairs = tuple[tuple[int, int], ...]


def resized(size: Size, min_size: int, max_size: int) -> Size:
    """The (height, width) with the shorter side at ``min_size``, or the longer at ``max_size`` if it would pass it.

    Rounded to whole pixels, at least one: an image of 1 x 5000 stays an image.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"an image needs at least 1 x 1 pixels, got {height} x {width}")
    scale = min(min_size / min(size), max_size / max(size))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(image: Tensor, target: Target, min_size: int, max_size: int) -> tuple[Tensor, Target]:
    """Bring an image to size, with its target.

    image     [3, H, W] uint8 or float; bilinear, smoothed where it shrinks
    min_size  px, the shorter side; max_size px, what the longer may not pass
    returns   the new image and target; an instance too small to keep a single mask pixel is dropped
    """
    size = tuple(image.shape[1:])
    new_size = resized(size, min_size, max_size)
    if new_size == size:
        return image, drop_vanished(target)
    image = image if image.dtype == torch.uint8 else image.float()  # PyTorch resizes no half precision on a CPU
    pixels = F.interpolate(image[None], new_size, mode="bilinear", antialias=True, align_corners=False)[0]
    return pixels, drop_vanished(resize_target(target, size, new_size))


def resize_target(target: Target, size: Size, new_size: Size) -> Target:
    """The target of an image (height, width) after its resize to ``new_size``; masks take the nearest pixel."""
    ratio_y, ratio_x = new_size[0] / size[0], new_size[1] / size[1]
    masks, keypoints = target.masks, target.keypoints
    if masks is not None:
        masks = torch.from_numpy(_resize_masks(masks.numpy(), new_size))
    if keypoints is not None:
        keypoints = keypoints * torch.tensor([ratio_x, ratio_y, 1.0])
    boxes = box_ops.clip(box_ops.resize(target.boxes, size, new_size), new_size)  # rounding may pass the border
    return replace(target, boxes=boxes, masks=masks, keypoints=keypoints)


def _resize_masks(masks: np.ndarray, new_size: Size) -> np.ndarray:
    """Masks [N, H, W] bool at another size, nearest pixel. Only what is set is moved, mostly little of the image."""
    rows, columns = (_nearest(old, new) for old, new in zip(masks.shape[1:], new_size))
    resized = np.zeros((len(masks), *new_size), dtype=bool)
    for mask, new in zip(masks, resized):
        filled = np.flatnonzero(mask.any(axis=1))
        if len(filled):
            top, bottom = np.searchsorted(rows, (filled[0], filled[-1] + 1))
            part = mask[filled[0] : filled[-1] + 1]
            filled_columns = np.flatnonzero(part.any(axis=0))
            left, right = np.searchsorted(columns, (filled_columns[0], filled_columns[-1] + 1))
            new[top:bottom, left:right] = mask[rows[top:bottom, None], columns[left:right]]
    return resized


def _nearest(old: int, new: int) -> np.ndarray:
    """For each of ``new`` pixels in a row, the one of ``old`` in which its centre lies, [new] int64."""
    return (2 * np.arange(new) + 1) * old // (2 * new)


def drop_vanished(target: Target) -> Target:
    """The instances that still have a box with an inside and, where there are masks, a mask pixel."""
    kept = box_ops.wide_enough(target.boxes, 1e-3)
    if target.masks is not None:
        # by NumPy, which stops at the first pixel: a hundred times as fast
        kept &= torch.from_numpy(target.masks.flatten(1).numpy().any(axis=1))
    return target if bool(kept.all()) else target[kept]


def flip(image: Tensor, target: Target, flip_pairs: FlipPairs = ()) -> tuple[Tensor, Target]:
    """The mirror image: x becomes width - x, and what was the left hand is now called the right one.

    flip_pairs  joints (i, j) that change places, counted from 0
    """
    width = image.shape[2]
    masks, keypoints = target.masks, target.keypoints
    flipped = replace(
        target,
        boxes=box_ops.flip(target.boxes, width),
        masks=None if masks is None else masks.flip(-1),
        keypoints=None if keypoints is None else keypoint_ops.flip(keypoints, width, flip_pairs),
    )
    return image.flip(-1), flipped


def shuffle_channels(image: Tensor, target: Target, order: Tensor | list[int]) -> tuple[Tensor, Target]:
    """The same scene in other colours: channel i is what channel ``order[i]`` was."""
    return image[order], target


class Drawn(NamedTuple):
    """What chance has decided about one image: its shorter side (px), mirrored or not, the order of its channels."""

    min_size: int
    mirrored: bool
    channels: list[int] | None


@dataclass(frozen=True)
class Augment:
    """What happens to an image between the disk and the batch, chance included.

    min_sizes        px, the shorter side; one of them is drawn
    max_size         px, the longer side
    flip             probability of a mirror image
    channel_shuffle  probability of permuted colour channels
    flip_pairs       joints that change places in a mirror
    """

    min_sizes: tuple[int, ...]
    max_size: int
    flip: float = 0.0
    channel_shuffle: float = 0.0
    flip_pairs: FlipPairs = ()

    @classmethod
    def for_training(cls, config: DataConfig, flip_pairs: FlipPairs = ()) -> Augment:
        """As the config says for training images."""
        return cls(config.min_size, config.max_size, config.flip, config.channel_shuffle, flip_pairs)

    @classmethod
    def for_testing(cls, config: DataConfig) -> Augment:
        """Only the resize: nothing is left to chance."""
        return cls((config.test_size,), config.max_size)

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        return self.apply(image, target, self.draw(generator))

    def draw(self, generator: torch.Generator) -> Drawn:
        """What will happen to one image."""
        choice = int(torch.randint(len(self.min_sizes), (1,), generator=generator))
        chance = torch.rand(2, generator=generator).tolist()
        order = torch.randperm(3, generator=generator).tolist()
        shuffled = order if chance[1] < self.channel_shuffle else None
        return Drawn(self.min_sizes[choice], chance[0] < self.flip, shuffled)

    def apply(self, image: Tensor, target: Target, drawn: Drawn) -> tuple[Tensor, Target]:
        """Let it happen."""
        image, target = resize(image, target, drawn.min_size, self.max_size)
        if drawn.mirrored:
            image, target = flip(image, target, self.flip_pairs)
        if drawn.channels is not None:
            image, target = shuffle_channels(image, target, drawn.channels)
        return image, target
