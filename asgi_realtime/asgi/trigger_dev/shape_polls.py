"""A run feed for the official clients, which poll it as a shape.

A poll without a cursor gets the runs of the feed. Every later poll carries an offset and gets the runs that changed
after it. Only a server that had found the feed could issue that cursor, so later polls skip the lookup. A live poll
without changes is held until something changes or `timeouts.poll` has passed, because an immediate response would only
be polled again. Responses about runs that change continuously are spaced out, because each costs the client a request,
and a browser two. Spec: docs/protocol.md, section 5.2.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import anyio
from starlette.responses import Response

from asgi_realtime.asgi.auth import allows, authorize, batch_resources, tag_resources
from asgi_realtime.asgi.feed_kinds import BatchFeed, Feed, FeedChange, RunFeed, TagFeed, select_changes
from asgi_realtime.asgi.feeds import requested_floor_ms, requested_tags
from asgi_realtime.asgi.lookup import find_batch, find_run
from asgi_realtime.asgi.open_request import Deadline, held
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import json_bytes_response, json_parts_response
from asgi_realtime.asgi.trigger_dev import shapes
from asgi_realtime.asgi.trigger_dev.client_version import check_client
from asgi_realtime.asgi.trigger_dev.shape_requests import ShapeRequest, read_shape_request
from asgi_realtime.asgi.trigger_dev.shapes import ShapeCursor
from asgi_realtime.brokers.following import Follower
from asgi_realtime.core.errors import ExpiredToken, ServerShutdown
from asgi_realtime.core.topics import Changes, Cursor
from asgi_realtime.runs.paging import newest, pages

MAX_ROWS = 1000
MAX_BYTES = 4 * 1024 * 1024
"""Limits of one response; the last row can exceed the bytes. The client polls for the rest immediately."""

HOLD_JITTER = 0.15
"""Keeps polls that began together, such as after a restart, from ending together."""

SPACING_S = 0.25
"""Time between responses to a client whose runs change continuously."""


_WATCHED = 1
"""The floor of the feed of a run whose readers are counted. It excludes nothing, and makes the cursor say so: a later
poll has no record of the run."""


async def run_feed(request: Request, run_id: str) -> Response:
    """Poll one run."""
    check_client(request)
    shape = read_shape_request(request)
    feed = RunFeed(run_id)
    watches = shape.cursor is not None and shape.cursor.floor_ms == _WATCHED
    if shape.cursor is None or not allows(request.claims, "read", [("runs", run_id)]):
        record = await find_run(request, run_id)
        feed = RunFeed(record.id, record.end)
        watches = record.counts_watchers
    if not watches:
        return await ShapePoll(request, feed, shape).respond()
    feed.floor_ms = _WATCHED
    watchers = request.host.watchers
    watchers.enter_poll(run_id)
    try:
        return await ShapePoll(request, feed, shape).respond()
    finally:
        watchers.leave_poll(run_id)


async def tag_feed(request: Request) -> Response:
    """Poll the recent runs that have all of the tags. The first poll fixes the window for the later ones."""
    tags, floor_ms = requested_tags(request), requested_floor_ms(request)
    shape = read_shape_request(request)
    authorize(request.claims, "read", tag_resources(tags))
    if shape.cursor is not None:
        floor_ms = shape.cursor.floor_ms
    return await ShapePoll(request, TagFeed(tags, floor_ms=floor_ms), shape).respond()


async def batch_feed(request: Request, batch_id: str) -> Response:
    """Poll the runs of a batch."""
    shape = read_shape_request(request)
    authorize(request.claims, "read", batch_resources(batch_id))
    closed = shape.cursor is None and await find_batch(request, batch_id)
    return await ShapePoll(request, BatchFeed(batch_id, closed=closed), shape).respond()


class ShapePoll:
    """One poll."""

    def __init__(self, request: Request, feed: Feed, shape: ShapeRequest) -> None:
        self._request = request
        self._host = request.host
        self._run_cache = request.run_cache
        self._feed = feed
        self._shape = shape
        self._skip = shapes.skippable_columns(request.skipped_columns)
        self._was_delayed = False

    async def respond(self) -> Response:
        """Raises `ExpiredToken` once the token has expired, `BrokerUnavailable`, `LimitExceeded`."""
        hold_s = self._host.timeouts.poll * random.uniform(1 - HOLD_JITTER, 1 + HOLD_JITTER)
        async with held(self._request, self._feed.topic, hold_s, run_id=self._feed.run_id) as (follower, deadline):
            return await self._poll(follower, deadline)
        raise ServerShutdown()  # the client has disconnected and does not receive it

    async def _poll(self, follower: Follower, deadline: Deadline) -> Response:
        shape = self._shape
        if shape.cursor is not None:
            return await self._follow(follower, deadline, Cursor(shape.cursor.epoch, shape.cursor.position))
        changes = await self._changes(follower, None)
        return await self._snapshot(changes) if shape.snapshot else self._must_refetch(changes)

    async def _follow(self, follower: Follower, deadline: Deadline, cursor: Cursor) -> Response:
        while True:
            changes = await self._changes(follower, cursor)
            if changes.snapshot and cursor.position:
                return self._must_refetch(changes)
            if changes.snapshot and changes.items:  # the topic was empty at the cursor
                return await self._snapshot(changes)
            found = await self._find(changes)
            if found and await self._delay(found):
                continue  # to include later changes
            cursor = changes.cursor
            if not found:
                self._check_can_wait()
            if found or deadline.is_over or not self._shape.live:
                return self._rows(found, cursor)
            await follower.wait()

    async def _changes(self, follower: Follower, cursor: Cursor | None) -> Changes:
        return await follower.changes(cursor, limit=self._host.limits.topic_runs)

    async def _snapshot(self, changes: Changes) -> Response:
        load = partial(select_changes, self._feed, self._run_cache)
        found = await newest(changes.items, load, limit=self._host.limits.feed_runs)
        return self._rows(found, changes.cursor)

    async def _find(self, changes: Changes) -> list[FeedChange]:
        """The changes that belong to this feed, at least as many as fit into one response."""
        found: list[FeedChange] = []
        for page in pages(changes.items):
            found += await select_changes(self._feed, self._run_cache, page)
            if len(found) > MAX_ROWS:
                break
        return found

    async def _delay(self, found: Sequence[FeedChange]) -> bool:
        """Delay the response once if the last ones came in quick succession; True after a delay.

        The end of the run that a feed is about is never delayed, because the client stops polling then.
        """
        if self._was_delayed or not self._shape.live or (self._feed.run_id and found[-1][1].is_completed):
            return False
        self._was_delayed = True
        delay_s = self._shape.pace.delay_s(self._now_ms(), SPACING_S)
        if delay_s:
            await anyio.sleep(delay_s)
        return delay_s > 0

    def _check_can_wait(self) -> None:
        """Raises what a poll without changes gets instead of a response."""
        if self._host.closing:
            raise ServerShutdown()
        if self._host.clock() >= self._request.claims.expires_at:
            raise ExpiredToken("token has expired")

    def _rows(self, found: Sequence[FeedChange], cursor: Cursor) -> Response:
        """As many rows as fit into one response, and the cursor after them."""
        rows: list[bytes] = []
        size = 0
        for change, record in found:
            if size >= MAX_BYTES or len(rows) == MAX_ROWS:
                break
            rows.append(self._run_cache.encoded(record, shapes.row, self._skip))
            size += len(rows[-1])
            position = change.position
        if len(rows) < len(found):
            cursor = Cursor(cursor.epoch, position)
        return json_parts_response(shapes.body(rows), headers=self._headers(cursor))

    def _headers(self, cursor: Cursor) -> dict[str, str]:
        """The headers that clients require. Without `electric-up-to-date` they would poll once more for nothing."""
        place = ShapeCursor(cursor.epoch, self._feed.floor_ms, cursor.position)
        headers = {"electric-handle": place.handle, "electric-offset": place.offset, "electric-up-to-date": "true"}
        if self._shape.live:
            return headers | {"electric-cursor": str(self._shape.pace.next(self._now_ms()))}
        return headers | {"electric-schema": shapes.schema(self._skip)}

    def _now_ms(self) -> int:
        return round(self._host.clock() * 1000)

    def _must_refetch(self, changes: Changes) -> Response:
        handle = ShapeCursor(changes.cursor.epoch, self._feed.floor_ms, 0).handle
        return json_bytes_response(shapes.MUST_REFETCH, 409, {"electric-handle": handle})
