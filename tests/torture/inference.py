"""What ``predict`` is given: images of every size and shape, and things that are no image."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from training_runs import MODEL

from mrcnn_edu.inference import predict
from mrcnn_edu.masks import rle_decode
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.ops import paste_rle
from mrcnn_edu.structures import Detections
from torture.harness import Area, refused

GENEROUS = replace(
    MODEL,
    rpn=replace(MODEL.rpn, pre_nms=(400, 400), post_nms=(200, 200)),
    box=replace(MODEL.box, detections_per_image=100, score_threshold=0.0),
)


@functools.cache
def model() -> MaskRCNN:
    """A small model that finds a hundred instances in anything."""
    torch.manual_seed(0)
    return build_model(GENEROUS).eval()


def check(found: Detections, height: int, width: int) -> None:
    """Finite, inside the image, best first."""
    for name in ("boxes", "scores", "mask_probs", "keypoints"):
        if not getattr(found, name).isfinite().all():
            raise AssertionError(f"{name} are not finite")
    x1, y1, x2, y2 = found.boxes.unbind(1)
    if not ((x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height) & (x1 <= x2) & (y1 <= y2)).all():
        raise AssertionError(f"boxes outside the image of {height} x {width}: {found.boxes.tolist()[:3]}")
    if (found.scores.diff() > 0).any() or not ((found.labels >= 1) & (found.labels <= GENEROUS.classes)).all():
        raise AssertionError("scores out of order, or an unknown label")


def large(_: random.Random) -> str:
    """100 masks of an image of 12 megapixels, at the network's usual size, as run lengths."""
    found = predict(model(), torch.randint(0, 256, (3, 3000, 4000), dtype=torch.uint8))
    check(found, 3000, 4000)
    if len(found) != 100:
        raise AssertionError(f"only {len(found)} detections")
    for rle in paste_rle(found.mask_probs, found.boxes, (3000, 4000)):
        rle_decode(rle)
    return "100 masks of 12 megapixels"


def uneven(draw: random.Random) -> str:
    """A batch of very different sizes."""
    sizes = [(1, 5000), (5000, 1), (1, 1), (300, 40), (64, 64), (2, 900)]
    draw.shuffle(sizes)
    found = predict(model(), [torch.rand(3, *size) for size in sizes], 64, 128, batch_size=draw.choice([1, 2, 6]))
    for detections, size in zip(found, sizes):
        check(detections, *size)
    return "a batch of very different sizes"


def not_finite(draw: random.Random) -> str:
    """NaN or infinity in an image, a weight or a statistic: an error and never an empty answer."""
    value, place = draw.choice([math.nan, math.inf, -math.inf]), draw.choice(["image", "weight", "buffer"])
    torch.manual_seed(0)
    network, image = build_model(GENEROUS), torch.rand(3, 64, 64)
    tensors = {
        "image": [image], "weight": list(network.parameters()),
        "buffer": [b for b in network.buffers() if b.is_floating_point()],
    }[place]  # fmt: skip
    tensor = draw.choice(tensors).data.view(-1)
    tensor[draw.randrange(len(tensor))] = value
    try:
        predict(network, image, 64, 64)
    except (FloatingPointError, ValueError) as error:
        refused(error)
        return f"{place} not finite: refused"
    raise AssertionError(f"{value} in the {place} passed")


def source(draw: random.Random) -> tuple[Any, tuple[int, int] | None]:
    """Something to predict on, and its size if it is an image."""
    size = (draw.choice([1, 2, 31, 64]), draw.choice([1, 3, 40, 200]))
    odd = (draw.choice([0, 1, 2, 4, 5]), *size)
    good = [
        torch.rand(3, *size),
        torch.rand(3, *size).half(),
        torch.rand(3, *size, dtype=torch.float64),
        torch.randint(0, 256, (3, *size), dtype=torch.uint8),
        torch.rand(3, *size[::-1]).transpose(1, 2),
        np.zeros((*size, 3), np.uint8),
        np.full((*size, 3), 255, np.uint8)[:, ::-1],
        torch.rand(3, *size).requires_grad_(),
        *(Image.new(mode, size[::-1]) for mode in ("RGB", "L", "LA", "1", "CMYK", "P", "I;16")),
    ]
    bad = [
        None,
        5,
        2.5,
        b"image",
        {},
        set(),
        object(),
        "",
        "/dev/null",
        "/dev/zero",
        "/",
        "\0",
        "a" * 5000,
        Path("missing.png"),
        [],
        torch.rand(odd),
        torch.rand(3, *size) * 255,
        torch.rand(3, *size) - 1,
        torch.rand(3, 0, 5),
        torch.rand(size),
        torch.rand(1, 3, *size),
        torch.zeros(3, *size, dtype=torch.int64),
        torch.zeros(3, *size, dtype=torch.bool),
        torch.zeros(3, *size, dtype=torch.complex64),
        torch.zeros(3, *size, device="meta"),
        torch.zeros(3, *size).to_sparse(),
        np.zeros(size, np.uint8),
        np.zeros((*size, 4), np.uint8),
        np.zeros((*size, 3)),
        np.array(["a"]),
        np.array(None),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("F", size[::-1]),
        Image.new("RGB", (0, 5)),
        torch.nn.Linear(2, 2),
    ]
    return (draw.choice(good), size) if draw.random() < 0.4 else (draw.choice(bad), None)


def anything(draw: random.Random) -> str:
    """One thing, or a list of several, with numbers that may be none."""
    sources = [source(draw) for _ in range(draw.choice([1, 1, 2, 3]))]
    things: Any = [thing for thing, _ in sources] if len(sources) > 1 else sources[0][0]
    numbers = {"min_size": 64, "max_size": 128, "batch_size": draw.choice([1, 2])}
    if wrong := draw.random() < 0.15:
        numbers[draw.choice(list(numbers))] = draw.choice(
            [0, -1, 2.5, None, "64", math.nan, math.inf, True, [64], 2**40]
        )
    try:
        found = predict(model(), things, **numbers)
    except Exception as error:
        if all(size for _, size in sources) and not wrong:
            raise
        return refused(error)
    if not all(size for _, size in sources):
        raise AssertionError(f"{type(things).__name__} was taken for an image")
    for detections, (_, size) in zip(found if len(sources) > 1 else [found], sources):
        check(detections, *size)
    return "odd numbers taken" if wrong else "predicted"


def case(number: int, _: Path) -> str:
    """The large image first, then anything."""
    draw = random.Random(number)
    torch.manual_seed(number)
    kind = large if number == 0 else {1: uneven, 2: not_finite}.get(number % 10, anything)
    return kind(draw)


AREA = Area("inference", "images of every size, 12 megapixels with 100 masks, what is not finite or no image", case,
            short=40, full=2000, seconds=120, memory=1024, chunk=200)  # fmt: skip
