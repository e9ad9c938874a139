"""Hostile calls of the ops, through Python's checks and around them, each by two implementations that must agree.

The calls themselves are ``tests/hostile_ops.py``'s, which the sanitizers run as well (``python csrc/sanitize.py``).
"""

from __future__ import annotations

import random
from pathlib import Path

import hostile_ops
import torch
from hostile_ops import Hostile

from mrcnn_edu import ops
from mrcnn_edu.ops import compiled
from torture.harness import Area, refused

CHECKED = [hostile_ops.roi_layer, hostile_ops.suppression, hostile_ops.pasting]
RAW = [hostile_ops.raw_forward, hostile_ops.raw_backward, hostile_ops.raw_others]
CLOSE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of values within 2; sums are taken in another order


def case(number: int, _: Path) -> str:
    """One call; every thousandth on maps that half precision or 32 bits could not count."""
    if number % 1000 == 999:
        return many_images(number)
    if number % 1000 == 998:
        return many_cells(number)
    calls = CHECKED if compiled.MISSING else CHECKED + RAW
    call = calls[number % len(calls)]
    if call in RAW:
        try:
            call(Hostile(number))
            return "raw call returned"
        except hostile_ops.ERRORS as error:
            if not str(error):
                raise
            return "raw call refused"
    ends = [outcome(call, number, name) for name in ("vectorized", *([] if compiled.MISSING else ["compiled"]))]
    words = {word for word, _ in ends}
    if len(words) > 1:
        raise AssertionError(f"{call.__name__}: the implementations disagree, {words}")
    for one, other in zip(ends[0][1], ends[-1][1]):
        torch.testing.assert_close(one, other, rtol=0, atol=CLOSE.get(one.dtype, 1e-3))
    return f"{call.__name__} {words.pop()}"


def outcome(call, number: int, name: str) -> tuple[str, list[torch.Tensor]]:
    """What one implementation makes of a call: a word, and what it returned."""
    try:
        with ops.use(name):
            return "returned", call(Hostile(number))
    except hostile_ops.ERRORS as error:
        return refused(error), []


def many_images(number: int) -> str:
    """Image 2049 has no number in float16: the rois carry it, and they are float32 whatever the features are."""
    draw = random.Random(number)
    images, dtype = draw.randrange(2050, 5000), draw.choice([torch.float16, torch.bfloat16, torch.float32])
    features = (torch.arange(images) % 251).to(dtype)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    index = torch.tensor([draw.randrange(2048, images) for _ in range(5)])
    rois = torch.cat([index[:, None].float(), torch.tensor([0.0, 0, 2, 2]).expand(5, 4)], dim=1)
    pooled = ops.roi_align(features, rois, 1, 1.0)[:, 0, 0, 0]
    if not torch.equal(pooled.long(), index % 251):
        raise AssertionError(f"images {index.tolist()} gave {pooled.tolist()}, not {(index % 251).tolist()}")
    return "image beyond 2048 returned"


def many_cells(number: int) -> str:
    """More than 2^31 cells, of whose memory the system maps only what is touched."""
    draw, side = random.Random(number), 32768
    features = torch.empty(3, 1, side, side, dtype=torch.float16)
    x, y = draw.randrange(8, side - 8), draw.randrange(8, side - 8)
    features[2, 0, y : y + 2, x : x + 2], features[1, 0, y : y + 2, x : x + 2] = 3, -1
    rois = torch.tensor([[2.0, x, y, x + 2, y + 2], [1, x, y, x + 2, y + 2]])
    pooled = ops.roi_align(features, rois, 2, 1.0, samples_per_bin=1).flatten(1)
    if pooled.tolist() != [[3.0] * 4, [-1.0] * 4]:
        raise AssertionError(f"cell ({y}, {x}) of {side} x {side} gave {pooled.tolist()}")
    return "cell beyond 2^31 returned"


AREA = Area(
    "ops",
    "hostile calls of the ops: NaN, inf, huge, bad index, empty, wrong shape, dtype, stride, device; both ways",
    case,
    short=2000,
    full=100_000,
    memory=512,
    chunk=1000,
)
