"""What ``mrcnn-edu check`` does: look at a data set before weeks are spent on it, and say what is there, and odd.

Chapter 2 (a data set we can trust) and Chapter 18 (your own data).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from mrcnn_edu.canvas import Picture
from mrcnn_edu.cli_tools import Check
from mrcnn_edu.data.cityscapes import CityscapesDataset
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.layouts import find_split, open_dataset
from mrcnn_edu.masks import to_boxes
from mrcnn_edu.structures import Target
from mrcnn_edu.visualize import draw

SHOWN = 10  # lines of a kind; the rest is counted
SHEET = 12  # pictures
TINY = 16  # square pixels below which an instance is hardly there
APART = 2.0  # pixels by which a stated box may differ from that of its mask


def check(options: Check) -> None:
    """Report on every part of a folder that is there; ValueError at the end where an image or annotation is broken."""
    found, broken = 0, 0
    for split in options.split or ("train", "val"):
        try:
            images, annotations = find_split(options.folder, split, options.keypoints)
        except FileNotFoundError:
            if options.split:
                raise
            continue
        found += 1
        broken += report(split, open_dataset(images, annotations, strict=False), options)
    if not found:
        raise FileNotFoundError(f"neither train nor val data in {options.folder}; name the part with --split")
    if broken:
        raise ValueError(f"{broken} broken images or annotations; they are listed above")


def report(split: str, dataset: CocoDataset | CityscapesDataset, options: Check) -> int:
    """Print what one part holds; the number of its broken images and annotations."""
    print(f"\n{split}: {dataset.annotations_file}")
    instances, crowds, areas, odd, broken = Counter(), 0, [], [], list(dataset.report)
    empty, order = 0, range(len(dataset))
    chosen = order if options.images is None else order[:: max(1, len(order) // options.images)]
    for index in tqdm(chosen, desc=split, unit="image", disable=None, leave=False):
        try:
            target = dataset[index][1]
        except (OSError, ValueError) as error:
            broken.append(str(error))
            continue
        single = target.labels if target.crowd is None else target.labels[~target.crowd]
        instances.update(single.tolist())
        crowds += len(target) - len(single)
        empty += not len(target)
        areas += pixels_of(target).tolist()
        odd += [f"image {dataset.image_id(index)}: {what}" for what in suspicious(target, dataset.size(index))]
    print("\n".join(summary(dataset, len(chosen), instances, crowds, empty, areas)))
    for title, lines in (("broken", broken), ("suspicious", odd)):
        print(f"  {len(lines)} {title}")
        print("".join(f"    {line}\n" for line in lines[:SHOWN]), end="")
        if len(lines) > SHOWN:
            print(f"    and {len(lines) - SHOWN} more")
    if not broken and options.sheet and instances:
        path = options.out / f"{split}.png"
        contact_sheet(dataset, path)
        print(f"  pictures: {path}")
    return len(broken)


def summary(
    dataset: CocoDataset | CityscapesDataset,
    looked_at: int,
    instances: Counter[int],
    crowds: int,
    empty: int,
    areas: list[float],
) -> Iterator[str]:
    """The lines about counts, sizes and classes."""
    heights, widths = zip(*dataset.sizes)
    upright = sum(height > width for height, width in dataset.sizes)
    yield f"  {len(dataset)} images, {looked_at} looked at; {empty} of them without annotations"
    yield f"  {min(widths)} to {max(widths)} px wide, {min(heights)} to {max(heights)} px high; {upright} upright"
    yield f"  {sum(instances.values())} instances and {crowds} crowd regions; joints: {dataset.joints}"
    small, large = sum(area < 32**2 for area in areas), sum(area > 96**2 for area in areas)
    medium = len(areas) - small - large
    yield f"  {small} small (under 32 x 32 px), {medium} medium, {large} large (over 96 x 96 px)"
    counts = sorted(instances.items(), key=lambda pair: -pair[1])
    names = dataset.categories.names
    yield f"  {len(names)} classes, of which {len(counts)} occur:"
    shown = [f"{names[label - 1]} {count}" for label, count in counts]
    yield "    " + ", ".join(shown[: 3 * SHOWN]) + (", ..." if len(shown) > 3 * SHOWN else "")
    absent = [name for label, name in enumerate(names, start=1) if label not in instances]
    if absent:
        yield "    none of " + ", ".join(absent[:SHOWN]) + (", ..." if len(absent) > SHOWN else "")


def pixels_of(target: Target) -> torch.Tensor:
    """The area of each single instance, px: of its mask, or else of its box."""
    if target.masks is not None:
        areas = target.masks.flatten(1).sum(dim=1).float()
    else:
        areas = (target.boxes[:, 2:] - target.boxes[:, :2]).prod(dim=1)
    return areas if target.crowd is None else areas[~target.crowd]


def suspicious(target: Target, size: tuple[int, int]) -> list[str]:
    """What is legal but unlikely: hardly an instance, a box that does not fit its mask, the same box twice, ..."""
    found = []
    single = torch.ones(len(target), dtype=torch.bool) if target.crowd is None else ~target.crowd
    areas = (target.boxes[:, 2:] - target.boxes[:, :2]).prod(dim=1)
    tight = None if target.masks is None else to_boxes(target.masks)
    seen: dict[tuple[float, ...], int] = {}
    for row in single.nonzero()[:, 0].tolist():
        box = [round(value, 1) for value in target.boxes[row].tolist()]
        if areas[row] < TINY:
            found.append(f"box {box} has {areas[row]:.0f} square pixels")
        elif areas[row] >= 0.99 * size[0] * size[1]:
            found.append(f"box {box} is the whole image")
        if tight is not None:
            if not bool(target.masks[row].any()):
                found.append(f"the mask in box {box} has no pixel")
            elif float((tight[row] - target.boxes[row]).abs().max()) > APART:
                found.append(f"box {box} is not that of its mask, {[round(v, 1) for v in tight[row].tolist()]}")
        key = (*box, int(target.labels[row]))
        if key in seen:
            found.append(f"box {box} is there twice with the same class")
        seen[key] = row
    return found


def contact_sheet(dataset: CocoDataset | CityscapesDataset, path: Path) -> None:
    """Some images with their annotations, spread over the data set."""
    spread = range(0, len(dataset), max(1, len(dataset) // (3 * SHEET)))
    chosen = [index for index in spread if len(dataset.target(index))][:SHEET]
    columns, side, gap = 4, 3.0, 0.1  # inches
    rows = -(-len(chosen) // columns)
    figure = Picture(columns * side, rows * side)
    for place, index in enumerate(chosen):
        row, column = divmod(place, columns)
        panel = figure.panel(column * side + gap, row * side + gap, side - 2 * gap, side - 2 * gap)
        image, target = dataset[index]
        draw(image, target, dataset.categories, ax=panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
