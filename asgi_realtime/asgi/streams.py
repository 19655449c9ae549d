"""`GET /v1/streams/{run}/{key}`: the chunks of one stream, from any position, to its end.

The hot path of the library. The cursor is the seq of the last chunk that the client has; everything behind it goes out
as one body, shared with the others at the same place. Resume, gap and end: docs/protocol.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

from asgi_realtime.asgi.auth import authorise, run_resources
from asgi_realtime.asgi.framing import BATCHES, NATIVE, Framing
from asgi_realtime.asgi.lookup import find_run
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.subscription import STILL_WAITING, WAITING, Finished, Over, Subscription
from asgi_realtime.brokers.live_log import MAX_BODY, LiveLog
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.errors import BrokerUnavailable, InvalidRequest, StreamGap, StreamLost, shown
from asgi_realtime.core.log import Entry, StreamKey
from asgi_realtime.core.names import input_stream, stream_name
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.tokens import Claims

MAX_SILENCE_S = 600
"""The most that `Timeout-Seconds` may say."""

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
    asked = asked_stream(request)
    record = await find_run(request, claims, run_id, events=asked.framing is NATIVE)
    authorise(claims, "read", run_resources(record))
    return StreamSubscription(request, claims, record, name, asked)


class AskedStream(NamedTuple):
    """How a stream is asked for: from which position, in which framing, and until how much silence."""

    after: int
    framing: Framing
    latest: bool = False
    """From the end: what is there already is not wanted."""
    silence_s: float = math.inf


def asked_stream(request: Request) -> AskedStream:
    """Read the headers. Raises `InvalidRequest`."""
    after = parse_position(request.last_event_id)
    if not request.is_official_client:
        return AskedStream(after, NATIVE)
    start = request.header(b"x-trigger-stream-start")
    latest = start is not None and start.strip().lower() == b"latest" and request.last_event_id is None
    return AskedStream(after, BATCHES, latest, _silence(request.header(b"timeout-seconds")))


def _silence(header: bytes | None) -> float:
    if header is None:
        return math.inf
    text = header.decode("latin-1").strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MAX_SILENCE_S):
        raise InvalidRequest(f"Timeout-Seconds is {shown(text)}; allowed are whole numbers from 1 to {MAX_SILENCE_S}")
    return int(text)


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

    __slots__ = ("_after", "_comment", "_hides_error", "_key", "_latest", "_quiet", "_seen", "_seen_at", "_silence_s")

    def __init__(self, request: Request, claims: Claims, record: RunRecord, name: str, asked: AskedStream) -> None:
        super().__init__(request.host, request.subscription_limits, claims, run_id=record.id, framing=asked.framing)
        self._key = StreamKey(record.id, name)
        self._after = asked.after
        self._latest = asked.latest
        self._silence_s = asked.silence_s
        self._quiet = False  # for so long
        self._seen = -2  # where the ticker saw the cursor, and when
        self._seen_at = 0.0
        self._hides_error = "error" in claims.skip_columns
        told = name in record.streams or name.startswith("$") or "realtimeStreams" in claims.skip_columns
        self._comment = "connected" if told else _unwritten(name, record.streams)

    def _open(self) -> AbstractAsyncContextManager[LiveLog]:
        return self._host.broker.live(self._key)

    async def _prepare(self, source: LiveLog) -> str:
        if self._latest:
            self._after = source.log.next - 1
        ahead = self._after - source.log.next
        if source.end is not None and ahead >= 0 and not (ahead and source.end.reason == "lost"):
            raise Finished(self._framing)
        if not self._framing.tells_gaps:
            await self._refuse_what_cannot_be_told(source)
        comment, self._comment = self._comment, ""
        return comment if not source.log.next else "connected"

    async def _refuse_what_cannot_be_told(self, source: LiveLog) -> None:
        """Raises `StreamGap` for a position before the part that is kept, `StreamLost` at the end of what was lost."""
        end, following = source.end, self._after + 1
        if end is not None and end.reason == "lost" and following >= source.log.next:
            raise StreamLost(end.error or "entries of this stream were lost")
        if following >= source.log.first:
            return
        page = await self._host.broker.read(self._key, after=self._after, limit=1)
        if page.first <= following:
            return
        if following:
            message = f"chunk {following} is past its retention, the oldest that is kept is {page.first}"
            raise StreamGap(message, requested=following, first=page.first)
        self._after = page.first - 1  # who asked for no position begins with what there is

    async def _follow(self, source: LiveLog) -> bytes:
        framing, waiter, cursor, log = self._framing, self._waiter, self._after, source.log
        try:
            while True:
                if self._alert:
                    self._alert = False
                    last = self._last_words()
                    if last is not None:
                        return last if log.end is None or log.next > cursor + 1 else self._end(source)
                    if self._quiet and await self._is_silent(source, cursor):
                        return b""
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
                    return framing.interrupted()  # the client comes back and hears what is wrong
                else:
                    self._after = cursor
                    source.waiting.add(waiter)
                    self._phase = WAITING
                    await waiter.arm()
        finally:
            source.waiting.discard(waiter)

    async def _is_silent(self, source: LiveLog, cursor: int) -> bool:
        """Whether there is nothing more. The broker is asked: if it is away, or messages of it are late, nothing is
        heard here, and that is not the end. Raises `BrokerUnavailable`."""
        self._quiet = False
        if source.log.next > cursor + 1:
            return False
        return not (await self._host.broker.read(self._key, after=cursor, limit=1)).entries

    async def _catch_up(self, cursor: int) -> int:
        """Send a page of what this process does not hold, or tell that it is gone. Returns the cursor behind it."""
        framing = self._framing
        page = await self._host.broker.read(self._key, after=cursor)
        if page.first > cursor + 1:
            gap = framing.gap(cursor + 1, page.first)
            if not framing.tells_gaps:
                raise Over(gap)
            await self._write(gap)
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
        end = source.end.without_error() if self._hides_error else source.end
        return self._framing.end(end, str(source.log.next))

    def tick(self, now: float, steady: float) -> None:
        super().tick(now, steady)
        if self._silence_s == math.inf:
            return
        if self._after != self._seen or self._phase not in (WAITING, STILL_WAITING):
            self._seen, self._seen_at = self._after, steady
        elif steady - self._seen_at >= self._silence_s:
            self._quiet = True
            self._rouse()


def _bodies(framing: Framing, entries: Sequence[Entry]) -> Iterator[tuple[bytes, int]]:
    """Entries in as few bodies as a server's buffer takes, each with the seq of its last."""
    start = size = 0
    for place, entry in enumerate(entries):
        if size and size + len(entry.data) > MAX_BODY:
            yield framing.encode(entries[start:place]), entries[place - 1].seq
            start, size = place, 0
        size += len(entry.data)
    if entries:
        yield framing.encode(entries[start:]), entries[-1].seq


def _unwritten(name: str, streams: tuple[str, ...]) -> str:
    """Tells who reads a wrong key, in `curl -N`, which keys there are."""
    return f"stream {encode_value(name).decode()} is not written yet; this run has {encode_value(streams).decode()}"
