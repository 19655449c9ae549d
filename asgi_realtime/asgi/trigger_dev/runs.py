"""Runs over HTTP: trigger, retrieve and cancel one, and add tags to it.

A trigger request is checked completely before it is recorded as the one that creates the run, and before a one-time
token is spent. A client that gets no answer sends the same request again and gets the same run.
"""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from asgi_realtime.asgi.auth import authorise, run_resources
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import exception_response, json_bytes_response, json_response
from asgi_realtime.asgi.trigger_dev.credentials import (
    check_task,
    find_parent,
    granted,
    handle_token,
    once,
    open_run,
)
from asgi_realtime.asgi.trigger_dev.run_requests import (
    NO_STORE,
    RunRequest,
    max_body_bytes,
    read_json,
    read_options,
    read_payload,
)
from asgi_realtime.core.errors import LimitExceeded, RunNotFound
from asgi_realtime.core.names import check_tags
from asgi_realtime.core.run_json import run_json
from asgi_realtime.core.runs import TagsAdded
from asgi_realtime.core.scopes import names

TAGS_BYTES = 64 * 1024


class NewTags(msgspec.Struct):
    tags: str | list[str]


async def trigger(request: Request, task_id: str) -> Response:
    claims = request.authenticate()
    authorise(claims, "trigger", [("tasks", task_id)])
    check_task(request, claims, task_id)
    request_is = once(request, claims, f"trigger {task_id}")

    tasks = request.host.tasks
    limits = request.host.limits
    body = read_json(await request.body(max_body_bytes(limits)), RunRequest)
    options = read_options(body, limits)
    payload, run_options = read_payload(body, options, limits), options.run_options()
    parent = await find_parent(request, claims, options.parent_run_id)
    token_id = None if claims.secret else claims.token_id
    prepared = tasks.prepare_json(task_id, payload, run_options, parent=parent, token_id=token_id)
    launched = await tasks.launcher.launch(prepared, once=request_is)
    token = handle_token(request.host, claims, granted(claims, launched.record))
    return json_response({"id": launched.record.id, "isCached": launched.is_cached}, headers={"x-trigger-jwt": token})


async def packets(request: Request) -> Response:
    """Where the official client would store and fetch a payload that is large. So that its user hears of the limit, and
    hears it at once, the answer is a status that is not tried again."""
    request.authenticate()
    if request.method == "GET":
        raise RunNotFound("no payload is stored apart from its run here")
    raise LimitExceeded(NO_STORE, status=413)


async def retrieve_run(request: Request, run_id: str) -> Response:
    claims = request.authenticate()
    try:
        record = await request.host.runs.get(run_id)
    except RunNotFound as exc:
        if request.is_from_elsewhere:
            raise
        answer = exception_response(exc)
        if run_id in names(claims.scopes, "read", "runs"):  # it may be on its way to the broker: the client asks again
            answer.headers["x-should-retry"] = "true"
        return answer
    authorise(claims, "read", run_resources(record))
    return json_bytes_response(run_json(record, skip=claims.skip_columns))


async def cancel_run(request: Request, run_id: str) -> Response:
    claims = request.authenticate()
    record = await request.host.runs.get(run_id)
    authorise(claims, "write", [("runs", record.id)])
    await request.host.cancel(run_id)
    return json_response({"id": run_id})


async def add_tags(request: Request, run_id: str) -> Response:
    record = await open_run(request, run_id)
    given = read_json(await request.body(TAGS_BYTES), NewTags).tags
    tags = check_tags(given, request.host.limits)
    check_tags((*record.tags, *tags), request.host.limits)
    changed = await request.host.runs.update(run_id, TagsAdded(tags))
    return json_response({"message": f"run {run_id} has {len(changed.tags)} tags"})
