"""A run feed as a shape, which the official clients poll.

A request without a cursor is answered with the runs of the feed. Any later one brings what it has, an offset, and gets
each run that changed after it. A live request that there is nothing for is held until there is something, or for
`timeouts.poll`; answered at once it would be asked again at once. Runs that change all the time are told now and then:
each poll is a request, in a browser two. All that is known of a client stands in its request, so any process can answer
it, also after a restart. Spec: docs/protocol.md.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import anyio
from starlette.responses import Response

from asgi_realtime.asgi.feed_kinds import Admitted, Feed, admitted
from asgi_realtime.asgi.request import EVENT_STREAM, Request
from asgi_realtime.asgi.responses import json_bytes_response
from asgi_realtime.asgi.subscription import shutdown_response, until_disconnect
from asgi_realtime.asgi.trigger_dev import shapes
from asgi_realtime.asgi.trigger_dev.shapes import ShapeCursor
from asgi_realtime.brokers.base import LiveTopic
from asgi_realtime.brokers.following import Follower
from asgi_realtime.core.errors import ExpiredToken, InvalidRequest, shown
from asgi_realtime.core.topics import Changes, Cursor
from asgi_realtime.loop.waiting import make_guard, make_interrupt, make_waiter
from asgi_realtime.runs.paging import newest, pages
from asgi_realtime.tokens import Claims

MAX_ROWS = 1000
MAX_BYTES = 4 * 1024 * 1024
"""Of one answer, less the last row. What is left over follows at once: the client asks for what comes next."""

HOLD_JITTER = 0.15
"""Polls that began together, after a restart, do not end together."""

AT_ONCE = 5
"""Answers that may follow each other closely before they are spaced: what happens when a run begins is told at once."""

CLOSELY_MS = 1000

SPACING_S = 0.25
"""Delay between answers to a client whose runs change all the time."""

_OFFSET = re.compile(r"[0-9]{1,18}_[0-9]{1,18}")
_RHYTHM = re.compile(r"([0-9]{1,15})-([0-9]{1,9})")
_SNAPSHOT = "-1"


class AskedShape(NamedTuple):
    """What a request asks for. A cursor that is none of ours is known to be of no use."""

    snapshot: bool
    cursor: ShapeCursor | None
    live: bool
    rhythm: Rhythm


class Rhythm(NamedTuple):
    """When the last answer to a client was given, and how many had come closely before it.

    A client brings it as the `cursor`, whose purpose is that no two URLs are the same.
    """

    at_ms: int = 0
    close: int = 0

    def __str__(self) -> str:
        return f"{self.at_ms}-{self.close}"

    @classmethod
    def parse(cls, text: str) -> Rhythm:
        """What is not ours is no rhythm."""
        found = _RHYTHM.fullmatch(text)
        return cls(int(found[1]), int(found[2])) if found else cls()

    def next(self, now_ms: int) -> Rhythm:
        return Rhythm(now_ms, self.close + 1 if abs(now_ms - self.at_ms) < CLOSELY_MS else 0)

    def early_s(self, now_ms: int, gather_s: float) -> float:
        """How much too early an answer would be now; 0 if it would not."""
        if self.close < AT_ONCE:
            return 0.0
        return min(max(self.at_ms / 1000 + gather_s - now_ms / 1000, 0.0), gather_s)


def asked_shape(request: Request) -> AskedShape:
    """Read the query. Raises `InvalidRequest`."""
    offset = request.query("offset")
    if offset is None:
        raise InvalidRequest(
            f"offset is missing; send the header `Accept: {EVENT_STREAM}` for events, or ?offset=-1 for a shape"
        )
    live = request.query("live") == "true"
    rhythm = Rhythm.parse(request.query("cursor") or "")
    if offset == _SNAPSHOT:
        return AskedShape(True, None, live, rhythm)
    if not _OFFSET.fullmatch(offset):
        raise InvalidRequest(f"offset is {shown(offset)}; allowed are -1 and what the last answer gave")
    return AskedShape(False, ShapeCursor.parse(request.query("handle") or "", offset), live, rhythm)


class ShapePoll:
    """One request. The ticker and the shutdown see it as a `Subscriber`, and wake it when it is to look again."""

    def __init__(self, request: Request, claims: Claims, feed: Feed, asked: AskedShape) -> None:
        host = request.host
        self._host = host
        self._run_cache = request.run_cache
        self._subscription_limits = request.subscription_limits
        self._receive = request.receive
        self._token_id = "" if claims.secret else claims.token_id
        self._expires_at = claims.expires_at
        self._feed = feed
        self._asked = asked
        self._skip = shapes.skippable_columns(request.skipped_columns(claims))
        self._interrupt = make_interrupt()
        self._has_gathered = False
        self._waiter = make_waiter()
        self._hold_s = host.timeouts.poll * random.uniform(1 - HOLD_JITTER, 1 + HOLD_JITTER)
        self._since: float | None = None  # when the ticker saw this first
        self._is_held_long = False

    async def answer(self) -> Response:
        """Raises `ExpiredToken` once the token has expired, `BrokerUnavailable`, `LimitExceeded`."""
        self._subscription_limits.acquire(self._feed.run_id, self._token_id)
        self._host.subscribers.add(self)
        try:
            with self._interrupt:
                async with (
                    make_guard(partial(until_disconnect, self._receive)),
                    self._host.broker.follow(self._feed.topic) as topic,
                ):
                    return await self._find(topic)
        finally:
            self._host.subscribers.discard(self)
            self._subscription_limits.release(self._feed.run_id, self._token_id)
        return shutdown_response()  # or the client has left, and hears nothing

    async def _find(self, topic: LiveTopic) -> Response:
        asked = self._asked
        if asked.snapshot:
            return await self._snapshot(await self._changes(topic, None))
        if asked.cursor is None:
            return self._must_refetch(await self._changes(topic, None))
        return await self._follow(topic, Cursor(asked.cursor.epoch, asked.cursor.position))

    async def _follow(self, topic: LiveTopic, cursor: Cursor) -> Response:
        with Follower(topic, waiter=self._waiter) as follower:
            while True:
                changes = await follower.changes(cursor, limit=self._host.limits.topic_runs)
                if changes.snapshot and cursor.position:
                    return self._must_refetch(changes)
                if changes.snapshot and changes.items:  # there was nothing at its position, and now there is
                    return await self._snapshot(changes)
                found = await self._found(changes)
                if found and await self._gathered(found):
                    continue  # there may be more by now
                cursor = changes.cursor
                answer = self._answer(found, cursor) if found else self._verdict(cursor)
                if answer is not None:
                    return answer
                await follower.wait()

    async def _changes(self, topic: LiveTopic, cursor: Cursor | None) -> Changes:
        return await topic.changes(cursor, limit=self._host.limits.topic_runs)

    async def _snapshot(self, changes: Changes) -> Response:
        load = partial(admitted, self._feed, self._run_cache)
        found = await newest(changes.items, load, limit=self._host.limits.feed_runs)
        return self._answer(found, changes.cursor)

    async def _found(self, changes: Changes) -> list[Admitted]:
        """The changes that are of this feed, at least as many as go into one answer."""
        found: list[Admitted] = []
        for page in pages(changes.items):
            found += await admitted(self._feed, self._run_cache, page)
            if len(found) > MAX_ROWS:
                break
        return found

    async def _gathered(self, found: Sequence[Admitted]) -> bool:
        """Wait, once, if the client has heard enough just now; whether it was so. The end of the one run that a feed is
        about is told at once: the client is done with it."""
        if self._has_gathered or not self._asked.live or (self._feed.run_id and found[-1][1].is_completed):
            return False
        early_s = self._asked.rhythm.early_s(self._now_ms(), SPACING_S)
        self._has_gathered = True
        if early_s:
            await anyio.sleep(early_s)
        return early_s > 0

    def _verdict(self, cursor: Cursor) -> Response | None:
        """The answer to a poll that there is nothing for, unless it is to be held on."""
        if self._host.closing:
            return shutdown_response()
        if self._host.clock() >= self._expires_at:
            raise ExpiredToken("token has expired")
        return None if self._asked.live and not self._is_held_long else self._answer([], cursor)

    def _answer(self, found: Sequence[Admitted], cursor: Cursor) -> Response:
        """The runs as rows, as many as go into one answer, and the cursor behind them."""
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
        return json_bytes_response(shapes.body(rows), headers=self._headers(cursor))

    def _headers(self, cursor: Cursor) -> dict[str, str]:
        """What the clients require, and that the answer is complete in itself: else they ask once more, for nothing."""
        place = ShapeCursor(cursor.epoch, self._feed.floor_ms, cursor.position)
        headers = {"electric-handle": place.handle, "electric-offset": place.offset, "electric-up-to-date": "true"}
        if self._asked.live:
            return headers | {"electric-cursor": str(self._asked.rhythm.next(self._now_ms()))}
        return headers | {"electric-schema": _schema(self._skip)}

    def _now_ms(self) -> int:
        return round(self._host.clock() * 1000)

    def _must_refetch(self, changes: Changes) -> Response:
        handle = ShapeCursor(changes.cursor.epoch, self._feed.floor_ms, 0).handle
        return json_bytes_response(shapes.MUST_REFETCH, 409, {"electric-handle": handle})

    # What the host calls

    def tick(self, now: float, steady: float) -> None:
        if self._since is None:
            self._since = steady
        self._is_held_long = steady - self._since >= self._hold_s
        if self._is_held_long or now >= self._expires_at:
            self._waiter.wake()

    def shut_down(self) -> None:
        self._interrupt.interrupt()  # also out of a call to a broker that does not answer


@lru_cache(maxsize=64)
def _schema(skip: tuple[str, ...]) -> str:
    return shapes.schema(skip=skip)
