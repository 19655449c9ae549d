"""Feeds of runs over SSE: one run, the runs with some tags, or the runs of a batch.

A snapshot first, as `run` events without an id; then `ready`, with the id to resume from; then each change with its id.
An id is a place in a topic. One that is of no use (another epoch, or trimmed) gives a new snapshot, never a wait. The
resume of a feed that is over and has no news is answered with 204. Spec: docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import chain
from typing import Protocol

import msgspec
from starlette.responses import Response

from asgi_realtime.asgi.answers import refusal
from asgi_realtime.asgi.auth import authorise, batch_resources, run_resources, tag_resources
from asgi_realtime.asgi.lookup import find_batch, find_run
from asgi_realtime.asgi.request import EVENT_STREAM, Request
from asgi_realtime.asgi.subscription import WAITING, Finished, Subscription
from asgi_realtime.brokers.base import LiveTopic
from asgi_realtime.config import Limits, parse_span
from asgi_realtime.core.log import End
from asgi_realtime.core.run_json import run_json
from asgi_realtime.core.runs import RunRecord, batch_topic, run_topic, tag_topic
from asgi_realtime.core.sse import control_frame
from asgi_realtime.core.topics import Change, Changes, Cursor
from asgi_realtime.errors import BrokerUnavailable, InvalidRequest, LimitExceeded, UsageError, shown
from asgi_realtime.livelog import MAX_BODY
from asgi_realtime.names import check_tags
from asgi_realtime.tokens import Claims

MAX_WINDOW_S = 24 * 3600.0
"""How far back a list of runs reaches at most, and unless asked otherwise."""

_PAGE = 500
"""Changes that are loaded at once."""

Answer = Response | Subscription[LiveTopic]


class Feed(Protocol):
    """Which runs a feed has, and when it is over."""

    topic: str
    run_id: str
    """The run that all of this is about, or ""."""
    whole: bool
    """Whether every run has to be met to know the end, also those that a resuming client is not told of."""

    def has(self, record: RunRecord) -> bool: ...

    def saw(self, record: RunRecord) -> None:
        """A record of this feed was met."""

    @property
    def end(self) -> End | None:
        """How the feed ends, once all that was met is sent."""
        ...


class RunFeed:
    """One run, to its terminal state."""

    whole = False

    def __init__(self, record: RunRecord) -> None:
        self.topic = run_topic(record.id)
        self.run_id = record.id
        self.end = record.end

    def has(self, record: RunRecord) -> bool:
        return True

    def saw(self, record: RunRecord) -> None:
        self.end = record.end


class TagFeed:
    """The runs that have all of these tags and were created after a time. Never over."""

    run_id = ""
    whole = False
    end: End | None = None

    def __init__(self, tags: Collection[str], *, created_after_ms: int) -> None:
        self.topic = tag_topic(min(tags))
        self._tags = frozenset(tags)
        self._created_after_ms = created_after_ms

    def has(self, record: RunRecord) -> bool:
        return record.created_at_ms >= self._created_after_ms and self._tags.issubset(record.tags)

    def saw(self, record: RunRecord) -> None:
        return None


class BatchFeed:
    """The runs of a batch, until all are over.

    They are created in their order, so once the last is there, one that is missing was over and is past its retention.
    """

    run_id = ""
    whole = True

    def __init__(self, batch_id: str) -> None:
        self.topic = batch_topic(batch_id)
        self._complete = False  # the last was met
        self._open: set[str] = set()

    def has(self, record: RunRecord) -> bool:
        return True

    def saw(self, record: RunRecord) -> None:
        if record.batch is not None and record.batch.index == record.batch.count - 1:
            self._complete = True
        if record.is_completed:
            self._open.discard(record.id)
        else:
            self._open.add(record.id)

    @property
    def end(self) -> End | None:
        return End("complete") if self._complete and not self._open else None


async def run_feed(request: Request, run_id: str) -> Answer:
    claims = request.authenticate()
    record = await find_run(request, claims, run_id)
    authorise(claims, "read", run_resources(record))
    return _subscribe(request, claims, RunFeed(record))


async def tag_feed(request: Request) -> Answer:
    claims = request.authenticate()
    tags = asked_tags(request.query("tags"), request.host.limits)
    window_s = asked_window(request.query("createdAt"))
    authorise(claims, "read", tag_resources(tags))
    created_after_ms = round((request.host.clock() - window_s) * 1000)
    return _subscribe(request, claims, TagFeed(tags, created_after_ms=created_after_ms))


async def batch_feed(request: Request, batch_id: str) -> Answer:
    claims = request.authenticate()
    authorise(claims, "read", batch_resources(batch_id))  # first: what a batch may be read by is in the request
    await find_batch(request, claims, batch_id)
    return _subscribe(request, claims, BatchFeed(batch_id))


def asked_tags(text: str | None, limits: Limits) -> tuple[str, ...]:
    """The tags of a query. Raises `InvalidRequest`, `UsageError`, `LimitExceeded`."""
    if not text:
        raise InvalidRequest("tags is missing; pass ?tags=a or ?tags=a,b (runs that have all of them)")
    tags = text.split(",")
    if len(tags) > limits.tags:
        raise LimitExceeded(f"{len(tags)} tags are asked for, limit {limits.tags}")
    try:
        return check_tags(tags, limits)
    except LimitExceeded:
        raise
    except UsageError as exc:
        raise InvalidRequest(str(exc)) from exc


def asked_window(text: str | None) -> float:
    """The span of `createdAt` in seconds. Raises `InvalidRequest`."""
    if not text:
        return MAX_WINDOW_S
    try:
        return min(parse_span(text, name="createdAt"), MAX_WINDOW_S)
    except UsageError as exc:
        raise InvalidRequest(
            f"createdAt is {shown(text)}; it must be a span such as '90s', '15m', '1h30m' or '24h'"
        ) from exc


def _subscribe(request: Request, claims: Claims, feed: Feed) -> Answer:
    if not request.accepts_event_stream:
        return refusal(406, "not_acceptable", f"runs are served as a feed; send the header `Accept: {EVENT_STREAM}`")
    skip = claims.skip_columns or tuple(filter(None, (request.query("skipColumns") or "").split(",")))
    cursor = Cursor.parse(request.last_event_id or "")
    return FeedSubscription(request, claims, feed, cursor=cursor, skip=skip)


class FeedSubscription(Subscription[LiveTopic]):
    """Sends the runs of a feed."""

    __slots__ = ("_cursor", "_feed", "_first", "_limits", "_rows", "_skip")

    def __init__(
        self, request: Request, claims: Claims, feed: Feed, *, cursor: Cursor | None, skip: tuple[str, ...]
    ) -> None:
        super().__init__(request.host, request.seats, claims, run_id=feed.run_id)
        self._rows = request.rows
        self._limits = request.host.limits
        self._feed = feed
        self._cursor = cursor
        self._skip = skip
        self._first: Changes | None = None

    def _open(self) -> AbstractAsyncContextManager[LiveTopic]:
        return self._host.broker.follow(self._feed.topic)

    async def _prepare(self, source: LiveTopic) -> str:
        if self._feed.whole:
            # Before the changes are asked for, so that what ends the feed here is among them.
            await self._look(await self._changes(source, None))
        first = self._first = await self._changes(source, self._cursor)
        if not first.snapshot and not first.items and self._feed.end is not None:
            raise Finished
        return "connected"

    async def _follow(self, source: LiveTopic) -> bytes:
        changes, self._first = self._first, None
        assert changes is not None
        if self._alert:
            self._heed()
        await self._tell(changes)
        cursor = changes.cursor
        try:
            while True:
                if self._alert:
                    self._heed()
                    await self._write(self._framing.heartbeat)
                    continue  # while that was sent there may have been another alert
                changed = self._parker.arm()
                source.waiting.add(self._parker)
                try:
                    changes = await self._changes(source, cursor)
                    if changes.items or changes.snapshot:
                        await self._tell(changes)
                        cursor = changes.cursor
                        continue
                    cursor = changes.cursor
                    if self._feed.end is not None:
                        return self._framing.end(self._feed.end, str(cursor))
                    if await self._is_gone():
                        return b""  # without an `end`, which nobody knows: the client comes back and hears of it
                except BrokerUnavailable:
                    pass  # the cursor is where it was, and the broker wakes those who follow when it is back
                self._phase = WAITING
                await changed
        finally:
            source.waiting.discard(self._parker)

    async def _is_gone(self) -> bool:
        """Whether the run of the feed is past its retention, of which a topic does not tell."""
        return bool(self._run_id) and await self._host.runs.load([self._run_id]) == [None]

    async def _changes(self, source: LiveTopic, cursor: Cursor | None) -> Changes:
        return await source.changes(cursor, limit=self._limits.topic_runs)

    async def _look(self, changes: Changes) -> None:
        for page in _pages(changes.items):
            await self._admitted(page)

    async def _tell(self, changes: Changes) -> None:
        if changes.snapshot:
            await self._tell_snapshot(changes)
            return
        for page in _pages(changes.items):
            admitted = await self._admitted(page)
            await self._send_frames(
                self._frame(record, Cursor(changes.cursor.epoch, change.position)) for change, record in admitted
            )

    async def _tell_snapshot(self, changes: Changes) -> None:
        """The newest runs of the feed, those that changed last at the end; then `ready`."""
        found: list[RunRecord] = []
        for page in _pages(changes.items[::-1]):
            found += [record for _, record in await self._admitted(page)]
            if len(found) >= self._limits.feed_runs:
                del found[self._limits.feed_runs :]
                break
        ready = control_frame("ready", msgspec.json.encode({"count": len(found)}), id=str(changes.cursor))
        await self._send_frames(chain((self._frame(record, None) for record in reversed(found)), (ready,)))

    async def _admitted(self, page: Sequence[Change]) -> list[tuple[Change, RunRecord]]:
        """The changes that belong to the feed, with the records behind them."""
        records = await self._rows.records(page)
        admitted = [
            (change, record)
            for change, record in zip(page, records, strict=True)
            if record is not None and self._feed.has(record)
        ]
        for _, record in admitted:
            self._feed.saw(record)
        return admitted

    def _frame(self, record: RunRecord, cursor: Cursor | None) -> bytes:
        json = run_json(record, skip=self._skip) if self._skip else self._rows.json(record)
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


def _pages(items: Sequence[Change]) -> Iterable[Sequence[Change]]:
    return (items[start : start + _PAGE] for start in range(0, len(items), _PAGE))
