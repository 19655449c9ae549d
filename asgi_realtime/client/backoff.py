"""When to reconnect after a connection was lost, and when to give up.

The pauses double from failure to failure, up to `MAX_PAUSE_S`, and start over after progress. The time without progress
runs from the first failing request, or from the loss of a connection that had made progress. The last pause is cut
short, so that one more attempt happens at the end of that time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

MAX_PAUSE_S = 30.0
"""The longest pause, unless the server asks for a longer one."""

_MAX_RETRY_AFTER_S = 3600.0
_FIRST_PAUSE_S = 1.0
_MIN_PAUSE_S = 0.1  # the least that `retry:` can set; less would be a busy loop
_MAX_DOUBLINGS = 16


class Backoff:
    """Pauses between attempts, and when to give up. `clock` is monotonic, in seconds; `random` returns 0 to 1.

    Each pause is drawn from the upper half of its range, so that the clients of a restarting server do not all
    reconnect at once.
    """

    def __init__(self, give_up_s: float | None, clock: Callable[[], float], random: Callable[[], float]) -> None:
        self.failures = 0
        """Since the last progress."""
        self.clock = clock
        self._give_up_s = math.inf if give_up_s is None else give_up_s
        self._random = random
        self._first_s = _FIRST_PAUSE_S
        self._failing_since: float | None = None

    def set_first_pause(self, retry_ms: int) -> None:
        """Apply the reconnection time that the event stream sets with `retry:`."""
        self._first_s = max(retry_ms / 1000, _MIN_PAUSE_S)

    def attempt(self) -> None:
        """Note that a request is about to be sent."""
        if self._failing_since is None:
            self._failing_since = self.clock()

    def suspend(self) -> None:
        """Note that the reader left. The time of an attempt that has not failed does not count until it returns."""
        if not self.failures:
            self._failing_since = None

    def reset(self) -> None:
        """Note progress."""
        self.failures = 0
        self._failing_since = None

    def fail(self, at_least_s: float = 0.0) -> float | None:
        """Return the pause before the next attempt, or None to give up. Returning None also resets it."""
        now = self.clock()
        if self._failing_since is None:
            self._failing_since = now
        left_s = self._failing_since + self._give_up_s - now
        if left_s < _MIN_PAUSE_S:
            self.reset()
            return None
        pause_s = max(at_least_s, self._pause_s())
        self.failures += 1
        return min(pause_s, left_s)

    def _pause_s(self) -> float:
        doubled: float = self._first_s * 2 ** min(self.failures, _MAX_DOUBLINGS)
        return min(max(MAX_PAUSE_S, self._first_s), doubled) * (0.5 + self._random() / 2)


def retry_after(value: str | None, date: str | None) -> float:
    """The seconds of a `Retry-After` header: a number, or a time by the server's clock (RFC 9110, section 10.2.3)."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return min(float(value), _MAX_RETRY_AFTER_S)
    try:
        now = parsedate_to_datetime(date) if date is not None else datetime.now(UTC)
        seconds = (parsedate_to_datetime(value) - now).total_seconds()
    except (ValueError, TypeError):  # TypeError: one of the two times has no zone
        return 0.0
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S)
