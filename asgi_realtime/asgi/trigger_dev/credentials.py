"""What a credential makes of a request: whether it may make a run only once, and what may be read of what it made."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from asgi_realtime.asgi.auth import authorise, run_resources
from asgi_realtime.asgi.host import Host
from asgi_realtime.asgi.request import REQUEST_KEY, Request
from asgi_realtime.core.config import MAX_SPAN_S, parse_span
from asgi_realtime.core.errors import ScopeDenied, UnknownTask, UsageError, shown
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.core.scopes import admits
from asgi_realtime.runs.handles import TOKEN_EXPIRES_IN, run_scopes
from asgi_realtime.tasks.launch import Once
from asgi_realtime.tokens import Claims

SKEW_S = 60.0
"""How much longer than it is valid a one-time token is remembered: clocks differ."""


def require_secret(claims: Claims, what: str) -> None:
    """Raises `ScopeDenied` for a public access token, whatever its scopes."""
    if not claims.secret:
        raise ScopeDenied(f"{what} needs the secret key; no scope of a public access token admits that")


def check_task(request: Request, claims: Claims, task_id: str) -> None:
    """Raises `UnknownTask`; which tasks there are is told to the host only."""
    try:
        request.host.tasks.get(task_id)
    except UnknownTask as exc:
        if claims.secret:
            raise
        raise UnknownTask(f"no task {shown(task_id)} is registered") from exc


def once(request: Request, claims: Claims, what: str) -> Once | None:
    """How to know this request again when its client repeats it. None if there is no way, nor a need.

    A one-time token is spent by the first request, and what comes without a key is a request of its own.
    """
    key = request.name(REQUEST_KEY)
    if claims.one_time:
        return Once(spending(claims), f"{what} {key or secrets.token_hex(16)}", _until_expiry(request.host, claims))
    if key is None:
        return None
    ttl_s = request.host.tasks.launcher.retention.request_key
    return Once(f"request:{claims.token_id}:{what}/{key}", "", ttl_s)


def spending(claims: Claims) -> str:
    """The claim that says what a one-time token was spent on."""
    return f"token:{claims.token_id}"


def _until_expiry(host: Host, claims: Claims) -> float:
    now = host.clock()
    return min(claims.expires_at, now + MAX_SPAN_S) - now + SKEW_S


def handle_token(host: Host, claims: Claims, scopes: Sequence[str]) -> str:
    """The token of a handle. What the token of the request keeps from its holder, this one does too."""
    expires_in_s = parse_span(TOKEN_EXPIRES_IN)
    return host.tokens.mint(scopes, expires_in_s=expires_in_s, skip_columns=claims.skip_columns)


def granted(claims: Claims, record: RunRecord) -> list[str]:
    """What the handle of a run admits to.

    A run that was found by an idempotency key may be somebody else's: whoever knows or guesses the key gets its id, and
    may read it only if the token says so.
    """
    if claims.secret or record.token_id == claims.token_id:
        return run_scopes(record.id)
    return run_scopes(record.id)[:1] if admits(claims.scopes, "read", run_resources(record)) else []


async def find_parent(request: Request, claims: Claims, run_id: str | None) -> RunRecord | None:
    """The run that a new one is to be a child of. Its task may change that run's metadata, so the token has to admit
    writing to it. Raises `ScopeDenied`, `RunNotFound`."""
    if run_id is None:
        return None
    authorise(claims, "write", [("runs", run_id)])
    return await request.host.runs.get(run_id)


async def open_run(request: Request, run_id: str) -> RunRecord:
    """The run that a request changes, which takes the secret key. Raises `ScopeDenied`, `RunNotFound`, `UsageError` if
    the run is over."""
    require_secret(request.authenticate(), "changing a run")
    record = await request.host.runs.get(run_id)
    if record.is_completed:
        raise UsageError(f"run {shown(run_id)} is over ({record.status}) and cannot be changed")
    return record
