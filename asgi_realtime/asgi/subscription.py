"""One open `text/event-stream` response: its head, its heartbeat, and everything that ends it from outside.

There is one loop per connection and nothing else: no task, timer, scope or generator beside it but the guard's
watcher, since no server tells of a disconnect in `send()`. What the loop sends is its subclass's matter (`streams`,
`feeds`). The ticker and the shutdown call `tick` and `shut_down`; these set a flag and wake the loop, which does the
sending, so that `send()` has one caller. An idle subscriber's bytes count: nothing of the request is kept once the head
is out.
"""

from __future__ import annotations

import logging
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from starlette.responses import Response

from asgi_realtime.asgi.framing import NATIVE, Framing
from asgi_realtime.asgi.host import Headers, Host, Receive, Scope, Send
from asgi_realtime.asgi.responses import error_response
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.log import End
from asgi_realtime.loop.guards import Guard, make_guard
from asgi_realtime.loop.waiting import make_waiter
from asgi_realtime.tokens import Claims

if TYPE_CHECKING:
    from asgi_realtime.asgi.limits import SubscriptionLimits

logger = logging.getLogger("asgi_realtime")

S = TypeVar("S")

MIN_RECONNECT_MS = 250
"""Nobody comes back at once: the server is still going down."""

SHUTDOWN_RECONNECT_MS = 3000
"""Subscribers disconnected by a shutdown spread their reconnects over this time."""

MAX_RECONNECT_MS = 1000
"""When one comes back that only got too old."""

AGE_SPREAD = 0.15
"""By how much of it the age at which they end differs."""

CLOSING_SEND_S = 1.0
"""How long a send may take once the shutdown began: a reader that stands still must not hold it up."""

SENDING, WAITING, STILL_SENDING, STILL_WAITING = "sending", "waiting", "still sending", "still waiting"
"""What the loop does. It sets the first two when it begins with them; the ticker turns those into the others, so the
loop needs no clock."""

_HEAD = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
)


async def until_disconnect(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Finished(Exception):
    """Raised before the head is sent: what the client asks for is over and it has it all."""

    def __init__(self, framing: Framing) -> None:
        super().__init__()
        self.answer = Response(status_code=framing.status_when_over, headers=_head(framing))


class Leaving(Exception):
    """Raised before the head is sent: the host shuts down. Whoever asked is to come back."""

    def __init__(self, host: Host, *, events: bool) -> None:
        super().__init__()
        self.answer = reconnect_response(host) if events else shutdown_response()


class Over(Exception):
    """Raised in `_follow`: the subscription ends with this frame."""

    def __init__(self, last: bytes) -> None:
        super().__init__()
        self.last = last


def _reconnect(framing: Framing) -> bytes:
    return framing.reconnect(random.randint(MIN_RECONNECT_MS, SHUTDOWN_RECONNECT_MS))


def reconnect_response(host: Host) -> Response:
    """What an EventSource is answered at a shutdown, or while the broker is away: it comes back when a body ends."""
    return Response(NATIVE.preamble("connected") + _reconnect(NATIVE), headers=_head(NATIVE))


def shutdown_response() -> Response:
    """The answer to everybody else at a shutdown."""
    return error_response(503, "server_shutdown", "the server is shutting down; try again")


def _head(framing: Framing) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in (*_HEAD, *framing.headers)}


class Subscription(ABC, Generic[S]):
    """An ASGI app that answers one request with what comes from a source. Raises before its head is sent or not at all.

    In `_follow` stands the loop. Each turn of it looks at `_alert` first, also while there is more to send: a reader
    that is never through with it has to hear of its end too.
    """

    __slots__ = (
        "_alert",
        "_expired",
        "_expires_at",
        "_framing",
        "_guard",
        "_host",
        "_old",
        "_old_at",
        "_waiter",
        "_phase",
        "_run_id",
        "_subscription_limits",
        "_send",
        "_since",
        "_token_id",
        "raw_headers",
    )
    _send: Send

    def __init__(
        self,
        host: Host,
        subscription_limits: SubscriptionLimits,
        claims: Claims,
        *,
        run_id: str = "",
        framing: Framing = NATIVE,
    ) -> None:
        self._host = host
        self._subscription_limits: SubscriptionLimits | None = subscription_limits
        self._run_id = run_id
        self._token_id = "" if claims.secret else claims.token_id
        self._expires_at = claims.expires_at
        self._framing = framing
        self._waiter = make_waiter()
        self._guard: Guard | None = None
        self._alert = False  # something of the following is to be looked at
        self._expired = False
        self._old = False
        self._old_at: float | None = None if host.timeouts.stream_age < math.inf else math.inf
        self._phase = SENDING
        self._since = 0.0  # when the ticker first saw this phase
        self.raw_headers: Headers = []
        """More headers for the head, such as those of CORS."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits = self._subscription_limits
        assert limits is not None, "a subscription answers once"
        limits.acquire(self._run_id, self._token_id)
        self._send = send
        self._host.subscribers.add(self)
        self._alert = self._host.closing  # a shutdown that begins later calls `shut_down`
        started = False
        try:
            async with self._open() as source:
                comment = await self._prepare(source)
                async with make_guard(partial(until_disconnect, receive)) as self._guard:
                    started = True
                    try:
                        await self._start(comment)
                        last = await self._follow(source)
                    except Over as over:
                        last = over.last
                    except OSError:
                        return  # the peer is gone; only some servers say so
                    except BrokerUnavailable as exc:  # the broker says so once, and not each of its readers
                        logger.debug("a subscription has to come back: %s", exc)
                        last = _reconnect(self._framing)
                    except Exception:
                        logger.exception("a subscription failed; its client will resume")
                        last = self._framing.interrupted()
                    await self._finish(last)
        except Exception:
            if not started:
                raise
            logger.debug("leaving a subscription failed", exc_info=True)
        finally:
            self._host.subscribers.discard(self)
            self._guard = None
            self._release()

    @abstractmethod
    def _open(self) -> AbstractAsyncContextManager[S]:
        """What is followed."""
        ...

    @abstractmethod
    async def _prepare(self, source: S) -> str:
        """Look before the head is sent: the last chance to raise. Returns the comment to begin with."""
        ...

    @abstractmethod
    async def _follow(self, source: S) -> bytes:
        """Send what there is and wait for more, until there is no more. Returns the frame to end with."""
        ...

    async def _start(self, comment: str) -> None:
        headers, self.raw_headers = [*_HEAD, *self._framing.headers, *self.raw_headers], []
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._write(self._framing.preamble(comment))

    def _write(self, body: bytes) -> Awaitable[None]:
        """Send part of the body. The message is a fresh one: a host's compression writes into it."""
        self._phase = SENDING
        return self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _finish(self, last: bytes) -> None:
        self._phase = SENDING
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

    def _last_words(self) -> bytes | None:
        """The frame to end with, if the subscription has to end now."""
        if self._expired:
            return self._framing.end(End("token_expired"), None)
        if self._host.closing:
            return _reconnect(self._framing)
        if self._old:
            return self._framing.reconnect(random.randint(MIN_RECONNECT_MS, MAX_RECONNECT_MS))
        return None

    def _heed(self) -> None:
        """End the subscription, out of whatever it is sending, if it has to end now. Takes the alert back."""
        self._alert = False
        last = self._last_words()
        if last is not None:
            raise Over(last)

    # What others call

    def tick(self, now: float, steady: float) -> None:
        phase = self._phase
        if phase is SENDING or phase is WAITING:
            self._phase = STILL_SENDING if phase is SENDING else STILL_WAITING
            self._since = steady
        elif phase is STILL_SENDING:
            self._check_send(steady)
        elif steady - self._since >= self._host.timeouts.heartbeat:
            self._rouse()
        if now >= self._expires_at and not self._expired:
            self._expired = True
            self._rouse()
        if self._old_at is None:
            self._old_at = steady + self._host.timeouts.stream_age * (1 - AGE_SPREAD * random.random())
        elif steady >= self._old_at and not self._old:
            self._old = True
            self._rouse()

    def shut_down(self) -> None:
        self._rouse()

    def _rouse(self) -> None:
        self._alert = True
        self._waiter.wake()

    def _check_send(self, steady: float) -> None:
        allowed_s = CLOSING_SEND_S if self._host.closing else self._host.timeouts.send
        if steady - self._since >= allowed_s and self._guard is not None:
            self._guard.cancel()
            # Not left to the loop: there are servers whose send() cannot be cancelled.
            self._release()
            self._host.subscribers.discard(self)

    def _release(self) -> None:
        limits, self._subscription_limits = self._subscription_limits, None
        if limits is not None:
            limits.release(self._run_id, self._token_id)
