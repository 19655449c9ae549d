"""The interface of a measured server, and the token check of servers that have none."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import jwt
from starlette.types import ASGIApp

SECRET = "a benchmark does not need a better secret than this"
_ISSUER = "https://benchmarks.invalid"


@dataclass(frozen=True, slots=True)
class Subscription:
    """The path of a stream, and distinct tokens that grant access to it."""

    path: str
    tokens: list[str]


class Peer(Protocol):
    """One server. All methods run in its event loop, after its start."""

    @property
    def app(self) -> ASGIApp: ...

    async def create_stream(self, name: str, *, tokens: int) -> Subscription:
        """Create an empty stream."""

    async def publish(self, name: str, chunks: Sequence[str]) -> None:
        """Add chunks and wake the subscribers, without suspending."""

    async def end_stream(self, name: str) -> None:
        """End every subscription after the last chunk."""

    async def store(self, source: AsyncIterator[str]) -> str:
        """Store a source in a new stream in Redis, and return the key of the stream once everything is acknowledged.

        Only for servers that store in Redis."""


def make_tokens(stream: str, count: int) -> list[str]:
    """Return distinct tokens for one stream that expire in about an hour."""
    now = int(time.time())
    claims = {"iss": _ISSUER, "aud": _ISSUER, "scopes": [f"read:streams:{stream}"]}
    return [jwt.encode({**claims, "exp": now + 3600 + number}, SECRET, algorithm="HS256") for number in range(count)]


def check_token(authorization: str, stream: str) -> bool:
    """Check an Authorization header as a careful app does: signature, algorithm, times, issuer, scope."""
    try:
        claims = jwt.decode(
            authorization.removeprefix("Bearer "),
            SECRET,
            algorithms=["HS256"],
            audience=_ISSUER,
            issuer=_ISSUER,
            options={"require": ["exp"]},
        )
    except jwt.InvalidTokenError:
        return False
    return f"read:streams:{stream}" in claims["scopes"]
