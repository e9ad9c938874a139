"""What the ops refuse, each with a sentence: shapes, dtypes, NaN, image indices, sizes.

Chapter 8 (RoI layers) and Chapter 22 (failure clinic). Everything is checked here before any memory is touched; the
compiled ops check what memory safety needs once more, since they can be called directly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SAMPLES = 256  # per side of a bin (kMaxSamples in csrc/roi_math.h); bounds the work a huge RoI can ask for
MAX_SCALE = 65536.0  # cells per image pixel; far beyond any use, and far below where float32 overflows
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _tensor(name: str, value: object, shape: str, ndim: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(value).__name__}")
    if value.ndim != ndim:
        raise ValueError(f"{name} must be {shape}, got {list(value.shape)}")


def _values_can_be_read() -> bool:
    """False while torch.compile traces: there are no values then, and the compiled ops check them when they run."""
    return not torch.compiler.is_compiling()


def size_pair(output_size: int | Sequence[int]) -> tuple[int, int]:
    """``output_size`` as (height, width) in bins, each at least 1."""
    pair = tuple(output_size) if isinstance(output_size, Sequence) else (output_size, output_size)
    if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(f"output_size must be one or two integers of at least 1, got {output_size!r}")
    return pair


def features_and_rois(features: Sequence[Tensor], rois: Tensor, levels: Tensor, scales: Sequence[float]) -> None:
    """Refuse maps that are not [B, C, H, W] of one kind, and rois that are not [R, 5] float32 on them."""
    if len(features) == 0 or len(features) != len(scales):
        raise ValueError(f"one scale per feature map is needed, got {len(features)} maps and {len(scales)} scales")
    for index, level in enumerate(features):
        name = "features" if len(features) == 1 else f"features[{index}]"
        _tensor(name, level, "[B, C, H, W]", 4)
        if level.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {level.dtype}; use .float()")
        if level.shape[2] < 1 or level.shape[3] < 1:
            raise ValueError(f"{name} has no cells: {list(level.shape)}")
        if level.shape[:2] != features[0].shape[:2]:
            raise ValueError(
                f"all feature maps need the same B and C, got {list(features[0].shape)} and {list(level.shape)}"
            )
        if level.dtype != features[0].dtype or level.device != features[0].device:
            raise ValueError(
                f"all feature maps need one dtype and device, got {features[0].dtype} on {features[0].device} and "
                f"{level.dtype} on {level.device}"
            )
    for scale in scales:
        if not (isinstance(scale, (int, float)) and 0 < scale <= MAX_SCALE):
            raise ValueError(
                f"spatial_scale must be a positive number (1 / stride) of at most {MAX_SCALE:.0f}, got {scale!r}"
            )
    _rois(rois, features[0])
    _levels(levels, rois, len(features))


def _rois(rois: Tensor, features: Tensor) -> None:
    _tensor("rois", rois, "[R, (image, x1, y1, x2, y2)]", 2)
    if rois.shape[1] != 5:
        raise ValueError(f"rois must be [R, (image, x1, y1, x2, y2)], got {list(rois.shape)}")
    if rois.dtype != torch.float32:
        raise TypeError(
            f"rois must be float32 whatever the dtype of the features, got {rois.dtype}; half precision moves boxes "
            "by pixels: keep them float32 from the start, or use rois.float()"
        )
    if rois.device != features.device:
        raise ValueError(f"rois are on {rois.device} but the features on {features.device}")


def _levels(levels: Tensor, rois: Tensor, count: int) -> None:
    _tensor("levels", levels, "[R]", 1)
    if levels.dtype != torch.int64:
        raise TypeError(f"levels must be int64, got {levels.dtype}")
    if levels.shape[0] != rois.shape[0]:
        raise ValueError(f"one level per roi is needed, got {rois.shape[0]} rois and {levels.shape[0]} levels")
    if levels.device != rois.device:
        raise ValueError(f"levels are on {levels.device} but the rois on {rois.device}")
    if _values_can_be_read() and levels.numel() and levels.device.type == "cpu":
        low, high = torch.aminmax(levels)
        if low < 0 or high >= count:
            raise ValueError(f"levels must lie in 0..{count - 1} for {count} maps, got {low} to {high}")


def roi_values(rois: Tensor, images: int) -> None:
    """Refuse NaN, inf, and image indices that are not whole numbers in 0..images-1. Reads the values: waits on CUDA."""
    if not _values_can_be_read() or rois.shape[0] == 0:
        return
    rois = rois.detach()
    index = rois[:, 0]
    good = torch.isfinite(rois).all(dim=1) & (index >= 0) & (index < images) & (index == index.floor())
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        raise ValueError(
            f"rois[{row}] = {rois[row].tolist()} must be finite numbers (image, x1, y1, x2, y2) with a whole image "
            f"index in 0..{images - 1} (there are {images} images)"
        )


def sampling(samples_per_bin: int, mode: str) -> None:
    """Refuse a sampling grid that is negative or unreasonably fine, and a mode other than mean or max."""
    if isinstance(samples_per_bin, bool) or not isinstance(samples_per_bin, int):
        raise TypeError(f"samples_per_bin must be an integer, got {samples_per_bin!r}")
    if not 0 <= samples_per_bin <= MAX_SAMPLES:
        raise ValueError(f"samples_per_bin must be 0 (adaptive) or 1..{MAX_SAMPLES}, got {samples_per_bin}")
    if mode not in ("mean", "max"):
        raise ValueError(f'mode must be "mean" or "max", got {mode!r}')


def boxes_and_scores(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, threshold: float, max_keep: int | None
) -> None:
    """Refuse what NMS cannot rank or compare."""
    boxes_only(boxes)
    _tensor("scores", scores, "[N]", 1)
    if scores.dtype not in FLOATS:
        raise TypeError(f"scores must be floating point, got {scores.dtype}")
    if scores.shape[0] != boxes.shape[0]:
        raise ValueError(f"one score per box is needed, got {boxes.shape[0]} boxes and {scores.shape[0]} scores")
    if groups is not None:
        _tensor("groups", groups, "[N]", 1)
        if groups.dtype != torch.int64:
            raise TypeError(f"groups must be int64, got {groups.dtype}")
        if groups.shape[0] != boxes.shape[0]:
            raise ValueError(f"one group per box is needed, got {boxes.shape[0]} boxes and {groups.shape[0]} groups")
    devices = {str(part.device) for part in (boxes, scores, groups) if part is not None}
    if len(devices) > 1:
        raise ValueError(f"boxes, scores and groups must be on one device, got {', '.join(sorted(devices))}")
    if not (isinstance(threshold, (int, float)) and 0 <= threshold <= 1):
        raise ValueError(f"threshold must be an IoU in 0..1, got {threshold!r}")
    if max_keep is not None and (isinstance(max_keep, bool) or not isinstance(max_keep, int) or max_keep < 0):
        raise ValueError(f"max_keep must be None or an integer of at least 0, got {max_keep!r}")


def boxes_only(boxes: Tensor) -> None:
    """Refuse boxes that are not [N, (x1, y1, x2, y2)] float32."""
    _tensor("boxes", boxes, "[N, (x1, y1, x2, y2)]", 2)
    if boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [N, (x1, y1, x2, y2)], got {list(boxes.shape)}")
    if boxes.dtype != torch.float32:
        raise TypeError(f"boxes must be float32, got {boxes.dtype}; use boxes.float()")


def finite(name: str, value: Tensor) -> None:
    """Refuse NaN and inf. Reads the values: waits on CUDA."""
    if not _values_can_be_read():
        return
    good = torch.isfinite(value.detach())
    if not bool(good.all()):
        row = int((~good.reshape(value.shape[0], -1).all(dim=1)).nonzero()[0])
        raise ValueError(f"{name}[{row}] = {value[row].tolist()} is not finite; drop such rows first")


def masks_and_boxes(mask_probs: Tensor, boxes: Tensor, size: Sequence[int], threshold: float | None, rule: str) -> None:
    """Refuse masks and boxes that do not belong together, and a canvas without pixels."""
    _tensor("mask_probs", mask_probs, "[N, M, M]", 3)
    if mask_probs.shape[1] != mask_probs.shape[2] or mask_probs.shape[1] < 1:
        raise ValueError(f"mask_probs must be square, [N, M, M], got {list(mask_probs.shape)}")
    if mask_probs.dtype not in FLOATS:
        raise TypeError(f"mask_probs must be floating point, got {mask_probs.dtype}; use .float()")
    boxes_only(boxes)
    if boxes.shape[0] != mask_probs.shape[0]:
        raise ValueError(f"one box per mask is needed, got {mask_probs.shape[0]} masks and {boxes.shape[0]} boxes")
    if boxes.device != mask_probs.device:
        raise ValueError(f"boxes are on {boxes.device} but the masks on {mask_probs.device}")
    pair = tuple(size) if isinstance(size, Sequence) else ()
    if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(f"size must be (height, width) in pixels, each at least 1, got {size!r}")
    if threshold is not None and not (isinstance(threshold, (int, float)) and 0 <= threshold <= 1):
        raise ValueError(f"threshold must be None or a probability, got {threshold!r}")
    if rule not in ("continuous", "integer"):
        raise ValueError(f'rule must be "continuous" or "integer", got {rule!r}')
    finite("boxes", boxes)
