"""Both loop libraries for every test with `@pytest.mark.anyio`, and real Redis servers for those that ask for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.redis_servers import RedisCluster, RedisServer, ReplicaPair
from tests.requirements import redis_binary, valkey_binary


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def log_level_left_as_it_was() -> Iterator[None]:
    """A host that is made in a test may set it for the whole process, and tests that look at the log would see more."""
    before = logging.root.level
    yield
    after = logging.root.level
    logging.root.setLevel(before)
    assert after == before, "the test has changed the level of the root logger"


# For tests that do no more than use them: one each for the whole session. Tests keep apart by their prefix.


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with RedisServer(redis_binary(), keeps_data=False) as server:
        yield server.url


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    with RedisServer(valkey_binary(), keeps_data=False) as server:
        yield server.url


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[RedisCluster]:
    with RedisCluster(redis_binary()) as cluster:
        yield cluster


# For tests that kill, pause or reconfigure: each has its own.


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    with RedisServer(redis_binary()) as server:
        yield server


@pytest.fixture
def redis_pair() -> Iterator[ReplicaPair]:
    with ReplicaPair(redis_binary()) as pair:
        yield pair
