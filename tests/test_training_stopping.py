"""Signals: noted between, obeyed at once where asked, and given back afterwards."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from mrcnn_edu.training.stopping import Stopped, StopSignals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_waits_for_the_check(number: int, kind: type[BaseException]) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    with StopSignals() as signals:
        signals.check()
        send(number)
        with pytest.raises(Stopped) as raised:
            signals.check()
    error = raised.value.as_exit("stopped")
    assert isinstance(error, kind)
    assert error.args == ((143,) if number == signal.SIGTERM else ("stopped",))
    assert before == {n: signal.getsignal(n) for n in before}


@pytest.fixture
def interactive() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell starts its background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_does_not_wait(interactive: None) -> None:
    with StopSignals() as signals:
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as raised:
            send(signal.SIGINT)
    assert signals.received == signal.SIGINT
    assert raised.type is KeyboardInterrupt


def test_at_once() -> None:
    with StopSignals() as signals:
        with pytest.raises(Stopped), signals.at_once():
            send(signal.SIGTERM)
            pytest.fail("the block went on")
        with pytest.raises(Stopped), signals.at_once():
            pytest.fail("a block was entered after a signal had come")


def test_nothing_swallows_it() -> None:
    assert not issubclass(Stopped, Exception)


def test_in_a_thread_nothing_is_installed() -> None:
    handlers = []

    def work() -> None:
        with StopSignals() as signals:
            handlers.append(signal.getsignal(signal.SIGINT))
            signals.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
