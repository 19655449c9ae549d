"""The open subscriptions of this process, and the events that end all of them.

**States.** `OPEN` serves subscriptions. A shutdown that is announced (by a signal, or by a server that stops) leads to
`ANNOUNCED`: every subscription ends, and so does each that arrives. That has to happen early, because servers wait for
open responses before they stop the app. But a signal is only an announcement: a host can have a handler that ignores
it. So if no stop follows within `ANNOUNCEMENT_COUNTS_S`, the state is `OPEN` again. In `CLOSED`, which `begin_shutdown`
and the stop enter, subscriptions end as well, until the next start.

A `Realtime` that was started on first use has no host to stop it, so there an announcement stops it directly.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from enum import Enum
from typing import Protocol

import anyio

from asgi_realtime.loop.signals import ShutdownSignals
from asgi_realtime.loop.supervisor import Supervisor

logger = logging.getLogger("asgi_realtime")

ANNOUNCEMENT_COUNTS_S = 30.0
"""How long an announced shutdown ends subscriptions while no stop follows."""


class Subscriber(Protocol):
    """An open subscription, as the ticker and the shutdown see it. Neither call suspends or raises."""

    def tick(self, now: float, steady: float) -> None:
        """Check heartbeat, expiry and stalled sends.

        `now` is the host's clock in unix seconds, for what expires; `steady` is a monotonic clock in seconds, for
        spans.
        """

    def shut_down(self) -> None:
        """End soon and cleanly, so that the client reconnects later."""


class State(Enum):
    OPEN = "open"
    ANNOUNCED = "announced"
    CLOSED = "closed"


class Subscribers:
    """The set `open`, and whether it is `closing`.

    `supervisor` returns the current one, if any; `is_lazy` whether no host is going to stop this `Realtime`.
    """

    def __init__(
        self, *, signals: bool, supervisor: Callable[[], Supervisor | None], is_lazy: Callable[[], bool]
    ) -> None:
        self.open: set[Subscriber] = set()
        self._state = State.OPEN
        self._supervisor = supervisor
        self._is_lazy = is_lazy
        self._signals = ShutdownSignals(self.announce_shutdown, in_background=self._in_background) if signals else None
        self._announced_at = 0.0

    @property
    def closing(self) -> bool:
        """Whether subscriptions end, and new ones are rejected."""
        return self._state is not State.OPEN

    def _in_background(self) -> bool:
        supervisor = self._supervisor()
        return supervisor is not None and supervisor.has_the_loop

    # Called by the engine

    def start(self) -> None:
        """A start begins: no subscription is open, and signals are watched."""
        self.open.clear()
        self._state = State.OPEN
        if self._signals is not None:
            self._signals.install()

    def stop(self) -> None:
        """The stop is complete: signals reach the server only."""
        if self._signals is not None:
            self._signals.restore()

    def close(self) -> None:
        """End every subscription cleanly, and each that arrives until the next start."""
        self._state = State.CLOSED
        self._end_all()

    def _end_all(self) -> None:
        for subscriber in tuple(self.open):
            subscriber.shut_down()

    # Called by the ticker

    def tick(self, now: float, steady: float) -> None:
        """Tick every subscription."""
        for subscriber in tuple(self.open):
            try:
                subscriber.tick(now, steady)
            except Exception:
                logger.exception("the ticker failed for %r", subscriber)

    def check_server(self) -> None:
        """Detect a shutdown without a signal, and install the handlers again if the server has replaced them."""
        if self._signals is None:
            return
        self._signals.install()
        if self._signals.server_stops and not self.closing:
            self.announce_shutdown()

    # Called from any thread or signal handler, even one that interrupts this very code

    def begin_shutdown(self) -> None:
        """End every subscription on the next loop iteration, and each that arrives until the next start. Idempotent."""
        supervisor = self._supervisor()
        if supervisor is not None:
            supervisor.post(self.close)

    def announce_shutdown(self) -> None:
        """The server was asked to stop: end subscriptions, and stop if no host will. Idempotent."""
        supervisor = self._supervisor()
        if supervisor is not None:
            supervisor.post(lambda: self._on_announcement(supervisor))

    def _on_announcement(self, supervisor: Supervisor) -> None:
        if self._is_lazy():
            self.close()
            supervisor.request_stop()
            return
        self._announced_at = time.monotonic()
        if self._state is State.OPEN:
            self._state = State.ANNOUNCED
            self._end_all()
            supervisor.spawn_detached(lambda: self._reopen_if_ignored(supervisor))

    async def _reopen_if_ignored(self, supervisor: Supervisor) -> None:
        while (left_s := self._announced_at + ANNOUNCEMENT_COUNTS_S - time.monotonic()) > 0:  # noqa: ASYNC110 - later announcements extend it
            await anyio.sleep(left_s)
        if self._state is not State.ANNOUNCED:
            return
        if supervisor.stopping or (self._signals is not None and self._signals.server_stops):
            self._state = State.CLOSED
            return
        logger.warning("no stop followed a signal within %g s: subscriptions are served again", ANNOUNCEMENT_COUNTS_S)
        self._state = State.OPEN
