"""One HTTP request, as the endpoints read it.

It is dropped once there is a response: an open stream retains nothing of it.
"""

from __future__ import annotations

import math
import re
from typing import Protocol
from urllib.parse import parse_qsl

from asgi_realtime.asgi.auth import MAX_QUERY_BYTES, bearer, redact_query
from asgi_realtime.asgi.host import Host, Receive, Scope
from asgi_realtime.asgi.limits import PROBE, SubscriptionLimits
from asgi_realtime.asgi.run_cache import RunCache
from asgi_realtime.core.errors import InvalidRequest, InvalidToken, LimitExceeded, RequestCutOff, shown
from asgi_realtime.tokens import Claims

EVENT_STREAM = "text/event-stream"
REQUEST_KEY = b"x-trigger-request-idempotency-key"
"""The official clients' name for one call, the same in each of its retries."""

_ANONYMOUS = Claims(scopes=(), expires_at=math.inf, token_id=PROBE, owner=PROBE)
_LAST_EVENT_ID = ("last_event_id", "lastEventId", "Last-Event-ID", "lastEventID", "last-event-id")
"""Its spellings in the query: ours, and those of EventSource polyfills and other servers (Mercure)."""
_NAME = re.compile(rb"[\x21-\x7e]{1,128}")


class Access(Protocol):
    """What a subscription needs of its request, or of the host that opened it."""

    @property
    def host(self) -> Host: ...
    @property
    def subscription_limits(self) -> SubscriptionLimits: ...
    @property
    def claims(self) -> Claims: ...
    @property
    def owner(self) -> str:
        """To whom the subscription is charged."""
        ...

    @property
    def last_event_id(self) -> str | None: ...

    @property
    def max_age_s(self) -> float:
        """The maximum age of the subscription."""
        ...


class Request:
    """Created before anything else, because this removes the access token from the scope."""

    def __init__(
        self,
        host: Host,
        subscription_limits: SubscriptionLimits,
        run_cache: RunCache,
        scope: Scope,
        receive: Receive,
    ) -> None:
        self.host = host
        self.subscription_limits = subscription_limits
        self.run_cache = run_cache
        self.scope = scope
        self.receive = receive
        self.method: str = scope["method"]
        self.route = "an unknown path"
        """The pattern of the path."""
        self._headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            self._headers.setdefault(name.lower(), value)
        self._query_bytes = len(scope.get("query_string", b""))
        self._query_token = redact_query(scope)
        self._query: bytes = scope.get("query_string", b"")
        self._parameters: dict[str, str] | None = None
        self._body_owner = ""
        self._body_bytes = 0
        self.claims = _ANONYMOUS
        """The content of the credential; anonymous if the route needs none."""
        self.max_age_s = host.timeouts.stream_age
        """The maximum age of a subscription."""

    @property
    def shown(self) -> str:
        """The request in the log: nothing of it but the method and the route."""
        return f"{self.method[:80]} {self.route}"

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header, by its lowercase name."""
        return self._headers.get(name)

    def check_query(self) -> None:
        """Raises `LimitExceeded` (414) for a query that is too long; nothing of it has been read then."""
        if self._query_bytes > MAX_QUERY_BYTES:
            raise LimitExceeded(f"the query is {self._query_bytes} bytes, limit {MAX_QUERY_BYTES}", status=414)

    def query(self, name: str) -> str | None:
        """The last value of a query parameter."""
        if not self._query:
            return None
        if self._parameters is None:
            self._parameters = dict(parse_qsl(self._query.decode("latin-1"), keep_blank_values=True))
        return self._parameters.get(name)

    @property
    def has_body(self) -> bool:
        return self.method in ("POST", "PUT")

    @property
    def has_token(self) -> bool:
        """Whether there is a token or a secret key, even in a place where it is not accepted."""
        return bool(bearer(self.header(b"authorization")) or self._query_token)

    def authenticate(self) -> None:
        """Raises `InvalidToken`, also without a credential; and what `admit` raises."""
        tokens, credential = self.host.tokens, bearer(self.header(b"authorization"))
        if not credential and self.method == "GET":
            credential = self._query_token
            if tokens.is_secret(credential):
                raise InvalidToken("the secret key must not be in a URL; send it as `Authorization: Bearer …`")
        self.admit(tokens.authenticate(credential))

    def admit(self, claims: Claims) -> None:
        """Continue with these claims. Raises `LimitExceeded` for a request with a body, if the owner has too many of
        those open."""
        self.claims = claims
        if self.has_body and not claims.secret:
            self.subscription_limits.acquire_body(claims.owner)
            self._body_owner = claims.owner

    @property
    def owner(self) -> str:
        """To whom the request is charged: the owner of the public token, or "" for the secret key."""
        return self.claims.owner

    def release_body(self) -> None:
        """There is a response, so the body no longer counts."""
        if self._body_owner:
            self.subscription_limits.release_body(self._body_owner, self._body_bytes)
            self._body_owner = ""

    def _count_body(self, size: int) -> None:
        """Count the body as at least this long. Raises `LimitExceeded` (429) if its owner sends too much at once."""
        if self._body_owner and size > self._body_bytes:
            self.subscription_limits.add_body_bytes(self._body_owner, size - self._body_bytes)
            self._body_bytes = size

    @property
    def is_from_elsewhere(self) -> bool:
        """Whether another process, which has its runs in its own memory, created the token."""
        return self.host.tokens.is_from_elsewhere(self.claims)

    @property
    def last_event_id(self) -> str | None:
        """Where the client resumes: from the header that an EventSource sends, or else from the query."""
        header = self.header(b"last-event-id")
        if header:
            return header.decode("utf-8", "replace")
        return next(filter(None, map(self.query, _LAST_EVENT_ID)), None) if self._query else None

    def accepts_events(self) -> bool:
        return EVENT_STREAM in (self.header(b"accept") or b"").decode("latin-1").lower()

    def is_official(self) -> bool:
        """Whether the client is Trigger.dev's, which reads streams in its own framing."""
        return self.header(b"trigger-version") is not None

    @property
    def protocol(self) -> str | None:
        """The wire format that the client wants a stream in."""
        return self.query("protocol")

    def names_protocol(self) -> bool:
        return self.protocol is not None

    @property
    def is_event_source(self) -> bool:
        """Whether the client reconnects after a body that ends, but never after an error such as 503."""
        is_native = not (self.is_official() or self.names_protocol())
        return self.method == "GET" and self.accepts_events() and is_native

    @property
    def sees_no_status(self) -> bool:
        """Whether the client is an EventSource for all we know: its token is in the URL, since it cannot set headers. A
        script sees neither status nor body of a response to it that is not an event stream."""
        return self.is_event_source and bool(self._query_token) and self.header(b"authorization") is None

    @property
    def skipped_columns(self) -> tuple[str, ...]:
        """The columns of a run to leave out: those in the token, or else those in the query."""
        return self.claims.skip_columns or tuple(filter(None, (self.query("skipColumns") or "").split(",")))

    def name(self, header: bytes) -> str | None:
        """The value of a header that names something. Raises `InvalidRequest`."""
        value = self.header(header)
        if value is None:
            return None
        if not _NAME.fullmatch(value):
            name, text = header.decode().title(), shown(value.decode("latin-1"))
            raise InvalidRequest(f"{name} is {text}; allowed are 1 to 128 visible ASCII characters")
        return value.decode()

    async def body(self, max_bytes: int) -> bytes:
        """The body. Raises `LimitExceeded` as soon as it is too long (413) or its owner sends too much at once (429),
        `RequestCutOff`, `ExpiredToken`."""
        length = self.header(b"content-length") or b""
        if length.isdigit() and len(length) < 19:
            _check_length(int(length), max_bytes)
            self._count_body(int(length))
        body = bytearray()
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise RequestCutOff("the request body was cut off; send it again")
            body += message.get("body", b"")
            _check_length(len(body), max_bytes)
            self._count_body(len(body))
            if not message.get("more_body", False):
                return bytes(body)


def _check_length(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise LimitExceeded(f"body is at least {size} bytes, limit {max_bytes}", status=413)
