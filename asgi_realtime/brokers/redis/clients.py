"""What the broker uses of redis-py: the settings of clients and pools, and the errors that a server answers with.

This is the only place where redis-py's exceptions become ours.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

from redis import exceptions
from redis.asyncio.client import Redis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff

from asgi_realtime.core.errors import BrokerUnavailable, InvalidConfiguration

_TRANSIENT_PREFIXES = ("LOADING", "MASTERDOWN", "READONLY", "CLUSTERDOWN", "TRYAGAIN")

NO_MEMORY = "Redis has no memory left (maxmemory); raise it, or lower Retention"


class Address(NamedTuple):
    """Where a primary listens. An empty host means the server of the URL."""

    host: str
    port: int


THE_URL = Address("", 0)


def open_client(url: str) -> Redis:
    """A client for `redis://`, `rediss://` or `unix://`, as redis-py parses it. Raises `InvalidConfiguration`."""
    try:
        return Redis.from_url(url)
    except ValueError as exc:
        raise InvalidConfiguration(f"redis-py does not accept the broker's URL: {exc}") from exc


def own_pool(pool: ConnectionPool, *, timeout_s: float) -> ConnectionPool:
    """A pool for our own use. A Sentinel pool queries its sentinels over connections that are bound to one loop."""
    if not isinstance(pool, SentinelConnectionPool):
        return pool
    manager = copy(pool.sentinel_manager)
    manager.sentinels = [_sentinel(one.connection_pool, timeout_s / 3) for one in manager.sentinels]
    settings = {name: value for name, value in pool.connection_kwargs.items() if name != "connection_pool"}
    return SentinelConnectionPool(  # type: ignore[no-untyped-call]
        pool.service_name,
        manager,
        connection_class=pool.connection_class,
        is_master=pool.is_master,
        check_connection=pool.check_connection,
        **settings,
    )


def _sentinel(pool: ConnectionPool, timeout_s: float) -> Redis:
    """A sentinel's client whose timeout leaves time to query the next sentinel."""
    settings = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, **pool.connection_kwargs}
    settings["retry"] = Retry(NoBackoff(), 0)
    return Redis(connection_pool=ConnectionPool(connection_class=pool.connection_class, **settings))


def new_connection(pool: ConnectionPool, address: Address, *, timeout_s: float) -> AbstractConnection:
    """A connection that is not open yet and waits for answers without limit; our own watchdogs limit that."""
    settings = {
        **pool.connection_kwargs,
        "socket_timeout": None,
        "socket_connect_timeout": timeout_s,
        "health_check_interval": 0,
        "decode_responses": False,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
    }
    if address is not THE_URL:
        settings |= {"host": address.host, "port": address.port}
    connection: AbstractConnection = pool.connection_class(**settings)
    return connection


async def close_sentinels(pool: ConnectionPool) -> None:
    if isinstance(pool, SentinelConnectionPool):
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.connection_pool.disconnect()


def is_transient(exc: exceptions.ResponseError) -> bool:
    """Whether the same call can succeed soon: the slot moves, the server loads its data or is being replaced."""
    # MovedError is an AskError
    passing = exceptions.AskError | exceptions.TryAgainError | exceptions.ClusterDownError | exceptions.ReadOnlyError
    return isinstance(exc, passing) or str(exc).startswith(_TRANSIENT_PREFIXES)


def unavailable(exc: exceptions.RedisError) -> BrokerUnavailable:
    """Our error for a refusal, with what the user can do about it."""
    if isinstance(exc, exceptions.OutOfMemoryError):
        return BrokerUnavailable(NO_MEMORY)
    if isinstance(exc, exceptions.NoPermissionError | exceptions.AuthorizationError):
        return BrokerUnavailable(f"the Redis user lacks a permission ({exc}); docs/scaling.md lists the rules it needs")
    return BrokerUnavailable(f"Redis refused: {exc}")
