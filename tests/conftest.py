"""The whole session: order, markers and signals; both event loops; and the Redis servers that tests share."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest

from tests.redis_servers import RedisCluster, RedisServer, ReplicaPair
from tests.requirements import redis_binary, valkey_binary

SERVER_MARKERS = ("redis", "chromium", "model")
SERVER_FIXTURES = {"redis_url", "valkey_url", "redis_cluster", "redis_server", "redis_pair", "site", "smallest"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="shuffle the test files and the tests of each file")


def pytest_configure(config: pytest.Config) -> None:
    # On a busy machine generating data takes long; no test may depend on that.
    no_time_limits = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
    hypothesis.settings.register_profile("no time limits", no_time_limits)
    hypothesis.settings.load_profile("no time limits")
    # A shell starts background jobs with SIGINT ignored. Child processes inherit that and could not be interrupted.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.nodeid.startswith("tests/e2e/") or any(map(item.get_closest_marker, SERVER_MARKERS)):
        item.add_marker("server")
    elif isinstance(item, pytest.Function) and not SERVER_FIXTURES.isdisjoint(item.fixturenames):
        item.add_marker("server")


@pytest.hookimpl(trylast=True)  # after pytest has grouped tests by the parameters of their fixtures
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed: int | None = config.getoption("shuffle")
    if seed is not None:
        shuffle(items, random.Random(seed))
    elif "PYTEST_XDIST_WORKER" in os.environ:
        # Workers take whole files. Start the long ones first, so that no worker finishes late.
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    gc.freeze()  # thousands of test items live to the end; no collection needs to visit them


@pytest.hookimpl(trylast=True)  # after the teardown of fixtures
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Collect the garbage of each file, so that its warnings fail no other one, and freeze what it imported: tests that
    collect garbage took half a second each in a process that had imported litellm."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # Hypothesis, imported for the summary, asks what refers to trio's random generator


def shuffle(items: list[pytest.Item], chance: random.Random) -> None:
    """Shuffle files, and tests within each file: module fixtures still start once."""
    files = {path: chance.random() for path in sorted({item.path for item in items})}
    chance.shuffle(items)
    items.sort(key=lambda item: files[item.path])


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
