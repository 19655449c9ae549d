"""Checks of what callers pass to the clients, and the paths that the calls request.

Ids and tags follow docs/protocol.md, sections 1 and 5.3. The server has its own limits, so only what no server could
accept is rejected here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from urllib.parse import quote, urlencode, urlsplit

import httpx

from asgi_realtime.core.config import Span, parse_span
from asgi_realtime.core.errors import InvalidConfiguration, InvalidToken, UsageError

_TOKEN = re.compile(r"[!-~]+")
_BAD_IN_URL = re.compile(r"[?#\s\x00-\x1f\x7f-\x9f]")
_BAD_IN_SEGMENT = re.compile(r"[/\\?#\x00-\x1f\x7f]")
_BAD_IN_TAG = re.compile(r"[,\x00-\x1f\x7f]")


def check_base_url(base_url: str) -> str:
    if not isinstance(base_url, str):
        raise InvalidConfiguration(f"base_url is a {type(base_url).__name__}; pass a str")
    try:
        parts = urlsplit(base_url)
        _ = parts.port
        httpx.URL(base_url).host.encode("idna")  # what the resolver will do
    except (ValueError, httpx.InvalidURL) as exc:
        raise InvalidConfiguration(f"base_url is not a URL: {exc}") from None
    if parts.username is not None:
        raise InvalidConfiguration("base_url has a user name or password; pass an access_token instead")
    if _BAD_IN_URL.search(base_url):
        raise InvalidConfiguration(
            "base_url has '?', '#', whitespace or control characters; pass the origin and the mount path, like"
            " https://api.example.com/realtime"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidConfiguration(
            f"base_url is {base_url!r}; pass the origin and the mount path, like https://api.example.com/realtime"
        )
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
    query = {"tags": ",".join(_tag_list(tags))}
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
    if not isinstance(value, str):
        raise UsageError(f"{name} is a {type(value).__name__}; pass a str")
    if value in ("", ".", "..") or _BAD_IN_SEGMENT.search(value):
        raise UsageError(
            f"{name} is {value!r}; it must not be empty, '.' or '..', nor contain / \\ ? # or control characters"
        )
    return quote(value, safe="")


def _tag_list(tags: str | Iterable[str]) -> list[str]:
    found = [tags] if isinstance(tags, str) else list(tags)
    if not found:
        raise UsageError("tags are empty; pass at least one")
    for tag in found:
        if not isinstance(tag, str):
            raise UsageError(f"a tag is a {type(tag).__name__}; pass a str")
        if not tag.strip() or _BAD_IN_TAG.search(tag):
            raise UsageError(f"tag is {tag!r}; it must not be empty, nor contain a comma or control characters")
    return found
