"""Renewing the leases of the runs that this process holds, so that no other process takes it for dead.

A process holds the runs that it executes and those that wait in it. Where the broker allows it, a thread renews their
leases, so that a blocked event loop does not crash its runs; otherwise the ticker does. The thread exists while the
process holds a run. It belongs to one start, and as a daemon never keeps a process from exiting.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

from asgi_realtime.brokers.base import ThreadRenewal
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.loop.logger import logger
from asgi_realtime.runs.store import RunStore

_RENEWALS_PER_LEASE = 3

_RETRY_PAUSE_S = 1.0
"""Longest pause between two attempts while the broker is unavailable."""


class Leases:
    """Renews the leases of what `held` returns. `held` must be thread-safe; `clock` returns unix seconds."""

    def __init__(
        self, runs: RunStore, *, held: Callable[[], Sequence[str]], clock: Callable[[], float], lease_s: float
    ) -> None:
        self._runs = runs
        self._held = held
        self._clock = clock
        self._lease_s = lease_s
        self._renewer = runs.broker if isinstance(runs.broker, ThreadRenewal) else None
        self._thread: LeaseThread | None = None
        self._renewed_at = -math.inf

    def keep(self) -> None:
        """Make sure that the thread runs while there is something to renew. Does not block; on the loop's thread."""
        if self._renewer is None or not self._held():
            return
        if self._thread is None:
            self._thread = LeaseThread(
                self._renewer,
                self._held,
                owner=self._runs.owner,
                lease_s=self._lease_s,
                on_renewed=self._runs.owned.renewed,
            )
        self._thread.keep()

    def stop(self) -> None:
        """End the thread, without waiting for it. Idempotent."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None
        self._renewed_at = -math.inf

    async def renew_if_due(self) -> None:
        """Renew the leases on the event loop, if no thread does and a third of a lease has passed."""
        if self._renewer is not None or not (held := self._held()):
            return
        now = self._clock()  # unlike the loop's clock it advances while the machine sleeps, as leases do
        if not 0 <= now - self._renewed_at < self._lease_s / _RENEWALS_PER_LEASE:
            await self._runs.broker.renew(held, owner=self._runs.owner)
            self._renewed_at = now
            self._runs.owned.renewed()


class LeaseThread:
    """A thread that renews what `held` returns, three times per lease. `held` and `on_renewed` are called in it."""

    def __init__(
        self,
        broker: ThreadRenewal,
        held: Callable[[], Sequence[str]],
        *,
        owner: str,
        lease_s: float,
        on_renewed: Callable[[], None],
    ) -> None:
        self._broker = broker
        self._held = held
        self._owner = owner
        self._period_s = lease_s / _RENEWALS_PER_LEASE
        self._on_renewed = on_renewed
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._unavailable = False

    def keep(self) -> None:
        """Start the thread if it does not run. Does not block; on the loop's thread."""
        if self._stopped.is_set():
            return
        with self._lock:  # held for moments only; orders this call before or after the thread's decision to end
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="asgi_realtime leases", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Stop renewing. Does not wait for the thread, which can be blocked in a call. Idempotent."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(min(self._period_s, _RETRY_PAUSE_S) if self._unavailable else self._period_s):
            held = self._held()
            if held:
                self._renew(held)
            elif self._ends():
                return

    def _ends(self) -> bool:
        """End the thread unless it has something to renew. A later `keep` finds no thread and starts another."""
        with self._lock:
            if self._held():
                return False
            self._thread = None
            return True

    def _renew(self, held: Sequence[str]) -> None:
        try:
            self._broker.renew_from_thread(held, owner=self._owner)
        except Exception as exc:
            if not self._unavailable:
                known = isinstance(exc, BrokerUnavailable)
                logger.warning("leases cannot be renewed: %s", exc, exc_info=None if known else exc)
            self._unavailable = True
        else:
            self._unavailable = False
            self._on_renewed()
