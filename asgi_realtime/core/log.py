"""The append-only log behind every stream.

Pure: no loop, no clock. Entries are SSE frames, encoded once, with contiguous sequence numbers from 0. Trimming removes
entries from the front; it changes neither `next` nor the end nor the counts of the producers. Subscribers hold cursors
(the seq of the last entry they received, -1 for none). Nothing here knows about them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from asgi_realtime.core.errors import ProducerGap, RealtimeError, RestoreOutOfOrder, StreamClosed, StreamLost
from asgi_realtime.core.sse import CHUNK_FRAME, chunk_frame, frame_data

COMPACT_AFTER = 1024
"""Trimmed slots at the front of the lists before the lists are compacted."""

MAX_FRAMES = 1024
"""How many frames `Log.frames` returns at most."""

HIDDEN_STREAM = "$"
"""Names of inputs start with this. They are hidden: a run does not list them among its streams."""


class StreamKey(NamedTuple):
    """Identifies a stream: its run, and its name there."""

    run: str
    name: str

    @property
    def hidden(self) -> bool:
        """Whether this is an input."""
        return self.name.startswith(HIDDEN_STREAM)


class Producer(NamedTuple):
    """An in-order source of appends, and the index of the call's first item in its own count, from 0."""

    id: str
    start: int


@dataclass(frozen=True, slots=True)
class End:
    """Why a log ended (`complete`, `failed`, `canceled`, …), and a message for subscribers."""

    reason: str
    error: str | None = None

    def without_error(self) -> End:
        """For subscribers whose token hides errors."""
        return End(self.reason)


class Position(NamedTuple):
    """The result of an append: the seq of its last item (-1 in an empty log), and the next seq of the log."""

    last: int
    next: int


class Entry(NamedTuple):
    """One chunk: its seq, its JSON, and when it was appended, in unix milliseconds."""

    seq: int
    data: bytes
    time_ms: int


class Page(NamedTuple):
    """Entries after a cursor, the bounds of the retained part (`first` to `next - 1`), and the end, if there is one.

    A cursor before `first - 1` means a gap: the reader has missed trimmed entries, and must be notified.
    """

    entries: list[Entry]
    first: int
    next: int
    end: End | None


def misplaced(at: int, following: int) -> RealtimeError:
    """The error for a lost entry that cannot be restored at its seq, in a log whose next seq is `following`."""
    if at < following:
        return StreamLost(f"entry {at} was lost, and other entries were appended up to {following - 1}")
    return RestoreOutOfOrder(f"entry {at} was lost; entries {following} to {at - 1} must be restored before it")


class Log:
    """The entries of one stream. Not thread-safe; every method is atomic on its event loop."""

    __slots__ = ("_base", "_frames", "_producers", "_times", "end", "first", "newest", "next", "size")

    def __init__(self) -> None:
        self.first = 0
        self.next = 0
        self.size = 0
        """Bytes of the retained frames."""
        self.newest = b""
        """The last frame."""
        self.end: End | None = None
        self._base = 0  # the seq of _frames[0]; slots from _base to first - 1 are empty
        self._frames: list[bytes] = []
        self._times = array("q")
        self._producers: dict[str, tuple[int, int]] = {}

    def append(
        self, items: Sequence[bytes], now_ms: int, *, producer: Producer | None = None, at: int | None = None
    ) -> Position:
        """Append JSON items. Skips items that the producer has stored before, so a retry is harmless.

        With `at`, the first item must get this seq. Raises `ProducerGap` if the call skips items of the producer,
        `StreamClosed` if the log has ended and an item is new, `StreamLost` if the seq of the first new item is taken,
        `RestoreOutOfOrder` if the log has not reached it yet. The producer is checked first, so a retry of stored items
        succeeds on a closed log.
        """
        seq = self.next
        if producer is not None:
            new = self.unseen(items, producer)
            at = None if at is None else at + len(items) - len(new)
            items = new
            expected, last = self._producers.get(producer.id, (0, -1))
            if not items:
                return Position(last, seq)
        if not items:
            return Position(seq - 1, seq)
        if self.end is not None:
            raise StreamClosed(f"the stream has ended ({self.end.reason}); nothing can be appended")
        if at is not None and at != seq:
            raise misplaced(at, seq)
        frames = [chunk_frame(number, item) for number, item in enumerate(items, seq)]  # can fail, so first
        self._frames += frames
        self.newest = frames[-1]
        self._times.extend([now_ms] * len(frames))
        self.size += sum(map(len, frames))
        self.next = seq = seq + len(frames)
        if producer is not None:
            self._producers[producer.id] = (expected + len(frames), seq - 1)
        return Position(seq - 1, seq)

    def push(self, item: bytes, now_ms: int) -> int:
        """Append one JSON item to a log that has not ended. Returns the size of its frame."""
        seq = self.next
        self.newest = frame = CHUNK_FRAME % (seq, item)
        self._frames.append(frame)
        self._times.append(now_ms)
        size = len(frame)
        self.size += size
        self.next = seq + 1
        return size

    def unseen(self, items: Sequence[bytes], producer: Producer) -> Sequence[bytes]:
        """The items that this producer has not stored before. Raises `ProducerGap`."""
        expected, _ = self._producers.get(producer.id, (0, -1))
        if producer.start > expected:
            raise ProducerGap(f"append starts at item {producer.start}, expected {expected}", expected=expected)
        return items[expected - producer.start :]

    @property
    def producers(self) -> int:
        """How many producers have appended. Trimming does not remove them."""
        return len(self._producers)

    def counted(self, producer_id: str) -> int:
        """How many items of a producer this log has received."""
        return self._producers.get(producer_id, (0, -1))[0]

    def close(self, end: End) -> None:
        """End the log. Final and idempotent: the first end wins."""
        if self.end is None:
            self.end = end

    def restart(self, seq: int) -> None:
        """Remove all entries and continue at another seq. For a copy of a log that skips a part of it."""
        self.first = self.next = self._base = seq
        self.size = 0
        self.newest = b""
        self._frames.clear()
        del self._times[:]

    def frames(self, after: int, max_bytes: int) -> list[bytes]:
        """The frames after the cursor: up to `max_bytes` and `MAX_FRAMES`, but at least one if there is one.

        A cursor before the retained part starts at `first`; the caller has handled the gap.
        """
        start = max(after + 1, self.first) - self._base
        frames = self._frames[start : start + MAX_FRAMES]
        sums = list(accumulate(map(len, frames)))
        if sums and sums[-1] > max_bytes:
            del frames[max(bisect_right(sums, max_bytes), 1) :]
        return frames

    def entries(self, after: int, limit: int) -> list[Entry]:
        """The entries after the cursor, at most `limit`."""
        start = max(after + 1, self.first) - self._base
        frames = self._frames[start : start + limit]
        return [
            Entry(self._base + slot, frame_data(frame), self._times[slot]) for slot, frame in enumerate(frames, start)
        ]

    def trim(self, max_bytes: int) -> int:
        """Remove the oldest entries down to `max_bytes`, but never the last one. Returns the freed bytes."""
        excess = self.size - max_bytes
        frames, stop, freed = self._frames, self.first - self._base, 0
        while freed < excess and stop < len(frames) - 1:
            freed += len(frames[stop])
            frames[stop] = b""
            stop += 1
        self.size -= freed
        self.first = self._base + stop
        if stop > COMPACT_AFTER and stop * 2 > len(frames):
            del frames[:stop], self._times[:stop]
            self._base += stop
        return freed
