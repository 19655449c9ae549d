"""The ASGI app of a `Realtime`: routes requests, and turns every exception into a response.

No exception reaches the host. A host would respond to it without CORS headers, and a browser reports that as a CORS
error and hides the real one. A preflight request is answered before authentication, since it carries no credential.
"""

from __future__ import annotations

import logging
import math
from functools import partial

from starlette.responses import Response

from asgi_realtime.asgi.auth import redact_query
from asgi_realtime.asgi.cors import cors_headers, preflight_headers
from asgi_realtime.asgi.host import Host, Receive, Scope, Send
from asgi_realtime.asgi.limits import SubscriptionLimits
from asgi_realtime.asgi.open_request import until_shutdown
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import error_response, exception_response
from asgi_realtime.asgi.routes import AnyResponse, Route, resolve
from asgi_realtime.asgi.run_cache import RunCache
from asgi_realtime.asgi.subscription import SubscriptionResponse, reconnect_response
from asgi_realtime.core.errors import (
    BrokerUnavailable,
    RealtimeError,
    RunKeptElsewhere,
    RunNotFound,
    ServerShutdown,
    shown,
)

logger = logging.getLogger("asgi_realtime")

KEPT_ELSEWHERE = (
    "this worker does not have the run: another worker, which keeps runs in its own memory, created the token. Share a"
    " broker (broker='redis://…') or run one worker. With a single worker: it was restarted since"
)

NOSNIFF = (b"x-content-type-options", b"nosniff")
"""A browser must not guess that a chunk is HTML: WHATWG Fetch, section 3.6."""


class RealtimeApp:
    """The ASGI app over a host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.subscription_limits = SubscriptionLimits(host.limits)
        self._run_cache = RunCache(host.runs.load)
        self._has_warned_of_elsewhere = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] == "websocket":
            redact_query(scope)  # servers log the handshake
            return await _reject_websocket(receive, send)
        # Not in a separate method: each frame adds to the memory of an idle subscriber.
        request = Request(self._host, self.subscription_limits, self._run_cache, scope, receive)
        origin, reconnects = request.header(b"origin"), request.is_event_source
        try:
            response = await self._respond(request, scope)
            del request  # an open stream must not retain it
            if isinstance(response, SubscriptionResponse):
                self._add_common_headers(response, scope, origin)
                return await response(scope, receive, send)
        except Exception as exc:
            response = self._error_response(exc, reconnects=reconnects)
        self._add_common_headers(response, scope, origin)
        try:
            await response(scope, receive, send)
        except Exception:  # only the server's `send` makes it fail
            logger.debug("a response could not be sent", exc_info=True)

    async def _respond(self, request: Request, scope: Scope) -> AnyResponse:
        cors = self._host.cors
        if cors is not None and request.method == "OPTIONS" and request.header(b"access-control-request-method"):
            preflight = Response(status_code=204)
            preflight.raw_headers += preflight_headers(cors, request.header(b"access-control-request-headers"))
            return preflight
        match = resolve(scope["path"], scope.get("root_path", ""))
        if match is None or (match.is_api and not self._host.api):
            return error_response(404, "not_found", f"nothing is served at {shown(scope['path'])}")
        route = match.route(request)
        if route is None:
            allowed = ", ".join(match.methods)
            message = f"{request.method[:80]} is not allowed here; allowed: {allowed}"
            return error_response(405, "method_not_allowed", message, {"allow": allowed})
        if route.needs_start:
            await self._ensure_started()
        return await self._call(route, request, match.params)

    async def _call(self, route: Route, request: Request, params: tuple[str, ...]) -> AnyResponse:
        timeouts = self._host.timeouts
        silence_s = math.inf
        if request.has_body:
            silence_s = timeouts.writer if route.open_ended else timeouts.receive
        try:
            if route.needs_token:
                request.authenticate()
            return await until_shutdown(request, partial(route.endpoint, request, *params), silence_s=silence_s)
        except RunNotFound as exc:
            if request.is_from_elsewhere:
                raise self._kept_elsewhere() from exc
            raise
        except ServerShutdown:
            if route.reconnects:
                return reconnect_response()
            raise

    def _kept_elsewhere(self) -> RunKeptElsewhere:
        error = RunKeptElsewhere(KEPT_ELSEWHERE)
        if not self._has_warned_of_elsewhere:
            logger.warning("a request got 404, and others can too: %s", error)
            self._has_warned_of_elsewhere = True
        return error

    def _add_common_headers(self, response: AnyResponse, scope: Scope, origin: bytes | None) -> None:
        response.raw_headers.append(NOSNIFF)
        response.raw_headers.extend(cors_headers(self._host.cors, origin))
        if scope["method"] == "HEAD" and isinstance(response, Response):
            response.body = b""  # the headers remain those of a response with a body: RFC 9110, 9.3.2

    async def _ensure_started(self) -> None:
        try:
            await self._host.ensure_started()
        except RealtimeError:
            raise
        except Exception as exc:
            logger.exception("the start failed")
            raise BrokerUnavailable("the server could not start; try later") from exc

    def _error_response(self, error: Exception, *, reconnects: bool) -> Response:
        if reconnects and isinstance(error, BrokerUnavailable | ServerShutdown):
            return reconnect_response()
        if not isinstance(error, RealtimeError) or error.status == 500:
            logger.error("a request failed", exc_info=error)
        return exception_response(error, debug=self._host.debug)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Called only if this is the root app of a server; a mounted app gets no lifespan."""
        for step, call in (("startup", self._host.start), ("shutdown", self._host.stop)):
            await receive()
            try:
                await call()
            except Exception as exc:
                logger.exception("%s failed", step)
                await send({"type": f"lifespan.{step}.failed", "message": f"{type(exc).__name__}: {exc}"})
                return
            await send({"type": f"lifespan.{step}.complete"})


async def _reject_websocket(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1000})  # before it is accepted: the client gets 403
