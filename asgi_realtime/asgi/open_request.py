"""Requests that have no response yet.

A shutdown interrupts an endpoint wherever it waits: for the body of its client, or for a broker that does not answer.
An interrupted broker call either took full effect or none, so clients that send an idempotency key can retry. A client
that sends nothing of its body for too long gets 408. A held request waits for a change of a topic, up to a deadline.
There is no timer per request; the ticker measures the silence and the deadline.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from starlette.responses import Response

from asgi_realtime.asgi.host import Host, Message, Receive
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import error_response
from asgi_realtime.asgi.subscription import until_disconnect
from asgi_realtime.brokers.following import Follower, following
from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.loop.interrupts import make_guard, make_interrupt
from asgi_realtime.loop.waiting import make_waiter

logger = logging.getLogger("asgi_realtime")

A = TypeVar("A")

CLOSING_GRACE_S = 1.0
"""How long a request without a body that arrives during a shutdown can wait."""


class OpenRequest:
    """A request as the ticker and the shutdown see it."""

    __slots__ = ("_host", "_receive", "_receiving", "_silence_s", "_since", "interrupt", "is_silent")

    def __init__(self, host: Host, receive: Receive, silence_s: float) -> None:
        self.interrupt = make_interrupt()
        self.is_silent = False
        """It was interrupted because its client sent nothing."""
        self._host = host
        self._receive = receive
        self._silence_s = silence_s
        self._receiving = False
        self._since: float | None = None  # the first tick of the current wait

    async def receive(self) -> Message:
        """The next message of the client. A server can report a disconnect with an exception, too."""
        self._receiving = True
        self._since = None
        try:
            return await self._receive()
        except Exception:  # only the server's `receive` makes it fail
            logger.debug("a request could not be received", exc_info=True)
            return {"type": "http.disconnect"}
        finally:
            self._receiving = False

    def tick(self, now: float, steady: float) -> None:
        closing = self._host.closing
        if not (closing or self._receiving):
            return
        if self._since is None:
            self._since = steady
        elif steady - self._since >= (CLOSING_GRACE_S if closing else self._silence_s):
            self.is_silent = not closing
            self.interrupt.interrupt()

    def shut_down(self) -> None:
        self.interrupt.interrupt()


async def until_shutdown(
    request: Request, respond: Callable[[], Awaitable[A]], *, silence_s: float = math.inf
) -> A | Response:
    """The response, or 408 if the client sends nothing for `silence_s`. Raises `ServerShutdown` once a shutdown begins.

    During a shutdown, a request with a body is rejected at once. Other requests can still be served for a moment.
    """
    host = request.host
    opened = OpenRequest(host, request.receive, silence_s)
    request.receive = opened.receive
    host.subscribers.add(opened)
    try:
        with opened.interrupt:
            if not (host.closing and request.has_body):
                return await respond()
    finally:
        host.subscribers.discard(opened)
        request.release_body()
    if opened.is_silent:
        message = f"the client sent nothing for {silence_s:g} s; send again what was not confirmed"
        return error_response(408, "silent", message)
    raise ServerShutdown()


class Deadline:
    """Wakes a held request once a time has passed or its token has expired."""

    __slots__ = ("_expires_at", "_since", "_wait_s", "is_over", "waiter")

    def __init__(self, wait_s: float, expires_at: float) -> None:
        self._wait_s = wait_s
        self._expires_at = expires_at
        self._since: float | None = None  # the first tick
        self.is_over = False
        self.waiter = make_waiter()

    def tick(self, now: float, steady: float) -> None:
        if self._since is None:
            self._since = steady
        self.is_over = steady - self._since >= self._wait_s or now >= self._expires_at
        if self.is_over:
            self.waiter.wake()

    def shut_down(self) -> None:
        """Nothing to do: the shutdown interrupts the whole request."""


@asynccontextmanager
async def held(
    request: Request, topic: str, wait_s: float, *, run_id: str = ""
) -> AsyncIterator[tuple[Follower, Deadline]]:
    """Follow a topic for one response, counted as a subscription. Ends without an error when the client disconnects.

    Raises `LimitExceeded`, `BrokerUnavailable`.
    """
    deadline = Deadline(wait_s, request.claims.expires_at)
    host, limits, token_id = request.host, request.subscription_limits, request.token_id
    limits.acquire(run_id, token_id)
    host.subscribers.add(deadline)
    try:
        async with (
            make_guard(partial(until_disconnect, request.receive)),
            following(host.broker, topic, waiter=deadline.waiter) as follower,
        ):
            yield follower, deadline
    finally:
        host.subscribers.discard(deadline)
        limits.release(run_id, token_id)
