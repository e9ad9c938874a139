"""Run lengths and polygons, good ones and what chance makes of them: a mask of the size asked for, or an error.

Each kind of input comes with its reader and with what must hold of the answer; only the reader's time counts.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mrcnn_edu import masks
from torture.harness import Area, refused

ODD = [0, -1, 1, 2, 0.5, 2**15, 2**31, 2**62, 2**80, -(2**40), 1e300, -1e300, math.nan, math.inf, -math.inf, True, None,
       "7", b"", [], [1], {}, (2, 3), 1e9, -1e9, 3e38]  # fmt: skip


Trial = tuple[Callable[..., Any], tuple[Any, ...], Callable[[Any], None]]  # a reader, its arguments, what checks it


def case(number: int, _: Path) -> tuple[str, float]:
    """One input for one of the readers, and the processor time that it took."""
    draw = random.Random(number)
    kind = draw.choice([compressed, compressed, listed, drawn, drawn, encoded])
    read, arguments, check = kind(draw)
    began = time.process_time()
    try:
        result, word = read(*arguments), "returned"
    except Exception as error:
        word = refused(error)
    seconds = time.process_time() - began
    if word == "returned":
        check(result)
    return f"{kind.__name__} {word}", seconds


def size_of(draw: random.Random) -> tuple[int, int]:
    """Mostly small, at times a megapixel, or as long as the rules allow."""
    if draw.random() < 0.001:
        return draw.choice([(1024, 1024), (1, 32768), (32768, 1), (256, 4096)])
    return draw.randint(1, 40), draw.randint(1, 40)


def some_mask(draw: random.Random, size: tuple[int, int]) -> np.ndarray:
    """Noise of some coarseness, [H, W] bool."""
    rng = np.random.default_rng(draw.getrandbits(32))
    step = draw.choice([1, 3, 9])
    coarse = rng.random((-(-size[0] // step), -(-size[1] // step))) < draw.choice([0.0, 0.1, 0.5, 1.0])
    return coarse.repeat(step, 0).repeat(step, 1)[: size[0], : size[1]]


def read_back(mask: torch.Tensor, rle: Any) -> None:
    """What was read must be a mask of the size and the area that the runs say, and survive a round trip."""
    if mask.dtype != torch.bool or list(mask.shape) != list(rle["size"]):
        raise AssertionError(f"{rle['size']} gave {mask.dtype} {list(mask.shape)}")
    counts = masks.rle_counts(rle)
    if int(mask.sum()) != counts[1::2].sum():
        raise AssertionError(f"a mask of {int(mask.sum())} pixels, the runs have {counts[1::2].sum()}")
    if mask.numel() < 10_000 and not torch.equal(masks.rle_decode(masks.rle_encode(mask)), mask):
        raise AssertionError("the mask does not survive a round trip")


def some_size(draw: random.Random, size: tuple[int, int]) -> Any:
    """The size, or at times another one, or none."""
    if draw.random() < 0.9:
        return draw.choice([list, tuple])(size)
    height, width = size
    return draw.choice(
        [[width, height], [height + 1, width], [height], [height, width, 1], None, "ab", {}, [draw.choice(ODD), width],
         [height, draw.choice(ODD)], [0, 0], [2**31, 2**31], [2**40, 2], [-height, -width], [float(height), width],
         [32768, 32768]]
    )  # fmt: skip


def compressed(draw: random.Random) -> Trial:
    """Run lengths as text: right ones, changed in a few places, or any characters."""
    size = size_of(draw)
    text = masks.rle_encode(torch.from_numpy(some_mask(draw, size)))["counts"]
    if draw.random() < 0.3:
        text = "".join(chr(draw.randrange(48, 112)) for _ in range(draw.randrange(60)))
    for _ in range(draw.choice([0, 0, 1, 2, 5])):
        place, new = draw.randrange(len(text) + 1), chr(draw.choice([draw.randrange(48, 112), draw.randrange(65536)]))
        text = draw.choice([text[:place] + new + text[place + 1 :], text[:place], text[:place] + new + text[place:],
                            text[:place] + text[place:][::-1], text * 2])  # fmt: skip
    counts = draw.choice([text, text.encode("utf-8", "surrogatepass")])
    rle = {"size": some_size(draw, size), "counts": counts}
    return masks.rle_decode, (rle,), lambda mask: read_back(mask, rle)


def listed(draw: random.Random) -> Trial:
    """Run lengths as a list."""
    size = size_of(draw)
    counts: Any = masks.rle_counts(masks.rle_encode(torch.from_numpy(some_mask(draw, size)))).tolist()
    for _ in range(draw.choice([0, 0, 1, 2, 5])):
        place, new = draw.randrange(len(counts) + 1), draw.choice([draw.choice(ODD), draw.randrange(-5, 100)])
        left, right = counts[:place], counts[place:]
        counts = draw.choice([[*left, new, *right[1:]], left, counts + counts[::-1], [*left, new, new, *right]])
    rle: Any = {"size": some_size(draw, size), "counts": counts}
    if draw.random() < 0.05:
        rle = draw.choice(
            [{"size": size}, {"counts": counts}, counts, None, {"size": size, "counts": draw.choice(ODD)}]
        )
    return masks.rle_decode, (rle,), lambda mask: read_back(mask, rle)


def drawn(draw: random.Random) -> Trial:
    """Polygons near, across and far from the image, with some values that no corner can have; at times endless ones."""
    size = size_of(draw)
    polygons: Any = []
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        reach = draw.choice([50, 50, 50, 1e3, 1e6, 1e12, 1e300])
        count = draw.choice([6, 6, 8, 20, 200, draw.randrange(12)])
        reach, count = (1e5, 20_000) if draw.random() < 0.0003 else (reach, count)
        polygon = [draw.uniform(-reach / 4, reach) for _ in range(count)]
        if polygon and draw.random() < 0.15:
            polygon[draw.randrange(len(polygon))] = draw.choice(ODD)
        if draw.random() < 0.1:  # on one line, or in one place
            polygon = [polygon[0] if polygon else 0.0] * len(polygon)
        polygons.append(polygon)
    if draw.random() < 0.03:
        polygons = draw.choice([None, 7, "abc", [None], [[[1, 2]]], {}, [{}], [np.zeros((3, 2))], [np.zeros(4)]])
    asked = some_size(draw, size)
    return masks.polygons_to_mask, (polygons, asked), lambda mask: within(mask, polygons, asked)


def within(mask: torch.Tensor, polygons: list[Any], asked: Any) -> None:
    """A mask of the size asked for, which ends where the corners end."""
    if mask.dtype != torch.bool or list(mask.shape) != list(asked):
        raise AssertionError(f"{asked} gave {mask.dtype} {list(mask.shape)}")
    rows, columns = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
    if rows:  # a pixel may stick out of the corners by one, by pycocotools' rounding
        x, y = [v for part in polygons for v in np.ravel(part)[0::2]], [v for p in polygons for v in np.ravel(p)[1::2]]
        inside = min(x) - 2 <= columns[0] and columns[-1] <= max(x) + 2 and min(y) - 2 <= rows[0]
        if not (inside and rows[-1] <= max(y) + 2):
            raise AssertionError("a mask beyond its polygons' corners")


def encoded(draw: random.Random) -> Trial:
    """Masks to be written, some of which are none."""
    size = size_of(draw)
    mask: Any = torch.from_numpy(some_mask(draw, size))
    if draw.random() < 0.2:
        mask = draw.choice([mask.float(), mask.long() * 2, mask[None], mask[0], mask.numpy(), None, 5, mask.tolist()])
    elif draw.random() < 0.3:
        mask = draw.choice([mask.t(), mask[::2], mask[:, ::2], mask.flip(0), mask[:0], mask[:, :0]])
    return masks.rle_encode, (mask,), lambda rle: comes_back(rle, mask)


def comes_back(rle: Any, mask: torch.Tensor) -> None:
    """The same mask, read again."""
    if mask.numel() and not torch.equal(masks.rle_decode(rle), mask):
        raise AssertionError(f"another mask came back from {rle}")


AREA = Area(
    "masks",
    "run lengths and polygons, random and mutated, to masks",
    case,
    short=2000,
    full=1_000_000,
    cpu=0.05,
    memory=128,
    chunk=10_000,
)
