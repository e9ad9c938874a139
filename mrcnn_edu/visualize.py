"""Pictures of what goes in and comes out: instances on an image, and sheets of truth beside prediction.

Chapter 1 (instances) and Chapter 12 (predictions); what happens in between is drawn by ``diagrams`` and offered here as
well. Every function returns a matplotlib Figure. Boxes, masks and keypoints are in the pixels of the image below them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mrcnn_edu import boxes as box_ops
from mrcnn_edu.canvas import INK, Colour, Picture, frame, halo, outline, palette, show, shrink, stage, write
from mrcnn_edu.data.coco import CategoryMap
from mrcnn_edu.diagrams import draw_anchors, draw_proposals, draw_rois
from mrcnn_edu.inference import ImageSource, as_image
from mrcnn_edu.ops import paste_masks
from mrcnn_edu.structures import Detections, Size, Target

__all__ = ["draw", "draw_anchors", "draw_proposals", "draw_rois", "matched_colours", "sheet"]

Categories = CategoryMap | Sequence[str] | None  # a map knows skeletons as well; names alone stand in label order


def draw(
    image: ImageSource,
    instances: Detections | Target,
    categories: Categories = None,
    *,
    score_threshold: float = 0.5,
    masks: bool = True,
    boxes: bool = True,
    labels: bool = True,
    keypoints: bool = True,
    colours: Sequence[Colour] | None = None,
    size: float = 6.0,
    ax: Axes | None = None,
) -> Figure:
    """An image with its instances: masks, boxes, labels with scores, and skeletons (hollow joints are hidden ones).

    image            path, PIL image, array [H, W, 3] uint8 or tensor [3, H, W]
    instances        Detections (those below ``score_threshold`` are left out) or a Target, in the image's pixels
    categories       class names in label order, or a CategoryMap, which also knows which joints to connect
    colours          one per instance of ``instances``; a palette for colour-blind readers when absent
    size             inches, longer side of the figure; ignored with ``ax``
    ax               draw into these axes instead of a new figure

    Raises ValueError for masks of another size than the image, for labels without a name and for too few colours.
    """
    if not (isinstance(size, (int, float)) and 0 < size <= 100):
        raise ValueError(f"size must be a number of inches, above 0 and at most 100, got {size!r}")
    pixels = as_image(image)
    full = (pixels.shape[1], pixels.shape[2])
    _check(instances, full, categories, colours)
    small = shrink(pixels, 1600)
    ax = stage(full, size, ax)
    show(ax, small.permute(1, 2, 0).numpy(), full)
    colours = palette(len(instances)) if colours is None else colours
    keep = _visible(instances, score_threshold)
    rows = keep[torch.argsort(box_ops.area(instances.boxes[keep]), descending=True, stable=True)].tolist()
    taken: list[np.ndarray] = []
    line = _line_width(ax)
    for row in rows:
        one, colour = instances[row : row + 1].to("cpu"), colours[row]
        if masks:
            _draw_mask(ax, one, (small.shape[1], small.shape[2]), full, colour, line)
        if boxes:
            _draw_box(ax, one, colour, line, dashed=masks and _has_masks(one))
    for row in rows:
        one, colour = instances[row : row + 1].to("cpu"), colours[row]
        if keypoints and one.keypoints is not None:
            _draw_joints(ax, one, categories, colour, line)
        if labels:
            write(ax, _caption(one, categories), one.boxes[0].tolist(), colour, taken, fontsize=3.6 + 2.4 * line)
    return ax.figure


def sheet(
    images: Sequence[ImageSource],
    targets: Sequence[Target],
    predictions: Sequence[Detections],
    categories: Categories = None,
    *,
    columns: int = 3,
    score_threshold: float = 0.5,
    size: float = 12.0,
) -> Figure:
    """Pictures in rows, the ground truth of each beside its prediction; what was found has its instance's colour.

    images, targets, predictions  one each per picture, in the same order and in the image's own pixels
    columns                       pairs beside each other
    size                          inches, width of the sheet
    """
    if not len(images) == len(targets) == len(predictions) > 0:
        raise ValueError(
            f"a sheet needs one target and one prediction per image, got {len(images)} images, {len(targets)} targets "
            f"and {len(predictions)} predictions"
        )
    pictures = [as_image(image) for image in images]
    columns = min(columns, len(pictures))
    between, within, header = 0.22, 0.05, 0.3  # inches
    side = (size - (columns - 1) * between) / columns / 2 - within / 2
    aspect = float(np.median([picture.shape[1] / picture.shape[2] for picture in pictures]))
    height = side * min(max(aspect, 0.4), 2.0)
    rows = -(-len(pictures) // columns)
    figure = Picture(size, header + rows * height + (rows - 1) * between)
    for index, (picture, target, found) in enumerate(zip(pictures, targets, predictions)):
        row, column = divmod(index, columns)
        left, top = column * (2 * side + within + between), header + row * (height + between)
        truth_colours, found_colours = matched_colours(target, found)
        pair = (
            (target, truth_colours, left, "ground truth"),
            (found, found_colours, left + side + within, "prediction"),
        )
        for instances, colours, start, title in pair:
            ax = figure.panel(start, top, side, height)
            draw(picture, instances, categories, score_threshold=score_threshold, colours=colours, ax=ax)
            if row == 0:
                centre = (start + side / 2) / size
                figure.text(
                    centre, 1 - 0.12 / figure.get_figheight(), title, color=INK, fontsize=9, ha="center", va="center"
                )
    return figure


def matched_colours(target: Target, found: Detections) -> tuple[list[Colour], list[Colour]]:
    """Colours for truth and prediction, equal where a detection overlaps an instance of its class by IoU >= 0.5.

    Detections are taken best first and each instance is given away once; what is left over gets colours of its own.
    """
    colours = palette(len(target) + len(found))
    chosen: list[Colour | None] = [None] * len(found)
    overlap = box_ops.iou(found.boxes.cpu(), target.boxes.cpu())  # [N, instances]
    overlap *= found.labels.cpu()[:, None] == target.labels.cpu()[None, :]
    for row in torch.argsort(found.scores.cpu(), descending=True, stable=True).tolist():
        if len(target) and overlap[row].max() >= 0.5:
            best = int(overlap[row].argmax())
            chosen[row] = colours[best]
            overlap[:, best] = 0
    spare = iter(colours[len(target) :])
    return colours[: len(target)], [next(spare) if colour is None else colour for colour in chosen]


def _check(
    instances: Detections | Target, size: Size, categories: Categories, colours: Sequence[Colour] | None
) -> None:
    if not isinstance(instances, (Detections, Target)):
        raise TypeError(f"instances must be Detections or a Target, got {type(instances).__name__}")
    masks = getattr(instances, "masks", None)
    if masks is not None and tuple(masks.shape[1:]) != size:
        raise ValueError(
            f"the masks are {masks.shape[1]} x {masks.shape[2]} but the image is {size[0]} x {size[1]}; "
            "draw a target on the image it belongs to"
        )
    if colours is not None and len(colours) < len(instances):
        raise ValueError(f"one colour per instance is needed, got {len(colours)} for {len(instances)} instances")
    names = _names(categories)
    if names and len(instances) and not 1 <= int(instances.labels.min()) <= int(instances.labels.max()) <= len(names):
        raise ValueError(
            f"labels must lie in 1..{len(names)} (the names given), got {instances.labels.min()} to "
            f"{instances.labels.max()}"
        )


def _names(categories: Categories) -> list[str]:
    if categories is None:
        return []
    if isinstance(categories, CategoryMap):
        return categories.names
    if not isinstance(categories, (list, tuple)) or not all(isinstance(name, str) for name in categories):
        raise TypeError(f"categories must be a list of names or a CategoryMap, got {type(categories).__name__}")
    return list(categories)


def _visible(instances: Detections | Target, score_threshold: float) -> Tensor:
    """The rows [n] to draw: all of a target, the detections at or above the threshold."""
    if isinstance(instances, Detections):
        return torch.nonzero(instances.scores >= score_threshold)[:, 0]
    return torch.arange(len(instances))


def _has_masks(instances: Detections | Target) -> bool:
    return (instances.mask_probs if isinstance(instances, Detections) else instances.masks) is not None


def _is_crowd(one: Detections | Target) -> bool:
    return isinstance(one, Target) and one.crowd is not None and bool(one.crowd[0])


def _line_width(ax: Axes) -> float:
    """Points; thinner in smaller panels."""
    box = ax.get_window_extent()
    return float(np.clip(max(box.width, box.height) / ax.figure.dpi * 0.32, 0.7, 1.8))


def _draw_mask(ax: Axes, one: Detections | Target, shown: Size, full: Size, colour: Colour, line: float) -> None:
    """One instance's mask, computed at the size at which the image is shown."""
    if isinstance(one, Detections) and one.mask_probs is not None:
        mask = paste_masks(one.mask_probs, box_ops.resize(one.boxes, full, shown), shown)[0]
    elif isinstance(one, Target) and one.masks is not None:
        mask = (
            one.masks[0] if shown == full else F.interpolate(one.masks[None].float(), shown, mode="area")[0, 0] >= 0.5
        )
    else:
        return
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if len(rows) == 0:
        return
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    scale = (full[1] / shown[1], full[0] / shown[0])
    outline(
        ax, mask[top:bottom, left:right].numpy(), (left * scale[0], top * scale[1]), scale,
        facecolor=(*colour, 0.12 if _is_crowd(one) else 0.42), edgecolor=colour, linewidth=line, joinstyle="round",
        hatch="////" if _is_crowd(one) else None, path_effects=halo(colour, 1.9 * line),
    )  # fmt: skip


def _draw_box(ax: Axes, one: Detections | Target, colour: Colour, line: float, dashed: bool) -> None:
    """Thin and dashed beside a mask, which says more; otherwise a full line."""
    if dashed:
        frame(ax, one.boxes[0].tolist(), colour, 0.7 * line, linestyle=(0, (4, 2)))
    else:
        frame(ax, one.boxes[0].tolist(), colour, line, path_effects=halo(colour, 1.9 * line))


def _draw_joints(ax: Axes, one: Detections | Target, categories: Categories, colour: Colour, line: float) -> None:
    """The labelled joints of one instance and the limbs between them; nothing for a class without keypoints."""
    skeleton: tuple[tuple[int, int], ...] = ()
    if isinstance(categories, CategoryMap):
        category = categories.categories[int(one.labels[0]) - 1]
        if not category.keypoints:
            return
        skeleton = category.skeleton
    joints = one.keypoints[0].detach().numpy()  # [J, (x, y, v or score)]
    labelled = joints[:, 2] > 0  # in a detection: zeros stand for a class without keypoints
    for a, b in ((a - 1, b - 1) for a, b in skeleton):
        if labelled[a] and labelled[b]:
            ax.plot(
                joints[[a, b], 0], joints[[a, b], 1], color=colour, linewidth=1.3 * line, solid_capstyle="round",
                path_effects=halo(colour, 2.6 * line), zorder=5,
            )  # fmt: skip
    for joint in joints[labelled]:
        hidden = isinstance(one, Target) and joint[2] == 1
        ax.plot(
            *joint[:2], marker="o", markersize=2.9 * line, markerfacecolor="none" if hidden else colour,
            markeredgecolor="white", markeredgewidth=0.6 * line, path_effects=halo((1, 1, 1), 1.2 * line), zorder=6,
        )  # fmt: skip


def _caption(one: Detections | Target, categories: Categories) -> str:
    names, label = _names(categories), int(one.labels[0])
    name = names[label - 1] if names else f"class {label}"
    if isinstance(one, Detections):
        return f"{name} {float(one.scores[0]):.2f}"
    return f"{name} (crowd)" if _is_crowd(one) else name
