"""Who asks: the credential of a request, where it must not be seen, and what its scopes admit.

A token comes as `Authorization: Bearer`, or on GET as `?access_token=` because an EventSource cannot set headers
(RFC 6750, section 2.3). The latter is taken out of the scope before anything else, so that a server's access log does
not print it. Scopes and resource names: docs/protocol.md.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from urllib.parse import unquote_plus

from asgi_realtime.asgi.host import Scope
from asgi_realtime.core.errors import ScopeDenied, shown
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.core.scopes import Resource, admits
from asgi_realtime.tokens import Claims

PARAMETER = "access_token"
REDACTED = "REDACTED"

_IN_TEXT = re.compile(r"(?i)(\baccess(?:_|%5f)token=)[^&\s\"'<>]+")


def redact_query(scope: Scope) -> str:
    """Replace the value of `access_token` in the scope's query, in place. Returns the (last) value that was there."""
    query: bytes = scope.get("query_string", b"")
    if not query:
        return ""
    token = ""
    parts = query.split(b"&")
    for place, part in enumerate(parts):
        name, _, value = part.partition(b"=")
        if value and unquote_plus(name.decode("latin-1")) == PARAMETER:
            token = unquote_plus(value.decode("latin-1"))
            parts[place] = name + b"=" + REDACTED.encode()
    scope["query_string"] = b"&".join(parts)
    return token


def bearer(authorization: bytes | None) -> str:
    """The token of an `Authorization` header, or "" if there is none or it is of another kind."""
    scheme, _, credential = (authorization or b"").decode("latin-1").strip().partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else ""


class RedactAccessToken(logging.Filter):
    """Hides `access_token=…` in log records, for servers and proxies that log what we cannot reach.

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


def run_resources(record: RunRecord) -> list[Resource]:
    """The names under which a run, its streams and its inputs may be read."""
    resources: list[Resource] = [("runs", record.id), ("tasks", record.task)]
    resources += [("tags", tag) for tag in record.tags]
    if record.batch is not None:
        resources.append(("batch", record.batch.id))
    return resources


def tag_resources(tags: Iterable[str]) -> list[Resource]:
    """The names of a list of runs with these tags."""
    return [("runs", None), ("tags", None), *(("tags", tag) for tag in tags)]


def batch_resources(batch_id: str) -> list[Resource]:
    return [("batch", batch_id), ("runs", None)]


def may(claims: Claims, action: str, resources: Iterable[Resource]) -> bool:
    """Whether the claims admit the action."""
    return claims.secret or admits(claims.scopes, action, resources)


def authorise(claims: Claims, action: str, resources: Iterable[Resource]) -> None:
    """Raises `ScopeDenied`, naming the scope that would do, unless the claims admit the action."""
    names = list(resources)
    if may(claims, action, names):
        return
    type, id = names[0]
    needed = ":".join(filter(None, (action, type, id)))
    raise ScopeDenied(f"the token's scopes do not admit this; a token with the scope {shown(needed)} does")
