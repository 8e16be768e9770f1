"""Stop training after the step under way when SIGINT or SIGTERM comes."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

__all__ = ["StopFlag", "stop_on_signals"]


_log = logging.getLogger(__name__)


class StopFlag:
    """Whether a signal asked for an end, and which."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.since = 0.0

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextmanager
def stop_on_signals(*, echo_s: float = 0.0, is_silent: bool = False) -> Iterator[StopFlag]:
    """Catch SIGINT and SIGTERM and set a flag; a second SIGINT interrupts at once.

    Outside the main thread, where Python allows no handlers, signals keep their meaning.

    Parameters
    ----------
    echo_s : float
        Seconds in which another SIGINT counts as the first one repeated: ``torchrun`` passes a Ctrl-C on to processes
        that have had it from the terminal already.
    is_silent : bool
        Do not announce the stop.

    Yields
    ------
    StopRequest
        True once a signal came.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if flag:
            if number == signal.SIGINT and monotonic() - flag.since >= echo_s:
                raise KeyboardInterrupt
            return
        flag.signal_name, flag.since = signal.Signals(number).name, monotonic()
        if not is_silent:
            _log.warning("Stopping after this step, so that the run can go on later; Ctrl-C again stops at once")

    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
