"""The endpoints of run feeds as events. Spec: docs/protocol.md, section 5.1."""

from __future__ import annotations

from asgi_realtime.asgi.auth import authorize, batch_resources, tag_resources
from asgi_realtime.asgi.feed_events import FeedResponse
from asgi_realtime.asgi.feed_kinds import BatchFeed, RunFeed, TagFeed
from asgi_realtime.asgi.lookup import find_batch, find_run
from asgi_realtime.asgi.request import Request
from asgi_realtime.core.config import parse_span
from asgi_realtime.core.errors import InvalidRequest, LimitExceeded, UsageError, shown
from asgi_realtime.core.names import check_tags

DEFAULT_WINDOW = "24h"
MAX_WINDOW_S = parse_span(DEFAULT_WINDOW)
"""How far back a list of runs can reach."""


async def run_feed(request: Request, run_id: str) -> FeedResponse:
    """Follow one run."""
    record = await find_run(request, run_id)
    return FeedResponse(request, RunFeed(record.id, record.end))


async def tag_feed(request: Request) -> FeedResponse:
    """Follow the recent runs that have all of the tags."""
    tags, floor_ms = requested_tags(request), requested_floor_ms(request)
    authorize(request.claims, "read", tag_resources(tags))
    return FeedResponse(request, TagFeed(tags, floor_ms=floor_ms))


async def batch_feed(request: Request, batch_id: str) -> FeedResponse:
    """Follow the runs of a batch."""
    authorize(request.claims, "read", batch_resources(batch_id))
    closed = await find_batch(request, batch_id)
    return FeedResponse(request, BatchFeed(batch_id, closed=closed))


def requested_tags(request: Request) -> tuple[str, ...]:
    """The tags of the query. Raises `InvalidRequest`, `LimitExceeded`."""
    text, limits = request.query("tags"), request.host.limits
    if not text:
        raise InvalidRequest("tags is missing; pass ?tags=a or ?tags=a,b (runs that have all of them)")
    tags = text.split(",")
    if len(tags) > limits.tags:
        raise LimitExceeded(f"{len(tags)} tags are requested, limit {limits.tags}")
    try:
        return check_tags(tags, limits)
    except LimitExceeded:
        raise
    except UsageError as exc:
        raise InvalidRequest(str(exc)) from exc


def requested_floor_ms(request: Request) -> int:
    """The oldest creation time in the window of `createdAt`, in unix milliseconds. Raises `InvalidRequest`."""
    text = request.query("createdAt") or DEFAULT_WINDOW
    try:
        window_s = min(parse_span(text, name="createdAt"), MAX_WINDOW_S)
    except UsageError as exc:
        raise InvalidRequest(
            f"createdAt is {shown(text)}; it must be a span such as '90s', '15m', '1h30m' or '24h'"
        ) from exc
    return round((request.host.clock() - window_s) * 1000)
