"""The five types that travel through the package: images in, targets in, proposals, samples, detections out.

Chapter 1 (images, boxes, instances). Paper: Sections 3 and 3.1.

Everywhere: a box is ``(x1, y1, x2, y2)`` in continuous image pixels (pixel i covers ``[i, i + 1)``, so a box is
``x2 - x1`` wide), labels are 1..K with 0 for background, and an image is RGB ``[3, H, W]`` in ``[0, 1]``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self  # Python 3.10 does not have it at run time

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True, eq=False)
class Rows:
    """N rows held in parallel tensors: what one image's targets, proposals or detections have in common.

    Every field is a tensor whose first dimension is N, or None where an optional field is absent.
    """

    def __post_init__(self) -> None:
        counts = {name: len(value) for name, value in self._tensors().items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{type(self).__name__}: all fields need the same number of rows, got {counts}")

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{type(self).__name__}.{field.name} must be a tensor, got {type(value).__name__}")
            if value.ndim == 0:
                raise ValueError(f"{type(self).__name__}.{field.name} must have a first dimension N, got a scalar")
            tensors[field.name] = value
        return tensors

    def _map(self, function) -> Self:
        return replace(self, **{name: function(value) for name, value in self._tensors().items()})

    def __len__(self) -> int:
        return len(next(iter(self._tensors().values())))

    def __getitem__(self, rows: Tensor | slice | list[int]) -> Self:
        """The given rows (a slice, indices ``[n]`` int64 or a mask ``[N]`` bool) of every field, in that order."""
        if isinstance(rows, int):
            raise TypeError(
                f"index rows with a slice, a list or a tensor, got the integer {rows}; use [{rows}:{rows + 1}]"
            )
        if isinstance(rows, Tensor) and rows.dtype == torch.bool and rows.shape == (len(self),):
            rows = rows.nonzero()[:, 0]  # once and not for every field: the host waits for a GPU to count them
        return self._map(lambda value: value[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same rows on another device."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same rows in page-locked memory, from which copies to a GPU can run in the background."""
        return self._map(lambda value: value.pin_memory())

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        """All rows of several objects of one class, one after the other; optional fields in all of them or in none."""
        if not parts:
            raise ValueError(f"{cls.__name__}.cat needs at least one part, got an empty list")
        names = [set(part._tensors()) for part in parts]
        if any(other != names[0] for other in names):
            raise ValueError(f"{cls.__name__}.cat: the parts have different fields, {[sorted(n) for n in names]}")
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0]._tensors()})


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Several images padded at the right and at the bottom to one size.

    pixels          [B, 3, H, W] RGB in [0, 1], zeros where padded
    sizes           [(h, w)] of each image before padding, in the pixels of ``pixels``
    original_sizes  [(h, w)] of each image before it was resized
    mirrored        is each image the mirror image of the original; None: none of them
    """

    pixels: Tensor
    sizes: list[Size]
    original_sizes: list[Size]
    mirrored: list[bool] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pixels, Tensor):
            raise TypeError(f"ImageBatch.pixels must be a tensor [B, 3, H, W], got {type(self.pixels).__name__}")
        if self.pixels.ndim != 4 or self.pixels.shape[1] != 3:
            raise ValueError(f"ImageBatch.pixels must be [B, 3, H, W], got {list(self.pixels.shape)}")
        for name in ("sizes", "original_sizes"):
            _check_sizes(f"ImageBatch.{name}", getattr(self, name))
        if not len(self.pixels) == len(self.sizes) == len(self.original_sizes):
            raise ValueError(
                f"ImageBatch needs one size and one original size per image, got {len(self.pixels)} images, "
                f"{len(self.sizes)} sizes, {len(self.original_sizes)} original sizes"
            )
        if self.mirrored is not None and len(self.mirrored) != len(self.pixels):
            raise ValueError(
                f"ImageBatch.mirrored must say it of each of {len(self.pixels)} images, got {len(self.mirrored)}"
            )
        height, width = self.pixels.shape[2:]
        for index, (h, w) in enumerate(self.sizes):
            if not (1 <= h <= height and 1 <= w <= width):
                raise ValueError(f"ImageBatch.sizes[{index}] is {h} x {w}, outside 1 x 1 to {height} x {width}")

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """The same batch on another device; its memory format is kept."""
        return replace(self, pixels=self.pixels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImageBatch:
        """The same batch in page-locked memory."""
        return replace(self, pixels=self.pixels.pin_memory())

    @classmethod
    def collate(cls, images: list[Tensor], original_sizes: list[Size] | None = None, multiple: int = 32) -> ImageBatch:
        """Pad images to their common size, rounded up to a multiple.

        images          list of [3, h, w], float in [0, 1] or uint8 in 0..255 (divided by 255 here)
        original_sizes  [(h, w)] before any resize; the images' own sizes when absent
        multiple        the largest stride of the backbone, so that every level's cells fit the image exactly

        Raises ValueError for an empty list, TypeError or ValueError for anything that is not such an image.
        """
        if not isinstance(images, (list, tuple)):
            raise TypeError(f"a batch is made of a list of images, got {type(images).__name__}")
        if isinstance(multiple, bool) or not isinstance(multiple, int) or not 1 <= multiple <= 1024:
            raise ValueError(f"multiple must be a whole number of pixels, 1 to 1024, got {multiple!r}")
        if not images:
            raise ValueError("a batch needs at least one image, got an empty list")
        for index, image in enumerate(images):
            check_image(image, f"image {index}")
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        if original_sizes is not None:
            _check_sizes("original_sizes", original_sizes)
        height = -(-max(h for h, _ in sizes) // multiple) * multiple
        width = -(-max(w for _, w in sizes) // multiple) * multiple
        pixels = torch.empty(len(images), 3, height, width, device=images[0].device)
        for padded, image, (h, w) in zip(pixels, images, sizes):
            padded[:, :h, :w] = image
            if not image.is_floating_point():
                padded[:, :h, :w].div_(255)
            padded[:, h:] = 0  # only what is padding, mostly little of the batch
            padded[:, :, w:] = 0
        return cls(pixels, sizes, list(original_sizes) if original_sizes is not None else sizes)


def check_image(image: Tensor, name: str = "image") -> None:
    """Refuse what is not one RGB image [3, H, W], float in [0, 1] or uint8, with a sentence naming the mend."""
    if not isinstance(image, Tensor):
        raise TypeError(
            f"{name} must be a tensor [3, H, W], got {type(image).__name__}; data.coco.read_image reads files"
        )
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"{name} must be RGB [3, H, W], got {list(image.shape)}; repeat a gray channel three times")
    if image.is_meta or image.layout != torch.strided:
        raise ValueError(f"{name} must be an ordinary tensor, got one on {image.device} with {image.layout}")
    if image.shape[1] < 1 or image.shape[2] < 1:
        raise ValueError(f"{name} has no pixels: {list(image.shape)}")
    if image.is_floating_point():
        low, high = torch.aminmax(image)
        # "not in range" rather than "out of range", so that NaN is refused as well
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{name} must lie in [0, 1] without NaN, got values from {low:.4g} to {high:.4g}; divide 0..255 by 255"
            )
    elif image.dtype != torch.uint8:
        raise TypeError(f"{name} must be float in [0, 1] or uint8, got {image.dtype}")


@dataclass(frozen=True, eq=False)
class Target(Rows):
    """The ground truth of one image.

    boxes      [N, (x1, y1, x2, y2)] float32, image pixels
    labels     [N] int64, 1..K
    masks      [N, H, W] bool, the visible pixels of each instance; None for box-only data
    keypoints  [N, J, (x, y, v)] float32, image pixels; v = 0 unlabelled, 1 labelled but hidden, 2 visible
    crowd      [N] bool, True for a region of uncounted instances: never a positive, never a negative
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None
    crowd: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shape("Target.boxes", self.boxes, ("N", 4), torch.float32)
        _check_shape("Target.labels", self.labels, ("N",), torch.int64)
        if self.masks is not None:
            _check_shape("Target.masks", self.masks, ("N", "H", "W"), torch.bool)
        if self.keypoints is not None:
            _check_shape("Target.keypoints", self.keypoints, ("N", "J", 3), torch.float32)
        if self.crowd is not None:
            _check_shape("Target.crowd", self.crowd, ("N",), torch.bool)

    @classmethod
    def empty(cls, size: Size, joints: int = 0) -> Target:
        """The target of an image without any instance (a perfectly good training image)."""
        return cls(
            boxes=torch.zeros(0, 4),
            labels=torch.zeros(0, dtype=torch.int64),
            masks=torch.zeros(0, *size, dtype=torch.bool),
            keypoints=torch.zeros(0, joints, 3) if joints else None,
            crowd=torch.zeros(0, dtype=torch.bool),
        )

    def to_dict(self) -> dict[str, Tensor]:
        """The fields as torchvision's detection references have them: masks uint8, crowd as ``iscrowd`` int64."""
        tensors = self._tensors()
        if "masks" in tensors:
            tensors["masks"] = tensors["masks"].to(torch.uint8)
        if "crowd" in tensors:
            tensors["iscrowd"] = tensors.pop("crowd").to(torch.int64)
        return tensors

    @classmethod
    def from_dict(cls, values: dict[str, Tensor]) -> Target:
        """A target from a torchvision-style dict; masks must hold only 0 and 1. Other keys are ignored."""
        for key in ("boxes", "labels"):
            if values.get(key) is None:
                raise ValueError(f"a target dict needs 'boxes' and 'labels', got only {sorted(values)}")
        for key in ("boxes", "labels", "masks", "iscrowd", "keypoints"):
            value = values.get(key)
            if value is not None and not (isinstance(value, Tensor) and not value.is_meta):
                raise TypeError(f"target[{key!r}] must be a tensor with values, got {type(value).__name__}")
        boxes = values["boxes"].reshape(0, 4) if values["boxes"].numel() == 0 else values["boxes"]  # torchvision's [0]
        masks, crowd, keypoints = values.get("masks"), values.get("iscrowd"), values.get("keypoints")
        other = None if masks is None else masks[(masks != 0) & (masks != 1)]
        if other is not None and len(other):
            raise ValueError(f"target masks must hold 0 and 1 only, got {other[0].item()}; compare with > 0 first")
        return cls(
            boxes=boxes.to(torch.float32),
            labels=values["labels"].to(torch.int64),
            masks=None if masks is None else masks.to(torch.bool),
            keypoints=None if keypoints is None else keypoints.to(torch.float32),
            crowd=None if crowd is None else crowd.to(torch.bool),
        )


def check_target(target: Target, size: Size, classes: int, joints: int | None = None, name: str = "target") -> None:
    """Refuse values no training should see: bad boxes, labels outside 1..K, masks of another size, unknown joints.

    size     (height, width) of the image the target belongs to, pixels
    classes  K
    joints   J of the model's keypoint head; None where it has none
    name     what to call the target in the error

    Raises TypeError or ValueError with the row and the value.
    """
    _check_form(target, size, joints, name)
    x1, y1, x2, y2 = target.boxes.unbind(1)
    # A comparison with NaN is false, so "good" is what has to be shown
    good = target.boxes.isfinite().all(dim=1) & (x2 > x1) & (y2 > y1)
    if not good.all():
        row = int((~good).nonzero()[0])
        raise ValueError(
            f"{name}.boxes[{row}] must be finite with x2 > x1 and y2 > y1, got {target.boxes[row].tolist()}; "
            "drop the instance or mend its annotation"
        )
    if ((target.labels < 1) | (target.labels > classes)).any():
        wrong = target.labels[(target.labels < 1) | (target.labels > classes)][0]
        raise ValueError(f"{name}.labels must lie in 1..{classes} (0 is background), got {int(wrong)}")
    if target.keypoints is not None and not target.keypoints.isfinite().all():
        raise ValueError(f"{name}.keypoints must be finite; mark unknown joints by v = 0 with any finite x and y")


def check_targets(targets: list[Target], sizes: list[Size], classes: int, joints: int | None = None) -> None:
    """``check_target`` for every image of a batch, with one look at all values: a GPU is waited for once."""
    for index, (target, size) in enumerate(zip(targets, sizes)):
        _check_form(target, size, joints, f"targets[{index}]")
    boxes, labels = torch.cat([t.boxes for t in targets]), torch.cat([t.labels for t in targets])
    numbers = [boxes.flatten(), *(t.keypoints.flatten() for t in targets if t.keypoints is not None)]
    good = torch.cat(numbers).isfinite().all() & (boxes[:, 2:] > boxes[:, :2]).all()
    if not good & ((labels >= 1) & (labels <= classes)).all():
        for index, (target, size) in enumerate(zip(targets, sizes)):
            check_target(target, size, classes, joints, f"targets[{index}]")


def _check_form(target: Target, size: Size, joints: int | None, name: str) -> None:
    """The part of ``check_target`` for which no value has to be read."""
    if not isinstance(target, Target):
        raise TypeError(f"{name} must be a Target, got {type(target).__name__}; Target.from_dict converts dicts")
    if target.masks is not None and tuple(target.masks.shape[1:]) != tuple(size):
        got = tuple(target.masks.shape[1:])
        raise ValueError(f"{name}.masks must have the image's size {size[0]} x {size[1]}, got {got[0]} x {got[1]}")
    if target.keypoints is not None and joints is not None and target.keypoints.shape[1] != joints:
        raise ValueError(f"{name}.keypoints must have {joints} joints, got {target.keypoints.shape[1]}")


@dataclass(frozen=True, eq=False)
class Proposals(Rows):
    """Class-free candidate boxes of one image, best first.

    boxes   [N, (x1, y1, x2, y2)] float32, image pixels
    scores  [N] float32, the probability that the box holds an object
    """

    boxes: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shape("Proposals.boxes", self.boxes, ("N", 4), torch.float32)


@dataclass(frozen=True, eq=False)
class Samples(Rows):
    """The rois one image contributes to a training step of the heads.

    boxes    [S, (x1, y1, x2, y2)] float32, image pixels
    labels   [S] int64, 1..K for positives, 0 for background
    matched  [S] int64, the row of the Target each box overlaps most (meaningless for background)
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor


@dataclass(frozen=True, eq=False)
class Detections(Rows):
    """What the model found in one image, best first.

    boxes       [N, (x1, y1, x2, y2)] float32, image pixels
    scores      [N] float32 in [0, 1]
    labels      [N] int64, 1..K
    mask_probs  [N, M, M] float32 in [0, 1], inside the box; None without a mask head
    keypoints   [N, J, (x, y, score)] float32, image pixels; None without a keypoint head
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    mask_probs: Tensor | None = None
    keypoints: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shape("Detections.boxes", self.boxes, ("N", 4), torch.float32)
        if self.mask_probs is not None and (
            self.mask_probs.ndim != 3 or self.mask_probs.shape[1] != self.mask_probs.shape[2]
        ):
            raise ValueError(f"Detections.mask_probs must be [N, M, M], got {list(self.mask_probs.shape)}")

    def to_dict(self, size: Size | None = None) -> dict[str, Tensor]:
        """The fields as torchvision's models return them.

        With ``size`` (h, w) the masks are pasted into the image: ``masks [N, 1, h, w]`` bool, which ``> 0.5`` reads as
        well. Keypoints come as ``keypoints [N, J, (x, y, 1)]`` beside ``keypoints_scores [N, J]``.
        """
        from mrcnn_edu.ops import paste_masks  # the types stand below everything else, so this import cannot be global

        tensors = self._tensors()
        mask_probs = tensors.pop("mask_probs", None)
        if mask_probs is not None and size is not None:
            tensors["masks"] = paste_masks(mask_probs, self.boxes, size)[:, None]
        if self.keypoints is not None:
            tensors["keypoints_scores"] = self.keypoints[..., 2]
            tensors["keypoints"] = torch.cat(
                [self.keypoints[..., :2], torch.ones_like(self.keypoints[..., 2:])], dim=-1
            )
        return tensors

    @classmethod
    def from_dict(cls, values: dict[str, Tensor], mask_size: int = 28) -> Detections:
        """Detections from a torchvision-style dict, its masks cropped to their boxes at M = ``mask_size``."""
        from mrcnn_edu.masks import crop_masks

        masks, keypoints, boxes = values.get("masks"), values.get("keypoints"), values["boxes"].to(torch.float32)
        if masks is not None:
            flat = masks.reshape(len(boxes), *masks.shape[-2:])
            masks = crop_masks(flat, boxes, torch.arange(len(boxes), device=boxes.device), mask_size, rule="soft")
        if keypoints is not None:
            scores = values.get("keypoints_scores", torch.ones_like(keypoints[..., 2]))
            keypoints = torch.cat([keypoints[..., :2], scores[..., None]], dim=-1)
        return cls(boxes, values["scores"], values["labels"].to(torch.int64), masks, keypoints)


def _check_sizes(name: str, sizes: object) -> None:
    good = isinstance(sizes, (list, tuple)) and all(
        isinstance(size, (list, tuple)) and len(size) == 2 and all(type(side) is int for side in size) for size in sizes
    )
    if not good:
        raise TypeError(f"{name} must be a list of (height, width) in whole pixels, got {str(sizes)[:60]}")


def _check_shape(name: str, value: Tensor, shape: tuple[str | int, ...], dtype: torch.dtype) -> None:
    fits = value.ndim == len(shape) and all(isinstance(s, str) or s == got for s, got in zip(shape, value.shape))
    if not fits:
        wanted = "[" + ", ".join(map(str, shape)) + "]"
        raise ValueError(f"{name} must be {wanted}, got {list(value.shape)}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}; convert with .to({dtype})")
