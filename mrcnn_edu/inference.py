"""From an image to its instances: resize, run the model, and bring what it found back to the image's own pixels.

Chapter 12 (the whole model). Paper: Section 3.1, Inference.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from mrcnn_edu import boxes as box_ops
from mrcnn_edu import keypoints as keypoint_ops
from mrcnn_edu.augmentation import Augmentation, detect_views
from mrcnn_edu.config import DataConfig
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.images import read_image, to_rgb
from mrcnn_edu.data.loading import val_loader
from mrcnn_edu.data.transforms import resize
from mrcnn_edu.structures import Detections, ImageBatch, Proposals, Size, Target, check_image

if TYPE_CHECKING:
    from mrcnn_edu.training.proposals import SavedProposals

ImageSource = str | os.PathLike | Image.Image | np.ndarray | Tensor


def predict(
    model: nn.Module,
    images: ImageSource | Sequence[ImageSource],
    min_size: int = 800,
    max_size: int = 1333,
    batch_size: int = 1,
    augmentation: Augmentation | None = None,
) -> Detections | list[Detections]:
    """What the model finds in one image (Detections) or in each of a list (list of Detections), on the CPU.

    model         called as ``model(ImageBatch) -> list[Detections]``; its training mode is the same afterwards
    images        path, PIL image, array [H, W, 3] uint8, tensor [3, H, W] uint8 or float in [0, 1]; or a list of these
    min_size      pixels, shorter side the network sees ...
    max_size      ... unless the longer side would pass this
    batch_size    images at a time; with 1 an image's result cannot depend on its neighbours through the padding
    augmentation  sizes and mirror images to combine, a view at a time, in place of the three numbers before
    returns       boxes and keypoints in the pixels of the image as given; masks stay ``mask_probs [N, M, M]`` inside
                  their boxes, which ``ops.paste_masks`` puts into the image

    Raises ValueError or TypeError for anything that is no image and FloatingPointError where numbers are not finite.
    """
    single = not isinstance(images, list | tuple)
    sources = [images] if single else list(images)
    if not sources:
        raise ValueError("predict needs at least one image, got an empty list")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_weights(model)
    found: list[Detections] = []
    for start in range(0, len(sources), batch_size):
        chunk = sources[start : start + batch_size]
        names = ["the image" if single else f"image {start + index}" for index in range(len(chunk))]
        tensors = [as_image(source, name) for source, name in zip(chunk, names)]
        if augmentation is not None:
            found += [detect_augmented(model, *pair, augmentation) for pair in zip(tensors, names)]
            continue
        sizes = [(image.shape[1], image.shape[2]) for image in tensors]
        resized = [resize(image, Target.empty(size), min_size, max_size)[0] for image, size in zip(tensors, sizes)]
        batch = ImageBatch.collate(resized, sizes)
        found += detect(model, batch, names)
    return found[0] if single else found


def predict_dataset(
    model: nn.Module,
    dataset: CocoDataset,
    config: DataConfig,
    batch_size: int = 8,
    progress: bool = False,
    proposals: SavedProposals | None = None,
    augmentation: Augmentation | None = None,
    rank: int = 0,
    world: int = 1,
) -> dict[int, Detections]:
    """What the model finds in every image of a data set, by image id, in the images' own pixels, on the CPU.

    config        gives the size (``test_size``, ``max_size``) and the number of loader processes
    batch_size    images at a time
    progress      show a bar on stderr
    proposals     to use in place of the model's own, ``training.proposals.SavedProposals``
    augmentation  sizes and mirror images to combine, a view at a time, in place of the config's size
    rank, world   this process among how many; it predicts its own part of the images only

    Raises FloatingPointError where weights or outputs are not finite, ValueError for both proposals and augmentation.
    """
    if proposals is not None and augmentation is not None:
        raise ValueError("saved proposals are of one view; leave out proposals or augmentation")
    check_weights(model)
    found: dict[int, Detections] = {}
    if augmentation is not None:
        own = range(rank, len(dataset), world)
        for index in tqdm(own, desc="predicting", unit="image", disable=not progress):
            image_id = dataset.image_id(index)
            found[image_id] = detect_augmented(model, dataset[index][0], f"image {image_id}", augmentation)
        return found
    batches = val_loader(dataset, config, batch_size, rank, world)
    with tqdm(total=batches.images, desc="predicting", unit="image", disable=not progress) as bar:
        for batch, _, image_ids in batches:
            names = [f"image {image_id}" for image_id in image_ids]
            given = None if proposals is None else proposals.of_batch(batch, image_ids)
            found.update(zip(image_ids, detect(model, batch, names, given)))
            bar.update(len(image_ids))
    return found


def detect(
    model: nn.Module,
    batch: ImageBatch,
    names: Sequence[str] | None = None,
    proposals: list[Proposals] | None = None,
) -> list[Detections]:
    """The model's detections for a batch, in the pixels of the original images, checked to be finite, on the CPU.

    names      what to call each image in an error message
    proposals  one per image, in the batch's pixels, to use in place of the model's own
    """
    names = names or [f"image {index}" for index in range(len(batch))]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model), torch.inference_mode():
        batch = batch.to(device)
        found = model(batch) if proposals is None else model(batch, proposals=[part.to(device) for part in proposals])
    checked = []
    for detections, size, original_size, name in zip(found, batch.sizes, batch.original_sizes, names):
        detections = detections.to("cpu")
        check_finite(detections, name)
        checked.append(to_original(detections, size, original_size))
    return checked


def detect_augmented(model: nn.Module, image: Tensor, name: str, augmentation: Augmentation) -> Detections:
    """The detections of all views of one image ``[3, H, W]``, in its own pixels, checked to be finite, on the CPU."""
    with evaluating(model), torch.inference_mode():
        found, size = detect_views(model, image, augmentation)
    found = found.to("cpu")
    check_finite(found, name)
    return to_original(found, size, (image.shape[1], image.shape[2]))


def to_original(detections: Detections, size: Size, original_size: Size) -> Detections:
    """Detections of an image resized to ``size`` (height, width), in the pixels of the original image and inside it."""
    boxes = box_ops.clip(box_ops.resize(detections.boxes, size, original_size), original_size)
    keypoints = detections.keypoints
    if keypoints is not None:
        ratio_y, ratio_x = (original / resized for original, resized in zip(original_size, size))
        x, y, score = keypoint_ops.resize(keypoints, ratio_x, ratio_y).unbind(-1)
        keypoints = torch.stack([x.clamp(0, original_size[1]), y.clamp(0, original_size[0]), score], dim=-1)
    return replace(detections, boxes=boxes, keypoints=keypoints)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module gets its own mode back, also those that were frozen one by one."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def as_image(source: ImageSource, name: str = "the image") -> Tensor:
    """A path, PIL image, array ``[H, W, 3]`` uint8 or tensor as an image ``[3, H, W]``, uint8 or float in [0, 1].

    name  what to call it in an error message
    """
    if isinstance(source, str | os.PathLike):
        return read_image(source)
    if isinstance(source, Image.Image):
        source = to_rgb(ImageOps.exif_transpose(source))
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8:
            raise ValueError(
                f"{name} must be an RGB array [H, W, 3] of uint8, got {list(source.shape)} of {source.dtype}; "
                "a gray one needs its channel three times, a float one goes in as a tensor [3, H, W]"
            )
        source = torch.from_numpy(source.copy()).permute(2, 0, 1)
    check_image(source, name)
    return source


def check_weights(model: nn.Module) -> None:
    """Raise FloatingPointError naming a weight or statistic that is not finite: it would silence every detection."""
    values = {
        name: value
        for name, value in chain(model.named_parameters(), model.named_buffers())
        if value.is_floating_point()
    }
    finite = [torch.isfinite(value.detach()).all() for value in values.values()]
    if finite and not torch.stack(finite).all():  # one wait for the device, not one per weight
        bad = [name for name, fine in zip(values, finite) if not fine]
        raise FloatingPointError(
            f"{len(bad)} of the model's {len(values)} weights hold NaN or infinity, the first is {bad[0]!r}; "
            "load a checkpoint from before the loss diverged"
        )


def check_finite(detections: Detections, name: str) -> None:
    """Raise FloatingPointError, naming the image and the field, where detections hold NaN or infinity."""
    for field in ("boxes", "scores", "mask_probs", "keypoints"):
        value = getattr(detections, field)
        if value is not None and not torch.isfinite(value).all():
            rows = (~torch.isfinite(value)).reshape(len(value), math.prod(value.shape[1:])).any(1).nonzero()[:, 0]
            raise FloatingPointError(
                f"the model gave {field} that are not finite for {name} (detections {rows.tolist()[:5]}); "
                "check the weights and, at reduced precision, the range of the activations"
            )
