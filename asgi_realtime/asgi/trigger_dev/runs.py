"""Runs over HTTP: trigger, retrieve and cancel one, and add tags to it.

A trigger request is checked completely before it is recorded as the one that creates the run, and before a one-time
token is spent. A client that gets no response sends the same request again and gets the same run.
"""

from __future__ import annotations

import anyio.lowlevel
import msgspec
from starlette.responses import Response

from asgi_realtime.asgi.auth import authorize, run_resources
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import exception_response, json_parts_response, json_response
from asgi_realtime.asgi.trigger_dev.credentials import (
    check_tags_allowed,
    check_task,
    find_open_run,
    find_parent,
    handle_token,
    once,
)
from asgi_realtime.asgi.trigger_dev.decoding import read_json
from asgi_realtime.asgi.trigger_dev.run_requests import NO_STORE, RunRequest, max_body_bytes, read_options, read_payload
from asgi_realtime.core.errors import LimitExceeded, RunNotFound
from asgi_realtime.core.names import check_tags
from asgi_realtime.core.run_changes import TagsAdded
from asgi_realtime.core.run_json import run_json
from asgi_realtime.core.scopes import named_ids
from asgi_realtime.runs.handles import run_scopes

MAX_TAGS_BODY_BYTES = 64 * 1024


class NewTags(msgspec.Struct):
    """The body that adds tags."""

    tags: str | list[str]


async def trigger(request: Request, task_id: str) -> Response:
    """Create a run of a task, or find the one that this request or its idempotency key created before."""
    authorize(request.claims, "trigger", [("tasks", task_id)])
    check_task(request, task_id)
    attempt = once(request, f"trigger {task_id}")

    tasks, limits = request.host.tasks, request.host.limits
    body = read_json(await request.body(max_body_bytes(limits)), RunRequest, max_parts=None)
    options = read_options(body, limits)
    payload, run_options = read_payload(body, options, limits), options.run_options()
    await anyio.lowlevel.checkpoint()  # both the last step and the next can decode a large payload
    parent = await find_parent(request, options.parent_run_id)
    prepared = tasks.prepare_json(task_id, payload, run_options, parent=parent, owner=request.owner or None)
    check_tags_allowed(request.claims, prepared.record.tags)
    launched = await tasks.launcher.launch(prepared, once=attempt)
    token = handle_token(request, run_scopes(launched.record.id))
    return json_response({"id": launched.record.id, "isCached": launched.is_cached}, headers={"x-trigger-jwt": token})


async def packets(request: Request) -> Response:
    """Where the official client stores and fetches large payloads.

    413 is final for the client, so its user sees the limit immediately.
    """
    if request.method == "GET":
        raise RunNotFound("payloads are not stored separately; retrieve the run")
    raise LimitExceeded(NO_STORE, status=413)


async def retrieve_run(request: Request, run_id: str) -> Response:
    """Respond with the record of a run."""
    try:
        record = await request.host.runs.get(run_id)
    except RunNotFound as exc:
        if request.is_from_elsewhere:
            raise
        response = exception_response(exc, now=request.host.clock())
        if run_id in named_ids(request.claims.scopes, "read", "runs"):  # the run may not have reached the broker yet
            response.headers["x-should-retry"] = "true"
        return response
    authorize(request.claims, "read", run_resources(record))
    request.run_cache.add(record)
    return json_parts_response([request.run_cache.encoded(record, run_json, request.claims.skip_columns)])


async def cancel_run(request: Request, run_id: str) -> Response:
    """Cancel a run. A run that is over stays as it ended."""
    record = await request.host.runs.get(run_id)
    authorize(request.claims, "write", [("runs", record.id)])
    await request.host.cancel(run_id)
    return json_response({"id": run_id})


async def add_tags(request: Request, run_id: str) -> Response:
    """Add tags to a run that is not over."""
    record = await find_open_run(request, run_id)
    limits = request.host.limits
    tags = check_tags(read_json(await request.body(MAX_TAGS_BODY_BYTES), NewTags).tags, limits)
    check_tags((*record.tags, *tags), limits)
    changed = await request.host.runs.update(run_id, TagsAdded(tags))
    return json_response({"message": f"run {run_id} has {len(changed.tags)} tags"})
