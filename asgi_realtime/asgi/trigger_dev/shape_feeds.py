"""The endpoints of run feeds as shapes, which the official clients poll. Spec: docs/protocol.md, section 5.2.

The first poll looks up and authorizes the feed as `asgi.feeds` does. A later poll carries a cursor, which only a server
that had found the feed could issue, so the lookup is skipped.
"""

from __future__ import annotations

from starlette.responses import Response

from asgi_realtime.asgi.auth import allows, authorize, batch_resources, tag_resources
from asgi_realtime.asgi.feed_kinds import BatchFeed, RunFeed, TagFeed
from asgi_realtime.asgi.feeds import requested_floor_ms, requested_tags
from asgi_realtime.asgi.lookup import find_batch, find_run
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.trigger_dev.shape_polls import ShapePoll
from asgi_realtime.asgi.trigger_dev.shape_requests import read_shape_request


async def run_feed(request: Request, run_id: str) -> Response:
    """Poll one run."""
    shape = read_shape_request(request)
    feed = RunFeed(run_id)
    if shape.cursor is None or not allows(request.claims, "read", [("runs", run_id)]):
        record = await find_run(request, run_id)
        feed = RunFeed(record.id, record.end)
    return await ShapePoll(request, feed, shape).respond()


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
