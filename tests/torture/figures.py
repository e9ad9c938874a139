"""The figures of the long form: as JSON, from which it goes on, and as a table."""

from __future__ import annotations

import json
import platform
from collections import Counter
from pathlib import Path

import numpy
import PIL
import torch

from torture.areas import AREAS
from torture.harness import SHOWN, Area, Report

HEAD = """# What was thrown at it

`make torture` writes this file: generated cases, each run in a forked process that is watched for signals, hangs, time
and memory. A fault is a crash, a hang, an error that is no sentence of ours, too much time or memory, or a wrong
answer; `python tests/torture AREA --case NUMBER` repeats one. Processor time is that of all processes; on two quiet
cores half of it passes. The slowest case is by processor time, of the masks the slowest reading.

| Area | Cases | of | Faults | Seconds | Processor | Slowest case | Memory grew by | Measured |
|---|---:|---:|---:|---:|---:|---:|---:|---|
"""


def joined(one: Report, two: Report) -> Report:
    """Two runs of one area as one."""
    return Report(
        one.cases + two.cases,
        one.outcomes + two.outcomes,
        (one.faults + two.faults)[:SHOWN],
        one.seconds + two.seconds,
        one.processor + two.processor,
        two.measured or one.measured,
        max(one.slowest, two.slowest),
        max(one.growth, two.growth),
    )


def line(area: Area, report: Report) -> str:
    """One row of the table."""
    slowest = f"{1000 * report.slowest[0]:.0f} ms"
    processor = f"{report.processor:.0f} s" if report.processor else "-"  # earlier figures do not tell
    return (
        f"| {area.name}: {area.what} | {report.cases:,} | {area.full:,} | {len(report.faults)} | "
        f"{report.seconds:.0f} s | {processor} | {slowest} | {report.growth:.0f} MiB | {report.measured} |"
    )


def in_words(outcomes: Counter[str], most: int = 12) -> str:
    """How often each outcome was seen, the frequent ones by name."""
    words = [f"{count:,} {word}" for word, count in outcomes.most_common(most)]
    if len(outcomes) > most:
        words.append(f"{outcomes.total() - sum(count for _, count in outcomes.most_common(most)):,} of other kinds")
    return ", ".join(words)


def read(file: Path) -> dict[str, Report]:
    """What an earlier run has left, by area."""
    if not file.exists():
        return {}
    areas = json.loads(file.read_text())["areas"]
    return {
        name: Report(**values | {"outcomes": Counter(values["outcomes"]), "slowest": tuple(values["slowest"])})
        for name, values in areas.items()
    }


def write(file: Path, reports: dict[str, Report]) -> None:
    """Both files, ``file`` and its table beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    reports = {name: reports[name] for name in AREAS if name in reports}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
                "pillow": PIL.__version__}  # fmt: skip
    content = {"versions": versions, "areas": {name: vars(report) for name, report in reports.items()}}
    file.write_text(json.dumps(content, indent=1) + "\n")
    rows = "\n".join(line(AREAS[name], report) for name, report in reports.items())
    words = "\n".join(f"- {name}: {in_words(report.outcomes)}" for name, report in reports.items())
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    file.with_suffix(".md").write_text(f"{HEAD}{rows}\n\nWhat came of them:\n\n{words}\n\nWith {used}.\n")
