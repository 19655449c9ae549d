"""The append-only log behind every stream.

Pure: no loop, no clock. Entries are SSE frames, encoded once, with contiguous sequence numbers from 0. Trimming takes
entries from the front and never the position: `next`, the end and the producers' indexes stay. Subscribers hold
cursors (the seq of the last entry that they have; -1 for none); nothing here knows about them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from asgi_realtime.core.errors import ProducerGap, RealtimeError, RestoreOutOfOrder, StreamClosed, StreamLost
from asgi_realtime.core.sse import chunk_frame, frame_data

COMPACT_AFTER = 1024
"""Trimmed slots that may stay at the front of the lists before they are cut off."""


HIDDEN_STREAM = "$"
"""Streams whose name begins so are inputs: the library's own, not listed among the run's streams."""


class StreamKey(NamedTuple):
    """Which stream: the run that it belongs to, and its name there."""

    run: str
    name: str

    @property
    def hidden(self) -> bool:
        """Whether this is an input."""
        return self.name.startswith(HIDDEN_STREAM)


class Producer(NamedTuple):
    """Who appends, and the place of the call's first item in the producer's own count, from 0."""

    id: str
    start: int


@dataclass(frozen=True, slots=True)
class End:
    """Why a log ended: `complete`, `failed`, `canceled`, … and a text for subscribers."""

    reason: str
    error: str | None = None

    def without_error(self) -> End:
        """For those who may not see it."""
        return End(self.reason)


class Position(NamedTuple):
    """Where the items of an append stand: the seq of the last one (-1 in an empty log), and what comes next."""

    last: int
    next: int


class Entry(NamedTuple):
    """One chunk: its seq, its JSON and the time of its append in unix milliseconds."""

    seq: int
    data: bytes
    time_ms: int


class Page(NamedTuple):
    """Entries after a cursor, the log's retained part `first` to `next - 1`, and its end if it has ended.

    A reader whose cursor lies before `first - 1` has lost entries: that is the gap, and it is never silent.
    """

    entries: list[Entry]
    first: int
    next: int
    end: End | None


def misplaced(at: int, following: int) -> RealtimeError:
    """Why an entry that was lost cannot be written again at its place."""
    if at < following:
        return StreamLost(f"entry {at} was lost and its place is taken: the stream is at {following}")
    return RestoreOutOfOrder(f"entry {at} was lost; those before it, from {following} on, are not there again yet")


class Log:
    """One stream's entries. Not safe for several threads; every method is atomic on its loop."""

    __slots__ = ("_base", "_frames", "_producers", "_sums", "_times", "_trimmed", "end", "first", "next", "size")

    def __init__(self) -> None:
        self.first = 0
        self.next = 0
        self.size = 0
        """Bytes of the retained frames."""
        self.end: End | None = None
        self._base = 0  # the seq of _frames[0]; between _base and first the slots are empty
        self._frames: list[bytes] = []
        self._times = array("q")
        self._sums = array("q")  # bytes of all entries up to and with this one, since the log began
        self._trimmed = 0  # bytes of all entries before `first`
        self._producers: dict[str, tuple[int, int]] = {}

    def append(
        self, items: Sequence[bytes], now_ms: int, *, producer: Producer | None = None, at: int | None = None
    ) -> Position:
        """Add JSON items. What the producer has stored before is skipped, so a retried call is harmless.

        With `at` the items have to stand from that seq on. Raises `ProducerGap` if the call leaves a hole in the
        producer's count, `StreamClosed` if the log has ended and an item is new, `StreamLost` if the place of the first
        new item is taken, `RestoreOutOfOrder` if the log has not come to it yet. The producer's check comes first: a
        retry of what was stored succeeds on a closed log.
        """
        seq = self.next
        if producer is not None:
            given = len(items)
            items = self.unseen(items, producer)
            at = None if at is None else at + given - len(items)
            expected, last = self._producers.get(producer.id, (0, -1))
            if not items:
                return Position(last, seq)
        if not items:
            return Position(seq - 1, seq)
        if self.end is not None:
            raise StreamClosed(f"the stream has ended ({self.end.reason}); nothing can be appended")
        if at is not None and at != seq:
            raise misplaced(at, seq)
        frames = [chunk_frame(number, item) for number, item in enumerate(items, seq)]  # before anything is changed
        total = self._sums[-1] if self._sums else self._trimmed
        for frame in frames:
            total += len(frame)
            self._sums.append(total)
            self._times.append(now_ms)
        self._frames += frames
        self.size = total - self._trimmed
        self.next = seq = seq + len(frames)
        if producer is not None:
            self._producers[producer.id] = (expected + len(frames), seq - 1)
        return Position(seq - 1, seq)

    def unseen(self, items: Sequence[bytes], producer: Producer) -> Sequence[bytes]:
        """Those of the items that this producer has not stored before. Raises `ProducerGap`."""
        expected, _ = self._producers.get(producer.id, (0, -1))
        if producer.start > expected:
            raise ProducerGap(f"append starts at item {producer.start}, expected {expected}", expected=expected)
        return items[expected - producer.start :]

    @property
    def producers(self) -> int:
        """How many producers have written here. Trimming does not forget them."""
        return len(self._producers)

    def counted(self, producer_id: str) -> int:
        """How many items of a producer this log has counted."""
        return self._producers.get(producer_id, (0, -1))[0]

    def close(self, end: End) -> None:
        """End the log. Final and idempotent: the first end stays."""
        if self.end is None:
            self.end = end

    def restart(self, seq: int) -> None:
        """Forget everything and go on at another place: the part of a log that is kept here begins anew."""
        self.first = self.next = self._base = seq
        self.size = self._trimmed = 0
        self._frames.clear()
        del self._times[:], self._sums[:]

    def frames(self, after: int, max_bytes: int) -> list[bytes]:
        """The frames after the cursor, at most `max_bytes` but at least one; empty if there is none.

        The caller has looked at `first`: a cursor before the retained part starts there.
        """
        start = max(after + 1, self.first) - self._base
        if start >= len(self._frames):
            return []
        before = self._sums[start - 1] if start else self._trimmed
        stop = bisect_right(self._sums, before + max_bytes, lo=start)
        return self._frames[start : max(stop, start + 1)]

    def entries(self, after: int, limit: int) -> list[Entry]:
        """The entries after the cursor, at most `limit`, with their data and times."""
        start = max(after + 1, self.first) - self._base
        frames = self._frames[start : start + limit]
        return [
            Entry(self._base + slot, frame_data(frame), self._times[slot]) for slot, frame in enumerate(frames, start)
        ]

    def trim(self, max_bytes: int) -> int:
        """Drop the oldest entries until at most `max_bytes` are left; the last entry stays. Returns the bytes freed."""
        excess = self.size - max_bytes
        if excess <= 0:
            return 0
        start = self.first - self._base
        stop = bisect_right(self._sums, self._trimmed + excess - 1, lo=start) + 1
        stop = min(stop, len(self._frames) - 1)
        if stop <= start:
            return 0
        freed = self._sums[stop - 1] - self._trimmed
        self._trimmed += freed
        self.size -= freed
        self.first = self._base + stop
        for slot in range(start, stop):
            self._frames[slot] = b""
        if stop > COMPACT_AFTER and stop * 2 > len(self._frames):
            del self._frames[:stop], self._times[:stop], self._sums[:stop]
            self._base += stop
        return freed
