"""Keeps a flood of similar log messages from flooding the log."""

from __future__ import annotations

import time
from collections.abc import Callable

_MAX_KINDS = 1000


class Throttle:
    """Admits `burst` messages of each kind in `period_s`, and counts the others. `clock` is monotonic, in seconds."""

    def __init__(self, *, burst: int = 10, period_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._period_s = period_s
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}  # when the period began, and how many messages it had

    def admit(self, kind: str) -> str | None:
        """None if the message must not be logged. Otherwise what to append to it: how many were not, or nothing."""
        now = self._clock()
        since, count = self._kinds.get(kind, (now, 0))
        if now - since < self._period_s:
            if not count and len(self._kinds) >= _MAX_KINDS:
                self._kinds.clear()
            self._kinds[kind] = (since, count + 1)
            return "" if count < self._burst else None
        self._kinds[kind] = (now, 1)
        return f" ({count - self._burst} more like this were not logged)" if count > self._burst else ""
