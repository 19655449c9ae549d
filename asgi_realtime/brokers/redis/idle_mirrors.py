"""Mirrors that nobody follows just now, kept a while for those who come back.

A client that polls follows its topic anew with each request. Without this each of them would subscribe and read the
whole topic again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from asgi_realtime.brokers.redis.mirror import TopicMirror

LINGER_S = 5.0
"""A mirror stays for as long as this at least, and for twice as long at most."""


MAX_LINGERING = 1000
"""Of all topics together. What a client asks for may be any name, so it is bounded; the oldest go at once."""


class IdleMirrors:
    """One timer for all. `let_go` is called with each mirror that was not taken back in time."""

    def __init__(self, let_go: Callable[[TopicMirror], None]) -> None:
        self._let_go = let_go
        self._young: dict[TopicMirror, None] = {}
        self._old: dict[TopicMirror, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def keep(self, mirror: TopicMirror) -> None:
        self._old.pop(mirror, None)
        self._young[mirror] = None
        if len(self._young) + len(self._old) > MAX_LINGERING:
            oldest = self._old or self._young
            mirror = next(iter(oldest))
            del oldest[mirror]
            self._let_go(mirror)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LINGER_S, self._sweep)

    def take_back(self, mirror: TopicMirror) -> None:
        """Somebody follows it again."""
        self._young.pop(mirror, None)
        self._old.pop(mirror, None)

    def clear(self) -> None:
        """The broker is left, and ends them all."""
        self._young.clear()
        self._old.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        expired, self._old, self._young = self._old, self._young, {}
        self._timer = asyncio.get_running_loop().call_later(LINGER_S, self._sweep) if self._old else None
        for mirror in expired:
            self._let_go(mirror)
