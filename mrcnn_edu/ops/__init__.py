"""RoIPool, RoIWarp, RoIAlign, non-maximum suppression and mask pasting, each one function of tensors.

Chapter 6 (NMS as a finished part), Chapter 7 (NMS), Chapter 8 (RoI layers), Chapter 9 (the same in C++ and CUDA) and
Chapter 11 (pasting). Paper: Section 3 and Table 2c.

Three implementations stand behind every function and give the same numbers: ``reference`` (loops to read),
``vectorized`` (whole-tensor PyTorch) and ``compiled`` (C++ and CUDA, where it was built). ``backend()`` says which one
runs and why, ``use("reference")`` switches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mrcnn_edu.ops import checks, compiled
from mrcnn_edu.ops.backends import backend, implementation, use

__all__ = [
    "backend",
    "batched_nms",
    "nms",
    "nms_of_images",
    "paste_crops",
    "paste_masks",
    "paste_rle",
    "pool_levels",
    "roi_align",
    "roi_pool",
    "roi_warp",
    "use",
]

FAR = 1e9  # px; a box that reaches further is pasted as if it ended here

Layer = Literal["roi_pool", "roi_warp", "roi_align"]
Mode = Literal["mean", "max"]
PasteRule = Literal["continuous", "integer"]


def roi_align(
    features: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    samples_per_bin: int = 2,
    aligned: bool = True,
    mode: Mode = "mean",
) -> Tensor:
    """RoIAlign: bilinear samples at exact positions, nothing rounded.

    features         [B, C, H, W] float32, float64, bfloat16 or float16, contiguous or channels_last
    rois             [R, (image, x1, y1, x2, y2)] float32, image pixels; image is an index into B
    output_size      P, or (height, width), in bins
    spatial_scale    cells per image pixel, 1 / stride
    samples_per_bin  per side, so 2 means the paper's four points; 0 takes one sample per cell the bin is wide; 256 at
                     most in either case
    aligned          cell i has its centre at i + 0.5 (right); False puts it at i and gives every RoI at least one cell
    mode             mean or max over the samples of a bin
    returns          [R, C, P, P] in the dtype of the features, summed in float32 (float64 for float64)

    A sample more than one cell off the map is 0. A RoI turned inside out (x2 < x1) is sampled mirrored; with adaptive
    samples it has none and gives 0, as does an empty one. Gradients flow to the features, never to the rois (the
    "approximate" end-to-end training of Appendix B), and only once.
    Raises ValueError or TypeError for anything else, naming the row.

    Source: Section 3, RoIAlign, and Table 2c.
    """
    return _single("roi_align", features, rois, output_size, spatial_scale, samples_per_bin, aligned, mode)


def roi_warp(
    features: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    samples_per_bin: int = 2,
    mode: Mode = "mean",
) -> Tensor:
    """RoIWarp: the RoI is rounded to whole cells as in RoIPool, then sampled bilinearly as in RoIAlign.

    Arguments and result as in ``roi_align``.

    Source: Section 3 and Table 2c, after Dai et al. [10] as the paper reads it.
    """
    return _single("roi_warp", features, rois, output_size, spatial_scale, samples_per_bin, True, mode)


def roi_pool(features: Tensor, rois: Tensor, output_size: int | tuple[int, int], spatial_scale: float) -> Tensor:
    """RoIPool: the RoI and its bins are rounded to whole cells, and each bin takes the largest of its cells.

    Arguments and result as in ``roi_align``; a bin without cells is 0.

    Source: Section 3 and Table 2c, after Fast R-CNN [12].
    """
    return _single("roi_pool", features, rois, output_size, spatial_scale, 0, True, "max")


def _single(layer, features, rois, output_size, spatial_scale, samples_per_bin, aligned, mode) -> Tensor:
    rows = rois.shape[0] if isinstance(rois, Tensor) and rois.ndim else 0
    levels = torch.zeros(rows, dtype=torch.int64, device=rois.device if isinstance(rois, Tensor) else None)
    return pool_levels(layer, [features], rois, levels, output_size, [spatial_scale], samples_per_bin, aligned, mode)


def pool_levels(
    layer: Layer,
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: int | tuple[int, int],
    scales: Sequence[float],
    samples_per_bin: int = 2,
    aligned: bool = True,
    mode: Mode = "mean",
) -> Tensor:
    """One RoI layer over the levels of a feature pyramid, each RoI on its own level.

    layer     which of the three; "roi_pool" takes the max over whole cells whatever the last three arguments say
    features  list of [B, C, H, W], one per level, the same B, C and dtype
    levels    [R] int64, the index into ``features`` of each RoI
    scales    1 / stride of each level
    returns   [R, C, P, P] in the order of the rois; other arguments as in ``roi_align``

    Source: Section 3 with Feature Pyramid Networks [27], Section 4.2.
    """
    if layer not in ("roi_pool", "roi_warp", "roi_align"):
        raise ValueError(f'layer must be "roi_pool", "roi_warp" or "roi_align", got {layer!r}')
    pair = checks.size_pair(output_size)
    checks.sampling(samples_per_bin, mode)
    checks.features_and_rois(features, rois, levels, scales)
    run = implementation(rois.device)
    if run is not compiled:  # which looks at the values itself; from here, that would wait for a CUDA device
        checks.roi_values(rois, features[0].shape[0])
    if layer == "roi_pool":
        mode = "max"
    return run.roi_features(
        layer, list(features), rois, levels, pair, [float(s) for s in scales], samples_per_bin, aligned, mode
    )


def nms(boxes: Tensor, scores: Tensor, threshold: float, max_keep: int | None = None) -> Tensor:
    """Greedy non-maximum suppression: keep the best box, drop what overlaps it too much, repeat.

    boxes      [N, (x1, y1, x2, y2)] float32, any unit
    scores     [N] floating point; equal scores keep the order of the rows
    threshold  a box is dropped when its IoU with a better kept box is larger than this
    max_keep   stop after so many; the result is exactly the head of the full one
    returns    [n] int64, the rows that are kept, best first

    Two boxes without area have IoU 0. Raises ValueError for NaN or inf in boxes or scores.

    Source: the paper inherits NMS from Faster R-CNN [36]; Appendix B gives the thresholds.
    """
    return _nms(boxes, scores, None, threshold, max_keep)


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, max_keep: int | None = None) -> Tensor:
    """``nms`` within each group (class, level or image): boxes of different groups never touch each other.

    groups   [N] int64, any values; other arguments as in ``nms``
    returns  [n] int64, the rows that are kept, best first over all groups
    """
    return _nms(boxes, scores, groups, threshold, max_keep)


def nms_of_images(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    counts: Sequence[int],
    threshold: float,
    max_keep: int | None = None,
) -> list[Tensor]:
    """``batched_nms`` of several images at once: on a GPU one call, and one look at what came out.

    boxes    [N, (x1, y1, x2, y2)] of all images, image after image
    scores   [N]; a row whose score is minus infinity is not there, so that nobody has to wait for a GPU to count rows
    counts   the rows of each image
    returns  one [n] int64 per image, rows counted from the image's first; other arguments as in ``batched_nms``

    Raises ValueError for counts that are not those of the boxes.
    """
    checks.boxes_and_scores(boxes, scores, groups, threshold, max_keep)
    if sum(counts) != len(boxes) or min(counts, default=0) < 0:
        raise ValueError(f"counts must be the rows of each image, {len(boxes)} together, got {list(counts)}")
    run = implementation(boxes.device)
    if run is compiled and boxes.is_cuda and len(counts) <= compiled.MOST_IMAGES:
        return compiled.nms_of_images(boxes, scores, groups, counts, float(threshold), max_keep)
    kept = []
    for image in zip(boxes.split(counts), scores.split(counts), groups.split(counts)):
        there = (image[1] != -torch.inf).nonzero()[:, 0]
        kept.append(there[_nms(*(part[there] for part in image), threshold, max_keep)])
    return kept


def _nms(boxes, scores, groups, threshold, max_keep) -> Tensor:
    checks.boxes_and_scores(boxes, scores, groups, threshold, max_keep)
    run = implementation(boxes.device)
    if run is not compiled:
        checks.finite("boxes", boxes)
        checks.finite("scores", scores)
    return run.nms(boxes.detach(), scores.detach(), groups, float(threshold), max_keep)


def paste_masks(
    mask_probs: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    threshold: float | None = 0.5,
    rule: PasteRule = "continuous",
) -> Tensor:
    """Resize each predicted mask to its box and put it into the image.

    mask_probs  [N, M, M] probabilities inside the box, any float dtype
    boxes       [N, (x1, y1, x2, y2)] float32, image pixels; what lies outside the image is cut off
    size        (height, width) of the image
    threshold   a pixel is set when its probability is at least this; None returns the probabilities
    rule        "continuous": the pixels whose centres lie in the box, so that a full mask sets exactly the box;
                "integer": boxes grown by (M + 2) / M and cut to whole pixels, as Detectron and torchvision do
    returns     [N, height, width] bool, or float32 where threshold is None

    Source: Section 3.1, the m x m mask is resized to the RoI size and binarised at 0.5.
    """
    checks.masks_and_boxes(mask_probs, boxes, size, threshold, rule)
    run = implementation(boxes.device)
    return run.paste(mask_probs.detach(), _near(boxes), (size[0], size[1]), threshold, rule)


def paste_crops(
    mask_probs: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    threshold: float | None = 0.5,
    rule: PasteRule = "continuous",
) -> list[tuple[int, int, Tensor]]:
    """``paste_masks`` without the image around the masks: only the part that can be set, and where it lies.

    returns  one (top, left, pixels [h, w]) per mask; h or w is 0 for a box outside the image

    Source: as ``paste_masks``; a hundred masks of a large image fit into little memory.
    """
    checks.masks_and_boxes(mask_probs, boxes, size, threshold, rule)
    run = implementation(boxes.device)
    return run.crops(mask_probs.detach(), _near(boxes), (size[0], size[1]), threshold, rule)


def paste_rle(
    mask_probs: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    threshold: float = 0.5,
    rule: PasteRule = "continuous",
) -> list[dict[str, list[int]]]:
    """``paste_masks`` as COCO's uncompressed run lengths, without ever drawing the image.

    returns  one {"size": [height, width], "counts": [...]} per mask: runs of zeros and ones in turn, column by column

    Source: the COCO API's format; ``masks.compress`` turns the counts into text.
    """
    crops = paste_crops(mask_probs, boxes, size, threshold, rule)
    return [{"size": [size[0], size[1]], "counts": _counts(top, left, crop, size)} for top, left, crop in crops]


def _near(boxes: Tensor) -> Tensor:
    return boxes.detach().clamp(-FAR, FAR)


def _counts(top: int, left: int, crop: Tensor, size: tuple[int, int]) -> list[int]:
    """The run lengths of an image that is zero but for a crop [h, w] bool at (top, left)."""
    columns = F.pad(crop.t(), (1, 1))  # [w, h + 2]: every run of ones begins and ends inside its column
    starts = (columns[:, 1:] & ~columns[:, :-1]).nonzero()  # (column, row) of each first one
    ends = (columns[:, :-1] & ~columns[:, 1:]).nonzero()  # (column, row) just after each last one
    edges = torch.stack([starts, ends], dim=1)  # [runs, 2, (column, row)]
    edges = ((edges[..., 0] + left) * size[0] + edges[..., 1] + top).flatten()  # pixels from the image's first one
    joined = edges[1:-1:2] == edges[2::2]  # a run that reaches the bottom goes on at the next column's top
    keep = torch.ones_like(edges, dtype=torch.bool)
    keep[1:-1:2] &= ~joined
    keep[2::2] &= ~joined
    ends_of_runs = torch.cat([edges.new_zeros(1), edges[keep], edges.new_full((1,), size[0] * size[1])])
    counts = ends_of_runs.diff().tolist()
    return counts if counts[-1] > 0 or len(counts) == 1 else counts[:-1]
