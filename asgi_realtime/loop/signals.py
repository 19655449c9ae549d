"""Detecting a shutdown early: a server waits for open streams before it stops its app, so the signal must end them.

The handlers are chained: ours notifies and then calls the previous one. They are installed at start, on the main thread
only, and never over the default action or "ignore", because a program without a handler ends at once. They are removed
at the stop, if they are still in place. A server can install its own handlers later, so the ticker checks regularly
whether ours are still reached.

A server can also stop without a signal. uvicorn does (`--limit-max-requests`, or code that sets `should_exit`), and
waits for open streams as it does after a signal, with its port closed. Its handlers are methods of the server object,
so that object is within reach.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]

WATCHED = (signal.SIGTERM, signal.SIGINT)


class ShutdownSignals:
    """Calls `on_signal` with the number, from the handler of each watched signal, before the handler of the server.

    `in_background` returns whether the signal interrupted a task of ours.
    """

    def __init__(self, on_signal: Callable[[int], None], *, in_background: Callable[[], bool]) -> None:
        self._on_signal = on_signal
        self._in_background = in_background
        self._handling = False

    def install(self) -> None:
        """Chain our handlers before the present ones, unless they are reached already."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in WATCHED:
            present = signal.getsignal(number)
            if callable(present) and self not in [handler.owner for handler in _chain(present)]:
                signal.signal(number, _Chained(self, present))

    @property
    def server_stops(self) -> bool:
        """Whether the server whose handler follows ours is stopping, as far as that is visible."""
        return _uvicorn_stops(self._server)

    @property
    def server_reloads(self) -> bool:
        """Whether the server restarts this process when its code changes, as far as that is visible.

        uvicorn's own flag covers `fastapi dev` and `uvicorn.run(reload=True)`. Child processes of other servers inherit
        the arguments of the command line.
        """
        config = getattr(self._server, "config", None)
        return getattr(config, "should_reload", False) is True or "--reload" in sys.argv

    @property
    def _server(self) -> Any:
        """The object whose method is the handler after ours."""
        for number in WATCHED:
            chain = list(_chain(signal.getsignal(number)))
            if self in [handler.owner for handler in chain]:
                return getattr(chain[-1].previous, "__self__", None)
        return None

    def restore(self) -> None:
        """Remove our handlers from the chain, as far as handlers of this class lead to them."""
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

    def handle(self, number: int, frame: FrameType | None, then: Handler) -> None:
        """Handle a signal, then call the previous handler. If that calls an older handler of ours, it notifies no more.

        Trio's handler of Ctrl-C raises `KeyboardInterrupt` in the interrupted code if that is not protected, and else
        in the main task at its next checkpoint. Without a frame it does the latter. The interrupt concerns the program,
        so it must not end a task of ours that happens to run.
        """
        outermost, self._handling = not self._handling, True
        try:
            if outermost:
                self._on_signal(number)
        finally:
            try:
                then(number, None if self._in_background() else frame)
            finally:
                self._handling = not outermost


class _Chained:
    """A handler that notifies its owner and then calls the previous handler."""

    def __init__(self, owner: ShutdownSignals, previous: Handler) -> None:
        self.owner = owner
        self.previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.owner.handle(number, frame, self.previous)


def _chain(handler: Any) -> Iterator[_Chained]:
    """The consecutive handlers of this class, from the outermost inward."""
    while isinstance(handler, _Chained):
        yield handler
        handler = handler.previous


def _uvicorn_stops(server: Any) -> bool:
    """Whether this is a `uvicorn.Server` that was asked to stop, or does not accept connections anymore."""
    listeners = getattr(server, "servers", None)
    if not isinstance(listeners, list):
        return False
    exits = getattr(server, "should_exit", False) is True
    return exits or (bool(listeners) and not any(listener.is_serving() for listener in listeners))
