"""The routes of run feeds. Over SSE if the request accepts that, else as the shape that the official clients poll.

What a feed may be asked for, and by whom, is the same either way. Spec: docs/protocol.md.
"""

from __future__ import annotations

from starlette.responses import Response

from asgi_realtime.asgi.auth import authorise, batch_resources, may, run_resources, tag_resources
from asgi_realtime.asgi.feed_events import FeedSubscription
from asgi_realtime.asgi.feed_kinds import BatchFeed, Feed, RunFeed, TagFeed
from asgi_realtime.asgi.lookup import find_batch, find_run
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.subscription import Subscription
from asgi_realtime.asgi.trigger_dev.shape_polls import ShapePoll
from asgi_realtime.asgi.trigger_dev.shape_requests import ShapeRequest, read_shape_request
from asgi_realtime.brokers.base import LiveTopic
from asgi_realtime.core.config import Limits, parse_span
from asgi_realtime.core.errors import InvalidRequest, LimitExceeded, UsageError, shown
from asgi_realtime.core.names import check_tags
from asgi_realtime.tokens import Claims

MAX_WINDOW_S = 24 * 3600.0
"""How far back a list of runs reaches at most, and unless asked otherwise."""

Answer = Response | Subscription[LiveTopic]


async def run_feed(request: Request, run_id: str) -> Answer:
    claims = request.authenticate()
    asked = _asked(request)
    if asked is not None and asked.cursor is not None and may(claims, "read", [("runs", run_id)]):
        return await _answer(request, claims, RunFeed(run_id), asked)  # its record need not be read to know that
    record = await find_run(request, claims, run_id, events=asked is None)
    authorise(claims, "read", run_resources(record))
    return await _answer(request, claims, RunFeed(record.id, record.end), asked)


async def tag_feed(request: Request) -> Answer:
    claims = request.authenticate()
    tags = asked_tags(request.query("tags"), request.host.limits)
    window_s = asked_window(request.query("createdAt"))
    asked = _asked(request)
    authorise(claims, "read", tag_resources(tags))
    if asked is None or asked.cursor is None:
        floor_ms = round((request.host.clock() - window_s) * 1000)
    else:
        floor_ms = asked.cursor.floor_ms  # the window of a shape stays where its first request has put it
    return await _answer(request, claims, TagFeed(tags, floor_ms=floor_ms), asked)


async def batch_feed(request: Request, batch_id: str) -> Answer:
    claims = request.authenticate()
    asked = _asked(request)
    authorise(claims, "read", batch_resources(batch_id))  # first: what a batch may be read by is in the request
    if asked is not None and asked.cursor is not None:
        return await _answer(request, claims, BatchFeed(batch_id), asked)  # it was found when the cursor was given
    closed = await find_batch(request, claims, batch_id, events=asked is None)
    return await _answer(request, claims, BatchFeed(batch_id, closed=closed), asked)


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


def _asked(request: Request) -> ShapeRequest | None:
    """None if events are asked for."""
    return None if request.accepts_event_stream else read_shape_request(request)


async def _answer(request: Request, claims: Claims, feed: Feed, asked: ShapeRequest | None) -> Answer:
    if asked is None:
        return FeedSubscription(request, claims, feed)
    return await ShapePoll(request, claims, feed, asked).respond()
