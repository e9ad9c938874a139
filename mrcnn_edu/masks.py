"""Masks: cut out of a box, and read from or written as polygons and run lengths.

Chapter 2 (run lengths and polygons) and Chapter 11 (mask targets). Paper: Section 3.1.
"""

from __future__ import annotations

from reprlib import Repr
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
MAX_OUTLINE = 2**18  # px, of all polygons of one mask; once around three times the largest image is less


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
    bits = np.zeros(len(counts), dtype=bool)
    bits[1::2] = True
    column_major = np.repeat(bits, counts)
    return torch.from_numpy(np.ascontiguousarray(column_major.reshape(width, height).T))


def rle_size(rle: dict[str, Any]) -> Size:
    """The (height, width) that run lengths claim; ValueError when it is no size or beyond MAX_SIDE or MAX_AREA."""
    size = rle.get("size") if isinstance(rle, dict) else None
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(type(side) is int for side in size)):
        raise ValueError(f"run lengths need 'size': [height, width] in whole pixels, got {short(rle)}")
    height, width = size
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and height * width <= MAX_AREA):
        raise ValueError(f"a mask may have 1 to {MAX_SIDE} pixels a side and {MAX_AREA} in all, got {height} x {width}")
    return height, width


def rle_counts(rle: dict[str, Any]) -> np.ndarray:
    """The runs ``[n]`` int64 in pixels, starting with the zeros, checked: none negative, together height x width."""
    height, width = rle_size(rle)
    counts, area = rle.get("counts"), height * width
    if isinstance(counts, (str, bytes)):
        runs = _decompress(counts, area)
    elif isinstance(counts, (list, tuple)):
        runs = _listed(counts, area)
    else:
        raise ValueError(f"'counts' must be a string or a list of whole numbers, got {short(counts)}")
    if runs.sum() != area or (runs < 0).any():
        raise ValueError(f"the runs cover {runs.sum()} pixels of {height} x {width} = {area}")
    return runs


def _listed(counts: list[Any] | tuple[Any, ...], area: int) -> np.ndarray:
    """A list's runs, piece by piece as far as they fit: of millions that do not, no more than shows it is looked at."""
    if len(counts) > area + 1:
        raise ValueError(f"a mask of height x width = {area} pixels has at most {area + 1} runs, got {len(counts)}")
    pieces, covered = [np.zeros(0, dtype=np.int64)], 0
    for first in range(0, len(counts), 2**16):
        piece = counts[first : first + 2**16]
        if [*map(type, piece)].count(int) < len(piece):
            raise ValueError(f"'counts' must be a string or a list of whole numbers, got {short(counts)}")
        try:
            runs = np.fromiter(piece, np.int64, len(piece))
        except OverflowError:
            runs = np.array([-1])
        if runs.min() < 0 or runs.max() > area:
            raise ValueError(f"runs must lie between 0 and height x width = {area}, got {short(counts)}")
        pieces.append(runs)
        covered += int(runs.sum())
        if covered > area:
            break
    return np.concatenate(pieces)


def compress(counts: np.ndarray) -> str:
    """Runs as text: each but the first three as the difference to the run two before, five bits to a character."""
    values = counts.copy()
    values[3:] -= counts[1:-2]
    lengths = np.ones(len(values), dtype=np.int8)
    for place in range(1, 7):
        limit = 1 << (5 * place - 1)
        longer = (values >= limit) | (values < -limit)
        if not longer.any():
            break
        lengths += longer
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    codes = np.empty(starts[-1] + lengths[-1], dtype=np.uint8)
    codes[starts] = (values & 31) + np.where(lengths > 1, 80, 48)  # 32, bit 5, beyond '0': more characters follow
    for place in range(1, lengths.max()):
        rows = np.flatnonzero(lengths > place)
        codes[starts[rows] + place] = (values[rows] >> 5 * place & 31) + np.where(lengths[rows] > place + 1, 80, 48)
    return codes.tobytes().decode("ascii")


def _decompress(text: str | bytes, area: int) -> np.ndarray:
    """The inverse of ``compress``; ValueError for characters outside its alphabet and for runs no mask can have."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > 2 * area + 16:  # runs that are not all empty never take so much
        raise ValueError(f"compressed 'counts' of {len(data)} characters cannot be of height x width = {area} pixels")
    codes = np.frombuffer(data, dtype=np.uint8) - 48  # below '0' that is more than 63, too
    if codes.size == 0 or codes.max() > 63:
        raise ValueError(f"compressed 'counts' must be characters from '0' to 'o', got {short(text)}")
    ends = np.flatnonzero(codes < 32)  # bit 5: more characters follow
    lengths = np.diff(ends, prepend=-1)
    if codes[-1] >= 32 or lengths.max() > 7:
        raise ValueError(f"compressed 'counts' end within a number or hold one too long: {short(text)}")
    values = -(codes[ends] & 16).astype(np.int64) << (5 * lengths - 4)  # bit 4 of the last character: the sign
    for place in range(lengths.max()):
        rows = np.flatnonzero(lengths > place)
        part = codes[ends[rows] - lengths[rows] + 1 + place] & 31
        values[rows] += part.astype(np.int64) << (5 * place)
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

    Raises ValueError for a polygon that is none, see ``check_polygon``, for a size that is none, and where there is too
    much to draw, see ``check_outlines``.
    """
    if not isinstance(polygons, (list, tuple)):
        raise ValueError(f"polygons must be a list of [x1, y1, x2, y2, ...], got {short(polygons)}")
    height, width = rle_size({"size": size})
    parts = [check_polygon(polygon) for polygon in polygons]
    check_outlines(parts, size)
    parts = [part for part in (_near_image(part, size) for part in parts) if len(part) >= 3]
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
        raise ValueError(f"a polygon must be a flat list of numbers [x1, y1, x2, y2, ...], got {short(polygon)}")
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(
            f"a polygon needs at least three corners, so an even count of 6 or more numbers, got {len(polygon)}"
        )
    try:
        corners = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    except OverflowError:
        corners = np.full((1, 2), np.inf)
    if not np.isfinite(corners).all():
        raise ValueError(f"a polygon's numbers must be finite, got {short(polygon)}")
    return corners


def check_outlines(polygons: list[np.ndarray], size: Size) -> None:
    """ValueError when polygons of checked corners are together longer than MAX_OUTLINE in and around the image.

    pycocotools takes memory and time by the pixel of outline: a small file could ask for all there is.
    """
    if sum(map(len, polygons)) * 3 * max(size) <= MAX_OUTLINE:
        return  # wherever their corners lie
    parts = [_near_image(polygon, size) for polygon in polygons]
    length = sum(np.abs(part - np.roll(part, 1, axis=0)).max(axis=1).sum() for part in parts if len(part))
    if length > MAX_OUTLINE:
        raise ValueError(
            f"the outlines of a mask's polygons may be {MAX_OUTLINE} px long together, these are {length:.0f} px; "
            "such a mask is better stored as run lengths"
        )


def _near_image(corners: np.ndarray, size: Size) -> np.ndarray:
    """The corners cut to three times the image (Sutherland and Hodgman); farther ones cost pycocotools its memory."""
    for axis, extent in ((0, size[1]), (1, size[0])):
        for sign, limit in ((1.0, -extent), (-1.0, -2 * extent)):  # keep where sign * coordinate >= limit
            inside = sign * corners[:, axis] >= limit
            if inside.all():
                continue
            way = np.roll(corners, -1, axis=0) - corners
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # where nothing crosses
                crossing = corners + ((sign * limit - corners[:, axis]) / way[:, axis])[:, None] * way
            crossing[:, axis] = sign * limit  # exactly, also where the corners are too far away to tell
            chosen = np.stack([inside, inside != np.roll(inside, -1)], axis=1)
            corners = np.stack([corners, crossing], axis=1)[chosen]
    return corners


def short(value: Any, length: int = 60) -> str:
    """The start of a value's text, for a message; of a list of millions only the first few are looked at."""
    text = _BRIEF.repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


_BRIEF = Repr()
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 20
_BRIEF.maxstring = _BRIEF.maxother = 200
