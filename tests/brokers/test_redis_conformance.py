"""The suite passes on the Redis broker: on one server, on a Cluster, and on Valkey."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from asgi_realtime.brokers.redis import RedisBroker
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.testing.conformance import *  # noqa: F403
from asgi_realtime.testing.conformance import Backend, MakeBroker

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]  # the guard of the suite is half of it


class OnRedis:
    """`make_broker` for a server that all tests share: each call has a prefix that is new."""

    guard_s = 30.0

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(
        self, *, limits: Limits, retention: Retention, timeouts: Timeouts
    ) -> AbstractAsyncContextManager[Backend]:
        return self._opened(limits, retention, timeouts)

    @asynccontextmanager
    async def _opened(self, limits: Limits, retention: Retention, timeouts: Timeouts) -> AsyncIterator[Backend]:
        prefix = f"t{secrets.token_hex(6)}"
        first, second = (
            RedisBroker(self.url, prefix=prefix, limits=limits, retention=retention, timeouts=timeouts)
            for _ in range(2)
        )
        async with first as broker, second as peer:
            yield Backend(broker=broker, peer=peer, held=lambda: broker.held + peer.held)


@pytest.fixture(params=["redis", pytest.param("redis:cluster", marks=pytest.mark.cluster), "valkey"])
def make_broker(request: pytest.FixtureRequest) -> MakeBroker:
    if request.param == "redis:cluster":
        return OnRedis(request.getfixturevalue("redis_cluster").url)
    return OnRedis(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
