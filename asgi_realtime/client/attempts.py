"""When to come back after a connection was lost, and when to give up.

The time without progress runs from the first try that brought none, or from the loss of a connection that was of use.
The last pause is cut to what is left of it, so that there is a try at its end.

Pauses double from failure to failure and begin again after progress. They are drawn at random from the upper half, so
that the readers of a server that went away do not come back in one moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

MOST_S = 30.0
"""The longest pause that is our own. A server may ask for a longer one."""

STEADY_S = 5.0
"""A connection that lasted so long was of use, though nothing may have come: some proxies cut what is silent."""

_LONGEST_WISH_S = 3600.0  # of a `Retry-After`
_FIRST_S = 1.0
_LEAST_S = 0.1  # what a server may set with `retry:`, so that nobody is asked in a loop
_DOUBLINGS = 16


class Attempts:
    """The failures since the last progress. `clock` gives seconds that never go back, `random` a number from 0 to 1."""

    def __init__(self, give_up_s: float | None, clock: Callable[[], float], random: Callable[[], float]) -> None:
        self.failures = 0
        self._give_up_s = give_up_s
        self.clock = clock
        self._random = random
        self._first_s = _FIRST_S
        self._failing_since: float | None = None
        self._opened_at = 0.0

    def server_wants(self, retry_ms: int) -> None:
        """The reconnection time of the event stream: the pause after a first failure."""
        self._first_s = max(retry_ms / 1000, _LEAST_S)

    def trying(self) -> None:
        """A request is about to be sent."""
        if self._failing_since is None:
            self._failing_since = self.clock()

    def left(self) -> None:
        """Who reads has gone, for as long as he likes: the time of a try that has not failed does not run on."""
        if not self.failures:
            self._failing_since = None

    def note_open(self) -> None:
        self._opened_at = self.clock()

    def lasted(self) -> bool:
        """Whether the present connection is of use by its age."""
        return self.clock() - self._opened_at >= STEADY_S

    def progressed(self) -> None:
        self.failures = 0
        self._failing_since = None

    def failed(self, at_least_s: float = 0.0) -> float | None:
        """The seconds to wait before the next try, or None to give up; who tries all the same begins anew."""
        left_s = self._left_s()
        if left_s < _LEAST_S:
            self.progressed()
            return None
        pause = max(at_least_s, self._pause())
        self.failures += 1
        return min(pause, left_s)

    def _left_s(self) -> float:
        if self._give_up_s is None:
            return math.inf
        now = self.clock()
        if self._failing_since is None:
            self._failing_since = now
        return self._failing_since + self._give_up_s - now

    def _pause(self) -> float:
        longest = max(MOST_S, self._first_s)
        doubled: float = self._first_s * 2 ** min(self.failures, _DOUBLINGS)
        return min(longest, doubled) * (0.5 + self._random() / 2)


def retry_after(value: str | None, date: str | None) -> float:
    """The seconds that a `Retry-After` asks for: a number, or a time by the server's clock (RFC 9110, 10.2.3)."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return min(float(value), _LONGEST_WISH_S)
    try:
        now = parsedate_to_datetime(date) if date is not None else datetime.now(UTC)
        seconds = (parsedate_to_datetime(value) - now).total_seconds()
    except (ValueError, TypeError):  # TypeError: of two times one has no zone
        return 0.0
    return min(max(seconds, 0.0), _LONGEST_WISH_S)
