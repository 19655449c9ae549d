"""One open `text/event-stream` response.

Each connection runs one loop. Its only companion is the guard's watcher, because no ASGI server reports a disconnect
in `send()`; there is no queue, timer or generator per connection. Subclasses define what is followed (`_open`), check
the request before the head is sent (`_prepare`) and implement the loop (`_follow`). Idle subscribers are many, so their
size matters: nothing of the request is retained once the head is sent.

**Phases.** The phase is where the loop is suspended. OPENING: it awaits the broker before the head is sent, and an
exception becomes the HTTP response. Later exceptions end the body instead. SENDING: it awaits `send()`. WAITING: it is
parked until the source or an alert wakes it. ASKING: it awaits the broker for something this process does not hold.
CLOSED: it has returned. The loop has no clock. When the ticker finds SENDING or WAITING it changes the phase to
STILL_SENDING or STILL_WAITING and notes the time, and the loop's next step overwrites that. So if a later tick finds
one of these, the loop has not moved since `_since`: a send has stalled, or a heartbeat is due. `TRANSITIONS` lists
every step. The loop stores its phase for every chunk and so does not consult the table; the tests check every store.

**Alerts.** The ticker and the shutdown never send anything. They set `_alert` and wake the loop, which checks it in
every iteration, also while there is more to send, so that a reader that never catches up ends too. Only the loop calls
`send()`, so frames cannot interleave. An alert replaces only a less urgent one.

**Invariant.** A shutdown ends every phase promptly. WAITING is woken. OPENING and ASKING are interrupted. SENDING
reaches the alert when `send()` returns; if it does not return, the ticker cancels it.
"""

from __future__ import annotations

import logging
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager
from enum import Enum, IntEnum, auto
from functools import partial
from traceback import walk_tb
from typing import ClassVar, Generic, TypeVar

from starlette.responses import Response

from asgi_realtime.asgi.framing import NATIVE, Framing
from asgi_realtime.asgi.host import Headers, Receive, Scope, Send
from asgi_realtime.asgi.limits import SubscriptionLimits
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.responses import NOT_CACHED
from asgi_realtime.core.errors import BrokerUnavailable, ServerShutdown
from asgi_realtime.core.log import End
from asgi_realtime.loop.interrupts import Guard, Interrupt, make_guard, make_interrupt
from asgi_realtime.loop.waiting import make_waiter

logger = logging.getLogger("asgi_realtime")

S = TypeVar("S")
T = TypeVar("T")

MIN_RECONNECT_MS = 250
"""The minimum for every reconnect: a server that shuts down takes a moment to exit."""

SHUTDOWN_RECONNECT_MS = 3000
"""Subscribers disconnected by a shutdown spread their reconnects over this time."""

AGE_RECONNECT_MS = 1000
"""The same for subscribers whose connection became too old."""

AGE_SPREAD = 0.15
"""Connections end up to this fraction before `Timeouts.stream_age`, so those opened together do not end together."""

CLOSING_SEND_S = 1.0
"""How long one send can take during a shutdown. A stalled reader must not delay the exit."""

_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", f"{NOT_CACHED}, no-transform".encode()),
    (b"x-accel-buffering", b"no"),
)


class Phase(Enum):
    """Where the loop of a subscription is suspended; see the top of the module."""

    OPENING = auto()
    SENDING = auto()
    STILL_SENDING = auto()
    WAITING = auto()
    STILL_WAITING = auto()
    ASKING = auto()
    CLOSED = auto()


OPENING, SENDING, WAITING, ASKING, CLOSED = Phase.OPENING, Phase.SENDING, Phase.WAITING, Phase.ASKING, Phase.CLOSED
STILL_SENDING, STILL_WAITING = Phase.STILL_SENDING, Phase.STILL_WAITING

_NEXT = frozenset({SENDING, WAITING, ASKING, CLOSED})
TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    OPENING: frozenset({SENDING, CLOSED}),
    SENDING: _NEXT | {STILL_SENDING},
    STILL_SENDING: _NEXT,
    WAITING: _NEXT | {STILL_WAITING},
    STILL_WAITING: _NEXT,
    ASKING: _NEXT,
    CLOSED: frozenset(),
}


class Alert(IntEnum):
    """What the ticker and the shutdown ask of the loop, in ascending urgency. All but the first two end the body."""

    HEARTBEAT = auto()
    SILENT = auto()
    """The stream was silent for as long as the client wants to wait. Set by a subclass only."""
    TOO_OLD = auto()
    SHUTDOWN = auto()
    EXPIRED = auto()


class Ended(Exception):
    """Raised within `_follow`: the body ends with this frame."""

    def __init__(self, last: bytes) -> None:
        super().__init__()
        self.last = last


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


def reconnect_response() -> Response:
    """A complete event stream that makes its client reconnect. An EventSource does so after a body, never after 503."""
    body = NATIVE.preamble("connected") + _reconnect(NATIVE, SHUTDOWN_RECONNECT_MS)
    return Response(body, headers={name.decode(): value.decode() for name, value in _HEADERS})


def _reconnect(framing: Framing, longest_ms: int) -> bytes:
    return framing.reconnect(random.randint(MIN_RECONNECT_MS, longest_ms))


def _raised_by(send: Send, exc: Exception) -> bool:
    """Whether `send` raised it. After a disconnect it can be anything: uvicorn on uvloop raises `RuntimeError`."""
    code = getattr(send, "__code__", None)
    return code is not None and any(frame.f_code is code for frame, _ in walk_tb(exc.__traceback__))


class SubscriptionResponse(ABC, Generic[S]):
    """An ASGI app that responds to one request with frames from a source."""

    __slots__ = (
        "_alert",
        "_call",
        "_ends_at",
        "_expires_at",
        "_guard",
        "_host",
        "_phase",
        "_run_id",
        "_send",
        "_since",
        "_subscription_limits",
        "_token_id",
        "_waiter",
        "raw_headers",
    )
    framing: ClassVar[Framing] = NATIVE
    _send: Send

    def __init__(self, request: Request, *, run_id: str = "") -> None:
        self._host = request.host
        self._subscription_limits: SubscriptionLimits | None = request.subscription_limits
        self._run_id = run_id
        self._token_id = request.token_id
        self._expires_at = request.claims.expires_at
        self._waiter = make_waiter()
        self._guard: Guard | None = None
        self._call: Interrupt | None = None
        self._alert: Alert | None = None
        self._phase = OPENING
        self._since = 0.0  # of STILL_SENDING and STILL_WAITING
        self._ends_at: float | None = None if self._host.timeouts.stream_age < math.inf else math.inf
        self.raw_headers: Headers = []
        """Headers to add to the head, such as those of CORS."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond, once. Raises only before the head is sent: `LimitExceeded`, or what `_open` or `_prepare` raises."""
        limits = self._subscription_limits
        assert limits is not None, "a subscription can respond only once"
        limits.acquire(self._run_id, self._token_id)
        self._send = send
        self._host.subscribers.add(self)
        self._alert = Alert.SHUTDOWN if self._host.closing else None  # a later shutdown calls `shut_down`
        try:
            async with make_guard(partial(until_disconnect, receive)) as self._guard, self._open() as source:
                comment = await self._prepare(source)
                self._phase = SENDING
                if comment is None:
                    return await self._send_nothing(scope, receive)
                try:
                    await self._send_head(comment)
                    last = await self._follow(source)
                except Exception as exc:
                    last = self._frame_after(exc)
                await self._send_last(last)
            if self._phase is OPENING and self._host.closing:
                await self._send_head("connected")
                await self._send_last(_reconnect(self.framing, SHUTDOWN_RECONNECT_MS))
        except Exception:
            if self._phase is OPENING:
                raise
            logger.debug("a subscription was not closed cleanly", exc_info=True)
        finally:
            self._phase = CLOSED
            self._release()
            self._guard = self._call = None  # both refer to this task

    @abstractmethod
    def _open(self) -> AbstractAsyncContextManager[S]:
        """The source, such as a stream or a topic."""
        ...

    async def _prepare(self, source: S) -> str | None:
        """Check the request against the source, as the last chance to raise.

        Returns the comment that opens the body, or None if the client has everything and there is nothing to send.
        """
        return "connected"

    @abstractmethod
    async def _follow(self, source: S) -> bytes:
        """Send what there is and wait for more, until there is no more. Returns the last frame."""
        ...

    async def _send_nothing(self, scope: Scope, receive: Receive) -> None:
        response = Response(status_code=self.framing.status_when_over)
        response.raw_headers += [*_HEADERS, *self.framing.headers, *self.raw_headers]
        await response(scope, receive, self._send)

    async def _send_head(self, comment: str) -> None:
        headers, self.raw_headers = [*_HEADERS, *self.framing.headers, *self.raw_headers], []
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._write(self.framing.preamble(comment))

    def _write(self, body: bytes) -> Awaitable[None]:
        """Send part of the body. Each message is a new dict, because a host's compression middleware writes into it."""
        self._phase = SENDING
        return self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _send_last(self, last: bytes) -> None:
        self._phase = SENDING
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

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
        if phase is SENDING or phase is WAITING:
            self._phase = STILL_SENDING if phase is SENDING else STILL_WAITING
            self._since = steady
        elif phase is STILL_SENDING:
            self._check_send(steady)
        elif phase is STILL_WAITING:
            if steady - self._since >= self._host.timeouts.heartbeat:
                self._notify(Alert.HEARTBEAT)
        elif self._host.closing:  # it was opened after `shut_down` was called for the others
            self._interrupt()
        if now >= self._expires_at:
            self._notify(Alert.EXPIRED)
        if self._ends_at is None:
            self._ends_at = steady + self._host.timeouts.stream_age * (1 - AGE_SPREAD * random.random())
        elif steady >= self._ends_at:
            self._notify(Alert.TOO_OLD)

    def shut_down(self) -> None:
        self._notify(Alert.SHUTDOWN)
        self._interrupt()

    def _interrupt(self) -> None:
        if self._phase is OPENING and self._guard is not None:
            self._guard.cancel()
        elif self._phase is ASKING and self._call is not None:
            self._call.interrupt()

    def _check_send(self, steady: float) -> None:
        allowed_s = CLOSING_SEND_S if self._host.closing else self._host.timeouts.send
        if steady - self._since >= allowed_s and self._guard is not None:
            self._guard.cancel()
            self._release()  # here, because the send() of some servers cannot be cancelled

    def _release(self) -> None:
        """Stop counting and ticking this subscription. Idempotent."""
        self._host.subscribers.discard(self)
        limits, self._subscription_limits = self._subscription_limits, None
        if limits is not None:
            limits.release(self._run_id, self._token_id)
