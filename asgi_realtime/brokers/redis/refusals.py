"""Errors that a Redis server answers with: which of them pass, and what the others mean to a user.

This is the only place where redis-py's exceptions become ours.
"""

from __future__ import annotations

from redis.exceptions import (
    AskError,
    AuthorizationError,
    ClusterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from asgi_realtime.core.errors import BrokerUnavailable

_TRANSIENT = (MovedError, AskError, TryAgainError, ClusterDownError, ReadOnlyError)
_TRANSIENT_PREFIXES = ("LOADING", "MASTERDOWN", "READONLY", "CLUSTERDOWN", "TRYAGAIN")


def is_transient(exc: ResponseError) -> bool:
    """Whether the same call can succeed soon: the slot moves, the server loads its data or is being replaced."""
    return isinstance(exc, _TRANSIENT) or str(exc).startswith(_TRANSIENT_PREFIXES)


def unavailable(exc: RedisError) -> BrokerUnavailable:
    """Our error for a refusal, with what the user can do about it."""
    if isinstance(exc, OutOfMemoryError):
        return BrokerUnavailable("Redis has no memory left (maxmemory); raise it, or lower Retention")
    if isinstance(exc, NoPermissionError | AuthorizationError):
        return BrokerUnavailable(f"the Redis user lacks a permission ({exc}); docs/scaling.md lists the rules it needs")
    return BrokerUnavailable(f"Redis refused: {exc}")
