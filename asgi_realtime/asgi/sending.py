"""Sends a complete response, in pieces if it is large.

Like an open stream, it must not last as long as a client that does not read it wants. There is no timer per response;
the ticker measures the time without progress.
"""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from asgi_realtime.asgi.connection import WHOLE_BYTES, allowed_send_s, find_transport, pieces, watch_unread
from asgi_realtime.asgi.host import Host, Receive, Scope, Send
from asgi_realtime.asgi.responses import PartsResponse
from asgi_realtime.loop.interrupts import make_interrupt
from asgi_realtime.loop.logger import logger


class _Sending:
    """A response as the ticker sees it."""

    __slots__ = ("_host", "_transport", "interrupt", "since")

    def __init__(self, host: Host, transport: asyncio.Transport | None) -> None:
        self.interrupt = make_interrupt()
        self.since: float | None = None
        """The first tick of the current send."""
        self._host = host
        self._transport = transport

    def tick(self, now: float, steady: float) -> None:
        if self.since is None:
            self.since = steady
        elif steady - self.since >= allowed_send_s(self._host, closing=self._host.closing):
            if self._transport is not None:
                self._transport.abort()
            self.interrupt.interrupt()

    def shut_down(self) -> None:
        """Nothing to do: the ticker allows `CLOSING_SEND_S` from now on."""


async def send_response(host: Host, response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Send a response. Returns early, and aborts the connection, if the client does not read for `Timeouts.send`.

    Does not raise if the server does.
    """
    transport = find_transport(scope.get("http_version", "1.1"), send)
    sending = _Sending(host, transport)
    host.subscribers.add(sending)
    try:
        with sending.interrupt:
            await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
            if scope["method"] == "HEAD":  # the headers remain those of a response with a body: RFC 9110, 9.3.2
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await _send_body(host, sending, response, send)
    except Exception:  # only the server's `send` makes it fail
        logger.debug("a response could not be sent", exc_info=True)
    finally:
        host.subscribers.discard(sending)
        watch_unread(host, transport)


async def _send_body(host: Host, sending: _Sending, response: Response, send: Send) -> None:
    body = response.body
    if isinstance(response, PartsResponse) or len(body) > WHOLE_BYTES:
        for piece in pieces(response.parts if isinstance(response, PartsResponse) else (body,)):
            if not host.closing:
                sending.since = None
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        body = b""
    await send({"type": "http.response.body", "body": body, "more_body": False})
