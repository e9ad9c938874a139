"""The ops in C++ and CUDA: loaded where they were built, with what autograd and torch.compile need to know of them.

Chapter 9 (the same in C++ and CUDA). Sources: ``csrc/``. Paper: Section 3, RoIAlign and Table 2c.

An op is declared in ``csrc/library.cpp`` and computed in ``csrc/cpu`` and ``csrc/cuda``. Here it gets a derivative,
which is a second op, and a "fake" form that only says which shape comes out.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor

LAYERS = {"roi_pool": 0, "roi_warp": 1, "roi_align": 2}
MAX_LEVELS = 8  # kMaxLevels in csrc/roi_problem.h
MOST_IMAGES = 128  # kMostImages in csrc/cuda/kernels.h


def _load() -> str | None:
    """Load the library; None, or why that did not work."""
    try:
        importlib.import_module("mrcnn_edu._C")
    except ModuleNotFoundError:
        compiler = next((name for name in ("c++", "g++", "clang++", "cl") if shutil.which(name)), None)
        found = f"a C++ compiler is here ({compiler})" if compiler else "no C++ compiler was found"
        return f"the C++ ops were not built; {found}; pip install --no-build-isolation . builds them"
    except ImportError as error:  # built against another torch
        return f"the C++ ops could not be loaded ({error}); build them again for torch {torch.__version__}"
    return None


MISSING = _load()  # why there are no compiled ops, or None


def devices() -> list[str]:
    """The device types that have compiled ops."""
    if MISSING is not None:
        return []
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in ("cpu", "cuda") if has_kernel("mrcnn_edu::roi_features", name.upper())]


# ---------------------------------------------------------------------------------------------------------------------
# The same three functions that reference.py and vectorized.py have
# ---------------------------------------------------------------------------------------------------------------------


def roi_features(
    layer: str,
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: tuple[int, int],
    scales: Sequence[float],
    samples_per_bin: int,
    aligned: bool,
    mode: str,
) -> Tensor:
    """RoIPool, RoIWarp or RoIAlign of rois [R, 5], each on the map its level names: [R, C, P, P].

    The result is channels_last where all maps are, and contiguous otherwise.
    """
    return torch.ops.mrcnn_edu.roi_features(
        features,
        rois.detach(),
        levels,
        scales,
        LAYERS[layer],
        output_size[0],
        output_size[1],
        samples_per_bin,
        aligned,
        mode == "max",
    )[0]


def nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, threshold: float, max_keep: int | None) -> Tensor:
    """Indices [n] int64, best first, of the boxes that no better kept box of their group overlaps too much."""
    return torch.ops.mrcnn_edu.nms(boxes, scores, groups, threshold, max_keep)


def nms_of_images(
    boxes: Tensor, scores: Tensor, groups: Tensor, counts: Sequence[int], threshold: float, max_keep: int | None
) -> list[Tensor]:
    """The same for several images on a GPU, which is asked once how many rows there are; see ``ops.nms_of_images``."""
    rows, kept = torch.ops.mrcnn_edu.nms_images(
        boxes.detach(), scores.detach(), groups, list(counts), threshold, max_keep
    )
    numbers = kept.tolist()
    torch.ops.mrcnn_edu.raise_reported()  # of this call too, now that it is through
    firsts = [sum(counts[:image]) for image in range(len(counts))]
    return [rows[first : first + number] - first for first, number in zip(firsts, numbers)]


def paste(mask_probs: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float | None, rule: str) -> Tensor:
    """Masks in the image [N, h, w]: bool, or float32 probabilities without a threshold."""
    return torch.ops.mrcnn_edu.paste(mask_probs.float(), boxes, size[0], size[1], threshold, rule == "integer")


def crops(
    mask_probs: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float | None, rule: str
) -> list[tuple[int, int, Tensor]]:
    """The part of each pasted mask that may be set: its first row, first column, and the pixels [h, w]."""
    windows, pixels = torch.ops.mrcnn_edu.paste_crops(
        mask_probs.float(), boxes, size[0], size[1], threshold, rule == "integer"
    )
    edges = windows.tolist()
    parts = pixels.split([(bottom - top) * (right - left) for top, left, bottom, right in edges])
    return [
        (top, left, part.view(bottom - top, right - left)) for (top, left, bottom, right), part in zip(edges, parts)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Shapes for torch.compile, derivatives for autograd
# ---------------------------------------------------------------------------------------------------------------------


def _all_channels_last(features: Sequence[Tensor]) -> bool:
    return all(f.is_contiguous(memory_format=torch.channels_last) and not f.is_contiguous() for f in features)


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _fake_roi_features(
    features, rois, levels, scales, layer, bins_y, bins_x, samples_per_bin, aligned, maximum
) -> tuple[Tensor, Tensor]:
    rows, channels = rois.shape[0], features[0].shape[1]
    size = (rows, channels, bins_y, bins_x)
    pooled = torch.empty(
        size,
        dtype=features[0].dtype,
        device=features[0].device,
        memory_format=_format(_all_channels_last(features)),
    )
    winners = rows * channels * bins_y * bins_x if maximum else 0
    return pooled, torch.empty(winners, dtype=torch.int32, device=features[0].device)


def _fake_roi_features_backward(
    gradient, winners, rois, levels, scales, images, heights, widths, channels_last, *options
) -> list[Tensor]:
    return [
        torch.empty(
            (images, gradient.shape[1], height, width),
            dtype=gradient.dtype,
            device=gradient.device,
            memory_format=_format(channels_last),
        )
        for height, width in zip(heights, widths)
    ]


def _fake_nms(boxes, scores, groups, threshold, max_keep) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _fake_nms_images(boxes, scores, groups, counts, threshold, max_keep) -> tuple[Tensor, Tensor]:
    return boxes.new_empty(boxes.shape[0], dtype=torch.int64), boxes.new_empty(len(counts), dtype=torch.int64)


def _fake_paste(masks, boxes, height, width, threshold, integer) -> Tensor:
    dtype = torch.float32 if threshold is None else torch.bool
    return masks.new_empty((masks.shape[0], height, width), dtype=dtype)


def _fake_paste_crops(masks, boxes, height, width, threshold, integer) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if threshold is None else torch.bool
    pixels = masks.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=dtype)
    return masks.new_empty((masks.shape[0], 4), dtype=torch.int64), pixels


def _remember(ctx, inputs, output) -> None:
    features, rois, levels, scales, layer, _, _, samples_per_bin, aligned, maximum = inputs
    ctx.save_for_backward(output[1], rois, levels)
    ctx.mark_non_differentiable(output[1])
    ctx.scales, ctx.options = scales, (layer, samples_per_bin, aligned, maximum)
    ctx.images = features[0].shape[0]
    ctx.heights, ctx.widths = [f.shape[2] for f in features], [f.shape[3] for f in features]
    ctx.channels_last = _all_channels_last(features)


def _backward(ctx, gradient: Tensor, _: Tensor | None):
    gradients = torch.ops.mrcnn_edu.roi_features_backward(
        gradient,
        *ctx.saved_tensors,
        ctx.scales,
        ctx.images,
        ctx.heights,
        ctx.widths,
        ctx.channels_last,
        *ctx.options,
    )
    return gradients, *[None] * 9


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError("RoI layers can be differentiated once only; do not pass create_graph=True through them")


if MISSING is None:
    torch.library.register_fake("mrcnn_edu::roi_features", _fake_roi_features)
    torch.library.register_fake("mrcnn_edu::roi_features_backward", _fake_roi_features_backward)
    torch.library.register_fake("mrcnn_edu::nms", _fake_nms)
    torch.library.register_fake("mrcnn_edu::nms_images", _fake_nms_images)
    torch.library.register_fake("mrcnn_edu::paste", _fake_paste)
    torch.library.register_fake("mrcnn_edu::paste_crops", _fake_paste_crops)
    torch.library.register_autograd("mrcnn_edu::roi_features", _backward, setup_context=_remember)
    torch.library.register_autograd("mrcnn_edu::roi_features_backward", _no_second_derivative)
