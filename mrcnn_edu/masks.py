"""Masks: cut out of a box, and read from or written as polygons and run lengths.

Chapter 2 (run lengths and polygons) and Chapter 11 (mask targets). Paper: Section 3.1.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from mrcnn_edu.ops import roi_align
from mrcnn_edu.structures import Size

MaskTarget = Literal["soft", "binary"]

# Larger masks are refused before anything is allocated: a size in a file is only a claim.
MAX_SIDE = 32768  # px
MAX_AREA = 2**28  # px


def crop_masks(
    masks: Tensor, boxes: Tensor, matched: Tensor, size: int, rule: MaskTarget = "binary", aligned: bool = True
) -> Tensor:
    """What each box sees of its instance, on an M x M grid: the training target of the mask head.

    masks    [N, H, W] bool, in the image
    boxes    [R, (x1, y1, x2, y2)], image pixels; what lies outside the image is empty
    matched  [R] int64, the row of ``masks`` each box belongs to
    size     M
    rule     "binary": 1 where at least half of the cell is covered; "soft": the covered share itself (torchvision)
    returns  [R, M, M] float32

    Raises ValueError for another rule.

    Source: Section 3.1, the target is the intersection between a RoI and its ground-truth mask.
    """
    if rule not in get_args(MaskTarget):
        raise ValueError(f"crop_masks has the rules {' and '.join(get_args(MaskTarget))}, got {rule!r}")
    if len(boxes) == 0:
        return torch.zeros(0, size, size, device=masks.device)
    rois = torch.cat([matched[:, None].to(boxes.dtype), boxes], dim=1)
    cropped = roi_align(masks[:, None].float(), rois, size, 1.0, samples_per_bin=0, aligned=aligned)[:, 0]
    return (cropped >= 0.5).float() if rule == "binary" else cropped


def to_boxes(masks: Tensor) -> Tensor:
    """The tight boxes ``[N, (x1, y1, x2, y2)]`` float32 around masks ``[N, H, W]`` bool; zeros for an empty mask.

    A box ends where its last pixel ends, so one pixel at column 3 gives x1 = 3 and x2 = 4.
    """
    sides = []
    for occupied in (masks.any(dim=1), masks.any(dim=2)):  # columns [N, W], then rows [N, H]
        places = torch.arange(occupied.shape[1], device=masks.device)
        last = torch.where(occupied, places + 1, 0).amax(dim=1)
        first = torch.where(occupied, places, occupied.shape[1]).amin(dim=1)
        sides.append((torch.minimum(first, last), last))
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], dim=1).float()


# ---------------------------------------------------------------------------------------------------------------------
# Run lengths: the lengths of the runs of 0, 1, 0, 1, ... down the columns, one column after the other
# ---------------------------------------------------------------------------------------------------------------------


def rle_encode(mask: Tensor) -> dict[str, Any]:
    """COCO's compressed run lengths ``{"size": [h, w], "counts": str}`` of a mask ``[H, W]`` bool.

    Raises TypeError or ValueError for anything that is not one bool mask.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"a mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}; compare > 0.5"
        )
    if mask.ndim != 2:
        raise ValueError(f"rle_encode takes one mask [H, W], got {list(mask.shape)}")
    column_major = mask.cpu().numpy().T.reshape(-1)
    changes = np.flatnonzero(column_major[1:] != column_major[:-1]) + 1
    edges = np.concatenate([[0], changes, [column_major.size]])
    counts = np.diff(edges) if column_major.size else edges[:1]
    if column_major.size and column_major[0]:
        counts = np.concatenate([[0], counts])  # the first run counts zeros
    return {"size": list(mask.shape), "counts": compress(counts)}


def rle_decode(rle: dict[str, Any]) -> Tensor:
    """The mask ``[H, W]`` bool of run lengths, compressed (``counts`` str or bytes) or not (a list of integers).

    Raises ValueError when the size is out of bounds or the runs do not fill it exactly.
    """
    height, width = rle_size(rle)
    counts = rle_counts(rle)
    column_major = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return torch.from_numpy(np.ascontiguousarray(column_major.reshape(width, height).T))


def rle_size(rle: dict[str, Any]) -> Size:
    """The (height, width) that run lengths claim; ValueError when it is no size or beyond MAX_SIDE or MAX_AREA."""
    size = rle.get("size") if isinstance(rle, dict) else None
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(type(side) is int for side in size)):
        raise ValueError(f"run lengths need 'size': [height, width] in whole pixels, got {_short(rle)}")
    height, width = size
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and height * width <= MAX_AREA):
        raise ValueError(f"a mask may have 1 to {MAX_SIDE} pixels a side and {MAX_AREA} in all, got {height} x {width}")
    return height, width


def rle_counts(rle: dict[str, Any]) -> np.ndarray:
    """The runs ``[n]`` int64 in pixels, starting with the zeros, checked: none negative, together height x width."""
    height, width = rle_size(rle)
    counts = rle.get("counts")
    if isinstance(counts, (str, bytes)):
        runs = _decompress(counts, height * width)
    elif isinstance(counts, (list, tuple)) and set(map(type, counts)) <= {int}:
        if any(not 0 <= count <= height * width for count in counts):
            raise ValueError(f"runs must lie between 0 and height x width = {height * width}, got {_short(counts)}")
        runs = np.array(counts, dtype=np.int64)
    else:
        raise ValueError(f"'counts' must be a string or a list of whole numbers, got {_short(counts)}")
    if runs.sum() != height * width or (runs < 0).any():
        raise ValueError(f"the runs cover {runs.sum()} pixels of {height} x {width} = {height * width}")
    return runs


def compress(counts: np.ndarray) -> str:
    """Runs as text: each but the first three as the difference to the run two before, five bits to a character."""
    values = counts.copy()
    values[3:] -= counts[1:-2]
    lengths = np.ones_like(values)
    for place in range(1, 7):
        limit = 1 << (5 * place - 1)
        lengths += (values >= limit) | (values < -limit)
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    codes = (np.repeat(values, lengths) >> (5 * place)) & 31
    codes |= np.where(place < np.repeat(lengths, lengths) - 1, 32, 0)  # bit 5: more characters follow
    return (codes + 48).astype(np.uint8).tobytes().decode("ascii")


def _decompress(text: str | bytes, area: int) -> np.ndarray:
    """The inverse of ``compress``; ValueError for characters outside its alphabet and for runs no mask can have."""
    data = text.encode("utf-8") if isinstance(text, str) else text
    codes = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if codes.size == 0 or codes.min() < 0 or codes.max() > 63:
        raise ValueError(f"compressed 'counts' must be characters from '0' to 'o', got {_short(text)}")
    last = codes & 32 == 0
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(codes.size) - np.repeat(starts, np.diff(np.append(starts, codes.size)))
    if not last[-1] or place.max() > 6:
        raise ValueError(f"compressed 'counts' end within a number or hold one too long: {_short(text)}")
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    values -= np.where(codes[last] & 16, 1 << (5 * (place[last] + 1)), 0)  # bit 4 of the last character: the sign
    if np.abs(values).max() > area:
        raise ValueError(f"compressed 'counts' hold a run of more than height x width = {area} pixels")
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Polygons
# ---------------------------------------------------------------------------------------------------------------------


def polygons_to_mask(polygons: list[Any], size: Size) -> Tensor:
    """The mask ``[H, W]`` bool of the pixels inside any of several polygons, as pycocotools draws them.

    polygons  each ``[x1, y1, x2, y2, ...]``, at least three corners, image pixels; what lies outside is cut off
    size      (height, width) of the image

    Raises ValueError for a polygon that is none, see ``check_polygon``.
    """
    rle_size({"size": list(size)})
    height, width = size
    parts = [_near_image(check_polygon(polygon), size) for polygon in polygons]
    parts = [part for part in parts if len(part) >= 3]
    if not parts:
        return torch.zeros(height, width, dtype=torch.bool)
    # Only the window that holds them is drawn. pycocotools works in fifths of a pixel: rounded to those before the
    # window's corner is taken off, a coordinate cannot be rounded otherwise than in the whole image.
    corners = np.concatenate(parts)
    origin = np.maximum(np.floor(corners.min(axis=0)), 0)
    parts = [np.where(origin > 0, np.trunc(part * 5 + 0.5) / 5 - origin, part) for part in parts]
    (x1, y1), (x2, y2) = (
        limit.astype(int).tolist() for limit in (origin, np.minimum(np.ceil(corners.max(axis=0)) + 2, (width, height)))
    )
    mask = np.zeros((height, width), dtype=bool)
    if x1 < x2 and y1 < y2:
        drawn = coco_mask.frPyObjects([part.reshape(-1).tolist() for part in parts], y2 - y1, x2 - x1)
        mask[y1:y2, x1:x2] = coco_mask.decode(drawn[0] if len(drawn) == 1 else coco_mask.merge(drawn))
    return torch.from_numpy(mask)


def check_polygon(polygon: Any) -> np.ndarray:
    """One polygon as corners ``[n, (x, y)]`` float64.

    Raises ValueError unless it is a flat list of finite numbers, an even count of at least six.
    """
    if isinstance(polygon, np.ndarray):
        polygon = polygon.reshape(-1).tolist()
    if not isinstance(polygon, (list, tuple)) or not set(map(type, polygon)) <= {int, float}:
        raise ValueError(f"a polygon must be a flat list of numbers [x1, y1, x2, y2, ...], got {_short(polygon)}")
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(
            f"a polygon needs at least three corners, so an even count of 6 or more numbers, got {len(polygon)}"
        )
    try:
        corners = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    except OverflowError:
        corners = np.full((1, 2), np.inf)
    if not np.isfinite(corners).all():
        raise ValueError(f"a polygon's numbers must be finite, got {_short(polygon)}")
    return corners


def _near_image(corners: np.ndarray, size: Size) -> np.ndarray:
    """The corners cut to three times the image (Sutherland and Hodgman); farther ones cost pycocotools its memory."""
    for axis, extent in ((0, size[1]), (1, size[0])):
        for sign, limit in ((1.0, -extent), (-1.0, -2 * extent)):  # keep where sign * coordinate >= limit
            inside = sign * corners[:, axis] >= limit
            if inside.all():
                continue
            kept = []
            for here, there, here_in, there_in in zip(corners, np.roll(corners, -1, 0), inside, np.roll(inside, -1)):
                if here_in:
                    kept.append(here)
                if here_in != there_in:
                    share = (sign * limit - here[axis]) / (there[axis] - here[axis])
                    kept.append(here + share * (there - here))
            corners = np.array(kept).reshape(-1, 2)
    return corners


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
