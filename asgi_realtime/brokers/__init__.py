"""The backends behind a `Realtime`, chosen by a URL. A driver is imported here and only when its URL is used."""

from __future__ import annotations

from asgi_realtime.brokers.base import Broker
from asgi_realtime.brokers.memory import Clock, MemoryBroker
from asgi_realtime.config import Limits, Retention, Timeouts
from asgi_realtime.errors import InvalidConfiguration


def open_broker(url: str, *, limits: Limits, retention: Retention, timeouts: Timeouts, clock: Clock) -> Broker:
    """Make the broker that a URL names. Raises `InvalidConfiguration` for a URL that names none."""
    if url == "memory://":
        return MemoryBroker(limits=limits, retention=retention, timeouts=timeouts, clock=clock)
    raise InvalidConfiguration(f"broker {url!r} is not known; allowed are 'memory://' and a Broker object")


__all__ = ["Broker", "MemoryBroker", "open_broker"]
