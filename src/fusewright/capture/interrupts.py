"""Ctrl-C while torch traces a model."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def postponed() -> Iterator[None]:
    """Within it the first SIGINT waits for the end; a second one, for a model that does not end, comes through.

    While torch traces, its C++ calls Python in places where an exception is lost, or ends the process.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came = 0

    def wait(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came += 1
        if came > 1:
            handler(number, frame)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)
