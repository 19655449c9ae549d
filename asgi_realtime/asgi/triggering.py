"""Starting a run over HTTP, as `tasks.trigger` of the official clients does.

Everything is checked before the request is known as the one that makes the run, and before a one-time token is spent.
A client that gets no answer sends the same request again, and gets the run that there is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.responses import Response

from asgi_realtime.asgi.answers import json_answer
from asgi_realtime.asgi.auth import authorise
from asgi_realtime.asgi.credentials import find_parent, granted, handle_token, once
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.run_options import NO_STORE, Body, read_json, read_options, read_payload
from asgi_realtime.config import Limits
from asgi_realtime.errors import (
    BrokerUnavailable,
    LimitExceeded,
    RealtimeError,
    RunNotFound,
    UnknownTask,
    UsageError,
    shown,
)
from asgi_realtime.tokens import Claims

logger = logging.getLogger("asgi_realtime")

OPTIONS_BYTES = 64 * 1024
"""Of a trigger's body, besides the payload and the metadata."""


async def trigger(request: Request, task_id: str) -> Response:
    claims = request.authenticate()
    authorise(claims, "trigger", [("tasks", task_id)])
    check_task(request, claims, task_id)
    request_is = once(request, claims, f"trigger {task_id}")

    tasks = request.host.tasks
    body = read_json(await request.body(max_body_bytes(request.host.limits)), Body)
    payload, options = read_payload(body), read_options(body.options)
    parent = await find_parent(request, claims, parent_id(body.options))
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


def check_task(request: Request, claims: Claims, task_id: str) -> None:
    """Raises `UnknownTask`; which tasks there are is told to the host only."""
    try:
        request.host.tasks.get(task_id)
    except UnknownTask as exc:
        if claims.secret:
            raise
        raise UnknownTask(f"no task {shown(task_id)} is registered") from exc


def parent_id(options: dict[str, Any] | None) -> str | None:
    """The run that the client says it is in."""
    found = (options or {}).get("parentRunId")
    if found is not None and not isinstance(found, str):
        raise UsageError("parentRunId must be a string, the id of a run")
    return found


def max_body_bytes(limits: Limits) -> int:
    """A payload is text in a JSON string, so each of its quotes takes two bytes; and it may be as long as its types."""
    return 2 * (limits.payload_bytes + limits.metadata_bytes) + OPTIONS_BYTES


@contextmanager
def executor_errors() -> Iterator[None]:
    """What an executor raises may be anything, and its words are not for clients."""
    try:
        yield
    except RealtimeError:
        raise
    except Exception as exc:
        logger.exception("the executor did not take a run")
        raise BrokerUnavailable("the queue of jobs takes no runs now; try later") from exc
