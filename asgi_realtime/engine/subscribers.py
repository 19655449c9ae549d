"""The open subscriptions of this process, and what ends them all: the user, a signal, a server that stops, the stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import anyio

from asgi_realtime.loop.signals import ShutdownSignals
from asgi_realtime.loop.supervisor import Supervisor

logger = logging.getLogger("asgi_realtime")

ANNOUNCEMENT_COUNTS_S = 30.0
"""How long an announced shutdown ends subscriptions if none comes: a host may have a handler that ignores signals."""


class Subscriber(Protocol):
    """An open subscription, as the ticker and the shutdown see it. Neither call suspends or raises."""

    def tick(self, now: float, steady: float) -> None:
        """Look after heartbeat, expiry and stalled sends.

        `now` is unix seconds of the host's clock, for what expires; `steady` are seconds of a clock that is never set,
        for spans.
        """

    def shut_down(self) -> None:
        """End soon and cleanly, so that the client comes back later."""


class Subscribers:
    """What is `open`, and whether this is `closing`: who comes then is sent away at once.

    `supervisor` gives the one that runs, if any; `is_left_alone` says whether no host will stop it.
    """

    def __init__(
        self, *, signals: bool, supervisor: Callable[[], Supervisor | None], is_left_alone: Callable[[], bool]
    ) -> None:
        self.open: set[Subscriber] = set()
        self.closing = False
        self._supervisor = supervisor
        self._is_left_alone = is_left_alone
        self._signals = ShutdownSignals(self.announce_shutdown, in_background=self._in_background) if signals else None
        self._announcements = 0
        self._shut_for_good = False

    def _in_background(self) -> bool:
        supervisor = self._supervisor()
        return supervisor is not None and supervisor.has_the_loop

    def begin(self) -> None:
        """Something starts: nothing is open yet, and signals are heard."""
        self.open.clear()
        self.closing = self._shut_for_good = False
        if self._signals is not None:
            self._signals.install()

    def end(self) -> None:
        """It has stopped: signals are the server's alone again."""
        if self._signals is not None:
            self._signals.restore()

    def tick(self, now: float, steady: float) -> None:
        """Have each of them look at the time."""
        for subscriber in tuple(self.open):
            try:
                subscriber.tick(now, steady)
            except Exception:
                logger.exception("the ticker failed for %r", subscriber)

    def check_server(self) -> None:
        """Hear of a shutdown that came without a signal, and be there for one if the server has replaced handlers."""
        if self._signals is None:
            return
        self._signals.install()
        if self._signals.server_stops and not self.closing:
            self.announce_shutdown()

    def close(self) -> None:
        """End every one of them cleanly, and each that comes."""
        self.closing = True
        for subscriber in tuple(self.open):
            subscriber.shut_down()

    def begin_shutdown(self) -> None:
        """End every one of them cleanly, at the next turn of the loop, and every later one until the next start.

        From any thread or signal handler, also one that interrupts this very code; idempotent. It cannot be taken back.
        """
        supervisor = self._supervisor()
        if supervisor is not None:
            supervisor.post(self._shut)

    def _shut(self) -> None:
        self._shut_for_good = True
        self.close()

    def announce_shutdown(self) -> None:
        """The server was told to stop: end every subscription, and if nobody else will stop this, begin with that too.

        From any thread or signal handler; idempotent.
        """
        supervisor = self._supervisor()
        if supervisor is not None:
            supervisor.post(lambda: self._heed_announcement(supervisor))

    def _heed_announcement(self, supervisor: Supervisor) -> None:
        self.close()
        if self._is_left_alone():
            supervisor.request_stop()
        else:
            self._announcements += 1
            heard = self._announcements
            supervisor.spawn_detached(lambda: self._reopen_if_ignored(supervisor, heard))

    async def _reopen_if_ignored(self, supervisor: Supervisor, heard: int) -> None:
        await anyio.sleep(ANNOUNCEMENT_COUNTS_S)
        stops = supervisor.stopping or self._shut_for_good or (self._signals is not None and self._signals.server_stops)
        if heard == self._announcements and not stops:
            logger.warning(
                "nothing stopped within %g s of a signal: subscriptions are served again", ANNOUNCEMENT_COUNTS_S
            )
            self.closing = False
