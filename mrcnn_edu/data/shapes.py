"""A world of drawn shapes with exact masks, boxes and keypoints: data that needs no download.

Chapter 2 (a data set we can trust). The paper trains on photographs; this stands in for them on a laptop, with what
makes photographs hard in small: instances of every size that hide one another, holes, textures, clutter and noise.

A pixel belongs to a shape where the shape's signed distance at the pixel's centre is negative, and an array of owners
remembers which instance is on top: masks are exact by construction.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mrcnn_edu.data.drawing import (
    CLASSES,
    FIGURE,
    FLIP_PAIRS,
    JOINTS,
    SKELETON,
    Stamp,
    background,
    draw_line,
    paint,
    stamp,
)
from mrcnn_edu.masks import polygons_to_mask, rle_counts, rle_encode, to_boxes
from mrcnn_edu.structures import Size, Target

__all__ = ["CATEGORY_IDS", "CLASSES", "FIGURE", "FLIP_PAIRS", "JOINTS", "SKELETON", "draw_scene", "make", "write"]

CATEGORY_IDS = (3, 7, 12, 18, 25, 31)  # of the classes in a written file; as in COCO, with gaps
HALF_SIZE = (0.04, 0.34)  # of the image's shorter side, log-uniform
NOISE = (0.005, 0.03)  # standard deviation of the pixels' noise, of the full range
FIGURES = 0.3  # share of the figures; in photographs, too, people are the most frequent class
MOST_HIDDEN = 0.6  # a later shape may hide this share of an earlier one
VERSION = 4  # of the drawings: raise it when the same seed gives another image, so that old folders are rewritten
SPLITS = ("train", "val")
EMPTY, CROWDED = 0.03, 0.07  # shares of images without any instance, and with a crowd region


def make(
    seed: int | Sequence[int], size: int | Size = 160, instances: tuple[int, int] = (1, 6)
) -> tuple[Tensor, Target]:
    """One drawn image and everything that is true about it.

    seed       a non-negative number or several; the same seed gives the same image on every machine
    size       px, side of the square image, or (height, width); at least 16
    instances  fewest and most instances, as far as they find room; a few images have none, a few a crowd besides
    returns    image [3, H, W] uint8, Target with masks, keypoints [N, 7, 3] (zeros except for figures) and crowd
    """
    scene = draw_scene(seed, size, instances)
    return torch.from_numpy(scene.pixels), scene.target()


@dataclass
class Instance:
    """One drawn shape: its class, the pixels it would have unhidden, and its outline and joints where it has them."""

    label: int
    area: int  # px inside the image, before later shapes hide some
    crowd: bool = False
    outline: np.ndarray | None = None  # [n, (x, y)] corners, image pixels; None for what no single polygon describes
    joints: np.ndarray | None = None  # [7, (x, y)], image pixels


@dataclass
class Scene:
    """A drawing in progress: its pixels, which instance owns each of them, and the instances from back to front."""

    pixels: np.ndarray  # [3, H, W] float32 in [0, 1] while drawing, uint8 when done
    owner: np.ndarray  # [H, W] int16, index into ``instances``, -1 for background
    instances: list[Instance] = field(default_factory=list)

    @property
    def size(self) -> Size:
        return self.owner.shape

    def add(self, shape: Stamp, index: int, rng: np.random.Generator) -> None:
        """Paint a shape on top of everything, as part of the given instance."""
        paint(self.pixels, shape, rng)
        self.owner[shape.rows, shape.columns][shape.mask] = index

    def keypoints(self, index: int) -> np.ndarray:
        """Joints ``[7, (x, y, v)]`` of one instance: v = 2 visible, 1 behind a later shape, 0 outside the image."""
        joints = np.zeros((len(JOINTS), 3), dtype=np.float32)
        if self.instances[index].joints is None:
            return joints
        height, width = self.size
        for joint, (x, y) in zip(joints, self.instances[index].joints):
            if 0 <= x < width and 0 <= y < height:
                joint[:] = x, y, 1 if self.owner[int(y), int(x)] > index else 2
        return joints

    def target(self) -> Target:
        """The ground truth of the scene, one row per instance from back to front."""
        count = len(self.instances)
        masks = torch.from_numpy(self.owner == np.arange(count, dtype=np.int16)[:, None, None])
        keypoints = [self.keypoints(index) for index in range(count)] or [np.zeros((0, len(JOINTS), 3))]
        return Target(
            boxes=to_boxes(masks),
            labels=torch.tensor([instance.label for instance in self.instances], dtype=torch.int64),
            masks=masks,
            keypoints=torch.from_numpy(np.stack(keypoints) if count else keypoints[0]).float(),
            crowd=torch.tensor([instance.crowd for instance in self.instances], dtype=torch.bool),
        )


def draw_scene(seed: int | Sequence[int], size: int | Size = 160, instances: tuple[int, int] = (1, 6)) -> Scene:
    """The drawing behind ``make``, with each instance's outline and order."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 16:
        raise ValueError(f"a drawing needs at least 16 pixels a side, got {height} x {width}")
    if not 0 <= instances[0] <= instances[1] <= 1000:
        raise ValueError(f"instances must be (fewest, most) with 0 <= fewest <= most <= 1000, got {instances}")
    rng = np.random.default_rng(seed)
    scene = Scene(background(rng, (height, width)), np.full((height, width), -1, dtype=np.int16))
    for _ in range(rng.integers(0, 5)):
        draw_line(scene.pixels, rng)
    kind = rng.random()
    if kind >= EMPTY:
        if kind > 1 - CROWDED:
            _draw_crowd(scene, rng)
        for _ in range(rng.integers(instances[0], instances[1] + 1)):
            _place(scene, rng)
    noise = rng.standard_normal(scene.pixels.shape, dtype=np.float32) * rng.uniform(*NOISE)
    scene.pixels = np.rint(np.clip(scene.pixels + noise, 0, 1) * 255).astype(np.uint8)
    return scene


# ---------------------------------------------------------------------------------------------------------------------
# Placing
# ---------------------------------------------------------------------------------------------------------------------


def _place(scene: Scene, rng: np.random.Generator) -> None:
    """Draw one instance where it hides no earlier one by more than MOST_HIDDEN; smaller and smaller if need be."""
    label = FIGURE if rng.random() < FIGURES else int(rng.integers(1, FIGURE))
    side = min(scene.size)
    half = side * math.exp(rng.uniform(math.log(HALF_SIZE[0]), math.log(HALF_SIZE[1])))
    for attempt in range(40):
        if attempt % 10 == 9:
            half *= 0.7
        half = max(half, HALF_SIZE[0] * side, 2.5)
        x, y = (rng.uniform(0.6 * half, extent - 0.6 * half) for extent in reversed(scene.size))
        shape = stamp(label, x, y, half, rng, scene.size)
        if _hides_little(scene, shape):
            scene.add(shape, len(scene.instances), rng)
            outline = shape.outline if _inside(shape.outline, scene.size) else None
            scene.instances.append(Instance(label, int(shape.mask.sum()), False, outline, shape.joints))
            return


def _hides_little(scene: Scene, shape: Stamp) -> bool:
    """Would every earlier instance keep enough of itself in view?"""
    if not shape.mask.any():
        return False
    covered = scene.owner[shape.rows, shape.columns][shape.mask]
    for index in np.unique(covered[covered >= 0]):
        left = np.count_nonzero(scene.owner == index) - np.count_nonzero(covered == index)
        if left < max(1, (1 - MOST_HIDDEN) * scene.instances[index].area):
            return False
    return True


def _draw_crowd(scene: Scene, rng: np.random.Generator) -> None:
    """A cluster of many tiny shapes of one class, labelled together as one region nobody counted."""
    side = min(scene.size)
    label = int(rng.integers(1, FIGURE))
    x, y = (rng.uniform(0.25, 0.75) * extent for extent in reversed(scene.size))
    for _ in range(rng.integers(14, 28)):
        dx, dy = rng.normal(0, 0.1 * side, 2)
        half = max(2.0, side * rng.uniform(0.018, 0.032))
        scene.add(stamp(label, x + dx, y + dy, half, rng, scene.size), 0, rng)
    area = int(np.count_nonzero(scene.owner == 0))
    if area:
        scene.instances.append(Instance(label, area, crowd=True))


def _inside(outline: np.ndarray | None, size: Size) -> bool:
    return outline is not None and bool((outline >= 0).all() and (outline <= (size[1], size[0])).all())


# ---------------------------------------------------------------------------------------------------------------------
# On disk, as COCO
# ---------------------------------------------------------------------------------------------------------------------


def write(folder: str | Path, train: int = 4000, val: int = 200, size: int | Size = 160, seed: int = 0) -> Path:
    """Write drawn images and their annotations in COCO format, unless the very same are there already.

    folder   gets train/*.png, train.json, val/*.png, val.json, and stamp.json, which says how they were made
    returns  the folder

    The files appear all at once or not at all. Raises ValueError for a folder that holds something else.
    """
    folder = Path(folder)
    made = {"made_by": "mrcnn_edu.data.shapes", "version": VERSION, "train": train, "val": val, "seed": seed}
    made["size"] = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if train < 0 or val < 0:
        raise ValueError(f"train and val must be 0 or more images, got {train} and {val}")
    if _is_complete(folder, made):
        return folder
    _check_replaceable(folder)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        for split, name in enumerate(SPLITS):
            (partial / name).mkdir(parents=True)
            _write_split(partial, name, made[name], tuple(made["size"]), (seed, split))
        (partial / "stamp.json").write_text(json.dumps(made))
        if not _is_complete(folder, made):  # else another process was faster
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _is_complete(folder: Path, made: dict[str, Any]) -> bool:
    try:
        if json.loads((folder / "stamp.json").read_text()) != made:
            return False
    except (OSError, ValueError):
        return False
    return all(
        (folder / f"{name}.json").exists() and sum(1 for _ in (folder / name).glob("*.png")) == made[name]
        for name in SPLITS
    )


def _check_replaceable(folder: Path) -> None:
    """Only what an earlier ``write`` left may be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; choose a folder")
    found = {path.name for path in folder.iterdir()}
    ours = {"stamp.json", *SPLITS, *(f"{name}.json" for name in SPLITS)}
    if found and not ("stamp.json" in found and found <= ours):
        stranger = min(found - ours or found)
        raise ValueError(f"{folder} holds files of others, such as {stranger}; choose a new or an empty folder")


def _write_split(folder: Path, name: str, count: int, size: Size, seed: tuple[int, int]) -> None:
    jobs = [(folder / name, index, size, seed) for index in range(count)]
    if count >= 64 and sys.platform == "linux":  # elsewhere forking is unsafe or unknown
        processes = min(8, len(os.sched_getaffinity(0)))
        # one thread each: a forked process must not use the thread pool its parent may have started
        with multiprocessing.get_context("fork").Pool(processes, torch.set_num_threads, (1,)) as pool:
            described = pool.starmap(_write_image, jobs, chunksize=16)
    else:
        described = [_write_image(*job) for job in jobs]
    annotations = [annotation for image in described for annotation in image]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    categories: list[dict[str, Any]] = [{"id": i, "name": n} for i, n in zip(CATEGORY_IDS, CLASSES)]
    categories[FIGURE - 1] |= {"keypoints": list(JOINTS), "skeleton": [list(limb) for limb in SKELETON]}
    images = [
        {"id": index + 1, "file_name": f"{index + 1:06d}.png", "height": size[0], "width": size[1]}
        for index in range(count)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{name}.json").write_text(json.dumps(content))


def _write_image(folder: Path, index: int, size: Size, seed: tuple[int, int]) -> list[dict[str, Any]]:
    """Draw and save one image; its annotations, still without ids."""
    scene = draw_scene((*seed, index), size)
    image = Image.fromarray(np.ascontiguousarray(scene.pixels.transpose(1, 2, 0)))
    image.save(folder / f"{index + 1:06d}.png", compress_level=0)  # noise does not shrink, and this reads faster
    target = scene.target()
    return [_annotation(scene, target, row, index + 1) for row in range(len(target))]


def _annotation(scene: Scene, target: Target, row: int, image_id: int) -> dict[str, Any]:
    instance, mask = scene.instances[row], target.masks[row]
    x1, y1, x2, y2 = target.boxes[row].tolist()
    annotation = {
        "image_id": image_id,
        "category_id": CATEGORY_IDS[instance.label - 1],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(mask.sum()),
        "iscrowd": int(instance.crowd),
        "segmentation": _segmentation(instance, mask),
    }
    if instance.label == FIGURE:
        joints = target.keypoints[row]
        annotation["keypoints"] = [round(value, 2) for value in joints.flatten().tolist()]
        annotation["num_keypoints"] = int((joints[:, 2] > 0).sum())
    return annotation


def _segmentation(instance: Instance, mask: Tensor) -> list[list[float]] | dict[str, Any]:
    """All three forms COCO knows: plain run lengths for crowds, a polygon where it fits, else compressed ones."""
    rle = rle_encode(mask)
    if instance.crowd:
        return {"size": rle["size"], "counts": rle_counts(rle).tolist()}
    if instance.outline is not None and int(mask.sum()) == instance.area:
        polygon = instance.outline.round(2).reshape(-1).tolist()
        wrong = int((polygons_to_mask([polygon], tuple(mask.shape)) ^ mask).sum())
        if wrong <= 0.02 * instance.area:
            return [polygon]
    return rle
