"""Runs numbered cases in forked processes, watched for signals, hangs, time and memory.

A case is a function of its number and of a folder that it may make; it returns a word for what happened and raises
where something is wrong. PyTorch is imported once, by the parent. A crash, a hang or a fault is named by its case, and
``python tests/torture AREA --case NUMBER`` repeats it.

A busy machine is no fault. What a case may take is processor time, of its best of three attempts; and the time after
which it hangs does not count while its process waits for a processor.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import mmap
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mrcnn_edu

PACKAGE = str(Path(mrcnn_edu.__file__).parent)
CLEAR = (ValueError, TypeError, OSError, RuntimeError, FloatingPointError)
MIB = 2**20
SHOWN = 20  # faults that a report quotes


@dataclass(frozen=True)
class Area:
    """Cases of one kind.

    what     one line for the table
    case     from a number and a folder it may make to a word for the outcome; raises where the answer is wrong. Where
             only a part of it is on trial: the word, and the seconds of processor time of that part
    short    cases of the short form, which the tests run
    full     cases of the long form
    seconds  after which a case hangs, without those that its process has waited for a processor
    cpu      seconds of processor time a case may take; None: nobody asks
    memory   MiB by which a process that runs cases may grow
    chunk    cases to a process
    """

    name: str
    what: str
    case: Callable[[int, Path], str | tuple[str, float]]
    short: int
    full: int
    seconds: float = 60.0
    cpu: float | None = None
    memory: int = 256
    chunk: int = 500


@dataclass
class Report:
    """What came of the cases of an area."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    processor: float = 0.0  # seconds of processor time, of all processes
    measured: str = ""  # on which day, and which version
    slowest: tuple[float, int] = (0.0, -1)  # seconds of processor time, case
    growth: float = 0.0  # MiB, of the process that grew most

    def fault(self, case: int, kind: str, text: str) -> None:
        """Note that a case went wrong."""
        self.faults.append({"case": case, "kind": kind, "text": text})


def refused(error: Exception) -> str:
    """The word for an error that is meant: one of ours, raised by the package. Any other is a fault.

    What the system says of a file that it cannot open, naming it, is as good as ours.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    meant = bool(ours) and ours[-1] is frames[-1] and (ours[-1].line or "").startswith("raise")
    meant = meant or (bool(ours) and ours[-1].filename.endswith("ops/compiled.py"))  # by our C++, through torch
    meant = meant or (isinstance(error, OSError) and error.filename is not None)
    if not (isinstance(error, CLEAR) and meant and len(str(error).split()) >= 4):
        raise error
    return f"refused, {type(error).__name__}"


def run(area: Area, cases: range, jobs: int = 1, until: float = float("inf")) -> Report:
    """Run cases; stop starting new processes at ``until`` (monotonic). The report says how many were run."""
    report = Report(measured=f"{datetime.date.today()}, {mrcnn_edu.__version__}")
    looked = began = time.monotonic()
    used = _children()
    waiting = deque(range(first, min(first + area.chunk, cases.stop)) for first in cases[:: area.chunk])
    running: list[_Child] = []
    while waiting or running:
        while waiting and len(running) < jobs and time.monotonic() < until:
            running.append(_Child(area, waiting.popleft()))
        if not running:
            break
        pause, looked = time.monotonic() - looked, time.monotonic()
        for child in list(running):
            if pause > 5:  # this process was stopped, and so were its children: their clocks begin again
                child.clock[1] = looked - child.waited()
            if (done := child.look()) is None:
                continue
            running.remove(child)
            if isinstance(done, Report):
                _add(report, done)
            else:  # killed in the middle: what lies before and behind is run again without it
                report.fault(*done)
                report.cases += 1
                parts = (range(child.cases.start, done[0]), range(done[0] + 1, child.cases.stop))
                waiting.extendleft(part for part in reversed(parts) if part)
        time.sleep(0.002)
    report.seconds, report.processor = time.monotonic() - began, _children() - used
    return report


def _add(report: Report, part: Report) -> None:
    report.cases += part.cases
    report.outcomes += part.outcomes
    report.faults += part.faults
    report.slowest = max(report.slowest, part.slowest)
    report.growth = max(report.growth, part.growth)


class _Child:
    """A process that runs some cases."""

    def __init__(self, area: Area, cases: range) -> None:
        self.area, self.cases = area, cases
        self.clock = memoryview(mmap.mmap(-1, 16)).cast("d")  # shared with the child: its case, and when that began
        self.folder = Path(tempfile.mkdtemp(prefix="torture-"))
        self.clock[0], self.clock[1] = cases.start, time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._work()
            finally:
                os._exit(1)
        self.resident = self._resident()

    def waited(self) -> float:
        """Seconds that the process was ready to run, but others did; 0 where the system does not tell."""
        return _waited(self.pid)

    def look(self) -> Report | tuple[int, str, str] | None:
        """None while it works; then its report, or the case that it did not survive, and how."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        case, began = int(self.clock[0]), self.clock[1]
        if pid == 0:
            late = time.monotonic() - began > self.area.seconds  # else nobody asks how long it has waited
            late = late and time.monotonic() - self.waited() - began > self.area.seconds
            large = self._resident() - self.resident > 2 * self.area.memory * MIB
            if not (late or large):
                return None
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            end = "hang" if late else "memory"
        else:
            end = os.waitstatus_to_exitcode(status)
            end = f"signal {signal.Signals(-end).name}" if end < 0 else f"exit {end}"
        outcome, stack = self.folder / "outcome.json", self.folder / "stack"
        try:
            if outcome.exists():
                return Report(**json.loads(outcome.read_text(), object_hook=_counted))
            return case, end, stack.read_text()[-2000:] if stack.exists() else ""
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _resident(self) -> int:
        """Bytes of memory in use; 0 where the system does not tell."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
        except (OSError, IndexError):
            return 0

    def _work(self) -> None:
        with open(self.folder / "stack", "w") as stack:
            faulthandler.enable(stack)
            report, before = Report(), _peak()
            for number in self.cases:
                self.clock[1], self.clock[0] = time.monotonic() - _waited("self"), number
                seconds, limit = run_one(self.area, number, self.folder / "own", report), self.area.cpu
                if limit is not None and seconds > limit:  # neighbours take caches away, too
                    again = (run_one(self.area, number, self.folder / "own", Report()) for _ in range(2))
                    seconds = min(seconds, *again)
                    if seconds > limit:
                        report.fault(number, "slow", f"{seconds:.3f} s of processor time")
                report.slowest = max(report.slowest, (seconds, number))
            report.growth = _peak() - before
            if report.growth > self.area.memory:
                report.fault(self.cases.start, "memory", f"cases {self.cases} took {report.growth:.0f} MiB more")
        part = self.folder / "outcome.part"
        part.write_text(json.dumps(vars(report)))
        part.rename(self.folder / "outcome.json")
        os._exit(0)


def run_one(area: Area, number: int, folder: Path, report: Report) -> float:
    """Run one case in this process; the seconds of processor time that count."""
    began, seconds = time.process_time(), None
    try:
        outcome = area.case(number, folder)
        word, seconds = outcome if isinstance(outcome, tuple) else (outcome, None)
        report.outcomes[word] += 1
    except BaseException as error:
        report.fault(number, "wrong", "".join(traceback.format_exception(error))[-2000:])
    report.cases += 1
    seconds = time.process_time() - began if seconds is None else seconds
    if folder.exists():
        shutil.rmtree(folder)
    return seconds


def _counted(values: dict) -> dict:
    if "outcomes" not in values:
        return values
    return values | {"outcomes": Counter(values["outcomes"]), "slowest": tuple(values["slowest"])}


def _children() -> float:
    """Seconds of processor time of all children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _waited(pid: int | str) -> float:
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _peak() -> float:
    """The most memory this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
