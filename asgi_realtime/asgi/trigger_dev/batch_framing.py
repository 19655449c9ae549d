"""The stream framing of the official clients: the second version of their streams, with one event per batch of chunks.

These clients know two ways for a body to end: cleanly, which means "complete", and with an event `error`, which means
"resume from your last index". Everything else is expressed as one of the two. Spec: docs/protocol.md, section 4.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from asgi_realtime.asgi.host import Headers
from asgi_realtime.brokers.live_log import LiveLog, Slice
from asgi_realtime.core.log import End, Entry
from asgi_realtime.core.runs import END_REASONS
from asgi_realtime.core.sse import HEARTBEAT, comment_frame, control_frame


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
    has_gaps = False
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
        return control_frame("error", msgspec.json.encode({"message": why}))


_RUN_ENDS = frozenset(END_REASONS.values())


def _record(entry: Entry) -> _Record:
    """A chunk as the clients know it: wrapped, with an id by which one that comes twice would be dropped."""
    return _Record(entry.seq, entry.time_ms, f'{{"data":{entry.data.decode()},"id":"{entry.seq}"}}')


BATCHES = BatchFraming()
