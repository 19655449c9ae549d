"""A request whose body is still on its way, or whose answer is: a POST or PUT.

The shutdown ends it at once, wherever it waits: for its client, or for a broker that is away. A call of the broker that
is cut off so happened entirely or not at all; who has a way to say that a request is a repeated one may repeat it. A
client that sends nothing for long is not waited for. There is no timer: the ticker looks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.responses import Response

from asgi_realtime.asgi.host import Message, Receive
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import error_response
from asgi_realtime.asgi.subscription import shutdown_response
from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.loop.interrupts import make_interrupt

A = TypeVar("A")


class OpenRequest:
    """The request as the ticker and the shutdown see it."""

    __slots__ = ("_listening", "_receive", "_silence_s", "_since", "interrupt", "silent")

    def __init__(self, receive: Receive, silence_s: float) -> None:
        self.interrupt = make_interrupt()
        self.silent = False
        """It was ended because nothing came."""
        self._receive = receive
        self._silence_s = silence_s
        self._listening = False
        self._since: float | None = None  # when the ticker first saw that this message is waited for

    async def receive(self) -> Message:
        """The next message of the client."""
        self._listening = True
        self._since = None
        try:
            return await self._receive()
        finally:
            self._listening = False

    def tick(self, now: float, steady: float) -> None:
        if not self._listening:
            return
        if self._since is None:
            self._since = steady
        elif steady - self._since >= self._silence_s:
            self.silent = True
            self.interrupt.interrupt()

    def shut_down(self) -> None:
        self.interrupt.interrupt()


async def until_shutdown(request: Request, answer: Callable[[], Awaitable[A]], *, silence_s: float) -> A | Response:
    """What `answer` gives, unless the shutdown begins or the client is silent for too long before that.

    These are answered by 503 and 408, with which the official clients come again.
    """
    host = request.host
    opened = OpenRequest(request.receive, silence_s)
    request.receive = opened.receive
    host.subscribers.add(opened)
    try:
        with opened.interrupt:
            if not host.closing:
                return await answer()
    except ServerShutdown:
        pass  # the broker was left before this request was
    finally:
        host.subscribers.discard(opened)
        request.release_body()
    if opened.silent:
        return error_response(408, "silent", f"nothing came for {silence_s:g} s; send again what is not confirmed")
    return shutdown_response()
