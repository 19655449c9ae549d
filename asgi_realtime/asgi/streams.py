"""`GET /v1/streams/{run}/{key}`: the chunks of one stream, from any position to its end.

The hot path of the library. The cursor is the seq of the last chunk that the client has. Everything after it goes out
as one body, which subscribers at the same cursor share. `_follow` is the whole loop. `take_turn` does the most frequent
iteration of it without a switch to the task. What this process no longer holds is read from the broker, page by page.
Resume, gap and end: docs/protocol.md, section 4.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Self

from asgi_realtime.asgi.connection import WHOLE_BYTES
from asgi_realtime.asgi.framing import Framing
from asgi_realtime.asgi.lookup import find_run
from asgi_realtime.asgi.phases import SENDING, WAITING
from asgi_realtime.asgi.request import Access, Request
from asgi_realtime.asgi.subscription import Ended, SubscriptionResponse
from asgi_realtime.brokers.live_log import MAX_BODY, LiveLog
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.errors import BrokerUnavailable, InvalidRequest, shown
from asgi_realtime.core.log import End, Entry, StreamKey
from asgi_realtime.core.names import input_stream, stream_name
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.core.sse import HEARTBEAT

_MAX_DIGITS = 18
_MAX_FIRST = 4096
"""The largest body that is copied behind the preamble. Readers share a larger one."""


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

    __slots__ = ("_after", "_hides_error", "_is_watcher", "_key", "_source", "_start", "_watches")
    kind = "stream"

    def __init__(self, request: Access, key: StreamKey) -> None:
        super().__init__(request, run_id=key.run)
        self._key = key
        self._after = self._start = parse_position(request.last_event_id)
        self._hides_error = "error" in request.claims.skip_columns
        self._watches = self._is_watcher = False

    @classmethod
    def stream(cls, request: Request, run_id: str, key: str) -> Awaitable[Self]:
        """The endpoint that follows a stream of a run."""
        return cls._respond(request, StreamKey(run_id, stream_name(key, request.host.limits)))

    @classmethod
    def tail_input(cls, request: Request, run_id: str, input_id: str) -> Awaitable[Self]:
        """The endpoint that follows an input of a run, which is a hidden stream."""
        return cls._respond(request, StreamKey(run_id, input_stream(input_id, request.host.limits)))

    @classmethod
    async def _respond(cls, request: Request, key: StreamKey) -> Self:
        response = cls(request, key)
        record = await find_run(request, key.run, stream=None if key.hidden else key.name)
        response._check_listed(request, record)
        response.watch(record)
        return response

    def _check_listed(self, request: Request, record: StoredRecord) -> None:
        """If the run does not list the stream, greet the client with those that it lists: this exposes a typo."""
        name, streams = self._key.name, record.streams
        if not (self._key.hidden or name in streams or "realtimeStreams" in request.claims.skip_columns):
            shown_name, shown_streams = encode_value(name).decode(), encode_value(streams).decode()
            self._comment = f"stream {shown_name} is not written yet; this run has {shown_streams}"

    def watch(self, record: StoredRecord) -> None:
        """Count this subscription while it is open, if the run asks for that. A rejected one does not count."""
        self._watches = record.counts_watchers and not self._key.hidden

    async def _send_head(self) -> None:
        if self._watches:
            self._host.watchers.enter(self._key.run)
            self._is_watcher = True
        await super()._send_head()

    def _release(self) -> None:
        super()._release()
        if self._is_watcher:
            self._is_watcher = False
            self._host.watchers.leave(self._key.run)

    @property
    def sent_chunks(self) -> int:  # type: ignore[override]
        return self._after - self._start

    def _move(self, after: int) -> None:
        """Continue after another position, without the chunks in between."""
        self._start += after - self._after
        self._after = after

    def _open(self) -> AbstractAsyncContextManager[LiveLog]:
        return self._host.broker.live(self._key)

    async def _prepare(self, source: LiveLog) -> bool:
        if source.log.next:
            self._comment = "connected"
        return source.end is None or self._after != source.log.next  # that is the id of `end`

    def _take_first(self, source: LiveLog) -> bytes:
        if self._alert is not None or self._after + 1 < source.log.first:
            return b""
        piece = self.framing.take(source, self._after)
        if piece is None or len(piece[0]) > _MAX_FIRST:
            return b""
        body, self._after = piece
        return body

    async def _follow(self, source: LiveLog) -> bytes:
        waiter, log, self._source = self._waiter, source.log, source
        try:
            while True:
                if self._alert is not None:
                    last = await self._respond_to_alert(source)
                    if last is not None:
                        return last
                elif self._after + 1 < log.first:
                    await self._catch_up()
                elif self._after + 1 < log.next:
                    await self._write(self._take(source))
                elif log.end is not None:
                    return self._end(source)
                elif source.failure is not None:
                    return self.framing.interrupted()
                else:
                    source.waiting.add(self)
                    self._phase = WAITING
                    try:
                        await waiter.arm()
                    except BaseException as exc:
                        if waiter.rest is None:
                            raise
                        waiter.rest.cancel(exc)
                    if waiter.rest is not None:
                        await waiter.take_rest()
        finally:
            source.waiting.discard(self)

    def _take(self, source: LiveLog) -> bytes:
        """What follows the cursor, in one body, and advance the cursor."""
        piece = self.framing.take(source, self._after)
        assert piece is not None
        body, self._after = piece
        return body

    def wake(self) -> None:
        """Let the task of this subscription continue `_follow`."""
        self._waiter.wake()

    def take_turn(self) -> bool:
        """What `_follow` would do next, if that is to send one body and to wait again; otherwise wake its task.

        Returns whether it waits again.
        """
        waiter, source, after = self._waiter, self._source, self._after
        log = source.log
        if not waiter.is_parked:
            return False
        is_open = log.end is None and source.failure is None
        piece = self.framing.take(source, after) if is_open and log.first <= after + 1 else None
        if piece is None or piece[1] + 1 < log.next or len(piece[0]) > WHOLE_BYTES:
            waiter.wake()
            return False
        body, last = piece
        self._phase = SENDING
        sending = self._send({"type": "http.response.body", "body": body, "more_body": True})
        self._after = last
        if not waiter.begin(sending):
            return False
        self._phase = WAITING
        return True

    async def _respond_to_alert(self, source: LiveLog) -> bytes | None:
        """Clear the alert. Returns the last frame if it ends the body; of a stream that was read to its end, `end`."""
        alert, self._alert = self._alert, None
        last = None if alert is None else self._frame_for(alert)
        if last is None:
            await self._write(HEARTBEAT)
            return None
        is_read_to_end = source.log.end is not None and source.log.next <= self._after + 1
        return self._end(source) if is_read_to_end else last

    async def _catch_up(self) -> None:
        """Send a page of entries that this process does not hold, or a gap."""
        after = self._after
        page = await self._ask(self._host.broker.read(self._key, after=after))
        if page.first > after + 1:
            gap = self.framing.gap(after + 1, page.first)
            if not self.framing.has_gaps:
                raise Ended(gap)
            await self._write(gap)
            self._move(page.first - 1)
            return
        if not page.entries:
            raise BrokerUnavailable(f"the entries after {after} of stream {self._key.name!r} disappeared; retry")
        for body, last in _bodies(self.framing, page.entries):
            await self._write(body)
            self._after = last
            if self._alert is not None:
                break

    def _end(self, source: LiveLog) -> bytes:
        end = self._end_of(source)
        return self.framing.end(end.without_error() if self._hides_error else end, str(source.log.next))

    def _end_of(self, source: LiveLog) -> End:
        """How the stream ended. For a client that has chunks beyond the end, something was lost: by the broker, or it
        has them from another server."""
        assert source.end is not None
        if self._after < source.log.next or source.end.reason == "lost":
            return source.end
        return End("lost", f"the position is past the end of the stream, which has {source.log.next} chunks")


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
