"""Checks of what callers pass to the clients, and the paths that the calls request.

Ids and tags follow docs/protocol.md, sections 1 and 5.3. The server has its own limits, so only what no server could
accept is rejected here.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from urllib.parse import quote, urlencode

import httpx

from asgi_realtime.core.config import Limits, Span, parse_span
from asgi_realtime.core.errors import InvalidConfiguration, InvalidToken, UsageError
from asgi_realtime.core.names import check_key, check_tags

EXAMPLE = "the origin and the mount path, like https://api.example.com/realtime"
"""What a base URL must be, for error messages."""

_NO_LIMITS = Limits(tags=sys.maxsize, tag_length=sys.maxsize, key_length=sys.maxsize)
_TOKEN = re.compile(r"[!-~]+")
_BAD_IN_URL = re.compile(r"[?#\s\x00-\x1f\x7f-\x9f]")


def check_base_url(base_url: str, *, name: str = "base_url") -> str:
    if not isinstance(base_url, str):
        raise InvalidConfiguration(f"{name} is a {type(base_url).__name__}; pass a str")
    try:
        url = httpx.URL(base_url)
        url.host.encode("idna")  # what the resolver will do
        if (url.port or 0) > 65535:
            raise ValueError(f"the port is {url.port}, limit 65535")
    except (ValueError, httpx.InvalidURL) as exc:
        raise InvalidConfiguration(f"{name} is not a URL: {exc}") from None
    if url.userinfo:
        raise InvalidConfiguration(f"{name} has a user name or password; pass an access_token instead")
    if _BAD_IN_URL.search(base_url):
        raise InvalidConfiguration(f"{name} has '?', '#', whitespace or control characters; pass {EXAMPLE}")
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidConfiguration(f"{name} is {base_url!r}; pass {EXAMPLE}")
    return base_url.rstrip("/")


def check_token(token: object) -> str:
    """Return the token if it fits into a header. The error never shows it."""
    if not isinstance(token, str):
        raise InvalidToken(f"the access token is a {type(token).__name__}; it must be a str")
    if not _TOKEN.fullmatch(token):
        raise InvalidToken("the access token is empty or has characters that no token contains")
    return token


def run_path(run_id: str) -> str:
    return f"/v1/runs/{_segment('run_id', run_id)}"


def batch_path(batch_id: str) -> str:
    return f"/v1/batches/{_segment('batch_id', batch_id)}"


def tags_path(tags: str | Iterable[str], created_within: Span | None) -> str:
    checked = check_tags(tags, _NO_LIMITS)
    if not checked:
        raise UsageError("tags are empty; pass at least one")
    query = {"tags": ",".join(checked)}
    if created_within is not None:
        query["createdAt"] = f"{math.ceil(parse_span(created_within, name='created_within'))}s"
    return f"/v1/runs?{urlencode(query)}"


def stream_path(run_id: str, stream: str) -> str:
    return f"/v1/streams/{_segment('run_id', run_id)}/{_segment('stream', stream)}"


def check_start_index(start_index: int) -> int:
    if isinstance(start_index, bool) or not isinstance(start_index, int) or start_index < 0:
        raise UsageError(f"start_index is {start_index!r}; pass a whole number, 0 or greater")
    return start_index


def _segment(name: str, value: str) -> str:
    """An id as one path segment."""
    return quote(check_key(value, _NO_LIMITS, what=name), safe="")
