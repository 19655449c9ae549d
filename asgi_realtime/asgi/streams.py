"""`GET /v1/streams/{run}/{key}`: the chunks of one stream, from any position to its end.

The hot path of the library. The cursor is the seq of the last chunk that the client has. Everything after it goes out
as one body, which subscribers at the same cursor share. What this process no longer holds is read from the broker, page
by page. Resume, gap and end: docs/protocol.md, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Self

from asgi_realtime.asgi.framing import Framing
from asgi_realtime.asgi.lookup import find_run
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.subscription import WAITING, Ended, SubscriptionResponse
from asgi_realtime.brokers.live_log import MAX_BODY, LiveLog
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.errors import BrokerUnavailable, InvalidRequest, shown
from asgi_realtime.core.log import Entry, StreamKey
from asgi_realtime.core.names import input_stream, stream_name
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.core.sse import HEARTBEAT

_MAX_DIGITS = 18


def parse_position(last_event_id: str | None) -> int:
    """The cursor from which a client resumes; -1 for the start of the stream. Raises `InvalidRequest`."""
    if last_event_id is None:
        return -1
    text = last_event_id
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise InvalidRequest(f"Last-Event-ID is {shown(text)}; on a stream it must be an integer from 0")
    return int(text)


class StreamResponse(SubscriptionResponse[LiveLog]):
    """Sends the chunks of a stream after a cursor."""

    __slots__ = ("_after", "_comment", "_hides_error", "_key")

    def __init__(self, request: Request, key: StreamKey) -> None:
        super().__init__(request, run_id=key.run)
        self._key = key
        self._after = parse_position(request.last_event_id)
        self._hides_error = "error" in request.claims.skip_columns
        self._comment = "connected"

    @classmethod
    async def stream(cls, request: Request, run_id: str, key: str) -> Self:
        """The endpoint that follows a stream of a run."""
        return await cls._respond(request, StreamKey(run_id, stream_name(key, request.host.limits)))

    @classmethod
    async def tail_input(cls, request: Request, run_id: str, input_id: str) -> Self:
        """The endpoint that follows an input of a run, which is a hidden stream."""
        return await cls._respond(request, StreamKey(run_id, input_stream(input_id, request.host.limits)))

    @classmethod
    async def _respond(cls, request: Request, key: StreamKey) -> Self:
        response = cls(request, key)
        response._check_listed(request, await find_run(request, key.run))
        return response

    def _check_listed(self, request: Request, record: RunRecord) -> None:
        """If the run does not list the stream, greet the client with those that it lists: this exposes a typo."""
        name, streams = self._key.name, record.streams
        if not (self._key.hidden or name in streams or "realtimeStreams" in request.claims.skip_columns):
            shown_name, shown_streams = encode_value(name).decode(), encode_value(streams).decode()
            self._comment = f"stream {shown_name} is not written yet; this run has {shown_streams}"

    def _open(self) -> AbstractAsyncContextManager[LiveLog]:
        return self._host.broker.live(self._key)

    async def _prepare(self, source: LiveLog) -> str | None:
        ahead = self._after - source.log.next
        if source.end is not None and ahead >= 0 and not (ahead and source.end.reason == "lost"):
            return None
        comment, self._comment = self._comment, ""
        return "connected" if source.log.next else comment

    async def _follow(self, source: LiveLog) -> bytes:
        framing, waiter, cursor, log = self.framing, self._waiter, self._after, source.log
        try:
            while True:
                if self._alert is not None:
                    last = await self._respond_to_alert(source, cursor)
                    if last is not None:
                        return last
                elif cursor + 1 < log.first:
                    cursor = await self._catch_up(cursor)
                elif cursor + 1 < log.next:
                    piece = framing.take(source, cursor)
                    assert piece is not None
                    cursor = piece.last
                    await self._write(piece.body)
                elif log.end is not None:
                    return self._end(source)
                elif source.failure is not None:
                    return framing.interrupted()
                else:
                    self._after = cursor
                    source.waiting.add(waiter)
                    self._phase = WAITING
                    await waiter.arm()
        finally:
            source.waiting.discard(waiter)

    async def _respond_to_alert(self, source: LiveLog, cursor: int) -> bytes | None:
        """Clear the alert. Returns the last frame if it ends the body; of a stream that was read to its end, `end`."""
        alert, self._alert = self._alert, None
        last = None if alert is None else self._frame_for(alert)
        if last is None:
            await self._write(HEARTBEAT)
            return None
        is_read_to_end = source.log.end is not None and source.log.next <= cursor + 1
        return self._end(source) if is_read_to_end else last

    async def _catch_up(self, cursor: int) -> int:
        """Send a page of entries that this process does not hold, or a gap. Returns the cursor after it."""
        page = await self._ask(self._host.broker.read(self._key, after=cursor))
        if page.first > cursor + 1:
            gap = self.framing.gap(cursor + 1, page.first)
            if not self.framing.has_gaps:
                raise Ended(gap)
            await self._write(gap)
            return page.first - 1
        if not page.entries:
            raise BrokerUnavailable(f"the entries after {cursor} of stream {self._key.name!r} disappeared; retry")
        for body, last in _bodies(self.framing, page.entries):
            await self._write(body)
            cursor = last
            if self._alert is not None:
                break
        return cursor

    def _end(self, source: LiveLog) -> bytes:
        assert source.end is not None
        end = source.end.without_error() if self._hides_error else source.end
        return self.framing.end(end, str(source.log.next))


def _bodies(framing: Framing, entries: Sequence[Entry]) -> Iterator[tuple[bytes, int]]:
    """Join entries into bodies of at most `MAX_BODY` bytes, each with the seq of its last entry."""
    start = size = 0
    for place, entry in enumerate(entries):
        if size and size + len(entry.data) > MAX_BODY:
            yield framing.encode(entries[start:place]), entries[place - 1].seq
            start, size = place, 0
        size += len(entry.data)
    if entries:
        yield framing.encode(entries[start:]), entries[-1].seq
