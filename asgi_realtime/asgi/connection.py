"""What a connection retains, and how it ends, where ASGI has no words for it.

A server waits in `send()` while its write buffer is full, which is 64 KiB in uvicorn, gunicorn and hypercorn, but it
accepts each message whole. So large bodies are sent in pieces: a reader that stalls then holds the buffer and two
pieces, about 128 KiB, whatever the size of an item.

ASGI cannot abort a connection either. Returning early makes servers flush the buffer first, and that waits for a peer
that never reads. So the asyncio transport is looked up behind `send`. This depends on attributes that servers do not
document. If they change, or a middleware hides `send`, there is no transport, and the server decides how long it
retains the connection. docs/deployment.md lists what each server does.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

import anyio
from anyio.streams.memory import MemoryObjectSendStream

from asgi_realtime.asgi.host import Host, Receive, Scope, Send
from asgi_realtime.loop.logger import logger

WHOLE_BYTES = 64 * 1024
"""The largest body that is sent as one message, such as the joined chunks that readers share."""

PIECE_BYTES = 32 * 1024
"""The size of the messages of a larger body."""

CLOSING_SEND_S = 1.0
"""How long one send can take during a shutdown. A stalled reader must not delay the exit."""

_TRANSPORTS = (
    attrgetter("transport"),  # uvicorn: `send` is a method of the request cycle; gunicorn: it is a closure
    attrgetter("send.__self__.send.__self__.writer.transport"),  # hypercorn, HTTP/1.1
)
_MAX_STEPS = 32
"""How many objects behind `send` are visited. A middleware adds a few: its function, and what that refers to."""


NOTICED_S = 1.0
"""How long a server can take to report that an aborted connection is closed. Until then it logs an app that returns."""


class CutOff(Exception):
    """Raised through a framework to break the connection, because only a part of the body could be sent."""


def pieces(parts: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The parts as one body, in pieces of at most `PIECE_BYTES`. Only one piece is copied at a time."""
    piece = bytearray()
    for part in parts:
        view, start = memoryview(part), 0
        while len(piece) + len(part) - start > PIECE_BYTES:
            stop = start + PIECE_BYTES - len(piece)
            piece += view[start:stop]
            whole = bytes(piece)
            piece.clear()  # here, because a stalled reader suspends the generator below
            yield whole
            start = stop
        piece += view[start:]
    if piece:
        yield bytes(piece)


def find_transport(http_version: str, *ends: Send | Receive) -> asyncio.Transport | None:
    """The transport of an HTTP/1 connection, or None. A connection of HTTP/2 is shared with other requests.

    `ends` are what the server passed to the app, or what middlewares made of it.
    """
    if http_version not in ("1.0", "1.1"):
        return None
    return next(filter(None, map(_search, ends)), None)


def reset(transport: asyncio.Transport) -> None:
    """Abort a connection with a TCP reset.

    A proxy that speaks HTTP/1.0 to the server, as nginx does by default, takes any other end for the end of the body.
    """
    sock = transport.get_extra_info("socket")
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except Exception:  # it is not a socket of TCP, or the loop does not show it
        logger.debug("a connection is closed instead of reset", exc_info=True)
    transport.abort()


async def break_connection(scope: Scope, receive: Receive, send: Send) -> None:
    """End a response so that its client does not take it for complete. Servers break it if the app returns early."""
    transport = find_transport(scope.get("http_version", "1.1"), send, receive)
    if transport is None:
        return
    reset(transport)
    with anyio.move_on_after(NOTICED_S):
        while (await receive())["type"] != "http.disconnect":
            pass


def completes_bodies(send: Send) -> bool:
    """Whether a middleware completes the body of an app that returns or raises before its end.

    Starlette's `BaseHTTPMiddleware` does. It passes messages through a memory stream.
    """
    return any(isinstance(step, MemoryObjectSendStream) for step in _steps(send))


def _search(end: Send | Receive) -> asyncio.Transport | None:
    for step in _steps(end):
        for get in _TRANSPORTS:
            try:
                transport: asyncio.Transport = get(step)
                if callable(transport.abort) and callable(transport.get_write_buffer_size):
                    return transport
            except Exception:  # `step` can be anything, also a proxy that raises
                continue
    return None


def _steps(end: Send | Receive) -> Iterator[Any]:
    """The objects behind a callable, the nearest first."""
    steps = [*_behind(end)] or [end]  # `send` itself has a transport only if it is neither a method nor a function
    for step in steps:
        yield step
        if len(steps) < _MAX_STEPS:
            steps += _behind(step)


def _behind(step: Any) -> Iterator[Any]:
    """The object of a bound method, and what a function refers to."""
    owner = getattr(step, "__self__", None)
    if owner is not None:
        yield owner
    receive = getattr(step, "_receive", None)  # of a Request of Starlette, which its middlewares wrap
    if callable(receive):
        yield receive
    for cell in getattr(step, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty
            continue


def is_lost(transport: asyncio.Transport) -> bool:
    """Whether the connection is closed, or a disconnect would not be noticed: the server does not read.

    It stops reading when a client sends a second request before the response to the first has ended. uvicorn then
    never reports a disconnect to the first.
    """
    is_reading: Callable[[], bool] | None = getattr(transport, "is_reading", None)
    return transport.is_closing() or (is_reading is not None and not is_reading())


def allowed_send_s(host: Host, *, closing: bool) -> float:
    """How long a send can make no progress."""
    return CLOSING_SEND_S if closing else host.timeouts.send


class Unread:
    """The end of a response that its client has not read. The server would retain it for as long as the client wants.

    As a subscriber of the host it is ticked. Without progress for `Timeouts.send` it aborts the connection.
    """

    __slots__ = ("_host", "_left", "_since", "_transport")

    def __init__(self, host: Host, transport: asyncio.Transport) -> None:
        self._host = host
        self._transport = transport
        self._left = -1  # bytes in the write buffer at `_since`
        self._since = 0.0

    def tick(self, now: float, steady: float) -> None:
        left = self._transport.get_write_buffer_size()
        if left != self._left:
            self._left, self._since = left, steady
        elif steady - self._since >= allowed_send_s(self._host, closing=self._host.closing):
            self._transport.abort()
            left = 0
        if not left:
            self._host.subscribers.discard(self)

    def shut_down(self) -> None:
        """Nothing to do: the ticker allows `CLOSING_SEND_S` from now on."""


def watch_unread(host: Host, transport: asyncio.Transport | None) -> None:
    """Call it once a response is complete."""
    if transport is not None and transport.get_write_buffer_size():
        host.subscribers.add(Unread(host, transport))
