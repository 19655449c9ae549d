"""What a credential grants to a request, how a repeated request is recognized, and what a handle grants."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

from asgi_realtime.asgi.auth import authorize
from asgi_realtime.asgi.request import REQUEST_KEY, Request
from asgi_realtime.core.config import MAX_SPAN_S
from asgi_realtime.core.errors import ScopeDenied, UnknownTask, UsageError, shown
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.runs.handles import TOKEN_EXPIRES_IN_S
from asgi_realtime.tasks.launch import Once
from asgi_realtime.tokens import Claims

SKEW_S = 60.0
"""How long a spent one-time token is remembered beyond its expiry, because clocks differ."""


def require_secret(request: Request, what: str) -> None:
    """Raise `ScopeDenied` for a public token, whatever its scopes."""
    if not request.claims.secret:
        raise ScopeDenied(f"{what} needs the secret key; no scope of a public token grants it")


def check_task(request: Request, task_id: str) -> None:
    """Raise `UnknownTask` if the task is not registered. Only the secret key gets the list of registered tasks."""
    try:
        request.host.tasks.get(task_id)
    except UnknownTask as exc:
        if request.claims.secret:
            raise
        raise UnknownTask(f"no task {shown(task_id)} is registered") from exc


def check_tags_allowed(claims: Claims, tags: Iterable[str]) -> None:
    """Raise `ScopeDenied` for a tag that the token does not allow for the runs it triggers."""
    if claims.tags is None:
        return
    for tag in tags:
        if tag not in claims.tags:
            allowed = ", ".join(map(repr, claims.tags)) or "none"
            raise ScopeDenied(f"the token does not allow the tag {tag!r}; it allows {allowed}")


def once(request: Request, what: str) -> Once | None:
    """How to recognize this request if the client repeats it; None if it cannot be repeated.

    A one-time token is spent by the first request. A request without a request key is always a new one, so that it can
    never share the token with another.
    """
    key, claims = request.name(REQUEST_KEY), request.claims
    if claims.one_time:
        mark = f"{what} {key or secrets.token_hex(16)}"
        now = request.host.clock()
        ttl_s = min(claims.expires_at, now + MAX_SPAN_S) - now + SKEW_S
        return Once(f"token:{claims.token_id}", mark, ttl_s, request.owner or None)
    if key is None:
        return None
    ttl_s = request.host.tasks.launcher.retention.request_key
    return Once(f"request:{claims.token_id}:{what}/{key}", "", ttl_s, request.owner or None)


def handle_token(request: Request, scopes: Sequence[str]) -> str:
    """The public token of a handle. It has the owner of the request's token, and hides the same columns."""
    return request.host.tokens.mint(
        scopes,
        expires_in_s=TOKEN_EXPIRES_IN_S,
        skip_columns=request.claims.skip_columns,
        owner=request.owner or None,
    )


async def find_parent(request: Request, run_id: str | None) -> StoredRecord | None:
    """The parent of a new run. The task of a child can change the metadata of its parent, so the token must grant
    writing to the parent. Raises `ScopeDenied`, `RunNotFound`."""
    if run_id is None:
        return None
    authorize(request.claims, "write", [("runs", run_id)])
    return await request.host.runs.get(run_id)


async def find_open_run(request: Request, run_id: str) -> StoredRecord:
    """The run that a request with the secret key changes. Raises `ScopeDenied`, `RunNotFound`, and `UsageError` if the
    run is over."""
    require_secret(request, "changing a run")
    record = await request.host.runs.get(run_id)
    if record.is_completed:
        raise UsageError(f"run {shown(run_id)} is over ({record.status}) and cannot be changed")
    return record
