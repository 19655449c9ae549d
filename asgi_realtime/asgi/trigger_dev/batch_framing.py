"""The stream framing of the official clients: version 2 of their protocol, with one SSE event for a batch of chunks.

These clients know two ways for a body to end. A clean end means that the stream is complete, and an event `error` means
"resume from your last index", so everything else is expressed as one of the two. Spec: docs/protocol.md, section 4.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from asgi_realtime.asgi.framing import Framing
from asgi_realtime.brokers.live_log import LiveLog, Slice
from asgi_realtime.core.log import End, Entry
from asgi_realtime.core.runs import END_REASONS
from asgi_realtime.core.sse import comment_frame, control_frame


class _Record(msgspec.Struct, frozen=True):
    seq_num: int
    timestamp: int
    body: str
    headers: tuple[()] = ()


class BatchFraming(Framing):
    """A `Framing` for the official clients."""

    __slots__ = ()
    headers = [(b"x-stream-version", b"v2")]
    has_gaps = False
    status_when_over = 200  # the clients retry a 204, because it has no body

    def preamble(self, comment: str) -> bytes:
        return comment_frame(comment)

    def take(self, live: LiveLog, after: int) -> Slice | None:
        return live.take_as(after, self.encode)

    def encode(self, entries: Sequence[Entry]) -> bytes:
        return control_frame("batch", msgspec.json.encode({"records": [_record(entry) for entry in entries]}))

    def gap(self, requested: int, first: int) -> bytes:
        return self._error(f"chunks {requested} to {first - 1} have expired")

    def end(self, end: End, id: str | None) -> bytes:
        """The stream of a run that is over is complete, whatever the status of the run."""
        return b"" if end.reason in _RUN_ENDS else self._error(end.error or end.reason)

    def reconnect(self, retry_ms: int) -> bytes:
        return self._error("the server is shutting down")

    def interrupted(self) -> bytes:
        return self._error("the stream was interrupted")

    def _error(self, message: str) -> bytes:
        return control_frame("error", msgspec.json.encode({"message": message}))


_RUN_ENDS = frozenset(END_REASONS.values())


def _record(entry: Entry) -> _Record:
    """A chunk in the wrapper of the clients, which drop a chunk with an id that they have seen."""
    return _Record(entry.seq, entry.time_ms, f'{{"data":{entry.data.decode()},"id":"{entry.seq}"}}')


BATCHES = BatchFraming()
