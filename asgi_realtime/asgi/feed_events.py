"""A run feed as events.

First a snapshot: `run` events without an id, then `ready` with the id to resume from. After that each change, with its
id. An id is a position in a topic. If it is unusable (of another epoch, or trimmed), the client gets a new snapshot. A
client that resumes a feed after its end gets 204. Spec: docs/protocol.md, section 5.1.
"""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import chain

import msgspec

from asgi_realtime.asgi.connection import WHOLE_BYTES
from asgi_realtime.asgi.feed_kinds import Feed, FeedChange, select_changes
from asgi_realtime.asgi.phases import WAITING
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.subscription import SubscriptionResponse
from asgi_realtime.brokers.base import LiveTopic
from asgi_realtime.brokers.following import Follower
from asgi_realtime.brokers.live_log import MAX_BODY
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.run_json import run_json, skippable_fields
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.core.sse import CONTROL_TAIL, HEARTBEAT, control_frame, control_head, event_data
from asgi_realtime.core.topics import Change, Changes, Cursor
from asgi_realtime.runs.paging import newest, pages


class FeedResponse(SubscriptionResponse[LiveTopic]):
    """Sends the runs of a feed."""

    __slots__ = ("_cursor", "_feed", "_first", "_limits", "_run_cache", "_skip")
    kind = "feed"

    def __init__(self, request: Request, feed: Feed) -> None:
        super().__init__(request, run_id=feed.run_id)
        self._run_cache = request.run_cache
        self._limits = request.host.limits
        self._feed = feed
        self._cursor = Cursor.parse(request.last_event_id or "")
        self._skip = skippable_fields(request.skipped_columns)
        self._first: Changes | None = None

    def _open(self) -> AbstractAsyncContextManager[LiveTopic]:
        return self._host.broker.follow(self._feed.topic)

    async def _prepare(self, source: LiveTopic) -> bool:
        if self._feed.needs_every_run:
            # Before the first changes are read, so that a change that ends the feed is among those.
            for page in pages((await self._changes(source, None)).items):
                await self._select(page)
        first = self._first = await self._changes(source, self._cursor)
        return self._cursor is None or bool(first.items) or self._feed.end is None

    async def _follow(self, source: LiveTopic) -> bytes:
        changes, self._first = self._first, None
        assert changes is not None
        await self._send_changes(changes)
        cursor = changes.cursor
        with Follower(source, waiter=self._waiter) as follower:
            while True:
                if self._alert is not None:
                    self._handle_alert()
                    await self._write(HEARTBEAT)
                    continue  # there can be another alert by now
                try:
                    changes = await self._ask(follower.changes(cursor, limit=self._limits.topic_runs))
                    if changes.items or changes.snapshot:
                        await self._send_changes(changes)
                        cursor = changes.cursor
                        continue
                    cursor = changes.cursor
                    if self._feed.end is not None:
                        return self._end(cursor)
                    if await self._is_removed(source):
                        return b""  # its end is unknown; the client reconnects and gets 404
                except BrokerUnavailable:
                    if source.failure is not None:
                        return b""  # it never wakes its followers again; the client resumes on a new one
                    # The cursor has not moved, and the broker wakes its followers when it is back.
                self._phase = WAITING
                await follower.wait()

    def _end(self, cursor: Cursor) -> bytes:
        end = self._feed.end
        assert end is not None
        return self.framing.end(end.without_error() if "error" in self._skip else end, str(cursor))

    async def _is_removed(self, source: LiveTopic) -> bool:
        """Whether the run has expired. That is not a change of its topic, but the topic is empty then."""
        return bool(self._run_id) and not (await self._ask(source.changes(None, limit=1))).items

    async def _changes(self, source: LiveTopic, cursor: Cursor | None) -> Changes:
        return await source.changes(cursor, limit=self._limits.topic_runs)

    async def _select(self, page: Sequence[Change]) -> list[FeedChange]:
        return await select_changes(self._feed, self._run_cache, page)

    async def _encode(self, page: Sequence[Change]) -> list[tuple[Change, bytes]]:
        """The JSON of the runs to send. A long list so holds no payloads that the reader skips."""
        selected = await self._select(page)
        return [(change, self._run_cache.encoded(record, _event_data, self._skip)) for change, record in selected]

    async def _send_changes(self, changes: Changes) -> None:
        if changes.snapshot:
            await self._send_snapshot(changes)
            return
        for page in pages(changes.items):
            self._handle_alert()
            encoded = await self._ask(self._encode(page))
            await self._send_frames(
                _frame(json, Cursor(changes.cursor.epoch, change.position)) for change, json in encoded
            )

    async def _send_snapshot(self, changes: Changes) -> None:
        """The newest runs of the feed, in the order of their last change; then `ready`."""
        self._handle_alert()
        found = await self._ask(newest(changes.items, self._encode, limit=self._limits.feed_runs))
        ready = control_frame("ready", msgspec.json.encode({"count": len(found)}), id=str(changes.cursor))
        await self._send_frames(chain((_frame(json, None) for _, json in found), ((ready,),)))

    async def _send_frames(self, frames: Iterable[tuple[bytes, ...]]) -> None:
        """Send frames, joined into bodies of about `MAX_BODY` bytes at most. A larger frame is sent alone."""
        body: list[bytes] = []
        size = 0
        for frame in frames:
            length = sum(map(len, frame))
            if body and size + length > MAX_BODY:
                await self._write_parts(body, size)
                self._handle_alert()
                body, size = [], 0
            body += frame
            size += length
        if body:
            await self._write_parts(body, size)

    def _write_parts(self, parts: Sequence[bytes], size: int) -> Awaitable[None]:
        return self._write_large(parts) if size > WHOLE_BYTES else self._write(b"".join(parts))


def _frame(json: bytes, cursor: Cursor | None) -> tuple[bytes, ...]:
    """In parts, because all readers share the JSON of a run, and a frame would copy it."""
    return control_head("run", id=None if cursor is None else str(cursor)), json, CONTROL_TAIL


def _event_data(record: StoredRecord, skip: Collection[str]) -> bytes:
    return event_data(run_json(record, skip))
