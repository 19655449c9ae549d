"""The ASGI app of a `Realtime`: what comes in is routed, what is raised becomes an answer.

Nothing escapes to the host: an exception that leaves a mount makes the host answer, without CORS headers, and a browser
shows that as a CORS error. A preflight is answered before authentication.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.responses import Response

from asgi_realtime.asgi import feeds, health, streams
from asgi_realtime.asgi.cors import cors_headers, preflight_headers
from asgi_realtime.asgi.host import Host, Receive, Scope, Send
from asgi_realtime.asgi.limits import SubscriptionLimits
from asgi_realtime.asgi.open_request import until_shutdown
from asgi_realtime.asgi.request import BODY_METHODS, Request
from asgi_realtime.asgi.responses import error_response, exception_response
from asgi_realtime.asgi.routes import API, Endpoint, resolve
from asgi_realtime.asgi.run_cache import RunCache
from asgi_realtime.asgi.subscription import Finished, Leaving, Subscription, reconnect_response
from asgi_realtime.asgi.trigger_dev import batches, metadata, runs, stream_writers, tokens
from asgi_realtime.core.errors import BrokerUnavailable, RealtimeError, RunKeptElsewhere, RunNotFound, shown

logger = logging.getLogger("asgi_realtime")

Answer = Response | Subscription[Any]

ENDPOINTS: dict[Endpoint, dict[str, Callable[..., Awaitable[Answer]]]] = {
    Endpoint.STREAM: {"GET": streams.stream},
    Endpoint.WRITE_STREAM: {
        "PUT": stream_writers.create_stream,
        "POST": stream_writers.write_stream,
        "HEAD": stream_writers.last_index,
    },
    Endpoint.APPEND: {"POST": stream_writers.append},
    Endpoint.INPUT: {"GET": streams.tail_input, "POST": stream_writers.send_input},
    Endpoint.RUN_FEED: {"GET": feeds.run_feed},
    Endpoint.TAG_FEED: {"GET": feeds.tag_feed},
    Endpoint.BATCH_FEED: {"GET": feeds.batch_feed},
    Endpoint.HEALTH: {"GET": health.health, "HEAD": health.health},
    Endpoint.TRIGGER: {"POST": runs.trigger},
    Endpoint.CREATE_BATCH: {"POST": batches.create_batch},
    Endpoint.BATCH_ITEMS: {"POST": batches.fill_batch},
    Endpoint.RETRIEVE_BATCH: {"GET": batches.retrieve_batch},
    Endpoint.RETRIEVE_RUN: {"GET": runs.retrieve_run},
    Endpoint.CANCEL_RUN: {"POST": runs.cancel_run},
    Endpoint.UPDATE_METADATA: {"GET": metadata.retrieve_metadata, "PUT": metadata.update_metadata},
    Endpoint.ADD_TAGS: {"POST": runs.add_tags},
    Endpoint.JWT_CLAIMS: {"POST": tokens.jwt_claims},
    Endpoint.PUBLIC_TOKENS: {"POST": tokens.public_token},
    Endpoint.PACKETS: {"GET": runs.packets, "PUT": runs.packets},
}
"""What answers which method. Called with the request and the route's parameters."""


KEPT_ELSEWHERE = (
    "this process does not have it: the token was made by another process, which keeps its runs in its own memory."
    " Several workers need a broker that they share (broker='redis://…'); if there is only one, it was restarted since"
)


class RealtimeApp:
    """The ASGI app over a host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.subscription_limits = SubscriptionLimits(host.limits)
        self._run_cache = RunCache(host.runs)
        self._told_of_others = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            answer: Answer | None = None
            request = Request(self._host, self.subscription_limits, self._run_cache, scope, receive)
            origin = request.header(b"origin")
            comes_back = _comes_back(request)
            try:
                answer = await self._decide(request, scope)
                del request  # an open stream keeps none of it
                self._finish(answer, scope, origin)
                await answer(scope, receive, send)
            except Exception as exc:
                response = self._error(exc, answer, comes_back)
                if response is not None:
                    self._finish(response, scope, origin)
                    await _send_quietly(response, scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})  # before it was accepted: 403

    async def _decide(self, request: Request, scope: Scope) -> Answer:
        cors = self._host.cors
        if cors is not None and request.method == "OPTIONS" and request.header(b"access-control-request-method"):
            answer = Response(status_code=204)
            answer.raw_headers += preflight_headers(cors, request.header(b"access-control-request-headers"))
            return answer
        route = resolve(scope["path"], scope.get("root_path", ""))
        if route is None or (route.endpoint in API and not self._host.api):
            return error_response(404, "not_found", f"nothing is served at {shown(scope['path'])}")
        methods = ENDPOINTS.get(route.endpoint, {})
        endpoint = methods.get(request.method)
        if endpoint is None:
            allowed = ", ".join(methods)
            message = f"{request.method[:80]} is not allowed here; allowed: {allowed}"
            return error_response(405, "method_not_allowed", message, {"allow": allowed})
        if route.endpoint is not Endpoint.HEALTH:  # which tells how the start went
            await self._ensure_started()
        try:
            if request.method not in BODY_METHODS:
                return await endpoint(request, *route.params)
            silence_s = (
                self._host.timeouts.writer if endpoint is stream_writers.write_stream else self._host.timeouts.receive
            )
            return await until_shutdown(request, partial(endpoint, request, *route.params), silence_s=silence_s)
        except RunNotFound as exc:
            if request.is_from_elsewhere:
                raise self._kept_elsewhere() from exc
            raise

    def _kept_elsewhere(self) -> RunKeptElsewhere:
        error = RunKeptElsewhere(KEPT_ELSEWHERE)
        if not self._told_of_others:
            logger.warning("a request was refused, and others may be: %s", error)
            self._told_of_others = True
        return error

    def _finish(self, answer: Answer, scope: Scope, origin: bytes | None) -> None:
        """What all answers have, errors too."""
        answer.raw_headers.extend(cors_headers(self._host.cors, origin))
        if scope["method"] == "HEAD" and isinstance(answer, Response):
            answer.body = b""  # the headers stay as they are with a body: RFC 9110, 9.3.2

    async def _ensure_started(self) -> None:
        try:
            await self._host.ensure_started()
        except RealtimeError:
            raise
        except Exception as exc:
            logger.exception("the start failed")
            raise BrokerUnavailable("the server could not start; try later") from exc

    def _error(self, error: Exception, answer: Answer | None, comes_back: bool) -> Response | None:
        """The answer to an exception, or None if it is too late for one."""
        if isinstance(answer, Response):  # its head may be out; and it fails only with the server's `send`
            logger.debug("an answer could not be sent", exc_info=error)
            return None
        if isinstance(error, Finished | Leaving):
            return error.answer
        if isinstance(error, BrokerUnavailable) and comes_back:
            return reconnect_response(self._host)
        if not isinstance(error, RealtimeError) or error.status == 500:
            logger.error("a request failed", exc_info=error)
        return exception_response(error, debug=self._host.debug)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Only the root app of a server gets here; a mount gets no lifespan."""
        await receive()
        try:
            await self._host.start()
        except Exception as exc:
            logger.exception("start failed")
            await send({"type": "lifespan.startup.failed", "message": f"{type(exc).__name__}: {exc}"})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        try:
            await self._host.stop()
        except Exception as exc:
            logger.exception("stop failed")
            await send({"type": "lifespan.shutdown.failed", "message": f"{type(exc).__name__}: {exc}"})
            return
        await send({"type": "lifespan.shutdown.complete"})


def _comes_back(request: Request) -> bool:
    """Whether this is an EventSource: it comes back after a body that ends, and never after a 503."""
    return request.method == "GET" and request.accepts_event_stream and not request.is_official_client


async def _send_quietly(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    try:
        await response(scope, receive, send)
    except Exception as exc:
        logger.debug("an answer could not be sent", exc_info=exc)
