"""What both clients have in common: their settings, checked, and the path of each call.

The rules for ids and tags are the server's (docs/protocol.md, sections 1 and 5.3); its limits are its own, so only that
is refused here which no server can mean.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import httpx

from asgi_realtime.client.attempts import Attempts
from asgi_realtime.client.errors import UnexpectedAnswer
from asgi_realtime.client.following import ChunksFollowing, RunsFollowing
from asgi_realtime.core.config import Span, parse_span
from asgi_realtime.core.errors import InvalidConfiguration, InvalidToken, RealtimeError, UsageError
from asgi_realtime.streams.followers import StreamChunk

S = TypeVar("S")

CONNECT_TIMEOUT = 10.0
"""Seconds until a server has taken the connection, and the request."""

SILENCE_TIMEOUT = 45.0
"""Seconds without a byte after which a connection counts as lost. The server sends a heartbeat every 15."""

GIVE_UP_AFTER = 300.0
"""Seconds without progress after which a subscription raises `ServerUnreachable`."""

MOST_OF_A_REFUSAL = 64 * 1024
"""How much is read of an answer that is no stream, in bytes."""

_TOKEN = re.compile(r"[!-~]+")
_BAD_IN_URL = re.compile(r"[?#\s\x00-\x1f\x7f-\x9f]")
_BAD_IN_SEGMENT = re.compile(r"[/\\?#\x00-\x1f\x7f]")
_BAD_IN_TAG = re.compile(r"[,\x00-\x1f\x7f]")


class ClientBase:
    """The settings of a client."""

    def __init__(
        self,
        base_url: str,
        access_token: str | Callable[[], Any],
        *,
        connect_timeout: Span,
        silence_timeout: Span,
        give_up_after: Span | None,
    ) -> None:
        self.base_url = check_base_url(base_url)
        if isinstance(access_token, str):
            check_token(access_token)
        elif not callable(access_token):
            raise InvalidConfiguration(
                f"access_token is a {type(access_token).__name__}; allowed are a str and a function that returns one"
            )
        self._access_token = access_token
        connect_s = parse_span(connect_timeout, name="connect_timeout")
        self._silence_s = parse_span(silence_timeout, name="silence_timeout")
        self._timeout = httpx.Timeout(connect_s, read=self._silence_s)
        self._give_up_s = None if give_up_after is None else parse_span(give_up_after, name="give_up_after")
        self._clock: Callable[[], float] = time.monotonic
        self._random: Callable[[], float] = random.random
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    @property
    def _renewable(self) -> bool:
        return not isinstance(self._access_token, str)

    def _attempts(self) -> Attempts:
        self._check_open()
        return Attempts(self._give_up_s, self._clock, self._random)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this client is closed")

    def _no_state(self) -> RealtimeError:
        """Why a feed of a run ended without any."""
        self._check_open()
        return UnexpectedAnswer("the server told no state of the run", status=200)

    def _runs(self, path: str) -> RunsFollowing:
        return RunsFollowing(path, self._attempts(), renewable=self._renewable)

    def _run(self, run_id: str) -> RunsFollowing:
        return self._runs(f"/v1/runs/{segment('run_id', run_id)}")

    def _batch(self, batch_id: str) -> RunsFollowing:
        return self._runs(f"/v1/batches/{segment('batch_id', batch_id)}")

    def _tagged(self, tags: str | Iterable[str], created_within: Span | None) -> RunsFollowing:
        query = {"tags": ",".join(check_tags(tags))}
        if created_within is not None:
            query["createdAt"] = f"{math.ceil(parse_span(created_within, name='created_within'))}s"
        return self._runs(f"/v1/runs?{urlencode(query)}")

    def _chunks(self, run_id: str, stream: str, start_index: int) -> ChunksFollowing:
        if isinstance(start_index, bool) or not isinstance(start_index, int) or start_index < 0:
            raise UsageError(f"start_index is {start_index!r}; allowed are whole numbers from 0")
        path = f"/v1/streams/{segment('run_id', run_id)}/{segment('stream', stream)}"
        return ChunksFollowing(
            path, self._attempts(), renewable=self._renewable, stream=stream, start_index=start_index
        )

    def _describe(self, error: httpx.RequestError) -> str:
        """What happened, without the request, which has the token."""
        if isinstance(error, httpx.ReadTimeout):
            return f"nothing was heard for {self._silence_s:g} s"
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def check_base_url(base_url: str) -> str:
    if not isinstance(base_url, str):
        raise InvalidConfiguration(f"base_url is a {type(base_url).__name__}; allowed is a str")
    try:
        parts = urlsplit(base_url)
        _ = parts.port
        httpx.URL(base_url).host.encode("idna")  # as it is looked up in the end
    except (ValueError, httpx.InvalidURL) as exc:
        raise InvalidConfiguration(f"base_url is no URL: {exc}") from None
    if parts.username is not None:
        raise InvalidConfiguration("base_url has a user name or password; allowed is an access_token")
    if _BAD_IN_URL.search(base_url):
        raise InvalidConfiguration(
            "base_url has '?', '#', white space or control characters; allowed are the origin and the mount, like"
            " https://api.example.com/realtime"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidConfiguration(
            f"base_url is {base_url!r}; allowed are the origin and the mount, like https://api.example.com/realtime"
        )
    return base_url.rstrip("/")


def check_token(token: object) -> str:
    """A token as a header can carry it. The message never shows it."""
    if not isinstance(token, str):
        raise InvalidToken(f"the access token is a {type(token).__name__}; it must be a str")
    if not _TOKEN.fullmatch(token):
        raise InvalidToken("the access token is empty or has characters that no token has")
    return token


def segment(name: str, value: str) -> str:
    """An id as one segment of a path."""
    if not isinstance(value, str):
        raise UsageError(f"{name} is a {type(value).__name__}; allowed is a str")
    if value in ("", ".", "..") or _BAD_IN_SEGMENT.search(value):
        raise UsageError(
            f"{name} is {value!r}; it must not be empty, '.' or '..', nor have / \\ ? # or control characters"
        )
    return quote(value, safe="")


def check_tags(tags: str | Iterable[str]) -> list[str]:
    given = [tags] if isinstance(tags, str) else list(tags)
    if not given:
        raise UsageError("tags are empty; name at least one")
    for tag in given:
        if not isinstance(tag, str):
            raise UsageError(f"a tag is a {type(tag).__name__}; allowed is a str")
        if not tag.strip() or _BAD_IN_TAG.search(tag):
            raise UsageError(f"tag is {tag!r}; it must not be empty, nor have a comma or control characters")
    return given


# What a subscription makes of what it follows.


def as_it_is(item: S) -> S:
    return item


def chunk_only(item: StreamChunk) -> Any:
    return item.chunk
