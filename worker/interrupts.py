"""Ctrl-C that waits until something is whole: its handler usually raises, wherever the main thread is.

    interrupts = Interrupts()
    interrupts.hold()        from here on it waits
    interrupts.release()     what came meanwhile takes effect here
    interrupts.end()         as if nothing had been

Laws
* Outside `hold` and `release`, and on any thread but the main one, everything is as it was before.
* A handler that somebody sets meanwhile stays, and does not wait.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupts:
    """Stands before the handler of SIGINT that it finds; where there is none, or on another thread, it does nothing."""

    def __init__(self) -> None:
        self._main = threading.main_thread().ident
        self._holding = False
        self._came: tuple[int, FrameType | None] | None = None
        handler = signal.getsignal(signal.SIGINT)
        self._handler = handler if callable(handler) and threading.get_ident() == self._main else None
        self._mine = self._arrived  # a bound method is another object each time
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._mine)

    def hold(self) -> None:
        """Handlers run on the main thread alone: for others there is nothing to hold."""
        self._holding = threading.get_ident() == self._main

    def release(self) -> None:
        """May raise what the handler raises."""
        if self._holding:
            self._holding = False
            came, self._came = self._came, None
            if came is not None and self._handler is not None:
                self._handler(*came)

    def end(self) -> None:
        """Give the handler back its place, where nobody else took it; on the main thread."""
        if self._handler is not None and signal.getsignal(signal.SIGINT) is self._mine:
            signal.signal(signal.SIGINT, self._handler)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._came = (number, frame)
        elif self._handler is not None:
            self._handler(number, frame)
