"""One open `text/event-stream` response.

Each connection runs one loop. Its only companion is the guard's watcher, because no ASGI server reports a disconnect
in `send()`; there is no queue, timer or generator per connection. Subclasses define what is followed (`_open`), check
the request before the head is sent (`_prepare`) and implement the loop (`_follow`). Idle subscribers are many, so their
size matters: nothing of the request is retained once the head is sent.

The module `phases` defines the states of that loop, and what the ticker and the shutdown ask of it. A shutdown ends
every phase promptly, except while it waits for the run of the subscription. WAITING is woken. OPENING and ASKING are
interrupted. SENDING reaches the alert when `send()` returns; if it does not return, the ticker cancels it.
"""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from traceback import walk_tb
from typing import ClassVar, Generic, TypeVar

import anyio
from starlette.responses import Response

from asgi_realtime.asgi.connection import (
    NOTICED_S,
    WHOLE_BYTES,
    allowed_send_s,
    completes_bodies,
    find_transport,
    is_lost,
    pieces,
    reset,
    watch_unread,
)
from asgi_realtime.asgi.framing import CUT_OFF, NATIVE, Framing
from asgi_realtime.asgi.host import App, Headers, Receive, Scope, Send
from asgi_realtime.asgi.limits import SubscriptionLimits
from asgi_realtime.asgi.phases import (
    ASKING,
    CLOSED,
    OPENING,
    SENDING,
    STILL_SENDING,
    STILL_WAITING,
    WAITING,
    Alert,
)
from asgi_realtime.asgi.request import Access
from asgi_realtime.asgi.responses import NOT_CACHED
from asgi_realtime.core.errors import BrokerUnavailable, ServerShutdown
from asgi_realtime.core.log import End
from asgi_realtime.core.sse import retry_line
from asgi_realtime.loop.interrupts import Guard, Interrupt, make_guard, make_interrupt
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.turns import make_parked_task

S = TypeVar("S")
T = TypeVar("T")

MIN_RECONNECT_MS = 250
"""The minimum for every reconnect: a server that shuts down takes a moment to exit."""

SHUTDOWN_RECONNECT_MS = 3000
"""Subscribers disconnected by a shutdown spread their reconnects over this time."""

AGE_RECONNECT_MS = 1000
"""The same for subscribers whose connection became too old."""

AWAITED_RECONNECT_MS = 1000
"""The same for subscribers whose run does not exist yet. While they are away, they miss its first moments."""

EXPIRED_RECONNECT_MS = 60_000
"""The pause of a client whose token has expired: a page that does not close its `EventSource` reconnects in vain."""

AGE_SPREAD = 0.15
"""Connections end up to this fraction before their maximum age, so those opened together do not end together."""

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", f"{NOT_CACHED}, no-transform".encode()),
    (b"x-accel-buffering", b"no"),
)


class Ended(Exception):
    """Raised within `_follow`: the body ends with this frame."""

    def __init__(self, last: bytes) -> None:
        super().__init__()
        self.last = last


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


def reconnect_response(*, longest_ms: int | None = None) -> Response:
    """A complete event stream that makes its client reconnect. An EventSource does so after a body, never after 503."""
    return _complete(NATIVE.preamble("connected") + _reconnect(NATIVE, longest_ms or SHUTDOWN_RECONNECT_MS))


def expired_response() -> Response:
    """A complete event stream whose client learns that its token has expired. An EventSource cannot see a 401."""
    return _complete(retry_line(EXPIRED_RECONNECT_MS) + NATIVE.end(End("token_expired"), None))


def _complete(body: bytes) -> Response:
    return Response(body, headers={name.decode(): value.decode() for name, value in HEADERS})


def _reconnect(framing: Framing, longest_ms: int) -> bytes:
    return framing.reconnect(random.randint(MIN_RECONNECT_MS, longest_ms))


def _raised_by(send: Send, exc: Exception) -> bool:
    """Whether `send`, or what it wraps, raised it. After a disconnect it can be anything: uvicorn on uvloop raises
    `RuntimeError`."""
    codes = [getattr(step, "__code__", None) for step in (send, getattr(send, "__wrapped__", None))]
    return any(frame.f_code is code for frame, _ in walk_tb(exc.__traceback__) for code in codes)


class SubscriptionResponse(ABC, Generic[S]):
    """An ASGI app that responds to one request with frames from a source."""

    __slots__ = (
        "_alert",
        "_call",
        "_comment",
        "_ends_at",
        "_expires_at",
        "_guard",
        "_host",
        "_owner",
        "_phase",
        "_run_id",
        "_send",
        "_since",
        "_subscription_limits",
        "_transport",
        "_waiter",
        "fail",
        "raw_headers",
    )
    framing: Framing = NATIVE
    kind: ClassVar[str]
    """For the metrics: one of `metrics.KINDS`."""
    sent_chunks = 0
    _send: Send

    def __init__(self, request: Access, *, run_id: str = "") -> None:
        self._host = request.host
        self._subscription_limits: SubscriptionLimits | None = request.subscription_limits
        self._run_id = run_id
        self._owner = request.owner
        self._expires_at = request.claims.expires_at
        self._waiter = make_parked_task()
        self._guard: Guard | None = None
        self._call: Interrupt | None = None
        self._transport: asyncio.Transport | None = None
        self._alert: Alert | None = None
        self._phase = OPENING
        self._since = 0.0  # of STILL_SENDING and STILL_WAITING
        self._ends_at = -request.max_age_s  # below zero: the maximum age, which the first tick adds to its time
        self.raw_headers: Headers = [*HEADERS, *self.framing.headers]
        """The headers of the head. The app adds more, such as those of CORS."""
        self.fail: Callable[[Exception], App] | None = None
        """Makes the response if an exception prevents this one. It holds the request, so it is None once the head is
        sent."""
        self._comment = "connected"  # opens the body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond, once. If that fails before the head is sent, `fail` makes the response."""
        failure: Exception | None = None
        try:
            self._acquire()
            self._send = self._host.runs.reporter.counting(self.kind, send)
            self._transport = find_transport(scope.get("http_version", "1.1"), send, receive)
            self._host.subscribers.add(self)
            self._alert = Alert.SHUTDOWN if self._is_shut_down else None  # a later shutdown calls `shut_down`
            async with make_guard(until_disconnect, receive) as self._guard, self._open() as source:
                has_more = await self._prepare(source)
                self._phase = SENDING
                if not has_more:
                    return await self._send_nothing(scope, receive)
                try:
                    await self._send_head()
                    await self._write(self._preamble() + self._take_first(source))
                    last = await self._follow(source)
                except Exception as exc:
                    last = self._frame_after(exc)
                await self._send_last(last)
            if self._phase is OPENING and self._host.closing:
                if not self.framing.reconnects:
                    raise ServerShutdown()
                self._comment = "connected"
                await self._send_head()
                await self._send_last(self._preamble() + _reconnect(self.framing, SHUTDOWN_RECONNECT_MS))
        except Exception as exc:
            if self._phase is OPENING:
                failure = exc
            else:
                logger.debug("a subscription was not closed cleanly", exc_info=True)
        finally:
            self._phase = CLOSED
            self._release()
            watch_unread(self._host, self._transport)
            self._guard = self._call = self._transport = None  # they refer to this task and its connection
        if failure is not None and self.fail is not None:
            await self.fail(failure)(scope, receive, send)

    @abstractmethod
    def _open(self) -> AbstractAsyncContextManager[S]:
        """The source, such as a stream or a topic."""
        ...

    async def _prepare(self, source: S) -> bool:
        """Check the request against the source, as the last chance to raise. Returns False if the client has everything
        and there is nothing to send."""
        return True

    @abstractmethod
    async def _follow(self, source: S) -> bytes:
        """Send what there is and wait for more, until there is no more. Returns the last frame."""
        ...

    async def _send_nothing(self, scope: Scope, receive: Receive) -> None:
        response = Response(status_code=204)  # makes an EventSource stop: WHATWG HTML, 9.2.3
        response.raw_headers += self.raw_headers
        await response(scope, receive, self._send)

    def _take_first(self, source: S) -> bytes:
        """What the first message of the body can contain already. A server makes a system call for each message."""
        return b""

    async def _send_head(self) -> None:
        headers = self.raw_headers
        self.fail = None
        del self.raw_headers
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    def _preamble(self) -> bytes:
        comment, self._comment = self._comment, ""
        return self.framing.preamble(comment)

    def _write(self, body: bytes) -> Awaitable[None]:
        """Send part of the body. Each message is a new dict, because a host's compression middleware writes into it."""
        if len(body) > WHOLE_BYTES:
            return self._write_large((body,))
        self._phase = SENDING
        return self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _write_large(self, parts: Iterable[bytes]) -> None:
        """Send one or more large frames in pieces. Each is progress, unless the body has to end."""
        self._phase = SENDING
        for piece in pieces(parts):
            if self._alert is None or self._alert < Alert.TOO_OLD:
                self._phase = SENDING
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def _send_last(self, last: bytes) -> None:
        if last is CUT_OFF:
            return await self._cut_off()
        if len(last) > WHOLE_BYTES:
            await self._write(last)
            last = b""
        self._phase = SENDING
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

    async def _cut_off(self) -> None:
        """Break the connection, so that the client does not take the body for complete.

        Servers break it if the app returns early; those whose transport is known complain about that, so it is aborted
        first. A middleware that completes every body leaves no way to break it.
        """
        if self._transport is not None:
            reset(self._transport)
            with anyio.move_on_after(NOTICED_S):  # until the server reports the disconnect, which ends this wait
                await anyio.sleep_forever()
        elif completes_bodies(self._send):
            await self._send_last(self.framing.cut_short())

    async def _ask(self, call: Awaitable[T]) -> T:
        """Await a call of the broker. Raises `Ended` if a shutdown interrupts it."""
        self._phase = ASKING
        with make_interrupt() as self._call:
            return await call
        raise Ended(_reconnect(self.framing, SHUTDOWN_RECONNECT_MS))

    def _frame_after(self, exc: Exception) -> bytes:
        """The last frame of a body that an exception ends. Raises an exception with which the server reports a
        disconnect."""
        if isinstance(exc, Ended):
            return exc.last
        if isinstance(exc, OSError) or _raised_by(self._send, exc):
            raise exc
        if isinstance(exc, BrokerUnavailable | ServerShutdown):  # logged once by the broker
            logger.debug("a subscription has to reconnect: %s", exc)
            return _reconnect(self.framing, SHUTDOWN_RECONNECT_MS)
        logger.error("a subscription failed; its client will resume", exc_info=exc)
        return self.framing.interrupted()

    # Alerts

    def _frame_for(self, alert: Alert) -> bytes | None:
        """The frame with which an alert ends the body; None if it does not end it."""
        match alert:
            case Alert.EXPIRED:
                return self.framing.end(End("token_expired"), None)
            case Alert.SHUTDOWN:
                return _reconnect(self.framing, SHUTDOWN_RECONNECT_MS)
            case Alert.TOO_OLD:
                return _reconnect(self.framing, AGE_RECONNECT_MS)
        return None

    def _handle_alert(self) -> None:
        """Clear the alert. Raises `Ended` if it ends the body."""
        alert, self._alert = self._alert, None
        last = None if alert is None else self._frame_for(alert)
        if last is not None:
            raise Ended(last)

    def _notify(self, alert: Alert) -> None:
        if self._alert is None or alert > self._alert:
            self._alert = alert
        self._waiter.wake()

    # Called by the host

    def tick(self, now: float, steady: float) -> None:
        phase = self._phase
        if self._transport is not None and is_lost(self._transport):
            return self._drop()
        if phase is SENDING or phase is WAITING:
            self._phase = STILL_SENDING if phase is SENDING else STILL_WAITING
            self._since = steady
        elif phase is STILL_SENDING:
            self._check_send(steady)
        elif phase is STILL_WAITING:
            if steady - self._since >= self._host.timeouts.heartbeat:
                self._notify(Alert.HEARTBEAT)
        elif self._is_shut_down:  # it was opened after `shut_down` was called for the others
            self._interrupt()
        if now >= self._expires_at:
            self._notify(Alert.EXPIRED)
        if self._ends_at < 0:
            self._ends_at = steady - self._ends_at * (1 - AGE_SPREAD * random.random())
        elif steady >= self._ends_at:
            self._notify(Alert.TOO_OLD)

    def shut_down(self) -> None:
        if self._is_shut_down:
            self._notify(Alert.SHUTDOWN)
            self._interrupt()

    @property
    def _is_shut_down(self) -> bool:
        """Whether a shutdown ends this subscription. It waits for a run that executes here, and so do its readers."""
        return self._host.closing and not self._host.drains(self._run_id)

    def _interrupt(self) -> None:
        if self._phase is OPENING and self._guard is not None:
            self._guard.cancel()
        elif self._phase is ASKING and self._call is not None:
            self._call.interrupt()

    def _check_send(self, steady: float) -> None:
        stalled_s = steady - self._since
        if stalled_s >= allowed_send_s(self._host, closing=self._is_shut_down):
            if self._guard is not None:
                self._host.runs.reporter.reader_stalled(self.kind, self._run_id, stalled_s)
            self._drop()

    def _drop(self) -> None:
        """Abandon a connection that is lost or stalled."""
        if self._guard is None:
            return
        if self._transport is not None:
            self._transport.abort()
        self._guard.cancel()
        self._release()  # here, because the send() of some servers cannot be cancelled

    def _acquire(self) -> None:
        """Count this subscription. Raises `LimitExceeded`."""
        limits, self._subscription_limits = self._subscription_limits, None
        assert limits is not None, "a subscription can respond only once"
        limits.acquire(self._run_id, self._owner)
        self._subscription_limits = limits

    def _release(self) -> None:
        """Stop counting and ticking this subscription. Idempotent."""
        self._host.subscribers.discard(self)
        limits, self._subscription_limits = self._subscription_limits, None
        if limits is not None:
            limits.release(self._run_id, self._owner)
            self._host.runs.reporter.subscription_ended(self.sent_chunks)
