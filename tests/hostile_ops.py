"""Calls no sane caller would make, by the thousand: every one must return something sound or raise a clear error.

    python tests/hostile_ops.py --calls 100000 --seed 7

A crash or a hang shows the number of the call; the same seed makes the same calls.
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import random
import sys

import torch

from mrcnn_edu import ops
from mrcnn_edu.ops import compiled

ERRORS = (ValueError, TypeError, RuntimeError, IndexError, OverflowError, NotImplementedError)
NASTY = [0.0, -0.0, 0.5, 1, -1, 7, 8, 1e-30, 1e4, -1e5, 2.0**31, 1e9, 1e20, 3e38, -3e38, math.inf, -math.inf, math.nan]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]


class Hostile:
    """A source of arguments, most of them sound, some of them not."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def often(self, good, *bad):
        return good if self.random.random() < 0.95 else self.random.choice(bad)

    def number(self) -> float:
        return self.random.choice(NASTY) if self.random.random() < 0.06 else self.random.uniform(-10, 30)

    def layout(self, tensor: torch.Tensor) -> torch.Tensor:
        kind = self.random.randrange(4)
        if kind == 1 and tensor.ndim == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        if kind == 2 and tensor.ndim >= 2:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == 3:
            return torch.stack([tensor, tensor], dim=-1)[..., 0]
        return tensor

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape = tuple(self.often(side, 0, side + 1, 1) if self.random.random() < 0.2 else side for side in shape)
        if self.random.random() < 0.03:
            shape = shape[1:]
        value = torch.rand(shape, generator=self.generator) * 4 - 2
        return self.layout(
            value.to(dtype or (self.random.choice(DTYPES) if self.random.random() < 0.1 else value.dtype))
        )

    def rois(self, images: int) -> torch.Tensor:
        count = self.random.choice([0, 1, 3, 9])
        rows = [[self.random.randrange(max(images, 1)), *(self.number() for _ in range(4))] for _ in range(count)]
        if rows and self.random.random() < 0.1:
            self.random.choice(rows)[0] = self.number()
        rois = torch.tensor(rows, dtype=torch.float32).view(count, 5)
        wrong = (rois.double(), rois[:, :4], rois.long(), rois.flatten(), rois.to("meta"), rois.tolist())
        rois = self.often(rois, *wrong)
        return self.layout(rois) if isinstance(rois, torch.Tensor) else rois

    def boxes(self, count: int) -> torch.Tensor:
        boxes = torch.tensor([[self.number() for _ in range(4)] for _ in range(count)], dtype=torch.float32)
        return self.layout(
            self.often(boxes.view(count, 4), boxes.double(), boxes[:1], boxes.flatten(), boxes.to("meta"))
        )


# ---------------------------------------------------------------------------------------------------------------------
# One call each, through Python's checks and around them
# ---------------------------------------------------------------------------------------------------------------------


def sound(condition: bool | torch.Tensor, problem: str) -> None:
    """AssertionError otherwise, under ``python -O`` as well."""
    if not condition:
        raise AssertionError(problem)


def roi_layer(hostile: Hostile) -> list[torch.Tensor]:
    images, channels = hostile.random.choice([1, 2]), hostile.random.choice([1, 3, 17])
    features = hostile.tensor(images, channels, hostile.random.choice([1, 5, 9]), hostile.random.choice([1, 7]))
    if features.is_floating_point() and hostile.random.random() < 0.5:
        features.requires_grad_()
    size = hostile.often((2, 3), 0, (0, 1), -1, (1, 2, 3), "7", 2.5, 5)
    scale = hostile.often(hostile.random.choice([1.0, 0.25, 0.3]), *NASTY, None)
    samples = hostile.often(hostile.random.choice([0, 1, 2]), -1, 64, 257, 10**9, 2.0, None)
    mode = hostile.often(hostile.random.choice(["mean", "max"]), "sum", None)
    layer = hostile.random.choice(["roi_align", "roi_warp", "roi_pool"])
    rois = hostile.rois(images)
    levels = torch.zeros(len(rois), dtype=torch.int64)
    aligned = hostile.random.random() < 0.5
    pooled = ops.pool_levels(layer, [features], rois, levels, size, [scale], samples, aligned, mode)
    height, width = (size, size) if isinstance(size, int) else size
    sound(pooled.shape == (len(rois), features.shape[1], height, width), f"another shape, {pooled.shape}")
    sound(pooled.dtype == features.dtype, f"another type, {pooled.dtype}")
    sound(torch.isfinite(pooled).all(), "finite features gave a result that is not")
    if features.requires_grad:
        pooled.sum().backward()
        sound(torch.isfinite(features.grad).all(), "the gradient is not finite")
        return [pooled.detach(), features.grad]
    return [pooled]


def suppression(hostile: Hostile) -> list[torch.Tensor]:
    count = hostile.random.choice([0, 1, 5, 40])
    boxes, scores = hostile.boxes(count), hostile.tensor(count)
    groups = hostile.often(torch.randint(-2, 3, (count,), generator=hostile.generator), torch.zeros(count), None)
    threshold = hostile.often(hostile.random.random(), *NASTY, None)
    most = hostile.often(None, 0, 1, 3, -1, 2.5)
    kept = ops.batched_nms(boxes, scores, groups, threshold, most)
    rows = set(kept.tolist())
    sound(len(rows) == len(kept) <= count and rows <= set(range(count)), f"kept {kept.tolist()} of {count}")
    return [kept]


def pasting(hostile: Hostile) -> list[torch.Tensor]:
    count, side = hostile.random.choice([0, 1, 4]), hostile.random.choice([1, 2, 7])
    masks, boxes = hostile.tensor(count, side, side).clamp(0), hostile.boxes(count)
    size = hostile.often((13, 11), (1, 1), (0, 5), (5, -1), (5,), (2.5, 3), None)
    threshold = hostile.often(0.5, None, 0.0, 1.0, 2.0, math.nan)
    rule = hostile.often(hostile.random.choice(["continuous", "integer"]), "nearest", None)
    pasted = ops.paste_masks(masks, boxes, size, threshold, rule)
    sound(pasted.shape == (len(masks), *size), f"another shape, {pasted.shape}")
    crops = ops.paste_crops(masks, boxes, size, threshold, rule)
    for mask, (top, left, crop) in zip(pasted, crops):
        window = mask[top : top + crop.shape[0], left : left + crop.shape[1]]
        sound(torch.equal(window, crop) and torch.count_nonzero(mask) == torch.count_nonzero(crop), "other crops")
    return [pasted]


def raw_forward(hostile: Hostile) -> None:
    maps = [hostile.tensor(2, 3, 6 >> i, 8 >> i) for i in range(hostile.often(2, 0, 1, 3, 9))]
    rois = hostile.rois(2)
    levels = torch.randint(-1, 3, (len(rois),), generator=hostile.generator)
    levels = hostile.often(levels.clamp(0, 1), levels, levels.int())
    scales = hostile.often([0.5] * len(maps), [0.5], [math.nan] * len(maps))
    options = [hostile.often(hostile.random.randrange(3), -1, 3, 2**40), *raw_size(hostile), raw_samples(hostile)]
    torch.ops.mrcnn_edu.roi_features(maps, rois, levels, scales, *options, True, hostile.random.random() < 0.5)


def raw_backward(hostile: Hostile) -> None:
    rois, size, maximum = hostile.rois(2), raw_size(hostile), hostile.random.random() < 0.5
    gradient = hostile.tensor(len(rois), 3, *(max(0, min(side, 64)) for side in size))
    winners = hostile.often(hostile.number(), -1, 3)
    winners = torch.full((gradient.numel() if maximum else 0,), int(winners) if math.isfinite(winners) else 2**31 - 1)
    levels = hostile.often(torch.zeros(len(rois), dtype=torch.int64), torch.full((len(rois),), 2), torch.zeros(1))
    heights, widths = hostile.often([6], [0], [-3], [6, 3]), hostile.often([8], [0], [2**33])
    images = hostile.often(2, 0, -1, 1)
    torch.ops.mrcnn_edu.roi_features_backward(
        gradient,
        hostile.often(winners.clamp(-(2**31), 2**31 - 1).int(), winners),
        rois,
        levels,
        [0.5],
        images,
        heights,
        widths,
        hostile.random.random() < 0.5,
        hostile.random.randrange(3),
        raw_samples(hostile),
        True,
        maximum,
    )


def raw_size(hostile: Hostile) -> tuple[int, int]:
    return hostile.often((2, 3), (0, 2), (-1, 2), (2**33, 2), (4, 7))


def raw_samples(hostile: Hostile) -> int:
    return hostile.often(hostile.random.randrange(4), -1, 256, 2**40)


def raw_others(hostile: Hostile) -> None:
    count = hostile.random.choice([0, 1, 5, 40])
    boxes = hostile.boxes(count)
    groups = hostile.often(None, torch.zeros(count, dtype=torch.int64), torch.zeros(count))
    torch.ops.mrcnn_edu.nms(boxes, hostile.tensor(count), groups, hostile.number() / 20, hostile.often(None, -1, 2))
    masks = hostile.tensor(count, 5, 5)
    for op in (torch.ops.mrcnn_edu.paste, torch.ops.mrcnn_edu.paste_crops):
        size = hostile.often((9, 8), (0, 8), (-3, 8), (2**40, 8))
        op(masks, boxes, *size, hostile.often(0.5, None, math.nan), hostile.random.random() < 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)
    backends = ["vectorized"] if compiled.MISSING else ["compiled", "compiled", "vectorized"]
    calls = [roi_layer, suppression, pasting]
    if compiled.MISSING is None:
        calls += [raw_forward, raw_backward, raw_others]
    returned = raised = 0
    for number in range(args.calls):
        seed = args.seed * 1_000_003 + number
        call, backend = calls[number % len(calls)], backends[number // len(calls) % len(backends)]
        print(f"\rcall {number} ({call.__name__}, {backend}), seed {seed}", end="", file=sys.stderr)
        faulthandler.dump_traceback_later(60, exit=True)  # a hang
        try:
            with ops.use(backend):
                call(Hostile(seed))
            returned += 1
        except ERRORS as error:
            if not str(error):
                raise
            raised += 1
    faulthandler.cancel_dump_traceback_later()
    print(f"\n{returned} calls returned, {raised} raised an error, none crashed")
    return 0


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
