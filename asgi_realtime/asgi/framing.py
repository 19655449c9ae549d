"""How a subscription looks on the wire.

A framing is chosen for each response. The native one has named SSE events that any EventSource can read, none of them
called `error`, because an EventSource fires that name itself. The batches are for the official clients: these know two
ends of a body, the clean one for "complete" and an event `error` for "come back from your last index", so whatever
else there is to say has to be one of the two. Spec: docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from asgi_realtime.asgi.host import Headers
from asgi_realtime.brokers.live_log import LiveLog, Slice
from asgi_realtime.core.log import End, Entry
from asgi_realtime.core.runs import END_REASONS
from asgi_realtime.core.sse import HEARTBEAT, chunk_frame, comment_frame, control_frame, retry_frame

RETRY_MS = 1000
"""How soon a client comes back after a drop. Said in each response, or a shutdown's value would stay."""


class Framing(Protocol):
    """What is said on a stream, chunks and all else."""

    heartbeat: bytes
    headers: Headers
    """What the head has besides that of every event stream."""
    tells_gaps: bool
    """Whether a gap can be told in the middle of a body, so that it goes on behind it."""
    status_when_over: int
    """The answer to who has everything, up to the end. Its body is empty."""

    def preamble(self, comment: str) -> bytes:
        """The first body, at once: some hosts hold the head back until there is one."""
        ...

    @property
    def take(self) -> Callable[[LiveLog, int], Slice | None]:
        """Gives what follows the cursor, as `LiveLog.take`."""
        ...

    def encode(self, entries: Sequence[Entry]) -> bytes:
        """Entries that the process does not hold: `take` gives those that it does."""
        ...

    def gap(self, requested: int, first: int) -> bytes:
        """Entries are gone: the client asked for `requested`, the first one there is `first`."""
        ...

    def end(self, end: End, id: str | None) -> bytes:
        """Nothing more will come."""
        ...

    def reconnect(self, retry_ms: int) -> bytes:
        """The server leaves; come back after this time."""
        ...

    def interrupted(self) -> bytes:
        """The stream cannot be followed just now; come back and hear why."""
        ...


class NativeFraming:
    """For EventSource, curl and httpx-sse."""

    __slots__ = ()
    heartbeat = HEARTBEAT
    headers: Headers = []
    tells_gaps = True
    status_when_over = 204  # an EventSource stops at this: WHATWG HTML, 9.2.3

    def preamble(self, comment: str) -> bytes:
        return retry_frame(RETRY_MS) + comment_frame(comment)

    take = staticmethod(LiveLog.take)  # for each delivery: no call around it

    def encode(self, entries: Sequence[Entry]) -> bytes:
        return b"".join(chunk_frame(entry.seq, entry.data) for entry in entries)

    def gap(self, requested: int, first: int) -> bytes:
        # With the id a drop right after this resumes at `first`, and the gap is not told twice.
        return control_frame("gap", _json({"requested": requested, "first": first}), id=str(first - 1))

    def end(self, end: End, id: str | None) -> bytes:
        data = {"reason": end.reason} if end.error is None else {"reason": end.reason, "error": end.error}
        return control_frame("end", _json(data), id=id)

    def reconnect(self, retry_ms: int) -> bytes:
        return control_frame("reconnect", _json({"retry": retry_ms}), retry_ms=retry_ms)

    def interrupted(self) -> bytes:
        return b""


class _Record(msgspec.Struct, frozen=True):
    seq_num: int
    timestamp: int
    body: str
    headers: tuple[()] = ()


class BatchFraming:
    """For the official clients: the second version of their streams, where one event has the chunks of one moment."""

    __slots__ = ()
    heartbeat = HEARTBEAT
    headers: Headers = [(b"x-stream-version", b"v2")]
    tells_gaps = False
    status_when_over = 200  # a 204 has no body, which they take for a failure

    def preamble(self, comment: str) -> bytes:
        return comment_frame(comment)

    def take(self, live: LiveLog, after: int) -> Slice | None:
        return live.take_as(after, self.encode)

    def encode(self, entries: Sequence[Entry]) -> bytes:
        return control_frame("batch", msgspec.json.encode({"records": [_record(entry) for entry in entries]}))

    def gap(self, requested: int, first: int) -> bytes:
        return self._come_back(f"chunks {requested} to {first - 1} are past their retention")

    def end(self, end: End, id: str | None) -> bytes:
        """Whatever the run ended with, its stream is complete; how the run ended is told by its feed."""
        return b"" if end.reason in _RUN_ENDS else self._come_back(end.error or end.reason)

    def reconnect(self, retry_ms: int) -> bytes:
        return self._come_back("the server is not there just now")

    def interrupted(self) -> bytes:
        return self._come_back("the stream was interrupted")

    def _come_back(self, why: str) -> bytes:
        return control_frame("error", _json({"message": why}))


_RUN_ENDS = frozenset(END_REASONS.values())


def _record(entry: Entry) -> _Record:
    """A chunk as the clients know it: wrapped, with an id by which one that comes twice would be dropped."""
    return _Record(entry.seq, entry.time_ms, f'{{"data":{entry.data.decode()},"id":"{entry.seq}"}}')


def _json(value: dict[str, str] | dict[str, int]) -> bytes:
    return msgspec.json.encode(value)


NATIVE = NativeFraming()
BATCHES = BatchFraming()
