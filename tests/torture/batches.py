"""Batches as no data set should have them, and as some day one has: every loss and every gradient must be finite."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import torch
from many_processes import plain_model
from training_runs import MODEL, tiny_model

from mrcnn_edu.structures import ImageBatch, Target
from torture.harness import Area

JOINTS = MODEL.keypoint.joints


@functools.cache
def _model(batch_norm: bool) -> Any:
    return tiny_model() if batch_norm else plain_model()


def odd_target(draw: random.Random, height: int, width: int) -> Target:
    """No instance, one pixel, hundreds, only crowds, the whole image, a line, or the same one many times."""
    count = draw.choice([0, 0, 1, 1, 3, 20, 500])
    kind, rows = draw.choice(["pixels", "lines", "whole", "same", "mixed"]), []
    for _ in range(count):
        w, h = {"pixels": (1, 1), "lines": (draw.randint(1, width), 1), "whole": (width, height), "same": (5, 7),
                "mixed": (draw.randint(1, width), draw.randint(1, height))}[kind]  # fmt: skip
        w, h = min(w, width), min(h, height)
        x, y = (0, 0) if kind == "same" else (draw.randint(0, width - w), draw.randint(0, height - h))
        rows.append((x, y, x + w, y + h))
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, rows):
        mask[y1:y2, x1:x2] = draw.random() < 0.95  # at times an empty one
    keypoints = torch.rand(count, JOINTS, 3) * 2 * max(height, width)  # some far outside
    keypoints[..., 2] = torch.randint(0, 3, (count, JOINTS))
    return Target(
        torch.tensor(rows, dtype=torch.float32).reshape(-1, 4),
        torch.tensor([draw.randint(1, 6) for _ in rows], dtype=torch.int64),
        masks,
        keypoints,
        torch.tensor([draw.random() < draw.choice([0.0, 0.1, 1.0]) for _ in rows], dtype=torch.bool),
    )


def odd_batch(number: int, _: Path) -> str:
    """One training step's losses and gradients: all of them there, all of them finite."""
    draw = random.Random(number)
    torch.manual_seed(number)
    sides, count = [1, 7, 32, 64, 90], draw.choice([1, 2, 3])
    sizes = [(draw.choice(sides), draw.choice(sides)) for _ in range(count)]
    batch = ImageBatch.collate([draw.choice([torch.rand, torch.zeros, torch.ones])(3, *size) for size in sizes])
    targets = [odd_target(draw, *size) for size in sizes]
    model = _model(max(map(max, sizes)) > 32)  # a batch norm cannot train on a single cell
    model.zero_grad(set_to_none=True)
    losses = model(batch, targets)
    sum(losses.values()).backward()
    bad = [name for name, loss in losses.items() if not loss.isfinite()]
    bad += [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    if bad:
        raise AssertionError(f"not finite, or without a gradient: {bad}; instances {[len(t) for t in targets]}")
    return f"{'with' if any(map(len, targets)) else 'without'} instances, all finite"


AREA = Area("odd batches", "no instance, one pixel, 500 instances, crowds only: finite losses and all gradients",
               odd_batch, short=30, full=1000, memory=512, chunk=100)  # fmt: skip
