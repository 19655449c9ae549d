"""Hearing of a shutdown in time: a server waits for open streams before it tells its app, so the signal must.

The handlers are chained: ours sets things going and calls the one that was there. They are put in at start, only on
the main thread, never over the default action or "ignore", and taken out again only if they are still in place. A
server may put in its own after that, so the ticker looks now and then whether ours are still reached.

A server may also stop by itself. uvicorn does (`--limit-max-requests`, or code that sets `should_exit`), and then waits
for open streams as after a signal, its port closed. Its handlers are methods of the server, so that is in reach.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]

WATCHED = (signal.SIGTERM, signal.SIGINT)


class ShutdownSignals:
    """Calls `on_signal` from the signal handler of each watched signal, before the handler of the server.

    `in_background` says whether the signal came while a task of ours had the loop. It is the program's matter all the
    same, and no code of ours is to be interrupted for it.
    """

    def __init__(self, on_signal: Callable[[], None], *, in_background: Callable[[], bool]) -> None:
        self._on_signal = on_signal
        self._in_background = in_background
        self._hearing = False

    def install(self) -> None:
        """Put the handlers in before those that are there, unless they are reached already."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in WATCHED:
            present = signal.getsignal(number)
            if callable(present) and self not in [handler.owner for handler in _chain(present)]:
                signal.signal(number, _Chained(self, present))

    @property
    def server_stops(self) -> bool:
        """Whether the server whose handler ours precedes stops without a signal, as far as that can be seen."""
        for number in WATCHED:
            chain = list(_chain(signal.getsignal(number)))
            if self in [handler.owner for handler in chain]:
                return _uvicorn_stops(getattr(chain[-1].previous, "__self__", None))
        return False

    def restore(self) -> None:
        """Take the handlers out, as far as they are reached through handlers of this kind only."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in WATCHED:
            above: _Chained | None = None
            for handler in _chain(signal.getsignal(number)):
                if handler.owner is not self:
                    above = handler
                elif above is None:
                    signal.signal(number, handler.previous)
                else:
                    above.previous = handler.previous

    def hear(self, number: int, frame: FrameType | None, then: Handler) -> None:
        """A signal came, and `then` handles it. That may call an older handler of ours: it is told once all the same.

        trio's handler of Ctrl-C raises in the code that it is told of, if that may be interrupted, and else in the main
        task at its next checkpoint. Without a frame it takes the second way.
        """
        outermost, self._hearing = not self._hearing, True
        try:
            if outermost:
                self._on_signal()
        finally:
            try:
                then(number, None if self._in_background() else frame)
            finally:
                self._hearing = not outermost


class _Chained:
    """A handler that tells its owner and then calls the one that was there before."""

    def __init__(self, owner: ShutdownSignals, previous: Handler) -> None:
        self.owner = owner
        self.previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.owner.hear(number, frame, self.previous)


def _chain(handler: Any) -> Iterator[_Chained]:
    """The handlers of this kind that are called one after the other, from the outermost on."""
    while isinstance(handler, _Chained):
        yield handler
        handler = handler.previous


def _uvicorn_stops(server: Any) -> bool:
    """Whether this is a `uvicorn.Server` that was told to stop, or takes no connections any more."""
    listeners = getattr(server, "servers", None)
    if not isinstance(listeners, list):
        return False
    told = getattr(server, "should_exit", False) is True
    return told or (bool(listeners) and not any(listener.is_serving() for listener in listeners))
