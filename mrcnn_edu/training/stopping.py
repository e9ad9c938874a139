"""Ctrl-C and SIGTERM: finish the iteration, save, and only then leave.

Chapter 13 (training) and Chapter 19 (many GPUs).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """Someone asked the run to stop, by a signal to this process or to another one of the run.

    Not an Exception, so that nothing between here and the loop swallows it.
    """

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received)
        self.signal = received

    def as_exit(self, message: str) -> BaseException:
        """What ends the run as the signal would have: KeyboardInterrupt for Ctrl-C, exit status 143 for SIGTERM."""
        return SystemExit(128 + signal.SIGTERM) if self.signal == signal.SIGTERM else KeyboardInterrupt(message)


class StopSignals:
    """While entered, SIGINT and SIGTERM are noted; ``check`` turns them into ``Stopped`` between two iterations.

    A second signal of the same kind acts as it did before, so an impatient Ctrl-C still ends the process at once. In a
    thread other than the main one nothing is installed: Python delivers signals to the main thread only.

    Terminals and batch systems signal all processes of a run. The loader's workers then die, of which PyTorch would
    tell by an exception in the middle of an iteration; from the first signal on it is not told.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at_once = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(number, self._before.pop(self.received))
        if hasattr(signal, "SIGCHLD") and signal.SIGCHLD not in self._before:
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self._at_once:
            raise Stopped(self.received)

    def check(self) -> None:
        """Raise ``Stopped`` if a signal has come."""
        if self.received is not None:
            raise Stopped(self.received)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that changes nothing worth saving, such as waiting for data: a signal leaves it without delay."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False
