"""Hearing of a shutdown in time: a server waits for open streams before it tells its app, so the signal must.

The handlers are chained: ours sets things going and calls the one that was there. They are put in at start, only on
the main thread, never over the default action or "ignore", and taken out again only if they are still in place.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

WATCHED = (signal.SIGTERM, signal.SIGINT)


class ShutdownSignals:
    """Calls `on_signal` from the signal handler of each watched signal, before the handler of the server."""

    def __init__(self, on_signal: Callable[[], None]) -> None:
        self._on_signal = on_signal
        self._installed: dict[signal.Signals, tuple[Any, Callable[[int, FrameType | None], None]]] = {}

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in WATCHED:
            previous = signal.getsignal(number)
            _, ours = self._installed.get(number, (None, None))  # still there if its loop was closed without a stop
            if callable(previous) and previous is not ours:
                handler = self._chained(previous)
                signal.signal(number, handler)
                self._installed[number] = (previous, handler)

    def _chained(self, previous: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            try:
                self._on_signal()
            finally:
                previous(number, frame)

        return handle

    def restore(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, (previous, handler) in self._installed.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, previous)
        self._installed.clear()
