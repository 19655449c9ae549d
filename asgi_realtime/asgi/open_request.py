"""A request that is answered when its body has come, however long that takes.

The shutdown ends it at once, wherever it waits: for its client, or for a broker that is away. A call of the broker that
is cut off so happened entirely or not at all; who has a way to say that a request is a repeated one may repeat it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.responses import Response

from asgi_realtime.asgi.answers import refusal
from asgi_realtime.asgi.request import Request
from asgi_realtime.errors import ServerShutdown
from asgi_realtime.waiting import make_interrupt


class OpenRequest:
    """The request as the ticker and the shutdown see it. Its silence is measured from tick to tick, without a timer."""

    __slots__ = ("_heard", "_silence_s", "_since", "interrupt", "silent")

    def __init__(self, silence_s: float) -> None:
        self.interrupt = make_interrupt()
        self.silent = False
        """It was ended because nothing came."""
        self._silence_s = silence_s
        self._heard = True
        self._since = 0.0

    def heard(self) -> None:
        """The client has sent something."""
        self._heard = True

    def tick(self, now: float) -> None:
        if self._heard:
            self._heard = False
            self._since = now
        elif now - self._since >= self._silence_s:
            self.silent = True
            self.interrupt.interrupt()

    def shut_down(self) -> None:
        self.interrupt.interrupt()


async def until_shutdown(request: Request, job: Callable[[OpenRequest], Awaitable[Response]]) -> Response:
    """Answer with a job, unless the shutdown begins or the client is silent for too long before it is done.

    These are answered by 503 and 408, with which the official clients come again.
    """
    host = request.host
    opened = OpenRequest(host.timeouts.writer)
    host.subscribers.add(opened)
    try:
        with opened.interrupt:
            if not host.closing:
                return await job(opened)
    except ServerShutdown:
        pass  # the broker was left before this request was
    finally:
        host.subscribers.discard(opened)
    if opened.silent:
        told = f"nothing came for {host.timeouts.writer:g} s; send again what is not confirmed"
        return refusal(408, "silent", told)
    return refusal(503, ServerShutdown.code, "the server goes down; send again what is not confirmed")
