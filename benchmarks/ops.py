"""Our ops beside torchvision's on the CPU: one process, taking turns, the same allocator, medians of ratios.

    python benchmarks/ops.py                      both allocator settings, two threads, about four minutes
    python benchmarks/ops.py --rounds 9 --only align

"keep heap" tells glibc to keep freed memory instead of giving every large block back to the system and asking for it
again; torchvision gains from it as well, so both sides always run under the same setting. Run it on an idle machine:
the load before and after is part of the result, which is written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from mrcnn_edu import ops
from mrcnn_edu.ops import vectorized

RESULTS = Path(__file__).parent / "results"


@dataclass
class Case:
    """One line of the table: what runs on both sides, and how many times faster ours shall be."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    least: float
    aim: float
    floor: float | None = None  # seconds that moving the bytes alone would take


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------------
# The work
# ---------------------------------------------------------------------------------------------------------------------


def some_rois(count: int) -> Tensor:
    """Rois [R, 5] in two images of 800 x 1088 px: sides log-uniform in 16..112 px, aspects in 1/2..2."""
    g = torch.Generator().manual_seed(0)
    side = 16 * torch.exp(torch.rand(count, generator=g) * math.log(112 / 16))
    aspect = torch.exp((torch.rand(count, generator=g) * 2 - 1) * math.log(2))
    width, height = side * aspect.sqrt(), side / aspect.sqrt()
    x = torch.rand(count, generator=g) * (1088 - width)
    y = torch.rand(count, generator=g) * (800 - height)
    image = torch.randint(2, (count,), generator=g).float()
    return torch.stack([image, x, y, x + width, y + height], dim=1)


def align_cases() -> list[Case]:
    contiguous = torch.randn(2, 256, 200, 272, generator=torch.Generator().manual_seed(1))
    channels_last = contiguous.contiguous(memory_format=torch.channels_last)
    rois = some_rois(1000)
    rate = copy_rate()

    def forward(features: Tensor, backend: str, size: int = 7) -> Callable[[], object]:
        def run() -> object:
            with ops.use(backend), torch.no_grad():
                return ops.roi_align(features, rois, size, 0.25)

        return run

    def torchvision_forward(size: int = 7) -> Callable[[], object]:
        return lambda: torchvision.ops.roi_align(contiguous, rois, size, 0.25, 2, True)

    cases = [
        Case("RoIAlign forward, channels_last map", forward(channels_last, "compiled"), torchvision_forward(), 15, 30),
        Case("RoIAlign forward, contiguous map", forward(contiguous, "compiled"), torchvision_forward(), 4, 10),
        Case("RoIAlign forward, vectorized form", forward(channels_last, "vectorized"), torchvision_forward(), 10, 25),
    ]
    cases[0].floor = bytes_moved(channels_last, rois, 7) / rate
    for size in (7, 14):
        ours = forward_and_backward(
            channels_last, rois, size, lambda f, r, p: ops.roi_align(f, r, p, 0.25), torch.channels_last
        )
        theirs = forward_and_backward(
            contiguous,
            rois,
            size,
            lambda f, r, p: torchvision.ops.roi_align(f, r, p, 0.25, 2, True),
            torch.contiguous_format,
        )
        cases.append(Case(f"RoIAlign forward + backward, {size} x {size}", ours, theirs, 15, 30))
    return cases


def forward_and_backward(features, rois, size, layer, memory_format) -> Callable[[], object]:
    """The layer and its gradient, with features and gradient in the memory format that suits the layer."""
    leaf = features.clone(memory_format=torch.preserve_format).requires_grad_()
    gradient = torch.ones(len(rois), leaf.shape[1], size, size).contiguous(memory_format=memory_format)

    def run() -> None:
        leaf.grad = None
        layer(leaf, rois, size).backward(gradient)

    return run


def copy_rate() -> float:
    """Bytes per second that a plain copy moves, reading and writing counted."""
    source = torch.randn(1 << 25)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.numel() * source.element_size() / best


def bytes_moved(features: Tensor, rois: Tensor, size: int) -> float:
    """Bytes RoIAlign cannot avoid: every cell it needs read once, every number of the result written once."""
    height, width = features.shape[2:]
    ys = vectorized.axis_samples("roi_align", rois[:, 2], rois[:, 4], 0.25, size, height, 2, True)
    xs = vectorized.axis_samples("roi_align", rois[:, 1], rois[:, 3], 0.25, size, width, 2, True)
    y, x = vectorized.mean_taps(*ys, height)[0].flatten(1), vectorized.mean_taps(*xs, width)[0].flatten(1)
    row = rois[:, 0].long()[:, None] * height + y
    cells = (row[:, :, None] * width + x[:, None, :]).unique().numel()
    numbers = (cells + len(rois) * size * size) * features.shape[1]
    return float(numbers * features.element_size())


def nms_cases() -> list[Case]:
    """5000 boxes around a few hundred centres, as a region proposal network and a box head give them."""
    g = torch.Generator().manual_seed(2)
    centre = (torch.rand(500, 2, generator=g) * 1000).repeat(10, 1) + torch.randn(5000, 2, generator=g) * 8
    half = 15 + torch.rand(5000, 2, generator=g) * 50
    boxes = torch.cat([centre - half, centre + half], dim=1)
    scores = torch.rand(5000, generator=g)
    groups = torch.randint(80, (5000,), generator=g)

    def ours(batched: bool) -> Callable[[], object]:
        def run() -> object:
            with ops.use("compiled"):
                return ops.batched_nms(boxes, scores, groups, 0.5) if batched else ops.nms(boxes, scores, 0.5)

        return run

    return [
        Case("NMS, 5000 boxes", ours(False), lambda: torchvision.ops.nms(boxes, scores, 0.5), 10, 15),
        Case(
            "NMS, 5000 boxes in 80 classes",
            ours(True),
            lambda: torchvision.ops.batched_nms(boxes, scores, groups, 0.5),
            10,
            25,
        ),
    ]


def paste_cases() -> list[Case]:
    """100 masks of 28 x 28 in boxes of 25 to 500 px."""
    g = torch.Generator().manual_seed(3)
    masks = torch.rand(100, 28, 28, generator=g)
    side = 25 * torch.exp(torch.rand(100, 2, generator=g) * math.log(500 / 25))
    corner = torch.rand(100, 2, generator=g) * (torch.tensor([1216.0, 800.0]) - side).clamp(min=1)
    boxes = torch.cat([corner, corner + side], dim=1)

    def ours() -> object:
        with ops.use("compiled"):
            return ops.paste_masks(masks, boxes, (800, 1216), rule="integer")

    def theirs() -> object:
        return paste_masks_in_image(masks[:, None], boxes, (800, 1216)) > 0.5

    return [Case("pasting 100 masks into 800 x 1216", ours, theirs, 10, 18)]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring and reporting
# ---------------------------------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int) -> dict[str, object]:
    """Both sides in turn; the median of the rounds' ratios, and the median times in milliseconds."""
    case.ours(), case.theirs()
    pairs = [(seconds(case.ours), seconds(case.theirs)) for _ in range(rounds)]
    ours, theirs = (statistics.median(side) for side in zip(*pairs))
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    result = {
        "name": case.name,
        "ours_ms": round(ours * 1e3, 2),
        "torchvision_ms": round(theirs * 1e3, 2),
        "ratio": round(statistics.median(ratios), 1),
        "ratio_range": [round(ratios[0], 1), round(ratios[-1], 1)],
        "at_least": case.least,
        "aim": case.aim,
    }
    if case.floor is not None:
        result["times_memory_floor"] = round(ours / case.floor, 2)
    return result


def keep_heap() -> None:
    """Serve large blocks from the heap and keep what is freed (glibc only)."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def run(allocator: str, rounds: int, only: str) -> list[dict[str, object]]:
    if allocator == "keep heap":
        keep_heap()
    print(f"\n{allocator} allocator, {torch.get_num_threads()} threads")
    print(f"{'':38}{'ours':>10}{'torchvision':>13}{'ratio':>8}{'range':>15}{'at least':>10}{'aim':>6}")
    results = []
    for name, cases in (("align", align_cases), ("nms", nms_cases), ("paste", paste_cases)):
        if only not in ("", name):
            continue
        for case in cases():
            result = measure(case, rounds) | {"allocator": allocator}
            results.append(result)
            low, high = result["ratio_range"]
            print(
                f"{result['name']:38}{result['ours_ms']:>7} ms{result['torchvision_ms']:>10} ms{result['ratio']:>7}x"
                f"{f'{low} - {high}':>15}{result['at_least']:>9}x{result['aim']:>5}x"
                + (f"   {result['times_memory_floor']} x the memory floor" if case.floor else ""),
                flush=True,
            )
    return results


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allocator", choices=["default", "keep heap", "both"], default="both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["", "align", "nms", "paste"], default="")
    parser.add_argument("--out", type=Path, default=RESULTS / "ops-cpu.json")
    args = parser.parse_args()
    if not ops.backend().startswith("compiled"):
        sys.exit(f"nothing to compare: {ops.backend()}")
    if args.allocator == "both":  # a process each: mallopt cannot be taken back
        parts = []
        for allocator in ("default", "keep heap"):
            part = args.out.with_suffix(f".{allocator.split()[0]}.part")
            options = ["--allocator", allocator, "--threads", args.threads, "--rounds", args.rounds, "--out", part]
            options += ["--only", args.only] if args.only else []
            subprocess.run([sys.executable, __file__, *map(str, options)], check=True)
            parts.append(json.loads(part.read_text()))
            part.unlink()
        report = parts[0] | {"load_after": parts[1]["load_after"], "results": parts[0]["results"] + parts[1]["results"]}
    else:
        torch.set_num_threads(args.threads)
        before = os.getloadavg()[0]
        results = run(args.allocator, args.rounds, args.only)
        report = {
            "date": date.today().isoformat(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": args.threads,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
            "rounds": args.rounds,
            "load_before": round(before, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "results": results,
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.allocator == "both":
        print(f"\nWritten to {args.out}")


if __name__ == "__main__":
    main()
