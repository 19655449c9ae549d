"""Where runs, streams, topics and claims are stored and followed: in memory, or in Redis."""

from __future__ import annotations

from asgi_realtime.brokers.base import Broker
from asgi_realtime.brokers.memory import Clock, MemoryBroker
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.core.errors import InvalidConfiguration
from asgi_realtime.core.runs import StoredRecord

REDIS_SCHEMES = ("redis", "rediss", "unix")


def open_broker(url: str, *, limits: Limits, retention: Retention, timeouts: Timeouts, clock: Clock) -> Broker:
    """Create the broker for a URL. Raises `InvalidConfiguration` for an unknown scheme."""
    if url == "memory://":
        return MemoryBroker(limits=limits, retention=retention, timeouts=timeouts, clock=clock)
    scheme = url.partition(":")[0]
    if scheme in REDIS_SCHEMES:
        from asgi_realtime.brokers.redis import RedisBroker

        return RedisBroker(url, limits=limits, retention=retention, timeouts=timeouts)
    allowed = ", ".join(f"{scheme}://" for scheme in ("memory", *REDIS_SCHEMES))
    raise InvalidConfiguration(f"broker {scheme + '://'!r} is not known; allowed are {allowed} and a Broker object")


__all__ = ["Broker", "MemoryBroker", "StoredRecord", "open_broker"]
