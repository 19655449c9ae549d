"""`/inspect`: a page about all runs, for the people who operate the app. Off by default.

The page is static. Its script gets a token for a few minutes, with the secret key or by `authorize_inspector`, and
polls the list of the runs that changed last (`runs.recent`). A single run it follows as any other page does, with the
browser module. A model's output is shown as text only, and the content security policy allows no inline script, no HTML
from strings and no other origin. Docs: docs/inspector.md.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from starlette.responses import Response

from asgi_realtime.asgi.auth import bearer
from asgi_realtime.asgi.host import Host
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import json_response
from asgi_realtime.asgi.sessions import ask_host, check_origin
from asgi_realtime.core.errors import BrokerUnavailable, InvalidRequest, InvalidToken, RealtimeError, ScopeDenied, shown
from asgi_realtime.core.log import StreamKey
from asgi_realtime.core.runs import Status, tag_topic
from asgi_realtime.loop.logger import logger
from asgi_realtime.runs.recent import MAX_RUNS, RunSummary, summarize

TOKEN_LIFE_S = 15 * 60.0
SCOPE = "inspect"
"""What the token of the page has, and nothing else can: it is not among the scopes of `create_public_token`."""

DEFAULT_ROWS = 100
MAX_ROWS = 500

_SCOPES = (SCOPE, "read:all", "write:runs")
_FOLDER = Path(__file__).parent
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


# The page


@cache
def _file(name: str) -> bytes:
    return (_FOLDER / name).read_bytes()


async def page(request: Request) -> Response:
    return Response(_file("inspector.html"), headers=_PAGE_HEADERS, media_type="text/html")


async def script(request: Request) -> Response:
    return Response(_file("inspector.js"), headers={"cache-control": "no-cache"}, media_type="text/javascript")


async def style(request: Request) -> Response:
    return Response(_file("inspector.css"), headers={"cache-control": "no-cache"}, media_type="text/css")


# Access


async def create_token(request: Request) -> Response:
    """A token for the page. Raises `InvalidToken`, and `ScopeDenied` for a page of another origin."""
    host, credential = request.host, bearer(request.header(b"authorization"))
    if credential:
        if not host.tokens.is_secret(credential):
            raise InvalidToken("this is not the secret key")
    elif host.authorize_inspector is None:
        raise InvalidToken("the inspector needs the secret key")
    else:
        check_origin(request, host.cors)
        if not await ask_host(host.authorize_inspector, request, name="authorize_inspector"):
            raise InvalidToken("the app's authorize_inspector= denied the request; log in, or use the secret key")
    token = host.tokens.mint(_SCOPES, expires_in_s=TOKEN_LIFE_S, own_id=True, owner="inspector")
    return json_response({"token": token})


def _check_access(request: Request) -> None:
    if not (request.claims.secret or SCOPE in request.claims.scopes):
        raise ScopeDenied("the inspector needs the secret key; no scope of a public token grants it")


# What it shows


async def list_runs(request: Request) -> Response:
    """The runs that changed last, newest first, with the state of the broker and of this process."""
    _check_access(request)
    host, task, tag = request.host, request.query("task"), request.query("tag")
    statuses, limit = _statuses(request), _limit(request)
    assert host.recent is not None
    listed = await (_tagged(request, tag) if tag else host.recent.newest())
    found = [run for run in listed if (not task or run.task == task) and (not statuses or run.status in statuses)]
    is_sample = len(listed) >= (MAX_ROWS if tag else MAX_RUNS)
    return json_response(
        {
            "runs": found[:limit],
            "found": len(found),
            "listed": len(listed),
            "isSample": is_sample,
            "perSecond": _changes_per_second(listed, now_ms=round(host.clock() * 1000)),
            "tasks": sorted({run.task for run in listed}),
            "broker": await _broker_state(host),
            "process": _process_state(host),
        }
    )


def _changes_per_second(listed: Sequence[RunSummary], *, now_ms: int) -> float:
    """How many of the listed runs changed per second, without those that are only listed because they failed."""
    changed = sorted((run.updated_at_ms for run in listed), reverse=True)[:MAX_RUNS]
    return len(changed) / max((now_ms - changed[-1]) / 1000, 1) if changed else 0.0


async def _tagged(request: Request, tag: str) -> list[RunSummary]:
    """The runs with a tag that changed last, from its topic."""
    changes = await request.host.broker.changes(tag_topic(tag), limit=request.host.limits.topic_runs)
    records = await request.run_cache.records(changes.items[-MAX_ROWS:])
    found = [summarize(record) for record in records if record is not None]
    return sorted(found, key=lambda run: (run.created_at_ms, run.id), reverse=True)


def _statuses(request: Request) -> frozenset[str]:
    names = frozenset(filter(None, (request.query("status") or "").upper().split(",")))
    if unknown := names - set(Status):
        raise InvalidRequest(f"status is {shown(min(unknown))}; allowed are {', '.join(Status)}, separated by commas")
    return names


def _limit(request: Request) -> int:
    text = request.query("limit") or str(DEFAULT_ROWS)
    if not (text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= MAX_ROWS):
        raise InvalidRequest(f"limit is {shown(text)}; allowed are 1 to {MAX_ROWS}")
    return int(text)


async def _broker_state(host: Host) -> dict[str, Any]:
    status = "ok"
    try:
        await host.broker.ping()
    except BrokerUnavailable as exc:
        status = str(exc)
    except Exception:
        logger.warning("the health check of the broker failed", exc_info=True)
        status = "unavailable"
    return {
        "name": type(host.broker).__name__,
        "isShared": host.broker.shared,
        "status": status,
        "warnings": host.broker.warnings,
    }


def _process_state(host: Host) -> dict[str, Any]:
    kinds = (getattr(subscriber, "kind", None) for subscriber in tuple(host.subscribers))  # requests have none
    subscriptions = Counter(kind for kind in kinds if kind is not None)
    return {"id": os.getpid(), "isClosing": host.closing, "subscriptions": subscriptions}


async def retrieve_run(request: Request, run_id: str) -> Response:
    """A run, and how many chunks each of its streams has, with the times of the first and the last."""
    _check_access(request)
    record = await request.host.runs.get(run_id)
    streams = [await _stream_state(request.host, StreamKey(run_id, name)) for name in record.streams]
    readers = request.subscription_limits.open_of(run_id)
    return json_response(
        {"run": record.json_fields(), "summary": summarize(record), "streams": streams, "readers": readers}
    )


async def _stream_state(host: Host, key: StreamKey) -> dict[str, Any]:
    try:
        page = await host.broker.read(key, limit=1)
        last = await host.broker.read(key, after=page.next - 2, limit=1) if page.next > 1 else page
    except RealtimeError as exc:
        return {"key": key.name, "error": str(exc)}
    times = {"firstAtMs": page.entries[0].time_ms, "lastAtMs": last.entries[-1].time_ms} if page.entries else {}
    return {"key": key.name, "chunks": page.next, "removed": page.first, **times}
