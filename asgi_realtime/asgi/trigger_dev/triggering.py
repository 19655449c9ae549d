"""Starting a run over HTTP, as `tasks.trigger` of the official clients does.

Everything is checked before the request is known as the one that makes the run, and before a one-time token is spent.
A client that gets no answer sends the same request again, and gets the run that there is.
"""

from __future__ import annotations

import logging

from starlette.responses import Response

from asgi_realtime.asgi.answers import json_answer
from asgi_realtime.asgi.auth import authorise
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.trigger_dev.credentials import check_task, find_parent, granted, handle_token, once
from asgi_realtime.asgi.trigger_dev.run_options import (
    NO_STORE,
    Body,
    Options,
    given_options,
    max_body_bytes,
    read_body,
    read_options,
    read_payload,
)
from asgi_realtime.core.errors import (
    LimitExceeded,
    RunNotFound,
    UsageError,
)

logger = logging.getLogger("asgi_realtime")


async def trigger(request: Request, task_id: str) -> Response:
    claims = request.authenticate()
    authorise(claims, "trigger", [("tasks", task_id)])
    check_task(request, claims, task_id)
    request_is = once(request, claims, f"trigger {task_id}")

    tasks = request.host.tasks
    limits = request.host.limits
    body = read_body(await request.body(max_body_bytes(limits)), Body)
    given = given_options(body, limits)
    payload, options = read_payload(body, given, limits), read_options(given)
    parent = await find_parent(request, claims, parent_id(given))
    token_id = None if claims.secret else claims.token_id
    prepared = tasks.prepare_json(task_id, payload, options, parent=parent, token_id=token_id)
    record, is_cached = await tasks.launcher.launch(prepared, once=request_is)
    token = handle_token(request.host, claims, granted(claims, record))
    return json_answer({"id": record.id, "isCached": is_cached}, headers={"x-trigger-jwt": token})


async def packets(request: Request) -> Response:
    """Where the official client would store and fetch a payload that is large. So that its user hears of the limit, and
    hears it at once, the answer is a status that is not tried again."""
    request.authenticate()
    if request.method == "GET":
        raise RunNotFound("no payload is stored apart from its run here")
    raise LimitExceeded(NO_STORE, status=413)


def parent_id(options: Options) -> str | None:
    """The run that the client says it is in."""
    found = options.get("parentRunId")
    if found is not None and not isinstance(found, str):
        raise UsageError("parentRunId must be a string, the id of a run")
    return found
