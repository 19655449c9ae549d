"""Requests that have no response yet.

A shutdown interrupts an endpoint wherever it waits: for the body of its client, or for a broker that does not answer.
An interrupted broker call either took full effect or none, so clients that send an idempotency key can retry. A client
that sends nothing of its body for too long, or takes too long for all of it, gets 408, and 401 once its token expires.
A held request waits for a change of a topic, up to a deadline. There is no timer per request; the ticker measures the
silence and the deadlines.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from asgi_realtime.asgi.host import Message
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.subscription import until_disconnect
from asgi_realtime.brokers.following import Follower, following
from asgi_realtime.core.errors import ExpiredToken, RealtimeError, RequestCutOff, ServerShutdown
from asgi_realtime.loop.interrupts import make_guard, make_interrupt
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.waiting import make_waiter

A = TypeVar("A")

_SEND_AGAIN = "send again what was not confirmed"

CLOSING_GRACE_S = 1.0
"""How long a request without a body that arrives during a shutdown can wait."""


class _TooSlow(RequestCutOff):
    """The client did not send its body in time. Clients retry the status."""

    code = "silent"


class OpenRequest:
    """A request as the ticker and the shutdown see it."""

    __slots__ = (
        "_body_s",
        "_expires_at",
        "_first_tick",
        "_host",
        "_receive",
        "_receiving",
        "_silence_s",
        "_since",
        "interrupt",
        "overdue",
    )

    def __init__(self, request: Request, silence_s: float, body_s: float) -> None:
        self.interrupt = make_interrupt()
        self.overdue: RealtimeError | None = None
        """Why its body is not awaited anymore."""
        self._host = request.host
        self._receive = request.receive
        self._silence_s = silence_s
        self._body_s = body_s
        self._expires_at = request.claims.expires_at if request.has_body else math.inf
        self._first_tick: float | None = None
        self._receiving = False
        self._since: float | None = None  # the first tick of the current wait

    async def receive(self) -> Message:
        """The next message of the client. A server can report a disconnect with an exception, too.

        Raises `ExpiredToken`, `RequestCutOff`.
        """
        if self.overdue is not None:
            raise self.overdue
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
        if self._first_tick is None:
            self._first_tick = steady
        if now >= self._expires_at:
            self.overdue = ExpiredToken("token has expired; get a new one, and send again what was not confirmed")
        elif steady - self._first_tick >= self._body_s:
            self.overdue = _TooSlow(f"the body took more than {self._body_s:g} s; {_SEND_AGAIN}")
        if not (closing or self._receiving):
            return
        if self._since is None:
            self._since = steady
        elif steady - self._since >= (CLOSING_GRACE_S if closing else self._silence_s):
            if not closing:
                self.overdue = _TooSlow(f"the client sent nothing for {self._silence_s:g} s; {_SEND_AGAIN}")
            self.interrupt.interrupt()
        if self.overdue is not None:
            self.interrupt.interrupt()

    def shut_down(self) -> None:
        self.interrupt.interrupt()


async def until_shutdown(
    request: Request, respond: Callable[[], Awaitable[A]], *, silence_s: float = math.inf, body_s: float = math.inf
) -> A:
    """The response. Raises `RequestCutOff` if the client sends nothing for `silence_s`, or its body takes longer than
    `body_s`; `ExpiredToken` if the token expires before the body has arrived; `ServerShutdown` once a shutdown begins.

    During a shutdown, a request with a body is rejected at once. Other requests can still be served for a moment.
    """
    host = request.host
    opened = OpenRequest(request, silence_s, body_s)
    request.receive = opened.receive
    host.subscribers.add(opened)
    try:
        with opened.interrupt:
            if not (host.closing and request.has_body):
                return await respond()
    finally:
        host.subscribers.discard(opened)
        request.release_body()
    raise opened.overdue or ServerShutdown()


class Deadline:
    """Wakes a held request once a time has passed or its token has expired."""

    __slots__ = ("_expires_at", "_since", "_wait_s", "is_over", "waiter")
    kind = "poll"

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

    Raises `LimitExceeded`, `BrokerUnavailable`, and `RequestCutOff` if the client disconnects before the topic is
    followed.
    """
    entered = False
    deadline = Deadline(wait_s, request.claims.expires_at)
    host, limits, owner = request.host, request.subscription_limits, request.owner
    limits.acquire(run_id, owner)
    host.subscribers.add(deadline)
    try:
        async with (
            make_guard(until_disconnect, request.receive),
            following(host.broker, topic, waiter=deadline.waiter) as follower,
        ):
            entered = True
            yield follower, deadline
    finally:
        host.subscribers.discard(deadline)
        limits.release(run_id, owner)
    if not entered:
        raise RequestCutOff("the client disconnected")
