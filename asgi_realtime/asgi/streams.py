"""`GET /v1/streams/{run}/{key}`: the chunks of one stream, from any position, to its end.

The hot path of the library. The cursor is the seq of the last chunk that the client has; everything behind it goes out
as one body, shared with the others at the same place. Resume, gap and end: docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager

from asgi_realtime.asgi.auth import authorise, run_resources
from asgi_realtime.asgi.framing import Framing
from asgi_realtime.asgi.host import Host
from asgi_realtime.asgi.lookup import find_run
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.seats import Seats
from asgi_realtime.asgi.subscription import WAITING, Finished, Subscription
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.log import Entry, StreamKey
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.errors import BrokerUnavailable, InvalidRequest, shown
from asgi_realtime.livelog import MAX_BODY, LiveLog
from asgi_realtime.names import input_stream, stream_name
from asgi_realtime.tokens import Claims

_MAX_DIGITS = 18


async def stream(request: Request, run_id: str, key: str) -> StreamSubscription:
    """Follow a stream of a run."""
    claims = request.authenticate()
    return await _subscribe(request, claims, run_id, stream_name(key, request.host.limits))


async def tail_input(request: Request, run_id: str, input_id: str) -> StreamSubscription:
    """Follow what is sent to an input of a run: a hidden stream."""
    claims = request.authenticate()
    return await _subscribe(request, claims, run_id, input_stream(input_id, request.host.limits))


async def _subscribe(request: Request, claims: Claims, run_id: str, name: str) -> StreamSubscription:
    after = parse_position(request.last_event_id)
    record = await find_run(request, claims, run_id)
    authorise(claims, "read", run_resources(record))
    return StreamSubscription(request.host, request.seats, claims, record, name, after)


def parse_position(last_event_id: str | None) -> int:
    """The cursor that a client resumes from; -1 for the begin. Raises `InvalidRequest`."""
    if last_event_id is None:
        return -1
    text = last_event_id
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise InvalidRequest(f"Last-Event-ID is {shown(text)}; on a stream it must be an integer from 0")
    return int(text)


class StreamSubscription(Subscription[LiveLog]):
    """Sends a stream's chunks after a position."""

    __slots__ = ("_after", "_comment", "_key")

    def __init__(self, host: Host, seats: Seats, claims: Claims, record: RunRecord, name: str, after: int) -> None:
        super().__init__(host, seats, claims, run_id=record.id)
        self._key = StreamKey(record.id, name)
        self._after = after
        written = name in record.streams or name.startswith("$")
        self._comment = "connected" if written else _unwritten(name, record.streams)

    def _open(self) -> AbstractAsyncContextManager[LiveLog]:
        return self._host.broker.live(self._key)

    async def _prepare(self, source: LiveLog) -> str:
        ahead = self._after - source.log.next
        if source.end is not None and ahead >= 0 and not (ahead and source.end.reason == "lost"):
            raise Finished
        comment, self._comment = self._comment, ""
        return comment if not source.log.next else "connected"

    async def _follow(self, source: LiveLog) -> bytes:
        framing, parker, cursor, log = self._framing, self._parker, self._after, source.log
        try:
            while True:
                if self._alert:
                    self._alert = False
                    last = self._last_words()
                    if last is not None:
                        return last if log.end is None or log.next > cursor + 1 else self._end(source)
                    await self._write(framing.heartbeat)
                    continue  # while that was sent there may have been another alert
                if cursor + 1 < log.first:
                    cursor = await self._catch_up(cursor)
                elif cursor + 1 < log.next:
                    piece = framing.take(source, cursor)
                    assert piece is not None
                    cursor = piece.last
                    await self._write(piece.body)
                elif log.end is not None:
                    return self._end(source)
                elif source.failure is not None:
                    return b""  # without an `end`: the client comes back and hears what is wrong
                else:
                    source.waiting.add(parker)
                    self._phase = WAITING
                    await parker.arm()
        finally:
            source.waiting.discard(parker)

    async def _catch_up(self, cursor: int) -> int:
        """Send a page of what this process does not hold, or tell that it is gone. Returns the cursor behind it."""
        framing = self._framing
        page = await self._host.broker.read(self._key, after=cursor)
        if page.first > cursor + 1:
            await self._write(framing.gap(cursor + 1, page.first))
            return page.first - 1
        if not page.entries:
            raise BrokerUnavailable(f"what follows entry {cursor} was there and is not any more")
        for body, last in _bodies(framing, page.entries):
            await self._write(body)
            cursor = last
            if self._alert:
                break
        return cursor

    def _end(self, source: LiveLog) -> bytes:
        assert source.end is not None
        return self._framing.end(source.end, str(source.log.next))


def _bodies(framing: Framing, entries: Sequence[Entry]) -> Iterator[tuple[bytes, int]]:
    """Entries in as few bodies as a server's buffer takes, each with the seq of its last."""
    body = bytearray()
    last = -1
    for entry in entries:
        frame = framing.frame(entry)
        if body and len(body) + len(frame) > MAX_BODY:
            yield bytes(body), last
            body.clear()
        body += frame
        last = entry.seq
    if body:
        yield bytes(body), last


def _unwritten(name: str, streams: tuple[str, ...]) -> str:
    """Tells who reads a wrong key, in `curl -N`, which keys there are."""
    return f"stream {encode_value(name).decode()} is not written yet; this run has {encode_value(streams).decode()}"
