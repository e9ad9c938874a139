"""The short form of the torture, in a process of its own; ``make torture`` is the long one."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torture.areas import AREAS
from torture.figures import read
from torture.harness import Area, Report, refused, run
from training_runs import ENVIRONMENT

import mrcnn_edu
from mrcnn_edu import masks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and counts memory as Linux does")


def test_the_short_form(tmp_path: Path):
    options = ["--short", "--jobs", "1", "--out", str(tmp_path)]
    script = [sys.executable, str(Path(__file__).with_name("torture")), *options]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, timeout=580, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    reports = read(tmp_path / "torture.json")
    assert {name: report.cases for name, report in reports.items()} == {a.name: a.short for a in AREAS.values()}
    assert all(report.outcomes.total() == report.cases for report in reports.values())


def test_no_assert_guards_anything():
    """``python -O`` takes them out, and their messages are none."""
    for path in Path(mrcnn_edu.__file__).parent.rglob("*.py"):
        found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not found, f"{path}, lines {found}"


# ---------------------------------------------------------------------------------------------------------------------
# The harness itself: it must see what it is there to see
# ---------------------------------------------------------------------------------------------------------------------


def harmful(number: int, folder: Path) -> str:
    """Dies, hangs, takes memory or is wrong in one of ten cases."""
    if number == 3:
        os.abort()
    if number == 5:
        while True:
            os.sched_yield()
    if number == 6:
        raise AssertionError("a wrong answer")
    if number == 7:
        bytearray(150 * 2**20)
    return "well"


def run_apart(area: Area, cases: int) -> Report:
    """``run`` in this process, whose threads the children here do not use."""
    return run(area, range(cases))


def test_the_harness_sees_crashes_hangs_memory_and_wrong_answers():
    report = run_apart(Area("harmful", "", harmful, 0, 0, seconds=0.5, memory=100, chunk=10), 10)
    assert report.cases == 10 and report.outcomes == {"well": 7}
    kinds = {fault["case"]: fault["kind"] for fault in report.faults if fault["kind"] != "memory"}
    assert kinds == {3: "signal SIGABRT", 5: "hang", 6: "wrong"}
    assert any(fault["kind"] == "memory" for fault in report.faults)


def test_the_harness_sees_slow_cases():
    def slow(number: int, folder: Path) -> str:
        return str(sum(range(3_000_000 if number == 1 else 3)))[:0] + "well"

    report = run_apart(Area("slow", "", slow, 0, 0, cpu=0.005), 3)
    assert [(fault["case"], fault["kind"]) for fault in report.faults] == [(1, "slow")]
    assert report.slowest[1] == 1


def test_only_errors_that_are_meant_pass():
    """A sentence of the package is an answer; what Python or NumPy say of a bad value is a fault."""
    with pytest.raises(ValueError) as ours:
        masks.rle_size(5)
    assert refused(ours.value) == "refused, ValueError"
    with pytest.raises(ValueError) as not_ours:
        int("five")
    with pytest.raises(ValueError, match="invalid literal"):
        refused(not_ours.value)
