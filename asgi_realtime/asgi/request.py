"""One HTTP request, as the endpoints read it.

It is dropped once there is a response: an open stream retains nothing of it.
"""

from __future__ import annotations

import math
import re
from urllib.parse import parse_qsl

from asgi_realtime.asgi.auth import bearer, redact_query
from asgi_realtime.asgi.host import Host, Receive, Scope
from asgi_realtime.asgi.limits import PROBE, SubscriptionLimits
from asgi_realtime.asgi.run_cache import RunCache
from asgi_realtime.core.errors import InvalidRequest, InvalidToken, LimitExceeded, RequestCutOff, shown
from asgi_realtime.tokens import Claims

EVENT_STREAM = "text/event-stream"
REQUEST_KEY = b"x-trigger-request-idempotency-key"
"""The official clients' name for one call, the same in each of its retries."""

_ANONYMOUS = Claims(scopes=(), expires_at=math.inf, token_id=PROBE)
_LAST_EVENT_ID = ("last_event_id", "lastEventId", "Last-Event-ID", "lastEventID", "last-event-id")
"""Its spellings in the query: ours, and those of EventSource polyfills and other servers (Mercure)."""
_NAME = re.compile(rb"[\x21-\x7e]{1,128}")


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
        self.receive = receive
        self.method: str = scope["method"]
        self._headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            self._headers.setdefault(name.lower(), value)
        self._query_token = redact_query(scope)
        self._query: bytes = scope.get("query_string", b"")
        self._parameters: dict[str, str] | None = None
        self._body_token_id = ""
        self.claims = _ANONYMOUS
        """The content of the credential; anonymous if the route needs none."""

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header, by its lowercase name."""
        return self._headers.get(name)

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

    def authenticate(self) -> None:
        """Raises `InvalidToken`, also without a credential; for a request with a body also `LimitExceeded`, if its
        token has too many of those open."""
        claims = self.claims = self._authenticate()
        if self.has_body and not claims.secret:
            self.subscription_limits.acquire_body(claims.token_id)
            self._body_token_id = claims.token_id

    def _authenticate(self) -> Claims:
        credential = bearer(self.header(b"authorization"))
        if credential or self.method != "GET":
            return self.host.tokens.authenticate(credential)
        if self.host.tokens.is_secret(self._query_token):
            raise InvalidToken("the secret key must not be in a URL; send it as `Authorization: Bearer …`")
        return self.host.tokens.authenticate(self._query_token)

    @property
    def token_id(self) -> str:
        """The id of the public token, or "" for the secret key."""
        return "" if self.claims.secret else self.claims.token_id

    def release_body(self) -> None:
        """There is a response, so the body no longer counts."""
        if self._body_token_id:
            self.subscription_limits.release_body(self._body_token_id)
            self._body_token_id = ""

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
        return next(filter(None, map(self.query, _LAST_EVENT_ID)), None)

    def accepts_events(self) -> bool:
        return EVENT_STREAM in (self.header(b"accept") or b"").decode("latin-1").lower()

    def is_official(self) -> bool:
        """Whether the client is Trigger.dev's, which reads streams in its own framing."""
        return self.header(b"trigger-version") is not None

    @property
    def is_event_source(self) -> bool:
        """Whether the client reconnects after a body that ends, but never after an error such as 503."""
        return self.method == "GET" and self.accepts_events() and not self.is_official()

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
        """The body. Raises `LimitExceeded` (413) as soon as it is too long, `RequestCutOff`."""
        length = self.header(b"content-length") or b""
        if length.isdigit() and len(length) < 19:
            _check_length(int(length), max_bytes)
        body = bytearray()
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise RequestCutOff("the request body was cut off; send it again")
            body += message.get("body", b"")
            _check_length(len(body), max_bytes)
            if not message.get("more_body", False):
                return bytes(body)


def _check_length(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise LimitExceeded(f"body is at least {size} bytes, limit {max_bytes}", status=413)
