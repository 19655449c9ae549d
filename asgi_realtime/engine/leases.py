"""Renewing leases from a thread, so that a blocked event loop does not crash its runs.

The thread is there while this process has runs in hand. It belongs to one start, and never keeps a process from ending.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from asgi_realtime.brokers.base import ThreadRenewal
from asgi_realtime.core.errors import BrokerUnavailable

logger = logging.getLogger("asgi_realtime")

_PAUSE_S = 1.0
"""Between two tries while the broker is away, at most."""


class LeaseThread:
    """Renews what `held` gives, three times in the length of a lease. `held` is called in the thread."""

    def __init__(
        self,
        broker: ThreadRenewal,
        held: Callable[[], Sequence[str]],
        *,
        owner: str,
        lease_s: float,
        renewed: Callable[[], None] = lambda: None,
    ) -> None:
        self._broker = broker
        self._held = held
        self._owner = owner
        self._period_s = lease_s / 3
        self._on_renewed = renewed
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._away = False

    def keep(self) -> None:
        """There is something to renew. Does not block; from the loop's thread."""
        if self._stopped.is_set():
            return
        with self._lock:  # it is held for moments only: a thread that is about to end has to have done so
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="asgi_realtime leases", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Renew no more. Does not wait for the thread, which may hang in a call. Idempotent."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(min(self._period_s, _PAUSE_S) if self._away else self._period_s):
            held = self._held()
            if held:
                self._renew(held)
            elif self._is_idle():
                return

    def _is_idle(self) -> bool:
        """End the thread, unless something came meanwhile: who comes later finds none, and starts another."""
        with self._lock:
            if self._held():
                return False
            self._thread = None
            return True

    def _renew(self, held: Sequence[str]) -> None:
        try:
            self._broker.renew_from_thread(held, owner=self._owner)
        except Exception as exc:
            if not self._away:
                known = isinstance(exc, BrokerUnavailable)
                logger.warning("leases cannot be renewed: %s", exc, exc_info=None if known else exc)
            self._away = True
        else:
            self._away = False
            self._on_renewed()
