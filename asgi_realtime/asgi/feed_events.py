"""A run feed over SSE.

A snapshot first, as `run` events without an id; then `ready`, with the id to resume from; then each change with its id.
An id is a place in a topic. One that is of no use (another epoch, or trimmed) gives a new snapshot, never a wait. The
resume of a feed that is over and has no news is answered with 204. Spec: docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import chain

import msgspec

from asgi_realtime.asgi.feed_kinds import Admitted, Feed, admitted
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.subscription import WAITING, Finished, Subscription
from asgi_realtime.brokers.base import LiveTopic
from asgi_realtime.brokers.following import Follower
from asgi_realtime.brokers.live_log import MAX_BODY
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.run_json import run_json, skippable_fields
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.core.sse import control_frame
from asgi_realtime.core.topics import Change, Changes, Cursor
from asgi_realtime.runs.paging import newest, pages
from asgi_realtime.tokens import Claims


class FeedSubscription(Subscription[LiveTopic]):
    """Sends the runs of a feed."""

    __slots__ = ("_cursor", "_feed", "_first", "_limits", "_run_cache", "_skip")

    def __init__(self, request: Request, claims: Claims, feed: Feed) -> None:
        super().__init__(request.host, request.subscription_limits, claims, run_id=feed.run_id)
        self._run_cache = request.run_cache
        self._limits = request.host.limits
        self._feed = feed
        self._cursor = Cursor.parse(request.last_event_id or "")
        self._skip = skippable_fields(request.skipped_columns(claims))
        self._first: Changes | None = None

    def _open(self) -> AbstractAsyncContextManager[LiveTopic]:
        return self._host.broker.follow(self._feed.topic)

    async def _prepare(self, source: LiveTopic) -> str:
        if self._feed.whole:
            # Before the changes are asked for, so that what ends the feed here is among them.
            await self._look(await self._changes(source, None))
        first = self._first = await self._changes(source, self._cursor)
        if self._cursor is not None and not first.items and self._feed.end is not None:
            raise Finished(self._framing)
        return "connected"

    async def _follow(self, source: LiveTopic) -> bytes:
        changes, self._first = self._first, None
        assert changes is not None
        if self._alert:
            self._heed()
        await self._tell(changes)
        cursor = changes.cursor
        with Follower(source, waiter=self._waiter) as follower:
            while True:
                if self._alert:
                    self._heed()
                    await self._write(self._framing.heartbeat)
                    continue  # while that was sent there may have been another alert
                try:
                    changes = await follower.changes(cursor, limit=self._limits.topic_runs)
                    if changes.items or changes.snapshot:
                        await self._tell(changes)
                        cursor = changes.cursor
                        continue
                    cursor = changes.cursor
                    if self._feed.end is not None:
                        hidden = "error" in self._skip
                        end = self._feed.end.without_error() if hidden else self._feed.end
                        return self._framing.end(end, str(cursor))
                    if await self._is_gone():
                        return b""  # without an `end`, which nobody knows: the client comes back and hears of it
                except BrokerUnavailable:
                    pass  # the cursor is where it was, and the broker wakes those who follow when it is back
                self._phase = WAITING
                await follower.wait()

    async def _is_gone(self) -> bool:
        """Whether the run of the feed is past its retention, of which a topic does not tell."""
        return bool(self._run_id) and await self._host.runs.load([self._run_id]) == [None]

    async def _changes(self, source: LiveTopic, cursor: Cursor | None) -> Changes:
        return await source.changes(cursor, limit=self._limits.topic_runs)

    async def _look(self, changes: Changes) -> None:
        for page in pages(changes.items):
            await self._admitted(page)

    async def _tell(self, changes: Changes) -> None:
        if changes.snapshot:
            await self._tell_snapshot(changes)
            return
        for page in pages(changes.items):
            admitted = await self._admitted(page)
            await self._send_frames(
                self._frame(record, Cursor(changes.cursor.epoch, change.position)) for change, record in admitted
            )

    async def _tell_snapshot(self, changes: Changes) -> None:
        """The newest runs of the feed, those that changed last at the end; then `ready`."""
        found = await newest(changes.items, self._admitted, limit=self._limits.feed_runs)
        ready = control_frame("ready", msgspec.json.encode({"count": len(found)}), id=str(changes.cursor))
        await self._send_frames(chain((self._frame(record, None) for _, record in found), (ready,)))

    async def _admitted(self, page: Sequence[Change]) -> list[Admitted]:
        return await admitted(self._feed, self._run_cache, page)

    def _frame(self, record: RunRecord, cursor: Cursor | None) -> bytes:
        json = self._run_cache.encoded(record, run_json, self._skip)
        return control_frame("run", json, id=None if cursor is None else str(cursor))

    async def _send_frames(self, frames: Iterable[bytes]) -> None:
        """Send frames in as few bodies as a server's buffer takes."""
        body: list[bytes] = []
        size = 0
        for frame in frames:
            if body and size + len(frame) > MAX_BODY:
                await self._write(b"".join(body))
                self._heed()
                body, size = [], 0
            body.append(frame)
            size += len(frame)
        if body:
            await self._write(b"".join(body))
