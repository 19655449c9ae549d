"""A stream as this process follows it: the newest part of its log, and those who wait for more.

There is one for each stream and process, whatever the number of its readers. A reader asks with its cursor: `take` for
bytes to send, `entries` for chunks. What several readers at one place are given is built once and shared. The join of
history and tail is the broker's work and has happened before a reader gets here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from asgi_realtime.core.log import End, Entry, Log
from asgi_realtime.loop.waiting import WaitList, WakeSoon

MAX_BODY = 64 * 1024
"""Bytes of one joined body: a server's write buffer, so that a stalled reader holds about one of them."""

_SHARED_SLICES = 4
"""Joined bodies that are kept for other readers at the same place, while there are readers."""


class Slice(NamedTuple):
    """Frames to send in one go, and the cursor behind them."""

    body: bytes
    last: int


class LiveLog:
    """A log with its waiters. The owner appends to `log` and calls `wake`; its logs may share their `wakes`."""

    __slots__ = ("_slices", "_slices_at", "_wakes", "failure", "log", "readers", "waiting")

    def __init__(self, log: Log, wakes: WakeSoon | None = None) -> None:
        self.log = log
        self.waiting = WaitList()
        self._wakes = wakes or WakeSoon()
        self.readers = 0
        self.failure: Exception | None = None
        self._slices: dict[object, Slice] = {}
        self._slices_at = 0

    @property
    def end(self) -> End | None:
        """How the log ended, if it has."""
        return self.log.end

    def wake(self) -> None:
        """Wake everyone who waits, at the next turn of the loop.

        There are new entries, the log ended, or it cannot be followed any more.
        """
        self._wakes.wake(self.waiting)

    def fail(self, failure: Exception) -> None:
        """End all readers with an error: the source of this log cannot be followed. They resume by their cursor."""
        self.failure = failure
        self.wake()

    def enter(self) -> None:
        """Count one more reader."""
        self.readers += 1

    def leave(self) -> None:
        """Count one reader less; the last one takes the shared bodies along."""
        self.readers -= 1
        if not self.readers:
            self._slices.clear()

    def gap(self, after: int) -> int | None:
        """The first retained seq if entries after the cursor are gone, else None."""
        first = self.log.first
        return first if after + 1 < first else None

    def entries(self, after: int, limit: int = 500) -> list[Entry]:
        """The entries that follow the cursor, at most `limit`. The caller has asked `gap` first."""
        return self.log.entries(after, limit)

    def take(self, after: int) -> Slice | None:
        """What follows the cursor, as one body of at most about `MAX_BODY`; None if there is nothing.

        The caller has asked `gap` first: a cursor before the retained part is moved to its begin without a word.
        """
        log = self.log
        if after + 1 >= log.next:
            return None
        if self._slices_at != log.next:
            self._slices.clear()
            self._slices_at = log.next
        found = self._slices.get(after)
        if found is None:
            frames = log.frames(after, MAX_BODY)
            body = frames[0] if len(frames) == 1 else b"".join(frames)
            found = self._share(after, Slice(body, max(after + 1, log.first) + len(frames) - 1))
        return found

    def take_as(self, after: int, encode: Callable[[Sequence[Entry]], bytes]) -> Slice | None:
        """As `take`, with the body that `encode` makes of the same entries."""
        log = self.log
        if after + 1 >= log.next:
            return None
        if self._slices_at != log.next:
            self._slices.clear()
            self._slices_at = log.next
        key = (encode, after)
        found = self._slices.get(key)
        if found is None:
            entries = log.entries(after, len(log.frames(after, MAX_BODY)))
            found = self._share(key, Slice(encode(entries), entries[-1].seq))
        return found

    def _share(self, key: object, slice: Slice) -> Slice:
        if len(self._slices) >= _SHARED_SLICES:
            del self._slices[next(iter(self._slices))]
        self._slices[key] = slice
        return slice
