"""`GET /v1/health`: whether this process takes requests, and whether its responses reach the client unbuffered.

Load balancers read the summary (`check`). With `Accept: text/event-stream` the same URL responds with a short stream
(`probe`). A proxy that buffers or compresses a body cannot be seen in a single response, so the stream sends a few
events some time apart, each with its time of sending, and the client compares. Neither needs a token or reveals data;
the number of open probes is limited. Spec: docs/protocol.md, section 9.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import anyio
from starlette.responses import Response

from asgi_realtime.asgi.phases import WAITING
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import json_response
from asgi_realtime.asgi.subscription import SubscriptionResponse
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.log import End
from asgi_realtime.core.sse import control_frame
from asgi_realtime.loop.logger import logger

PROBE_EVENTS = 5
PROBE_INTERVAL_S = 0.2


async def check(request: Request) -> Response:
    """The status of this process and its broker: 200 if both are ready, otherwise 503."""
    broker = "unavailable"
    try:
        await request.host.ensure_started()
        await request.host.broker.ping()
        broker = "ok"
    except BrokerUnavailable:
        pass
    except Exception:
        logger.warning("the health check of the broker failed", exc_info=True)
    status = "closing" if request.host.closing else broker
    summary: dict[str, Any] = {"status": status, "broker": broker}
    if request.host.broker.warnings:
        summary["warnings"] = request.host.broker.warnings
    return json_response(summary, 200 if status == "ok" else 503)


async def probe(request: Request) -> ProbeResponse:
    """A short event stream."""
    return ProbeResponse(request)


class ProbeResponse(SubscriptionResponse[None]):
    """Sends its events and ends."""

    __slots__ = ()
    kind = "probe"

    def _open(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def _follow(self, source: None) -> bytes:
        for number in range(PROBE_EVENTS):
            if number:
                self._phase = WAITING
                with anyio.move_on_after(PROBE_INTERVAL_S):
                    await self._waiter.arm()
            self._handle_alert()
            sent_at = round(self._host.clock() * 1000)
            await self._write(control_frame("probe", encode_value({"n": number, "sentAt": sent_at})))
        return self.framing.end(End("complete"), None)
