"""The open subscriptions of this process."""

from __future__ import annotations

from typing import Protocol

from asgi_realtime.loop.logger import logger


class Subscriber(Protocol):
    """An open subscription, as the ticker and the shutdown see it. Neither call suspends or raises."""

    def tick(self, now: float, steady: float) -> None:
        """Check heartbeat, expiry and stalled sends.

        `now` is the host's clock in unix seconds, for what expires; `steady` is a monotonic clock in seconds, for
        spans.
        """

    def shut_down(self) -> None:
        """End soon and cleanly, so that the client reconnects later; unless the shutdown waits for its run."""


class Subscribers:
    """The set `open`."""

    def __init__(self) -> None:
        self.open: set[Subscriber] = set()

    def tick(self, now: float, steady: float) -> None:
        """Tick every subscription."""
        for subscriber in tuple(self.open):
            try:
                subscriber.tick(now, steady)
            except Exception:
                logger.exception("the ticker failed for %r", subscriber)

    def shut_down(self) -> None:
        """The shutdown begins, or its drain is over."""
        for subscriber in tuple(self.open):
            subscriber.shut_down()
