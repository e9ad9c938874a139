"""RoIAlign on a GPU: one launch over four FPN levels, beside torchvision's one launch per level.

    python benchmarks/ops_cuda.py

Forward, and forward with backward, for 512 and 1000 RoIs in float32, float16 and bfloat16 (which torchvision has not:
it gets float16 there). Times are the device's alone: each side is recorded as a CUDA graph, so that neither waits for
Python. Also how far the forward pass is from the time that moving its bytes takes, and NMS of the proposals of one and
of eight images, where the calls themselves are timed. Written to benchmarks/results/ with card, driver and versions.
Says so and ends where there is no GPU.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable

import torch
import torchvision
from machine import described, in_words, write
from torch import Tensor

from mrcnn_edu import ops
from mrcnn_edu.ops import backends, vectorized

STRIDES = (4, 8, 16, 32)
ROUNDS = 30


def milliseconds(function: Callable[[], object], repeats: int = 10) -> float:
    """Mean time of one call on the device, over several calls in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def recorded(function: Callable[[], object]) -> Callable[[], None]:
    """The same as a CUDA graph."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        function(), function()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def suppression(images: int) -> dict[str, object]:
    """NMS over the proposals of some images, 2000 from each of four levels; torchvision's, image after image."""
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(images, 8000, 2, generator=g) * 800
    boxes = torch.cat([corner, corner + 10 + torch.rand(images, 8000, 2, generator=g) * 200], dim=2).cuda()
    scores, levels = torch.rand(images, 8000, generator=g).cuda(), torch.arange(4).repeat_interleave(2000).cuda()

    def our_side() -> list[Tensor]:
        return ops.nms_of_images(
            boxes.flatten(0, 1), scores.flatten(), levels.repeat(images), [8000] * images, 0.7, max_keep=1000
        )

    def their_side() -> list[Tensor]:
        return [torchvision.ops.batched_nms(*image, levels, 0.7)[:1000] for image in zip(boxes, scores)]

    for ours, theirs in zip(our_side(), their_side()):
        if not torch.equal(ours, theirs):
            raise RuntimeError("the two kept other boxes")
    pairs = [tuple(map(milliseconds, (our_side, their_side))) for _ in range(ROUNDS)]
    mine, other = (statistics.median(side) for side in zip(*pairs))
    ratio = statistics.median(b / a for a, b in pairs)
    return {"images": images, "ours_ms": round(mine, 3), "torchvision_ms": round(other, 3), "ratio": round(ratio, 2)}


def some_rois(count: int) -> tuple[Tensor, Tensor]:
    """Rois [R, 5] in two images of 800 x 1344 px, sides log-uniform in 16..600 px, and each one's FPN level."""
    g = torch.Generator().manual_seed(0)
    side = 16 * torch.exp(torch.rand(count, generator=g) * math.log(600 / 16))
    aspect = torch.exp((torch.rand(count, generator=g) * 2 - 1) * math.log(2))
    width, height = side * aspect.sqrt(), side / aspect.sqrt()
    x, y = torch.rand(count, generator=g) * (1344 - width), torch.rand(count, generator=g) * (800 - height)
    image = torch.randint(2, (count,), generator=g).float()
    levels = torch.floor(4 + torch.log2(side / 224)).clamp(2, 5).long() - 2
    return torch.stack([image, x, y, x + width, y + height], dim=1).cuda(), levels.cuda()


def bytes_moved(maps: list[Tensor], rois: Tensor, levels: Tensor, size: int) -> float:
    """Every cell RoIAlign needs read once, every number of the result written once."""
    cells = 0
    for level, (features, stride) in enumerate(zip(maps, STRIDES)):
        chosen, (height, width) = rois[levels == level], features.shape[2:]
        if len(chosen) == 0:
            continue
        ys = vectorized.axis_samples("roi_align", chosen[:, 2], chosen[:, 4], 1 / stride, size, height, 2, True)
        xs = vectorized.axis_samples("roi_align", chosen[:, 1], chosen[:, 3], 1 / stride, size, width, 2, True)
        y, x = vectorized.mean_taps(*ys, height)[0].flatten(1), vectorized.mean_taps(*xs, width)[0].flatten(1)
        row = chosen[:, 0].long()[:, None] * height + y
        cells += (row[:, :, None] * width + x[:, None, :]).unique().numel()
    return float((cells + len(rois) * size * size) * maps[0].shape[1] * maps[0].element_size())


def copy_rate() -> float:
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source)) * 1e-3)


def measure(dtype: torch.dtype, count: int, size: int) -> dict[str, object]:
    rois, levels = some_rois(count)
    maps = [torch.randn(2, 256, 800 // s, 1344 // s, device="cuda", dtype=dtype) for s in STRIDES]
    ours = [m.contiguous(memory_format=torch.channels_last).requires_grad_() for m in maps]
    known = torch.float16 if dtype == torch.bfloat16 else dtype
    theirs = [m.to(known, copy=True).requires_grad_() for m in maps]
    scales = [1 / s for s in STRIDES]
    rows = [(levels == level).nonzero()[:, 0] for level in range(4)]
    per_level = [rois[r].to(known) for r in rows]  # torchvision wants rois in the dtype of the map

    def our_forward() -> Tensor:
        return ops.pool_levels("roi_align", ours, rois, levels, size, scales)

    def their_forward() -> Tensor:
        pooled = [
            torchvision.ops.roi_align(m, r, size, s, 2, True) for m, r, s in zip(theirs, per_level, scales) if len(r)
        ]
        return torch.cat(pooled)

    result = {"dtype": str(dtype).removeprefix("torch."), "rois": count, "size": size}
    gradient = torch.ones(count, 256, size, size, device="cuda", dtype=dtype)
    ours_gradient = gradient.contiguous(memory_format=torch.channels_last)
    for name, our_side, their_side in (
        ("forward", our_forward, their_forward),
        (
            "forward + backward",
            lambda: torch.autograd.grad(our_forward(), ours, ours_gradient),
            lambda: torch.autograd.grad(their_forward(), theirs, gradient.to(known), allow_unused=True),
        ),
    ):
        sides = recorded(our_side), recorded(their_side)
        pairs = [tuple(map(milliseconds, sides)) for _ in range(ROUNDS)]
        mine, other = (statistics.median(side) for side in zip(*pairs))
        ratio = statistics.median(b / a for a, b in pairs)
        result[name] = {"ours_ms": round(mine, 4), "torchvision_ms": round(other, 4), "ratio": round(ratio, 2)}
    with torch.no_grad():
        floor = bytes_moved(maps, rois, levels, size) / copy_rate() * 1e3
    result["forward"]["times_memory_floor"] = round(result["forward"]["ours_ms"] / floor, 2)
    return result


def page(report: dict) -> str:
    """The report as a Markdown page."""
    lines = ["# RoIAlign and NMS on a GPU, beside torchvision's", ""]
    lines += [f"{in_words(report)}. Written by benchmarks/ops_cuda.py, which says what is compared.", ""]
    lines += ["| dtype | rois | bins | what | ours, ms | torchvision, ms | ratio | times the time of its bytes |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for result in report["results"]:
        for what in ("forward", "forward + backward"):
            one = result[what]
            cells = [result["dtype"], result["rois"], f"{result['size']} x {result['size']}", what, one["ours_ms"]]
            cells += [one["torchvision_ms"], f"{one['ratio']}x", one.get("times_memory_floor", "")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "NMS of 8000 boxes per image, 1000 of them kept:", ""]
    lines += ["| images | ours, ms | torchvision, ms | ratio |", "|---|---|---|---|"]
    lines += [f"| {n['images']} | {n['ours_ms']} | {n['torchvision_ms']} | {n['ratio']}x |" for n in report["nms"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    if not torch.cuda.is_available():
        print("There is no GPU here: nothing measured.")
        return
    if "cuda" not in backends.COMPILED_FOR:
        sys.exit(f"The CUDA ops were not built: {ops.backend()}")
    cases = [(512, 7), (1000, 7), (512, 14), (1000, 14)]
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    results = [measure(dtype, *case) for dtype in dtypes for case in cases]
    report = described() | {"results": results, "nms": [suppression(images) for images in (1, 8)]}
    write(f"gpu ops {torch.cuda.get_device_name()}", report, page(report))


if __name__ == "__main__":
    main()
