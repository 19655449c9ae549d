"""Requests without a token, which the host authorizes by its session.

A browser attaches cookies to requests that pages of any origin make, so a cookie alone does not say that the user
wants the request (CSRF). Only pages of the app's own origin are therefore accepted, and those of the origins that
`cors` lists. Browsers declare the page's origin in `Sec-Fetch-Site` and `Origin`, which no script can forge:
W3C Fetch Metadata, section 2.2, and WHATWG Fetch, section 3.1. Requests with a token skip all of this.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request as HostRequest

from asgi_realtime.asgi.request import Request
from asgi_realtime.core.access import Authorize, Grant, Resource
from asgi_realtime.core.config import Cors, Limits
from asgi_realtime.core.errors import AuthorizeFailed, InvalidToken, RealtimeError, ScopeDenied, UsageError, shown
from asgi_realtime.core.names import check_tags
from asgi_realtime.core.scopes import flatten_scopes
from asgi_realtime.loop.waiting import at_most
from asgi_realtime.tokens import Claims, check_columns, check_owner

_SAME_ORIGIN = (b"same-origin", b"none")
"""Of `Sec-Fetch-Site`: a page of this origin, or the user, who typed the address."""

_DENIED = "no token, and the app's authorize= denied the request; log in, or pass a token as `Authorization: Bearer …`"


async def authorize_session(authorize: Authorize, request: Request, resource: Resource) -> None:
    """Let the host authorize a request without a token.

    Raises `InvalidToken` or `ScopeDenied` if it does not, or if a page of another origin sent the request; and what
    `ask_host` raises.
    """
    host = request.host
    check_origin(request, host.cors)
    granted = await ask_host(authorize, request, resource, name="authorize")
    if not granted:
        raise InvalidToken(_DENIED)
    request.admit(_claims(granted, resource, host.limits))
    request.max_age_s = min(host.timeouts.session, host.timeouts.stream_age)


def check_origin(request: Request, cors: Cors | None) -> None:
    """Raises `ScopeDenied` if a page of another origin made the request."""
    origin, site = request.header(b"origin"), request.header(b"sec-fetch-site")
    if origin is not None and lists(cors, origin):
        return
    if site is not None:
        is_same = site in _SAME_ORIGIN
    elif origin is not None:  # a browser from before 2023, or plain HTTP
        is_same = (request.header(b"host") or b"?").lower() == urlsplit(origin.lower()).netloc
    else:  # not a browser; or a GET, whose response a page of another origin cannot read
        is_same = not request.has_body or (request.header(b"content-type") or b"").lower().startswith(
            b"application/json"
        )
    if not is_same:
        page = f"a page of {shown(origin.decode('latin-1'))}" if origin else "another origin, or does not say"
        raise ScopeDenied(
            f"the request comes from {page}; without a token, allowed are pages of this server's own origin and of"
            " those in Realtime(cors=[…])"
        )


def lists(cors: Cors | None, origin: bytes) -> bool:
    """Whether an origin is allowed by name. `"*"` names none."""
    return cors is not None and cors.origins != "*" and origin.decode("latin-1") in cors.origins


async def ask_host(function: Callable[..., Any], request: Request, *more: object, name: str) -> Any:
    """Call a function of the host with its kind of request: in a thread, because a session is often in a database; a
    coroutine function on the loop. Raises the errors of this library that the function raises, and `AuthorizeFailed`
    for all others, or if it takes too long."""
    limit_s = request.host.timeouts.authorize
    try:
        with at_most(limit_s, lambda: f"{name}= did not return within {limit_s:g} s (Timeouts.authorize)"):
            return await _call(function, HostRequest(request.scope), *more)
    except Exception as exc:
        if isinstance(exc, RealtimeError) and exc.status != 500:
            raise
        path = f"{request.method} {shown(request.scope['path'])}"
        request.host.runs.reporter.authorize_failed(name, path, exc)
        raise AuthorizeFailed() from exc


async def _call(function: Callable[..., Any], *arguments: object) -> Any:
    try:
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            found = function(*arguments)
        else:
            # in a list, because trio rejects a coroutine as a result
            (found,) = await to_thread.run_sync(lambda: [function(*arguments)], abandon_on_cancel=True)
        return await found if inspect.isawaitable(found) else found
    except HTTPException as exc:  # from a function that the host shares with its routes
        if exc.status_code not in (401, 403):
            raise
        raise (InvalidToken if exc.status_code == 401 else ScopeDenied)(str(exc.detail)) from exc


def _claims(granted: Grant | Any, resource: Resource, limits: Limits) -> Claims:
    """The claims of a token that would grant the same."""
    try:
        grant = granted if isinstance(granted, Grant) else Grant(None if granted is True else granted)
        scopes = resource.scopes if grant.scopes is None else flatten_scopes(grant.scopes)
        owner = check_owner(grant.owner)
        if owner is None and resource.action in ("trigger", "batchTrigger"):
            # Idempotency keys are the owner's: without one, a user would find the runs of others.
            raise UsageError("the request triggers runs, so it needs an owner; return Grant(owner='user:1')")
        token_id = hashlib.sha256("\0".join([owner] if owner else scopes).encode()).hexdigest()[:32]
        return Claims(
            scopes=scopes,
            expires_at=math.inf,
            skip_columns=check_columns(grant.skip_columns),
            token_id=f"session-{token_id}",
            owner=owner or f"session-{token_id}",
            tags=None if grant.tags is None else check_tags(grant.tags, limits),
        )
    except RealtimeError as exc:  # the host's mistake, which is not the client's to see
        raise RuntimeError(f"authorize= returned {shown(granted)}: {exc}") from exc


def _run(request: Request, run_id: str) -> Resource:
    return Resource(action="read", kind="run", run_id=run_id)


def _run_to_cancel(request: Request, run_id: str) -> Resource:
    return Resource(action="write", kind="run", run_id=run_id)


def _stream(request: Request, run_id: str, key: str) -> Resource:
    return Resource(action="read", kind="stream", run_id=run_id, key=key)


def _input(request: Request, run_id: str, input_id: str) -> Resource:
    return Resource(action="write" if request.has_body else "read", kind="input", run_id=run_id, key=input_id)


def _runs(request: Request) -> Resource:
    return Resource(action="read", kind="runs", tags=tuple(filter(None, (request.query("tags") or "").split(","))))


def _batch(request: Request, batch_id: str | None = None) -> Resource:
    return Resource(action="batchTrigger" if request.has_body else "read", kind="batch", batch_id=batch_id)


def _task(request: Request, task_id: str) -> Resource:
    return Resource(action="trigger", kind="task", task=task_id)


RESOURCES: dict[tuple[str, str], Callable[..., Resource]] = {
    ("GET", "v1/streams/{run_id}/{key}"): _stream,
    ("GET", "v1/streams/{run_id}/input/{input_id}"): _input,
    ("POST", "v1/streams/{run_id}/input/{input_id}"): _input,
    ("GET", "v1/runs"): _runs,
    ("GET", "v1/runs/{run_id}"): _run,
    ("GET", "v1/batches/{batch_id}"): _batch,
    ("POST", "api/v1/tasks/{task_id}/trigger"): _task,
    ("POST", "api/v3/batches"): _batch,
    ("POST", "api/v3/batches/{batch_id}/items"): _batch,
    ("GET", "api/v2/batches/{batch_id}"): _batch,
    ("GET", "api/v3/runs/{run_id}"): _run,
    ("POST", "api/v2/runs/{run_id}/cancel"): _run_to_cancel,
    ("GET", "api/v1/runs/{run_id}/metadata"): _run,
}
"""What the requests of a route ask for, from the request and the variable segments of its path. A route that is missing
here needs a token: what it does, only the secret key grants."""
