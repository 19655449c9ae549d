"""The newest part of a stream, as this process follows it.

Two channels announce changes: that of the stream (appends, its end) and that of its run, because a terminal commit ends
all streams in one step and announces the end of each with the position at which it ends. An end applies only once the
log has all entries before it; if some are missing, the mirror reads again.

Readers hold cursors into `live.log` and never see a mirror move backwards: if Redis has fewer entries than this process
has shown, acknowledged data was lost, and the mirror fails. Its readers then resume by their cursors.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import msgspec

from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.brokers.redis.keys import Keys
from asgi_realtime.brokers.redis.mirror import DataLoss, Mirror
from asgi_realtime.brokers.redis.pubsub import PubSub
from asgi_realtime.core.chunks import decode_as
from asgi_realtime.core.errors import BrokerUnavailable, RunNotFound
from asgi_realtime.core.log import End, Entry, Log, Page, StreamKey
from asgi_realtime.loop.waiting import WakeSoon

ReadPage = Callable[[StreamKey, "int | None"], Awaitable[Page]]
"""Reads the page after a seq, or the newest part of the stream if that is None."""

_POSITIONS = msgspec.msgpack.Decoder(dict[str, int])


class StreamMirror(Mirror):
    """`live` is what readers follow."""

    def __init__(
        self, keys: Keys, pubsub: PubSub, key: StreamKey, *, read: ReadPage, wakes: WakeSoon, max_bytes: int
    ) -> None:
        self.live = LiveLog(Log(), wakes)
        self._read_page = read
        self._max_bytes = max_bytes
        self._has_position = False
        self._ending: tuple[End, int] | None = None  # how the stream ended, and at which position
        channels = (keys.stream_channel(key), keys.topic_channel(f"run:{key.run}"))
        super().__init__(key, channels, pubsub)

    async def _read(self) -> None:
        log = self.live.log
        while log.end is None:
            page = await self._read_page(self.key, log.next - 1 if self._has_position else None)
            if page.next < log.next:
                raise DataLoss(f"stream {self.key.name!r} has {page.next} entries left of {log.next}")
            if not self._has_position or page.first > log.next:
                self._has_position = True
                log.restart(page.entries[0].seq if page.entries else page.next)
            if page.entries:
                self._on_found_change()
            self._add(page.entries)
            if page.end is not None:
                self._end(page.end, page.next)
            if log.next >= page.next:
                return
            if not page.entries:
                raise BrokerUnavailable(f"stream {self.key.name!r} lacks entries from {log.next} on; retry")

    def _add(self, entries: Sequence[Entry]) -> None:
        log = self.live.log
        for entry in entries:
            log.append((entry.data,), entry.time_ms)
        if entries:
            self._grown()

    def _grown(self) -> None:
        log = self.live.log
        if log.size > self._max_bytes:
            log.trim(self._max_bytes)
        if self._ending is not None:
            self._end(*self._ending)
        self.live.wake()

    def _end(self, end: End, at: int) -> None:
        self._ending = (end, at)
        if self.live.log.next >= at:
            self.live.log.close(end)
            self.live.wake()

    def _take(self, message: bytes) -> None:
        log = self.live.log
        kind = message[:1]
        if kind == b"r":
            self._fail(RunNotFound(f"run {self.key.run!r} has expired (Retention.after_end)"))
        elif log.end is not None:
            return
        elif kind == b"a":  # inline: each chunk takes this path
            head, _, body = message.partition(b"\n")
            _, seq_text, time_ms = head.split(b" ")
            seq = int(seq_text)
            if seq > log.next:
                self.check(routine=False)
                return
            items = body.split(b"\n")
            if seq < log.next:
                items = items[log.next - seq :]
            if items:
                log.append(items, int(time_ms))
                self._grown()
        elif kind == b"p":
            if int(message[2:]) > log.next:
                self.check(routine=False)
        elif kind == b"e":
            head, _, end = message.partition(b"\n")
            self._take_end(decode_end(end), int(head[2:]))
        elif kind == b"E":
            self._take_end(*_run_end(message, self.key.name))

    def _take_end(self, end: End, at: int) -> None:
        self._end(end, at)
        if self.live.log.end is None:
            self.check(routine=False)

    def _on_failure(self) -> None:
        assert self.failure is not None
        self.live.fail(self.failure)


def decode_end(data: bytes) -> End:
    return decode_as(data, End)


def _run_end(message: bytes, name: str) -> tuple[End, int]:
    """How a run ended, and the position at which its stream of this name did."""
    head, _, body = message.partition(b"\n")
    size = int(head[2:])
    return decode_end(body[:size]), _POSITIONS.decode(body[size:]).get(name, 0)
