"""A stream as this process follows it: the newest part of its log, and the readers that wait for more.

There is one for each stream and process, however many readers it has. A reader passes its cursor: to `take` for bytes
to send, to `entries` for chunks. What several readers at the same cursor get is built once and shared. The broker has
joined history and tail before a reader gets here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from asgi_realtime.core.log import End, Entry, Log
from asgi_realtime.loop.waiting import WaitList, WakeSoon

MAX_BODY = 64 * 1024
"""The size of a joined body. It equals a server's write buffer, so that a stalled reader holds about one body."""

_SHARED_SLICES = 4
"""How many joined bodies are retained for other readers at the same cursor, while there are readers."""


T = TypeVar("T")


Slice = tuple[bytes, int]
"""Frames to send in one piece, and the cursor after them. A plain tuple: one is made for each delivery."""


class LiveLog:
    """A log with its waiters. The owner appends to `log` and calls `wake`. Logs of one owner can share `wakes`."""

    __slots__ = ("_slices", "_slices_at", "_wakes", "cost", "failure", "log", "readers", "waiting")

    def __init__(self, log: Log, wakes: WakeSoon | None = None) -> None:
        self.log = log
        self.waiting = WaitList()
        self._wakes = wakes or WakeSoon()
        self.readers = 0
        self.cost = 0  # the bytes that its owner counts for the log
        self.failure: Exception | None = None
        self._slices: dict[Hashable, Any] = {}
        self._slices_at = 0

    @property
    def end(self) -> End | None:
        """How the log ended, if it has."""
        return self.log.end

    def wake(self) -> None:
        """Wake all waiters in the next loop iteration: the log has new entries, has ended or has failed."""
        self._wakes.wake(self.waiting)

    def fail(self, failure: Exception) -> None:
        """End all readers with an error, because this log can no longer be followed. They resume by their cursors."""
        self.failure = failure
        self.wake()

    def enter(self) -> None:
        """Add a reader."""
        self.readers += 1

    def leave(self) -> None:
        """Remove a reader. The last one releases the shared bodies."""
        self.readers -= 1
        if not self.readers:
            self._slices.clear()

    def gap(self, after: int) -> int | None:
        """The first retained seq if entries after the cursor were trimmed, else None."""
        first = self.log.first
        return first if after + 1 < first else None

    def entries(self, after: int, limit: int = 500) -> list[Entry]:
        """The entries after the cursor, at most `limit`. Check `gap` first."""
        return self.log.entries(after, limit)

    def take(self, after: int) -> Slice | None:
        """The frames after the cursor as one body of about `MAX_BODY` at most; None if there are none.

        Check `gap` first: a cursor before the retained part silently moves to its start.
        """
        log = self.log
        ahead = log.next - after - 1
        if ahead <= 1:
            return (log.newest, after + 1) if ahead == 1 else None  # nothing to join, so nothing to share
        if self._slices_at != log.next:
            self._slices.clear()
            self._slices_at = log.next
        found: Slice | None = self._slices.get(after)
        if found is None:
            frames = log.frames(after, MAX_BODY)
            body = frames[0] if len(frames) == 1 else b"".join(frames)
            found = self._share(after, (body, max(after + 1, log.first) + len(frames) - 1))
        return found

    def take_as(self, after: int, encode: Callable[[Sequence[Entry]], bytes]) -> Slice | None:
        """As `take`, with the body that `encode` returns for the same entries."""
        if after + 1 >= self.log.next:
            return None
        return self.shared((encode, after), lambda: self._encoded(after, encode))

    def _encoded(self, after: int, encode: Callable[[Sequence[Entry]], bytes]) -> Slice:
        entries = self.log.entries(after, len(self.log.frames(after, MAX_BODY)))
        return encode(entries), entries[-1].seq

    def shared(self, key: Hashable, build: Callable[[], T]) -> T:
        """What `build` returns, once for all readers with this key, while the log does not grow."""
        if self._slices_at != self.log.next:
            self._slices.clear()
            self._slices_at = self.log.next
        found: T | None = self._slices.get(key)
        return self._share(key, build()) if found is None else found

    def _share(self, key: Hashable, slice: T) -> T:
        if len(self._slices) >= _SHARED_SLICES:
            del self._slices[next(iter(self._slices))]
        self._slices[key] = slice
        return slice
