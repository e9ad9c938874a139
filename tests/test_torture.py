"""The short form of the torture, in a process of its own; ``make torture`` is the long one."""

from __future__ import annotations

import ast
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torture import harness
from torture.areas import AREAS
from torture.figures import read
from torture.harness import Area, Report, refused, run
from training_runs import ENVIRONMENT

import mrcnn_edu
from mrcnn_edu import masks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and counts memory as Linux does")


def test_the_short_form(tmp_path: Path):
    """Under ``python -O``: what it finds wrong is raised, never asserted, and so must be what the package refuses."""
    options = ["--short", "--jobs", "1", "--out", str(tmp_path)]
    script = [sys.executable, "-O", str(Path(__file__).with_name("torture")), *options]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, timeout=580, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    reports = read(tmp_path / "torture.json")
    assert {name: report.cases for name, report in reports.items()} == {a.name: a.short for a in AREAS.values()}
    assert all(report.outcomes.total() == report.cases for report in reports.values())


TESTS = Path(__file__).parent
ERROR_PATHS = ["test_structures.py", "test_ops_checks.py", "test_config.py", "test_masks.py", "test_data_faults.py",
               "test_boxes.py", "test_matching.py"]  # fmt: skip


def test_error_paths_without_asserts(tmp_path: Path):
    """The same errors under ``python -O``, where the tests' asserts still hold: pytest rewrites them."""
    control = tmp_path / "test_control.py"
    control.write_text("def test_that_fails():\n    assert not __debug__\n    assert 1 == 2, 'still asserted'\n")
    files = [str(TESTS / name) for name in ERROR_PATHS]
    words = "refused or bad or wrong or error or raise or strict or lenient or reject or only or needs or must or none"
    pytest_o = [sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent)]
    options = {"capture_output": True, "text": True, "timeout": 580, "env": ENVIRONMENT | {"OMP_NUM_THREADS": "1"}}
    fails = subprocess.run([*pytest_o, str(control)], **options)
    assert fails.returncode == 1 and "still asserted" in fails.stdout, fails.stdout
    done = subprocess.run([*pytest_o, "-k", words, *files], **options)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("folder", [Path(mrcnn_edu.__file__).parent, TESTS / "torture"], ids=["package", "torture"])
def test_no_assert_guards_anything(folder: Path):
    """``python -O`` takes them out, and their messages are none."""
    for path in [*folder.rglob("*.py"), TESTS / "hostile_ops.py"]:
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
        with mmap.mmap(-1, 150 * 2**20) as fresh:  # of the heap there may be as much left over from other tests
            fresh.write(bytes(len(fresh)))
    return "well"


def run_apart(area: Area, cases: int) -> Report:
    """``run`` in this process, whose threads the children here do not use."""
    return run(area, range(cases))


def test_the_harness_sees_crashes_hangs_memory_and_wrong_answers():
    report = run_apart(Area("harmful", "", harmful, 0, 0, seconds=2, memory=100, chunk=10), 10)
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


def test_a_case_may_say_what_counts():
    def told(number: int, folder: Path) -> tuple[str, float]:
        return "well", 0.004 if number < 2 else 7.0

    report = run_apart(Area("told", "", told, 0, 0, cpu=0.005), 3)
    assert report.outcomes == {"well": 3} and report.slowest == (7.0, 2)
    assert [(fault["case"], fault["kind"]) for fault in report.faults] == [(2, "slow")]


def test_waiting_for_a_processor_is_no_hang(monkeypatch: pytest.MonkeyPatch):
    """Of a case's half second the process is said to have waited all but an instant: it may go on."""
    monkeypatch.setattr(harness, "_waited", lambda pid: 0.0 if pid == "self" else 1000.0)
    area = Area("slept", "", lambda number, folder: time.sleep(0.5) or "well", 0, 0, seconds=0.1)
    assert run_apart(area, 1).outcomes == {"well": 1}
    monkeypatch.setattr(harness, "_waited", lambda pid: 0.0)
    assert [fault["kind"] for fault in run_apart(area, 1).faults] == ["hang"]


def test_only_errors_that_are_meant_pass():
    """A sentence of the package is an answer; what Python or NumPy say of a bad value is a fault."""
    with pytest.raises(ValueError) as ours:
        masks.rle_size(5)
    assert refused(ours.value) == "refused, ValueError"
    with pytest.raises(ValueError) as not_ours:
        int("five")
    with pytest.raises(ValueError, match="invalid literal"):
        refused(not_ours.value)
