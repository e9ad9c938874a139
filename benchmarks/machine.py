"""What a measurement was made on, and where it is written; by itself it prints the machine.

python benchmarks/machine.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
import torchvision

RESULTS = Path(__file__).parent / "results"


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def copy_rate() -> float:
    """Bytes per second that a plain copy moves, reading and writing counted."""
    source = torch.randn(1 << 25)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.numel() * source.element_size() / best


def processor() -> str:
    """Its name, its vector instructions as PyTorch sees them and, on Linux, family, model and stepping."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, KeyError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        found = {key.strip(): value.strip() for key, _, value in lines}
        name = f"{found['model name']} {found['cpu family']}-{found['model']}-{found['stepping']}"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def card() -> str | None:
    """The first GPU and its driver, or None."""
    if not torch.cuda.is_available():
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}"


def conditions() -> dict[str, float]:
    """Others' load and the rate of a plain copy, which tell how much of the machine was there."""
    return {"load": round(os.getloadavg()[0], 2), "copy_gb_per_s": round(copy_rate() / 1e9, 1)}


def described() -> dict[str, object]:
    """Date, processor and versions, as every report begins."""
    return {
        "date": date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "card": card(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }


def in_words(report: dict) -> str:
    """The same as a sentence."""
    machine = f"{report['date']}; {report['processor']}, {report['cores']} cores"
    if report.get("card"):
        machine += f"; {report['card']}"
    return f"{machine}; torch {report['torch']}, torchvision {report['torchvision']}, Python {report['python']}"


def options(doc: str, allocators: Sequence[str], sections: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """What can be asked of a benchmark that stands beside torchvision, with so many rounds by default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allocator", choices=[*allocators, "all"], default="all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--only", choices=["", *sections], default="")
    parser.add_argument("--out", type=Path, help="where to write, without suffix; default: named after the processor")
    parser.add_argument("--print-json", action="store_true", help=argparse.SUPPRESS)  # what in_a_process asks for
    return parser


def write(name: str, report: dict, page: str, out: Path | None = None) -> None:
    """Leave a report in ``results`` for programs (JSON) and readers (Markdown), and show it.

    name  of both files, as words
    out   where to write instead, without suffix
    """
    path = out or RESULTS / "-".join(re.findall(r"[a-z0-9]+", name.lower()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(page)
    print(page)
    print(f"Written to {path}.json and .md")


if __name__ == "__main__":
    print(in_words(described()))
