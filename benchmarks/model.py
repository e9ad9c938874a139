"""The whole model beside torchvision's: one process, taking turns, equal results, medians of ratios.

    python benchmarks/model.py                      two threads, both allocator settings, some fifteen minutes
    python benchmarks/model.py --only inference --rounds 7

Mask R-CNN with ResNet-50-FPN, the twins of twins.py: equal weights, equal results before anything is timed. Inference
is from an image to its 100 masks in the image, as probabilities; a training step is forward, losses, backward and SGD
with the stem and c2 frozen; on a GPU both also for 8 images at once. "plain" is our model as it is built; "optimised"
is ``model.optimize()``, and for training the memory layout that ``train`` chooses. The allocator settings are those of
ops.py.

bfloat16 is measured where the processor has instructions for it, and a GPU where there is one. Run it on an idle
machine; on a busy one ``--clock processor --threads 1`` counts the processor's seconds, which others change less.
Written to benchmarks/results/, for programs and for readers.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from machine import conditions, described, in_words, options, write
from ops import keep_heap
from twins import Sides, Task, has_bf16, inference, training

from mrcnn_edu import ops

SETTINGS = ("default", "keep heap")
SECTIONS = (
    "inference", "training", "inference of 8", "training of 8", "inference memory", "training memory",
    "inference of 8 memory", "training of 8 memory", "growth",
)  # fmt: skip
BARS = {  # times as fast as torchvision, at least
    ("inference", "default"): 1.9, ("inference", "keep heap"): 1.35, ("inference", "cuda"): 2.0,
    ("inference, bf16", "default"): 4.0, ("inference, bf16", "keep heap"): 2.5, ("inference, bf16", "cuda"): 2.0,
    ("training", "default"): 1.35, ("training", "keep heap"): 1.35, ("training", "cuda"): 2.0,
    ("training, bf16", "default"): 2.5, ("training, bf16", "keep heap"): 2.5, ("training, bf16", "cuda"): 2.0,
    ("inference of 8, bf16, graphs", "cuda"): 2.0, ("training of 8, bf16, compiled", "cuda"): 2.0,
}  # fmt: skip
PEAK_SO_FAR = Path("/proc/self/clear_refs")  # Linux: 5 written into it makes the process forget its peak of memory
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
SMALL = Task(384, 544)
GROWTH = {  # one number at a time, around a small image
    "image side": [(n, replace(SMALL, height=n * 3 // 4 // 32 * 32, width=n)) for n in (288, 544, 1088, 1600)],
    "proposals": [(n, replace(SMALL, proposals=n)) for n in (250, 1000, 2000)],
    "instances": [(n, replace(SMALL, detections=n)) for n in (10, 100, 300)],
    "batch": [(n, replace(SMALL, images=n)) for n in (1, 2, 4)],
}


TASKS = {
    "inference": lambda device: inference(Task(device=device)),
    "training": lambda device: training(Task(512, 512, images=2, device=device)),
    "inference of 8": lambda device: inference(Task(images=8, device=device)),
    "training of 8": lambda device: training(Task(images=8, device=device)),
}
ON_GPUS = ("inference of 8", "training of 8")  # 8 images of 800 x 1088 at once


def measure(what: str, sides: Sides, rounds: int, allocator: str, clock: str) -> list[dict[str, object]]:
    """All sides in turn; for each of ours the median of the rounds' ratios, and the median times in milliseconds."""

    def timed(side: Callable[[], object]) -> float:
        began = CLOCKS[clock]()
        side()
        if allocator == "cuda":
            torch.cuda.synchronize()
        return CLOCKS[clock]() - began

    # Compilers take the sizes that they have seen twice for ones that change, and compile anew
    warmup = 4 if allocator == "cuda" else 1
    turns = [{name: timed(side) for name, side in sides.items()} for _ in range(rounds + warmup)][warmup:]
    rows = []
    for name in list(sides)[1:]:
        ratios = sorted(turn["torchvision"] / turn[name] for turn in turns)
        quarter = len(ratios) // 4
        row = {
            "name": f"{what}, {name}",
            "ours_ms": round(statistics.median(turn[name] for turn in turns) * 1e3),
            "torchvision_ms": round(statistics.median(turn["torchvision"] for turn in turns) * 1e3),
            "ratio": round(statistics.median(ratios), 2),
            "middle_half": [round(ratios[quarter], 2), round(ratios[-1 - quarter], 2)],
            "range": [round(ratios[0], 2), round(ratios[-1], 2)],
            "allocator": allocator,
        }
        bar = BARS.get((what + name.removeprefix("optimised"), allocator))
        rows.append(row if bar is None else row | {"at_least": bar})
    return rows


def peak(sides: Sides, allocator: str) -> dict[str, float]:
    """GB that each side needs beside weights and images, at its peak of two runs."""
    found = {}
    for name, side in sides.items():
        if allocator == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            side(), side()
            found[name] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)
            continue
        ctypes.CDLL(None).malloc_trim(0)  # else this side runs in what the sides before have left behind
        PEAK_SO_FAR.write_text("5")
        before = resident("VmRSS")
        side(), side()
        found[name] = round((resident("VmHWM") - before) / 1e9, 2)
    return found


def resident(kind: str) -> float:
    """Bytes of this process in memory: now (VmRSS) or at the most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024


def run(section: str, allocator: str, rounds: int, clock: str) -> list[dict[str, object]]:
    """One section of the report, in this process."""
    device = "cuda" if allocator == "cuda" else "cpu"
    if allocator == "keep heap":
        keep_heap()
    if section == "growth":
        rows = []
        for what, tasks in GROWTH.items():
            for number, task in tasks:
                sides = inference(replace(task, device=device))
                sides.pop("plain")
                found = measure("inference", sides, 1, allocator, clock)
                rows += [row | {"what": what, "value": number} for row in found]
        return rows
    sides = TASKS[section.removesuffix(" memory")](device)
    if section.endswith("memory"):
        return [{"name": section, "allocator": allocator, "gb": peak(sides, allocator)}]
    return measure(section, sides, rounds, allocator, clock)


def in_a_process(allocator: str, section: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """The same in a process of its own: allocator settings cannot be taken back, and the heap remembers."""
    print(f"{allocator}: {section} ...", file=sys.stderr, flush=True)
    options = ["--allocator", allocator, "--only", section, "--clock", args.clock]
    options += ["--rounds", str(args.rounds), "--threads", str(args.threads)]
    command = [sys.executable, __file__, *options, "--print-json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def only_gpu(report: dict) -> bool:
    return all(row["allocator"] == "cuda" for row in report["results"] + report["memory"] + report["growth"])


def page(report: dict) -> str:
    """The report as a Markdown page."""
    where = report["card"] if only_gpu(report) else f"{report['processor']}, {report['threads']} threads"
    lines = [f"# The whole model beside torchvision's: {where}", ""]
    lines += [f"{in_words(report)}; {report['rounds']} rounds, seconds of the "
              f"{report['clock']} clock. Load {report['before']['load']} before and "
              f"{report['after']['load']} after. Written by benchmarks/model.py, which says what is compared. "
              f"{report['left_out']}"]  # fmt: skip
    lines += ["", "| what | allocator | ours, ms | torchvision, ms | ratio | middle half | range | at least |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in report["results"]:
        spreads = (f"{low} - {high}" for low, high in (row["middle_half"], row["range"]))
        cells = (row["name"], row["allocator"], row["ours_ms"], row["torchvision_ms"], f"{row['ratio']}x", *spreads)
        least = row.get("at_least")
        judged = "" if least is None else f"{least}x" if row["ratio"] >= least else f"{least}x: **no**"
        lines.append("| " + " | ".join(map(str, (*cells, judged))) + " |")
    if report["memory"]:
        lines += ["", "Peak memory beside weights and images:", "", "| what | GB |", "|---|---|"]
        for row in report["memory"]:
            lines += [f"| {row['name']} | {', '.join(f'{name} {gb}' for name, gb in row['gb'].items())} |"]
    if report["growth"]:
        lines += ["", f"Inference as one number grows; else {SMALL.height} x {SMALL.width}, {SMALL.images} image, "
                  f"{SMALL.proposals} proposals, {SMALL.detections} detections; one round:", ""]  # fmt: skip
        lines += ["| what grows | to | ours, ms | torchvision, ms | ratio |", "|---|---|---|---|---|"]
        for row in report["growth"]:
            name = f"{row['what']} ({row['name'].removeprefix('inference, ')})"
            cells = (name, row["value"], row["ours_ms"], row["torchvision_ms"], f"{row['ratio']}x")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = options(__doc__, [*SETTINGS, "cuda"], SECTIONS, rounds=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    if not ops.backend().startswith("compiled"):
        sys.exit(f"nothing to compare: {ops.backend()}")
    torch.set_num_threads(args.threads)
    if args.print_json:
        print(json.dumps(run(args.only, args.allocator, args.rounds, args.clock)))
        return
    every = [*SETTINGS, "cuda"] if torch.cuda.is_available() else [*SETTINGS]
    allocators = every if args.allocator == "all" else [args.allocator]
    once = [name for name in allocators if name != "keep heap"]  # memory and growth: as users run it
    before, found = conditions(), {}
    for section in [args.only] if args.only else SECTIONS:
        chosen = allocators if section in TASKS else once
        if section.startswith(ON_GPUS):
            chosen = [allocator for allocator in allocators if allocator == "cuda"]
        elif section.endswith("memory") and not PEAK_SO_FAR.exists():
            chosen = [allocator for allocator in once if allocator == "cuda"]
        found[section] = [row for a in chosen for row in in_a_process(a, section, args)]
    report = described() | {
        "threads": args.threads,
        "rounds": args.rounds,
        "clock": args.clock,
        "before": before,
        "after": conditions(),
        "left_out": ""
        if has_bf16("cpu") or allocators == ["cuda"]
        else "No bfloat16 on this processor: it has no instructions for it.",
        "results": [row for section in TASKS for row in found.get(section, [])],
        "memory": [row for section in TASKS for row in found.get(f"{section} memory", [])],
        "growth": found.get("growth", []),
    }
    name = f"model {report['processor']} {args.threads} threads"
    if only_gpu(report):
        name = f"gpu model {torch.cuda.get_device_name()}"
    write(name, report, page(report), args.out)


if __name__ == "__main__":
    main()
