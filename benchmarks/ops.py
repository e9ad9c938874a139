"""Our ops beside torchvision's on the CPU: one process, taking turns, the same allocator, medians of ratios.

    python benchmarks/ops.py                      three allocator settings, two threads, some eight minutes
    python benchmarks/ops.py --rounds 9 --only align --allocator default

Both sides always run under the same setting of the allocator, because it decides much of what large results cost:

    default      glibc gives every large block back to the system when it is freed, and asks for it again page by page
    keep heap    glibc keeps what is freed (mallopt)
    huge pages   PyTorch asks for pages of 2 MB (THP_MEM_ALLOC_ENABLE=1)

Run it on an idle machine: the load before and after is part of the result, and so is the rate of a plain copy, which
tells how much of the memory's speed was there. Written to benchmarks/results/, for programs and for readers.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from machine import conditions, copy_rate, described, options, seconds, write
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from mrcnn_edu import ops
from mrcnn_edu.ops import vectorized

SETTINGS = ("default", "keep heap", "huge pages")
SECTIONS = ("align", "nms", "paste")


@dataclass
class Case:
    """One line of the table: what runs on both sides, and how many times faster ours shall be."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    least: float
    aim: float
    floor: float | None = None  # seconds that moving the bytes alone would take
    times: int = 1  # short ones are measured this many times as often


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
        Case("NMS, 5000 boxes", ours(False), lambda: torchvision.ops.nms(boxes, scores, 0.5), 10, 15, times=5),
        Case(
            "NMS, 5000 boxes in 80 classes",
            ours(True),
            lambda: torchvision.ops.batched_nms(boxes, scores, groups, 0.5),
            *(10, 25),
            times=5,
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


def measure(case: Case, rounds: int) -> dict[str, object]:
    """Both sides in turn; the median of the rounds' ratios, and the median times in milliseconds."""
    pairs = [(seconds(case.ours), seconds(case.theirs)) for _ in range(rounds * case.times + 1)][1:]
    ours, theirs = (statistics.median(side) for side in zip(*pairs))
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    quarter = len(ratios) // 4
    result = {
        "name": case.name,
        "ours_ms": round(ours * 1e3, 2),
        "torchvision_ms": round(theirs * 1e3, 2),
        "ratio": round(statistics.median(ratios), 1),
        "middle_half": [round(ratios[quarter], 1), round(ratios[-1 - quarter], 1)],
        "range": [round(ratios[0], 1), round(ratios[-1], 1)],
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


def run(allocator: str, section: str, rounds: int) -> list[dict[str, object]]:
    """The cases of one section, in this process."""
    if allocator == "keep heap":
        keep_heap()
    cases = {"align": align_cases, "nms": nms_cases, "paste": paste_cases}[section]()
    return [measure(case, rounds) | {"allocator": allocator} for case in cases]


def in_a_process(allocator: str, section: str, rounds: int, threads: int) -> list[dict[str, object]]:
    """The same in a process of its own: allocator settings cannot be taken back, and the heap remembers."""
    options = ["--allocator", allocator, "--only", section, "--rounds", str(rounds), "--threads", str(threads)]
    huge = {"THP_MEM_ALLOC_ENABLE": "1"} if allocator == "huge pages" else {}
    command = [sys.executable, __file__, *options, "--print-json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | huge)
    return json.loads(done.stdout)


def table(report: dict) -> str:
    """The report as a Markdown page."""
    head = (
        "# Ops beside torchvision's: {processor}, {threads} threads\n\n{date}; {cores} cores; torch {torch}, "
        "torchvision {torchvision}, Python {python}; {rounds} rounds or more. Load {before[load]} before and "
        "{after[load]} after; a plain copy moves {before[copy_gb_per_s]} GB/s before and {after[copy_gb_per_s]} after. "
        "Written by benchmarks/ops.py, which says what the allocator settings are."
    )
    lines = [head.format(**report)]
    for allocator in dict.fromkeys(row["allocator"] for row in report["results"]):
        lines += ["", f"## {allocator}", ""]
        lines += ["| what | ours, ms | torchvision, ms | ratio | middle half | range | at least | aim | reached |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for row in report["results"]:
            if row["allocator"] == allocator:
                ratio, least, aim = row["ratio"], row["at_least"], row["aim"]
                reached = "aim" if ratio >= aim else "at least" if ratio >= least else "**no**"
                floor = f", {row['times_memory_floor']} x the memory floor" if "times_memory_floor" in row else ""
                spreads = (f"{low} - {high}" for low, high in (row["middle_half"], row["range"]))
                cells = (row["name"] + floor, row["ours_ms"], row["torchvision_ms"], f"{ratio}x", *spreads)
                lines.append("| " + " | ".join(map(str, (*cells, f"{least}x", f"{aim}x", reached))) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = options(__doc__, SETTINGS, SECTIONS, rounds=7).parse_args()
    if not ops.backend().startswith("compiled"):
        sys.exit(f"nothing to compare: {ops.backend()}")
    torch.set_num_threads(args.threads)
    if args.print_json:
        print(json.dumps(run(args.allocator, args.only, args.rounds)))
        return
    before, results = conditions(), []
    for allocator in SETTINGS if args.allocator == "all" else [args.allocator]:
        for section in [args.only] if args.only else SECTIONS:
            print(f"{allocator}: {section} ...", file=sys.stderr, flush=True)
            results += in_a_process(allocator, section, args.rounds, args.threads)
    ran = {"threads": args.threads, "rounds": args.rounds, "before": before, "after": conditions(), "results": results}
    report = described() | ran
    write(f"ops {report['processor']} {args.threads} threads", report, table(report), args.out)


if __name__ == "__main__":
    main()
