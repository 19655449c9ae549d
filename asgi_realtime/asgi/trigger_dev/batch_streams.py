"""Streams for the official clients: native streams in another framing, with two more request headers.

The framing is version 2 of their protocol, with one SSE event for a batch of chunks. These clients know two ways for a
body to end. A clean end means that the stream is complete, and an event `error` means "resume from your last index", so
everything else is expressed as one of the two. A cursor that cannot be served is an error response, and a body ends
after a silence only if the broker confirms that the stream has no more chunks. Spec: docs/protocol.md, section 4.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from asgi_realtime.asgi.framing import Framing
from asgi_realtime.asgi.phases import STILL_WAITING, WAITING, Alert
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.streams import StreamResponse
from asgi_realtime.asgi.trigger_dev.client_version import check_client
from asgi_realtime.brokers.live_log import LiveLog, Slice
from asgi_realtime.core.errors import InvalidRequest, StreamGap, StreamLost, shown
from asgi_realtime.core.log import End, Entry, StreamKey
from asgi_realtime.core.runs import END_REASONS
from asgi_realtime.core.sse import comment_line, control_frame

MAX_SILENCE_S = 600
"""The limit of `Timeout-Seconds`."""


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

    def preamble(self, comment: str) -> bytes:
        return comment_line(comment)

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


def _parse_silence(header: bytes | None) -> float:
    if header is None:
        return math.inf
    text = header.decode("latin-1").strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MAX_SILENCE_S):
        raise InvalidRequest(f"Timeout-Seconds is {shown(text)}; allowed are whole numbers from 1 to {MAX_SILENCE_S}")
    return int(text)


class BatchStreamResponse(StreamResponse):
    """Sends the chunks of a stream in batches, and ends after `silence_s` without one."""

    __slots__ = ("_latest", "_seen", "_seen_at", "_silence_s")
    framing = BATCHES

    def __init__(self, request: Request, key: StreamKey) -> None:
        check_client(request)
        super().__init__(request, key)
        start = (request.header(b"x-trigger-stream-start") or b"").strip().lower()
        self._latest = start == b"latest" and request.last_event_id is None
        self._silence_s = _parse_silence(request.header(b"timeout-seconds"))
        self._seen = -2  # the cursor at an earlier tick, and the time of that tick
        self._seen_at = 0.0

    async def _prepare(self, source: LiveLog) -> bool:
        if self._latest:
            self._move(source.log.next - 1)
        await super()._prepare(source)
        await self._check_position(source)
        return True

    async def _check_position(self, source: LiveLog) -> None:
        """Raises `StreamGap` before the retained part of the stream, `StreamLost` at the end of a lost stream, or past
        the end of any."""
        following = self._after + 1
        if source.end is not None and following >= source.log.next:
            end = self._end_of(source)
            if end.reason == "lost":
                raise StreamLost(end.error or "entries of this stream were lost")
        if following >= source.log.first:
            return
        page = await self._host.broker.read(self._key, after=self._after, limit=1)
        if page.first <= following:
            return
        if following:
            message = f"chunk {following} has expired; the oldest retained chunk is {page.first}"
            raise StreamGap(message, requested=following, first=page.first)
        self._move(page.first - 1)  # a client without a position starts at the oldest chunk

    async def _respond_to_alert(self, source: LiveLog) -> bytes | None:
        if self._alert is Alert.SILENT and source.log.next <= self._after + 1:
            # Messages of the broker can be late, and then silence here does not mean that there is nothing more.
            page = await self._ask(self._host.broker.read(self._key, after=self._after, limit=1))
            if not page.entries:
                return b""
        return await super()._respond_to_alert(source)

    def tick(self, now: float, steady: float) -> None:
        super().tick(now, steady)
        if self._silence_s == math.inf:
            return
        if self._after != self._seen or self._phase not in (WAITING, STILL_WAITING):
            self._seen, self._seen_at = self._after, steady
        elif steady - self._seen_at >= self._silence_s:
            self._notify(Alert.SILENT)
