"""What a server must offer to be measured, and the token check that those without their own share."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import jwt
from starlette.types import ASGIApp

SECRET = "a benchmark needs no better secret than this one"
_ISSUER = "https://benchmarks.invalid"


@dataclass(frozen=True, slots=True)
class Subscription:
    """Where a stream is subscribed to, and distinct tokens that admit it."""

    path: str
    tokens: list[str]


class Peer(Protocol):
    """One server. All methods are called in the server's event loop, after its start."""

    @property
    def app(self) -> ASGIApp: ...

    async def create_stream(self, name: str, *, tokens: int) -> Subscription:
        """Make an empty stream."""

    async def publish(self, name: str, chunks: Sequence[str]) -> None:
        """Add chunks and wake the subscribers, without suspending."""

    async def end_stream(self, name: str) -> None:
        """Have every subscriber end after the last chunk."""

    async def store(self, source: AsyncIterator[str]) -> str:
        """Put all of a source in a stream of its own in Redis, and return the stream's key once all is acknowledged.

        Only of those that store there."""


def make_tokens(stream: str, count: int) -> list[str]:
    """Return distinct tokens that admit one stream for about an hour."""
    now = int(time.time())
    claims = {"iss": _ISSUER, "aud": _ISSUER, "scopes": [f"read:streams:{stream}"]}
    return [jwt.encode({**claims, "exp": now + 3600 + number}, SECRET, algorithm="HS256") for number in range(count)]


def token_admits(authorization: str, stream: str) -> bool:
    """Check an Authorization header as a careful application does: signature, algorithm, times, issuer, scope."""
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
