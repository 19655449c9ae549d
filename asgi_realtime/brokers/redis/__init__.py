"""The broker on Redis: many processes, on any number of machines, share runs and streams. Needs the extra `redis`."""

from __future__ import annotations

try:
    import redis.asyncio  # noqa: F401
except ModuleNotFoundError as exc:  # pragma: no cover
    raise ModuleNotFoundError("the Redis broker needs redis-py: pip install 'asgi_realtime[redis]'") from exc

from asgi_realtime.brokers.redis.broker import PREFIX, RedisBroker

__all__ = ["PREFIX", "RedisBroker"]
