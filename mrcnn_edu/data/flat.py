"""An easy world, which a small head learns in seconds: bright flat shapes on a dark flat ground, a few to an image.

Chapter 10 (the box head), Chapter 11 (the mask head), Chapter 12 (the whole model), Chapter 13 (training) and
Chapter 14 (keypoints) watch models learn on it, and the toys of Chapter 17 (the ablations) are trained on it: what must
be learned in half a minute. Whole models that have longer are measured on ``data.shapes``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mrcnn_edu.data.drawing import CLASSES, FIGURE, JOINTS, SKELETON, stamp
from mrcnn_edu.data.shapes import Instance, Scene
from mrcnn_edu.masks import rle_encode
from mrcnn_edu.structures import Target

HALF_SIZE = (0.16, 0.34)  # of the image's side
LEAST_AREA = 0.03  # of the image; what later shapes hide down to less is not counted as an instance


def make(
    seed: int | Sequence[int], size: int = 64, instances: int = 3, labels: Sequence[int] | None = None
) -> tuple[Tensor, Target]:
    """One image of flat shapes, the later ones on top, and everything that is true about it.

    seed       a non-negative number or several; the same seed gives the same image on every machine
    size       px, side of the square image; at least 16
    instances  shapes that are drawn
    labels     the classes to draw from, out of 1..6; None: all
    returns    image [3, size, size] uint8, Target with masks and keypoints [N, 7, 3] (zeros except for figures)
    """
    if size < 16 or instances < 0:
        raise ValueError(f"a flat image needs a size of 16 or more and 0 or more instances, got {size} and {instances}")
    rng = np.random.default_rng(seed)
    pixels = np.broadcast_to(rng.uniform(0.05, 0.3, (3, 1, 1)), (3, size, size)).copy()
    scene = Scene(pixels, np.full((size, size), -1, dtype=np.int16))
    for index in range(instances):
        label = int(rng.choice(labels if labels is not None else range(1, len(CLASSES) + 1)))
        x, y = rng.uniform(0.22, 0.78, 2) * size
        shape = stamp(label, x, y, size * rng.uniform(*HALF_SIZE), rng, scene.size)
        pixels[:, shape.rows, shape.columns][:, shape.mask] = _another_colour(rng, pixels[:, int(y), int(x)])[:, None]
        scene.owner[shape.rows, shape.columns][shape.mask] = index
        scene.instances.append(Instance(label, int(shape.mask.sum()), joints=shape.joints))
    noisy = pixels + rng.normal(0, 0.03, pixels.shape)
    target = scene.target()
    seen = target.masks.sum(dim=(1, 2)) >= LEAST_AREA * size**2
    return torch.from_numpy(np.rint(noisy.clip(0, 1) * 255).astype(np.uint8)), target[seen]


def write(
    folder: Path | str, count: int, seed: int = 0, size: int = 64, instances: int = 3, labels: Sequence[int] = (1, 2, 3)
) -> tuple[Path, Path]:
    """So many images of ``make`` with the seeds (seed, 0), (seed, 1), ... in COCO format.

    folder   made if need be; files of an earlier call are replaced
    labels   the classes to draw from, one named twice twice as often; in the file, and so in a data set, they are
             numbered from 1 without gaps
    returns  the folder of the images and the annotation file, as ``CocoDataset`` wants them
    """
    images, annotations = Path(folder) / "images", []
    images.mkdir(parents=True, exist_ok=True)
    ids = {label: number for number, label in enumerate(sorted(set(labels)), start=1)}
    for image_id in range(1, count + 1):
        pixels, target = make((seed, image_id - 1), size, instances, labels)
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        picture.save(images / f"{image_id:06d}.png", compress_level=0)  # noise does not shrink, and this reads faster
        annotations += [_annotation(target, row, image_id, ids) for row in range(len(target))]
    categories: list[dict[str, Any]] = [{"id": number, "name": CLASSES[label - 1]} for label, number in ids.items()]
    if FIGURE in ids:
        categories[ids[FIGURE] - 1] |= {"keypoints": list(JOINTS), "skeleton": [list(limb) for limb in SKELETON]}
    content = {
        "images": [
            {"id": image_id, "file_name": f"{image_id:06d}.png", "height": size, "width": size}
            for image_id in range(1, count + 1)
        ],
        "annotations": [{"id": number, **one} for number, one in enumerate(annotations, start=1)],
        "categories": categories,
    }
    file = Path(folder) / "instances.json"
    file.write_text(json.dumps(content))
    return images, file


def _annotation(target: Target, row: int, image_id: int, ids: dict[int, int]) -> dict[str, Any]:
    x1, y1, x2, y2 = target.boxes[row].tolist()
    annotation = {
        "image_id": image_id,
        "category_id": ids[int(target.labels[row])],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(target.masks[row].sum()),
        "iscrowd": 0,
        "segmentation": rle_encode(target.masks[row]),
    }
    if int(target.labels[row]) == FIGURE:
        joints = target.keypoints[row]
        annotation["keypoints"] = [round(value, 2) for value in joints.flatten().tolist()]
        annotation["num_keypoints"] = int((joints[:, 2] > 0).sum())
    return annotation


def _another_colour(rng: np.random.Generator, around: np.ndarray) -> np.ndarray:
    """A random bright colour ``[3]`` in [0, 1] that stands out from the one around it."""
    while True:
        colour = rng.uniform(0.25, 0.95, 3)
        if colour.max() > 0.6 and np.abs(colour - around).max() > 0.3:
            return colour
