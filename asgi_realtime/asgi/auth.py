"""The credential of a request, and what its scopes grant.

A token is sent as `Authorization: Bearer`, or on GET as `?access_token=`, because an EventSource cannot set headers
(RFC 6750, section 2.3). The app removes the latter from the scope before anything else, so the server's access log does
not print it. Scopes and resource names: docs/protocol.md, section 3.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Sequence
from urllib.parse import unquote_plus

from asgi_realtime.asgi.host import Scope
from asgi_realtime.core.errors import ScopeDenied, shown
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.core.scopes import ResourceName, grants
from asgi_realtime.tokens import Claims

PARAMETER = "access_token"
REDACTED = "REDACTED"
MAX_QUERY_BYTES = 64 * 1024
"""Limit of a query. A token of 16 KiB and ten tags of 128 escaped characters take a third of it."""

_IN_TEXT = re.compile(r"(?i)(\baccess(?:_|%5f)token=)[^&;\s\"'<>]+")


def redact_query(scope: Scope) -> str:
    """Redact `access_token` in the scope's query, in place. Returns its last value, or "".

    After a semicolon, or in the path, it is not accepted, but servers log it, so it is redacted there too. A query of
    more than `MAX_QUERY_BYTES` is redacted as a whole, because parsing it would block the event loop.
    """
    if "=" in scope.get("path", ""):
        scope["path"] = _redact(scope["path"])
        if scope.get("raw_path"):
            scope["raw_path"] = _redact(scope["raw_path"].decode("latin-1")).encode("latin-1")
    query: bytes = scope.get("query_string", b"")
    if not query:
        return ""
    if len(query) > MAX_QUERY_BYTES:
        scope["query_string"] = REDACTED.encode()
        return ""
    token = ""
    parts = query.split(b"&")
    for place, part in enumerate(parts):
        name, _, value = part.partition(b"=")
        if value and unquote_plus(name.decode("latin-1")) == PARAMETER:
            token = unquote_plus(value.decode("latin-1"))
            parts[place] = name + b"=" + REDACTED.encode()
        elif b";" in part:
            parts[place] = _redact(part.decode("latin-1")).encode("latin-1")
    scope["query_string"] = b"&".join(parts)
    return token


def bearer(authorization: bytes | None) -> str:
    """The token of an `Authorization` header, or "" if the header is missing or has another scheme."""
    scheme, _, credential = (authorization or b"").decode("latin-1").strip().partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else ""


class RedactAccessToken(logging.Filter):
    """Redacts `access_token=…` in log records, for servers that log a query from before the app redacts it.

    `logging.getLogger("uvicorn.access").addFilter(RedactAccessToken())`
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.msg, str):
            record.msg = _redact(record.msg)
        if isinstance(record.args, tuple):
            record.args = tuple(_redact(arg) if isinstance(arg, str) else arg for arg in record.args)
        elif record.args:
            record.args = {key: _redact(arg) if isinstance(arg, str) else arg for key, arg in record.args.items()}
        return True


def _redact(text: str) -> str:
    return _IN_TEXT.sub(rf"\1{REDACTED}", text)


def run_resources(record: StoredRecord) -> list[ResourceName]:
    """The names of a run: a scope for any of them grants access to the run, its streams and its inputs."""
    resources: list[ResourceName] = [("runs", record.id), ("tasks", record.task)]
    resources += [("tags", tag) for tag in record.tags]
    if record.batch is not None:
        resources.append(("batch", record.batch.id))
    return resources


def tag_resources(tags: Iterable[str]) -> list[ResourceName]:
    """The names of the list of runs with these tags."""
    return [*(("tags", tag) for tag in tags), ("tags", None), ("runs", None)]


def batch_resources(batch_id: str) -> list[ResourceName]:
    return [("batch", batch_id), ("runs", None)]


def allows(claims: Claims, action: str, resources: Collection[ResourceName]) -> bool:
    """Whether the claims grant the action on the resource with these names."""
    return claims.secret or grants(claims.scopes, action, resources)


def authorize(claims: Claims, action: str, resources: Sequence[ResourceName]) -> None:
    """Raises `ScopeDenied`, which names the missing scope, unless the claims grant the action.

    The first name is the narrowest, because a host copies the scope from the error into its code.
    """
    if allows(claims, action, resources):
        return
    type, id = resources[0]
    needed = ":".join(filter(None, (action, type, id)))
    raise ScopeDenied(f"access is not granted; it needs the scope {shown(needed)}")
