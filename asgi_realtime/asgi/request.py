"""One HTTP request, as the endpoints read it.

It is gone once the answer is decided: an open stream keeps none of it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from asgi_realtime.asgi.auth import bearer, redact_query
from asgi_realtime.asgi.host import Host, Receive, Scope
from asgi_realtime.core.errors import InvalidRequest, InvalidToken, LimitExceeded, RequestCutOff, shown
from asgi_realtime.tokens import Claims

if TYPE_CHECKING:
    from asgi_realtime.asgi.limits import SubscriptionLimits
    from asgi_realtime.asgi.run_cache import RunCache

EVENT_STREAM = "text/event-stream"
BODY_METHODS = frozenset({"POST", "PUT"})
REQUEST_KEY = b"x-trigger-request-idempotency-key"
"""The official clients' own name for one call, the same in each of its retries."""

_NAME = re.compile(rb"[\x21-\x7e]{1,128}")


class Request:
    """Made first thing: with it the access token is out of the scope."""

    def __init__(
        self, host: Host, subscription_limits: SubscriptionLimits, run_cache: RunCache, scope: Scope, receive: Receive
    ) -> None:
        self.host = host
        self.subscription_limits = subscription_limits
        self.run_cache = run_cache
        self.receive = receive
        self.method: str = scope["method"]
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        self._query_token = redact_query(scope)
        self._query: bytes = scope.get("query_string", b"")
        self._parameters: dict[str, str] | None = None
        self._body_token_id = ""
        self.claims: Claims | None = None
        """What the credential says, once it was verified."""

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header, by its name in small letters."""
        for key, value in self._headers:
            if key.lower() == name:
                return value
        return None

    def query(self, name: str) -> str | None:
        """The last value of a query parameter."""
        if not self._query:
            return None
        if self._parameters is None:
            self._parameters = dict(parse_qsl(self._query.decode("latin-1"), keep_blank_values=True))
        return self._parameters.get(name)

    def authenticate(self) -> Claims:
        """Raises `InvalidToken`, also if there is no credential at all; for a request with a body also `LimitExceeded`,
        if the token has too many of those open."""
        self.claims = self._authenticated()
        return self.claims

    def _authenticated(self) -> Claims:
        credential = bearer(self.header(b"authorization"))
        if credential or self.method != "GET":
            claims = self.host.tokens.authenticate(credential)
            if self.method in BODY_METHODS and not claims.secret:
                self.subscription_limits.acquire_body(claims.token_id)
                self._body_token_id = claims.token_id
            return claims
        if self.host.tokens.is_secret(self._query_token):
            raise InvalidToken("the secret key must not stand in a URL; send it as `Authorization: Bearer …`")
        return self.host.tokens.authenticate(self._query_token)

    @property
    def is_from_elsewhere(self) -> bool:
        """Whether its token is of a process that keeps its runs in its own memory, and not of this one."""
        return self.claims is not None and self.host.tokens.is_from_elsewhere(self.claims)

    def release_body(self) -> None:
        """The request is answered."""
        if self._body_token_id:
            self.subscription_limits.release_body(self._body_token_id)
            self._body_token_id = ""

    @property
    def last_event_id(self) -> str | None:
        """Where a client resumes: the header that an EventSource sends, else the query, else None."""
        header = self.header(b"last-event-id")
        text = header.decode("utf-8", "replace") if header else self.query("last_event_id")
        return text or None

    @property
    def accepts_event_stream(self) -> bool:
        return EVENT_STREAM in (self.header(b"accept") or b"").decode("latin-1").lower()

    @property
    def is_official_client(self) -> bool:
        """Whether the client is one of Trigger.dev's, which read streams in a framing of their own."""
        return self.header(b"trigger-version") is not None

    def skipped_columns(self, claims: Claims) -> tuple[str, ...]:
        """The columns of a run that are to be left out: what the token says, else the query."""
        return claims.skip_columns or tuple(filter(None, (self.query("skipColumns") or "").split(",")))

    def name(self, header: bytes) -> str | None:
        """The value of a header that names something, if it is there. Raises `InvalidRequest`."""
        value = self.header(header)
        if value is None:
            return None
        if not _NAME.fullmatch(value):
            name, text = header.decode().title(), shown(value.decode("latin-1"))
            raise InvalidRequest(f"{name} is {text}; allowed are 1 to 128 characters of ASCII that can be seen")
        return value.decode()

    async def body(self, max_bytes: int) -> bytes:
        """The body. Raises `LimitExceeded` (413) as soon as it is too long, `RequestCutOff`."""
        length = self.header(b"content-length") or b""
        if length.isdigit() and len(length) < 19:
            _check_length(int(length), max_bytes)
        body = bytearray()
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise RequestCutOff("the request's body was cut off; send it again")
            body += message.get("body", b"")
            _check_length(len(body), max_bytes)
            if not message.get("more_body", False):
                return bytes(body)


def _check_length(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise LimitExceeded(f"body is at least {size} bytes, limit {max_bytes}", status=413)
