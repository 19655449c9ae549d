"""The ASGI app of a `Realtime`: routes requests, and turns every exception into a response.

No exception reaches the host. A host would respond to it without CORS headers, and a browser reports that as a CORS
error and hides the real one. A preflight request is answered before authentication, since it carries no credential.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.responses import Response

from asgi_realtime.asgi.auth import redact_query
from asgi_realtime.asgi.browser_module import versioned_name
from asgi_realtime.asgi.cors import cors_headers, preflight_headers
from asgi_realtime.asgi.host import App, Headers, Host, Receive, Scope, Send
from asgi_realtime.asgi.host_response import HostAccess, HostResponse, Spawn, last_event_id_of
from asgi_realtime.asgi.limits import SubscriptionLimits
from asgi_realtime.asgi.lookup import RunAwaited
from asgi_realtime.asgi.open_request import until_shutdown
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import error_response, exception_response
from asgi_realtime.asgi.routes import AnyResponse, Route, resolve
from asgi_realtime.asgi.run_cache import RunCache
from asgi_realtime.asgi.sending import send_response
from asgi_realtime.asgi.sessions import RESOURCES, authorize_session
from asgi_realtime.asgi.subscription import (
    AWAITED_RECONNECT_MS,
    SubscriptionResponse,
    expired_response,
    reconnect_response,
)
from asgi_realtime.core.errors import (
    AuthorizeFailed,
    BrokerUnavailable,
    ExpiredToken,
    RealtimeError,
    RunKeptElsewhere,
    RunNotFound,
    ServerShutdown,
    shown,
)
from asgi_realtime.core.log import StreamKey
from asgi_realtime.loop.logger import logger

KEPT_ELSEWHERE = (
    "run not found in this worker: it lives in the memory of another one. Share a broker (broker='redis://…') or run"
    " one worker. With a single worker: it was restarted since"
)

SERVED = (
    "below the mount there are v1/streams/{run}/{stream}, v1/runs/{run}, v1/runs?tags={tag}, v1/batches/{batch} and"
    " v1/health; docs/protocol.md lists the rest"
)

NOSNIFF = (b"x-content-type-options", b"nosniff")
"""A browser must not guess that a chunk is HTML: WHATWG Fetch, section 3.6."""


class RealtimeApp:
    """Responds to the requests to a host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.subscription_limits = SubscriptionLimits(host.limits)
        self._run_cache = RunCache(host.runs.load)
        self._has_warned_of_elsewhere = False

    @property
    def client_js(self) -> str:
        """The name of the browser module that the app serves."""
        return versioned_name()

    async def respond(self, scope: Scope, receive: Receive) -> App:
        """The response to a request, as an ASGI app to call once. Does not raise.

        The caller calls it, because each frame below an open stream adds to the memory of an idle subscriber.
        """
        if scope["type"] == "lifespan":
            return self._lifespan
        if scope["type"] == "websocket":
            redact_query(scope)  # servers log the handshake
            return _reject_websocket
        request = Request(self._host, self.subscription_limits, self._run_cache, scope, receive)
        try:
            response = await self._respond(request, scope)
        except Exception as exc:
            return self._fail(request, exc)
        response.raw_headers += self._common_headers(request)
        if isinstance(response, SubscriptionResponse):
            response.fail = partial(self._fail, request)
            return response
        return partial(send_response, self._host, response)

    def host_response(
        self,
        key: StreamKey,
        protocol: str,
        *,
        spawn: Spawn,
        token: str,
        request: Any,
        last_event_id: str | None,
        owner: str,
    ) -> HostResponse:
        """A stream as the response of a route of the host. Raises `InvalidRequest` for an unknown protocol."""
        if last_event_id is None and request is not None:
            last_event_id = last_event_id_of(request)
        access = HostAccess(self._host, self.subscription_limits, last_event_id, owner)
        return HostResponse(access, key, protocol, fail=self._fail_for_host, spawn=spawn, token=token)

    def _fail_for_host(self, error: Exception, is_event_source: bool) -> App:
        self._report(error, "a request for realtime.response()")
        return partial(send_response, self._host, self._error_response(error, reconnects=is_event_source))

    def _fail(self, request: Request, error: Exception) -> App:
        self._report(error, request.shown)
        response = self._error_response(error, reconnects=request.is_event_source)
        response.raw_headers += self._common_headers(request)
        return partial(send_response, self._host, response)

    def _report(self, error: Exception, request: str) -> None:
        if isinstance(error, RealtimeError):
            self._host.runs.reporter.rejected(error, request)

    def _common_headers(self, request: Request) -> Headers:
        """No cache stores what depends on a cookie (`NOT_CACHED`), so there is no `Vary: Cookie`, which a session
        middleware would repeat."""
        host, origin = self._host, request.header(b"origin")
        return [NOSNIFF, *cors_headers(host.cors, origin, credentials=host.authorize is not None)]

    async def _respond(self, request: Request, scope: Scope) -> AnyResponse:
        cors = self._host.cors
        if cors is not None and request.method == "OPTIONS" and request.header(b"access-control-request-method"):
            preflight = Response(status_code=204)
            preflight.raw_headers += preflight_headers(cors, request.header(b"access-control-request-headers"))
            return preflight
        request.check_query()
        match = resolve(scope["path"], scope.get("root_path", ""))
        host = self._host
        if match is None or (match.is_api and not host.api) or (match.is_inspector and host.recent is None):
            return error_response(404, "not_found", f"nothing is served at {shown(scope['path'])}; {SERVED}")
        request.route = match.pattern
        route = match.route(request)
        if route is None:
            allowed = ", ".join(match.methods)
            message = f"{request.method[:80]} is not allowed here; allowed: {allowed}"
            return error_response(405, "method_not_allowed", message, {"allow": allowed})
        if route.needs_start and not self._host.running:
            await self._ensure_started()
        return await self._call(route, request, match.params)

    async def _call(self, route: Route, request: Request, params: tuple[str, ...]) -> AnyResponse:
        timeouts = self._host.timeouts
        silence_s = body_s = math.inf
        if request.has_body:
            silence_s = timeouts.writer if route.open_ended else timeouts.receive
            body_s = math.inf if route.open_ended else timeouts.body
        try:
            respond: Callable[[], Awaitable[AnyResponse]] = partial(route.endpoint, request, *params)
            if route.needs_token:
                authorize = self._host.authorize
                resource_of = RESOURCES.get((route.method, route.pattern))
                if authorize is None or resource_of is None or request.has_token:
                    request.authenticate()
                else:
                    resource = resource_of(request, *params)
                    respond = partial(_after, partial(authorize_session, authorize, request, resource), respond)
            return await until_shutdown(request, respond, silence_s=silence_s, body_s=body_s)
        except ExpiredToken as exc:
            if route.reconnects and request.sees_no_status:
                self._report(exc, request.shown)
                return expired_response()
            raise
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
            logger.warning("%s", error)
            self._has_warned_of_elsewhere = True
        return error

    async def _ensure_started(self) -> None:
        try:
            await self._host.ensure_started()
        except RealtimeError:
            raise
        except Exception as exc:
            logger.exception("the start failed")
            raise BrokerUnavailable("the server could not start; try later") from exc

    def _error_response(self, error: Exception, *, reconnects: bool) -> Response:
        if reconnects and isinstance(error, BrokerUnavailable | ServerShutdown | AuthorizeFailed):
            return reconnect_response()
        if reconnects and isinstance(error, RunAwaited):
            return reconnect_response(longest_ms=AWAITED_RECONNECT_MS)
        if not isinstance(error, RealtimeError) or error.status == 500:
            logger.error("a request failed", exc_info=error)
        return exception_response(error, now=self._host.clock(), debug=self._host.debug)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
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


async def _after(first: Callable[[], Awaitable[None]], respond: Callable[[], Awaitable[AnyResponse]]) -> AnyResponse:
    await first()
    return await respond()


async def _reject_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1000})  # before it is accepted: the client gets 403
