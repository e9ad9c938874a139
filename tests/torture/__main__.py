"""The long form: every area in full, or what was asked for; figures go to ``benchmarks/results/torture.{json,md}``.

python tests/torture                           # everything, less than two hours on two cores
python tests/torture masks ops --minutes 4     # go on with these where the figures' file says they stopped
python tests/torture masks --case 4711         # repeat one case, in this process
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # what the tests import

import torch  # noqa: E402

from torture import figures, harness  # noqa: E402
from torture.areas import AREAS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"out of {', '.join(AREAS)}; none: all")
    parser.add_argument("--case", type=int, help="run this case alone, here, and show what it raises")
    parser.add_argument(
        "--short", action="store_true", help="the short form, as the tests run it; writes to --out only"
    )
    parser.add_argument("--minutes", type=float, help="stop after about so many, to go on another time")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, help="folder for the figures")
    options = parser.parse_args()
    if unknown := set(options.areas) - set(AREAS):
        parser.error(f"no area {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # a process that has used several cannot fork
    chosen = [AREAS[name] for name in options.areas or AREAS]
    if options.case is not None:
        return repeat(chosen[0], options.case)
    until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    file = (options.out or HERE.parent.parent / "benchmarks" / "results") / "torture.json"
    known = figures.read(file)  # of other areas their rows stay
    for area in chosen:
        aim = area.short if options.short else area.full
        done = known.get(area.name, harness.Report()) if options.minutes else harness.Report()
        if time.monotonic() < until:
            done = figures.joined(done, harness.run(area, range(done.cases, aim), options.jobs, until))
        known[area.name] = done
        print(figures.line(area, done), flush=True)
        for fault in done.faults[: harness.SHOWN]:
            print(f"  {area.name} --case {fault['case']}: {fault['kind']}\n{fault['text']}", flush=True)
        figures.write(file, known)
    return any(known[area.name].faults for area in chosen)


def repeat(area: harness.Area, number: int) -> int:
    """One case in this process; a crash shows where."""
    import faulthandler

    faulthandler.enable()
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(area.case(number, Path(folder) / "own"))
        return 0
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main())
