"""Converts the chunks of a stream to the events of a chat frontend, and joins deltas on the way.

Pure: a conversion holds nothing but the names of its run. What depends on the chunks so far is a state, a hashable
value that goes in and comes out, so readers at the same place share both the bytes and the state.

Each event is `data: <JSON>`. The last event of a chunk has its seq as `id:`, and events without an id belong to the
next one that has one: a chunk that opens a text is two events, for example. So each id is a position from which a
client resumes exactly.

**Joining.** Consecutive deltas in one call become one delta for each part that they extend, and the last of these has
the id of the last chunk. Live chunks come one by one and stay as they are. A late reader gets the text so far in a few
events instead of thousands.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

from asgi_realtime.core.chunks import decode, encode_value
from asgi_realtime.core.log import End, Entry
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.core.sse import chunk_frame

S = TypeVar("S")
Event = dict[str, Any]

_END_TEXTS = {
    "failed": "the run failed",
    "crashed": "the run crashed",
    "timed_out": "the run took too long",
    "expired": "the run did not start in time",
    "lost": "a part of the answer was lost",
}

NOT_PARTS = (
    "the stream has chunks that are not message parts; pipe asgi_realtime.ai.parts(source) into it, or plain strings"
)
"""What a reader gets for a chunk that cannot be shown."""


def end_text(end: End) -> str:
    """What the user reads about a run that ended without success."""
    return end.error or _END_TEXTS.get(end.reason, f"the run ended: {end.reason}")


class Converted(NamedTuple, Generic[S]):
    """Bytes to send, the seq of the last chunk in them, and the state after it."""

    body: bytes
    last: int
    state: S


class NoMeaning(Exception):
    """Raised by `Conversion.step`."""


class Conversion(ABC, Generic[S]):
    """How one run looks in one wire format."""

    name: ClassVar[str]
    headers: ClassVar[Sequence[tuple[bytes, bytes]]] = ()
    """Those of the response, besides those of every event stream."""
    deltas: ClassVar[Mapping[str, tuple[str, str]]]
    """The types of events that can be joined: the field that names what they extend, and the field with the text."""
    beginning: S
    """The state before the first chunk."""
    middle: S
    """The state where the first retained chunk is not the first of the stream."""

    @classmethod
    @abstractmethod
    def of(cls, record: StoredRecord) -> Self:
        """The conversion of the streams of a run."""
        ...

    @abstractmethod
    def step(self, state: S, chunk: Any, seq: int) -> tuple[S, list[Event]]:
        """The state after a chunk, and the events for it. Raises `NoMeaning`."""
        ...

    @abstractmethod
    def finish(self, state: S, end: End) -> list[Event]:
        """The last events."""
        ...

    def opening(self) -> list[Event]:
        """The events before the first chunk. `step` adds them to those of the first chunk."""
        return []

    trailer: ClassVar[bytes] = b""
    """What follows the last event."""

    def scan(self, state: S, entries: Iterable[Entry]) -> S:
        """The state after chunks that the client has."""
        for entry in entries:
            try:
                state, _ = self.step(state, decode(entry.data), entry.seq)
            except NoMeaning:
                continue
        return state

    def convert(self, state: S, after: int, entries: Iterable[Entry], *, max_bytes: float = math.inf) -> Converted[S]:
        """Convert the chunks after a seq, up to a size. Stops before a chunk without meaning."""
        frames = _Frames(self.deltas)
        for entry in entries:
            try:
                state, events = self.step(state, decode(entry.data), entry.seq)
            except NoMeaning:
                break
            frames.add(events, entry.seq)
            after = entry.seq
            if frames.size >= max_bytes:
                break
        return Converted(frames.joined(), after, state)

    def convert_one(self, state: S, entry: Entry) -> Converted[S]:
        """As `convert`, for one chunk: the path of live readers."""
        try:
            following, events = self.step(state, decode(entry.data), entry.seq)
        except NoMeaning:
            return Converted(b"", entry.seq - 1, state)
        if len(events) == 1:
            return Converted(chunk_frame(entry.seq, encode_value(events[0])), entry.seq, following)
        frames = _Frames({})
        frames.add(events, entry.seq)
        return Converted(frames.joined(), entry.seq, following)

    def end(self, state: S, end: End, id: int | None, *, is_first: bool = False) -> bytes:
        """The bytes with which a body ends. `id` is that of the last event. `is_first`: there is no first chunk yet."""
        frames = _Frames({})
        frames.add([*(self.opening() if is_first else []), *self.finish(state, end)], id)
        return frames.joined() + self.trailer


class _Frames:
    """Collects frames, and joins consecutive deltas."""

    def __init__(self, deltas: Mapping[str, tuple[str, str]]) -> None:
        self.size = 0
        self._deltas = deltas
        self._frames: list[bytes] = []
        self._group: dict[tuple[str, str], list[Event]] = {}
        self._group_seq: int | None = None  # of the last chunk that ends in the group

    def add(self, events: list[Event], seq: int | None) -> None:
        """Add the events of a chunk. The last one gets its seq."""
        last = len(events) - 1
        if last > 0:
            self._flush()  # a delta of this chunk must not get the seq of an earlier one
        for place, event in enumerate(events):
            delta = self._deltas.get(event["type"])
            if delta is None:
                self._flush()
                self._write(event, seq if place == last else None)
                continue
            self._group.setdefault((event["type"], event[delta[0]]), []).append(event)
            self.size += len(event[delta[1]])
            if place == last:
                self._group_seq = seq

    def _write(self, event: Event, seq: int | None) -> None:
        data = encode_value(event)
        frame = b"data: %b\n\n" % data if seq is None else chunk_frame(seq, data)
        self._frames.append(frame)
        self.size += len(frame)

    def _flush(self) -> None:
        left = len(self._group)
        for events in self._group.values():
            left -= 1
            self._write(self._join(events), None if left else self._group_seq)
        self._group.clear()
        self._group_seq = None

    def _join(self, events: list[Event]) -> Event:
        if len(events) == 1:
            return events[0]
        field = self._deltas[events[0]["type"]][1]
        joined: Event = {}
        for event in events:
            joined |= event
        joined[field] = "".join([event[field] for event in events])
        return joined

    def joined(self) -> bytes:
        self._flush()
        return b"".join(self._frames)
