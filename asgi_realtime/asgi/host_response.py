"""`Realtime.response`: a stream as the response of a route of the host.

The host has authorized its request, so there is no token. Otherwise it is a subscription like any other: counted,
limited, ticked, and ended by a shutdown. It is a Starlette `Response`, that is, an ASGI app. For hosts of another kind
it is an async iterator of the same bytes; a job then runs the subscription and hands over one body at a time.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio
from starlette.responses import Response

from asgi_realtime.asgi.connection import CutOff
from asgi_realtime.asgi.framing import NATIVE
from asgi_realtime.asgi.host import App, Host, Message, Receive, Scope, Send
from asgi_realtime.asgi.limits import SubscriptionLimits
from asgi_realtime.asgi.protocol_streams import ConvertedResponse, find_protocol
from asgi_realtime.asgi.streams import StreamResponse
from asgi_realtime.asgi.subscription import HEADERS
from asgi_realtime.core.log import StreamKey
from asgi_realtime.tokens import Claims

if TYPE_CHECKING:
    from starlette.background import BackgroundTask

Spawn = Callable[[Callable[[], Awaitable[None]]], None]

_OF_THE_HOST = Claims(scopes=(), expires_at=math.inf, token_id="", owner="")
_SCOPE = {"type": "http", "http_version": "1.1", "method": "GET"}


@dataclass(frozen=True, slots=True)
class HostAccess:
    """A subscription that the host opens for a request that it has authorized."""

    host: Host
    subscription_limits: SubscriptionLimits
    last_event_id: str | None
    owner: str
    """Charged for the subscription; empty for the host."""
    claims: Claims = _OF_THE_HOST

    @property
    def max_age_s(self) -> float:
        return self.host.timeouts.stream_age


def last_event_id_of(request: Any) -> str | None:
    """The header of a request of any framework: Starlette, FastAPI, Litestar, Quart, Django."""
    headers: Mapping[str, str] = request.headers
    return headers.get("last-event-id") or headers.get("Last-Event-ID") or None


class HostResponse(Response):
    """Responds with a stream of a run. Created by `Realtime.response`.

    As an ASGI app it responds with an error if there is no such run (404), if the client resumes where it cannot (400,
    410), if a limit is exceeded (429), or during a shutdown (503). As an iterator it raises these errors, and `CutOff`
    to make the host break the connection. `RealtimeMiddleware` keeps `CutOff` out of the server's log.
    """

    def __init__(
        self,
        access: HostAccess,
        key: StreamKey,
        protocol: str,
        *,
        fail: Callable[[Exception, bool], App],
        spawn: Spawn,
        token: str,
    ) -> None:
        self._access = access
        self._key = key
        self._protocol = find_protocol(protocol)
        self._fail = fail
        self._spawn = spawn
        self.status_code = 200
        self.background: BackgroundTask | None = None
        if self._protocol is None:
            self.raw_headers = [*HEADERS, *NATIVE.headers]
        else:
            where = f"v1/streams/{key.run}/{quote(key.name)}?protocol={protocol}&access_token={token}"
            self.raw_headers = [*HEADERS, *self._protocol.headers, (b"x-realtime-resume", where.encode())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope.get("headers", ())}
        is_event_source = self._protocol is None and b"text/event-stream" in headers.get(b"accept", b"")

        def fail(error: Exception) -> App:
            return self._fail(error, is_event_source and scope["method"] == "GET")

        app: App
        try:
            app = subscription = await self._subscription()
            subscription.fail = fail
            if scope["method"] == "HEAD":
                app = self._head
        except Exception as exc:
            app = fail(exc)
        await app(scope, receive, send)
        if self.background is not None:
            await self.background()

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": b""})

    async def _subscription(self) -> StreamResponse:
        """Raises `RunNotFound`, `InvalidRequest`, `BrokerUnavailable`."""
        host = self._access.host
        await host.ensure_started()
        record = await host.runs.get(self._key.run)
        if self._protocol is None:
            response = StreamResponse(self._access, self._key)
        else:
            response = ConvertedResponse(self._access, self._key, self._protocol.of(record))
        response.watch(record)
        response.raw_headers = self.raw_headers
        return response

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        subscription = await self._subscription()
        relay = _Relay(subscription)
        self._spawn(relay.run)
        try:
            async for body in relay.bodies:
                yield body
            if relay.failure is not None:
                raise relay.failure
        finally:
            relay.leave()


class _Relay:
    """Runs a subscription and hands its bodies to an iterator, one at a time."""

    def __init__(self, subscription: StreamResponse) -> None:
        self._subscription = subscription
        self._bodies, self.bodies = anyio.create_memory_object_stream[bytes](0)
        self._left = anyio.Event()
        self._is_complete = False
        self.failure: Exception | None = None
        """Why the bodies ended before the stream did."""
        subscription.fail = self._fail

    async def run(self) -> None:
        try:
            await self._subscription(_SCOPE, self._receive, self._send)
        finally:  # also if a stop cancels this: the iterator must not just end
            if not self._is_complete and self.failure is None:
                self.failure = CutOff("the response ends before its stream does; the client resumes")
            self._bodies.close()

    def _fail(self, error: Exception) -> App:
        self.failure = error
        return _nothing

    async def _receive(self) -> Message:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message.get("body"):
            await self._bodies.send(message["body"])
        if message["type"] == "http.response.body":
            self._is_complete = not message.get("more_body", False)

    def leave(self) -> None:
        self._left.set()
        self.bodies.close()


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    pass
