"""Topic mirrors without users, retained for a while in case their users return.

A client that polls follows its topic anew with each request. Without this, each poll would subscribe and read the whole
topic again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from asgi_realtime.brokers.redis.topic_mirror import TopicMirror

IDLE_S = 5.0
"""How long an idle mirror is retained at least; twice that at most."""

MAX_IDLE = 1000
"""Of all topics together; the oldest are dropped first. Clients choose the names of topics, so this is a bound."""


class IdleMirrors:
    """One timer for all. `drop` is called with each mirror that was not used again in time."""

    def __init__(self, drop: Callable[[TopicMirror], None]) -> None:
        self._drop = drop
        self._young: dict[TopicMirror, None] = {}
        self._old: dict[TopicMirror, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, mirror: TopicMirror) -> None:
        self._old.pop(mirror, None)
        self._young[mirror] = None
        if len(self._young) + len(self._old) > MAX_IDLE:
            oldest = self._old or self._young
            mirror = next(iter(oldest))
            del oldest[mirror]
            self._drop(mirror)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._sweep)

    def discard(self, mirror: TopicMirror) -> None:
        """The mirror has a user again."""
        self._young.pop(mirror, None)
        self._old.pop(mirror, None)

    def clear(self) -> None:
        """Forget all without dropping them, because the broker closes."""
        self._young.clear()
        self._old.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        expired, self._old, self._young = self._old, self._young, {}
        self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._sweep) if self._old else None
        for mirror in expired:
            self._drop(mirror)
