"""`GET /v1/health` as an event stream: a short stream that shows what stands between a client and the server.

A proxy that collects a body before it passes it on, or compresses it, cannot be seen in one answer. So a few events go
out some time apart, each with the time when it was sent; whoever reads them compares. No token, no data; few at once.
docs/protocol.md, section 9.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
from starlette.responses import Response

from asgi_realtime.asgi.limits import PROBE
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import json_response
from asgi_realtime.asgi.subscription import WAITING, Subscription
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.log import End
from asgi_realtime.core.sse import control_frame
from asgi_realtime.tokens import Claims

logger = logging.getLogger("asgi_realtime")

EVENTS = 5
APART_S = 0.2

_NOBODY = Claims(scopes=(), expires_at=math.inf, token_id=PROBE)


class Probe(Subscription[None]):
    """Sends its events and ends."""

    __slots__ = ()

    def __init__(self, request: Request) -> None:
        super().__init__(request.host, request.subscription_limits, _NOBODY)

    def _open(self) -> AbstractAsyncContextManager[None]:
        return _nothing()

    async def _prepare(self, source: None) -> str:
        return "connected"

    async def _follow(self, source: None) -> bytes:
        for number in range(EVENTS):
            if number:
                self._phase = WAITING
                with anyio.move_on_after(APART_S):
                    await self._waiter.arm()
            if self._alert:
                self._heed()
            sent_at = round(self._host.clock() * 1000)
            await self._write(control_frame("probe", encode_value({"n": number, "sentAt": sent_at})))
        return self._framing.end(End("complete"), None)


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


async def health(request: Request) -> Response | Probe:
    """Whether this process takes requests, for load balancers; or a `Probe`. Needs no token and tells no data."""
    if request.method == "GET" and request.accepts_event_stream:
        await request.host.ensure_started()
        return Probe(request)
    broker = "unavailable"
    try:
        await request.host.ensure_started()
        await request.host.broker.ping()
        broker = "ok"
    except BrokerUnavailable:
        pass  # expected of a broker that is away
    except Exception:
        logger.warning("the broker cannot be used", exc_info=True)
    status = "closing" if request.host.closing else broker
    told: dict[str, Any] = {"status": status, "broker": broker}
    if request.host.broker.warnings:
        told["warnings"] = request.host.broker.warnings
    return json_response(told, 200 if status == "ok" else 503)
