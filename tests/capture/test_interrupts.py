"""An interrupt neither gets lost nor breaks what must not be broken."""

from __future__ import annotations

import signal
import threading

import pytest

from fusewright.capture.interrupts import postponed


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_the_first_waits_and_is_raised() -> None:
    before, reached = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), postponed():
        interrupt()
        reached.append("the end")
    assert reached == ["the end"] and signal.getsignal(signal.SIGINT) is before


def test_the_second_comes_through() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), postponed():
        interrupt()
        reached.append("between")
        interrupt()
        reached.append("never")
    assert reached == ["between"]


def test_it_wins_over_an_error() -> None:
    """What fails is tried again in another way, which an interrupt is to end."""
    with pytest.raises(KeyboardInterrupt), postponed():
        interrupt()
        raise ValueError


def test_errors_pass_and_other_threads_have_no_signals() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError), postponed():
        raise ValueError
    seen = []

    def elsewhere() -> None:
        with postponed():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]
