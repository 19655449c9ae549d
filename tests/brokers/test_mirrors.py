"""The states of mirrors and of pub/sub connections, with a fake Redis that tests hold up and break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any

import pytest
from redis.asyncio import Connection
from redis.exceptions import MovedError

from asgi_realtime.brokers.redis import pubsub_connection
from asgi_realtime.brokers.redis.clients import Address
from asgi_realtime.brokers.redis.keys import Keys
from asgi_realtime.brokers.redis.mirror import TRANSITIONS, MirrorState
from asgi_realtime.brokers.redis.pubsub_connection import ConnectionState, PubSubConnection
from asgi_realtime.brokers.redis.server_health import ServerReporter
from asgi_realtime.brokers.redis.topic_mirror import TopicMirror
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.topics import Change, Changes, Cursor, TopicIndex
from tests.brokers.streaming import until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakePubSub:
    """Confirms every subscription at once."""

    def __init__(self, spawn: Any = None) -> None:
        self.missed_channels: list[str] = []
        self.spawn = spawn

    def add(self, channel: str, subscriber: object) -> None: ...

    def discard(self, channel: str, subscriber: object) -> None: ...

    def missed(self, channel: str) -> None:
        self.missed_channels.append(channel)

    async def confirmed(self, channels: Sequence[str]) -> None: ...


class FakeTopic:
    """The topic as Redis stores it. Reads raise `failure`; while it `holds`, each question waits for its future."""

    def __init__(self) -> None:
        self.stored = TopicIndex("epoch", max_runs=10)
        self.failure: Exception | None = None
        self.holds = False
        self.asks: list[asyncio.Future[None]] = []

    def change(self, run_id: str) -> None:
        self.stored.put(Change(self.stored.position + 1, run_id, 1))

    async def index(self, topic: str) -> TopicIndex:
        if self.failure is not None:
            raise self.failure
        copy = TopicIndex(self.stored.epoch, max_runs=10)
        for change in self.stored.after(None, limit=10).items:
            copy.put(change)
        return copy

    async def changes(self, topic: str, cursor: Cursor, limit: int) -> Changes:
        changes = self.stored.after(cursor, limit=limit)
        answer = asyncio.get_running_loop().create_future()
        self.asks.append(answer)
        if self.holds:
            await answer
        return changes


class Jobs:
    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def spawn(self, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(job)
        self.tasks.append(task)
        return task


@pytest.fixture
async def jobs() -> AsyncIterator[Jobs]:
    jobs = Jobs()
    yield jobs
    for task in jobs.tasks:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


@pytest.fixture
async def stored() -> FakeTopic:
    return FakeTopic()


@pytest.fixture
def pubsub(jobs: Jobs) -> FakePubSub:
    return FakePubSub(jobs.spawn)


@pytest.fixture
async def mirror(stored: FakeTopic, pubsub: FakePubSub) -> TopicMirror:
    mirror = TopicMirror(Keys("test"), pubsub, stored, "tag:a")  # type: ignore[arg-type]
    await mirror.joined()
    return mirror


async def run_ids(mirror: TopicMirror) -> list[str]:
    return [change.run_id for change in (await mirror.changes(None)).items]


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_a_refresh_that_did_not_happen_is_not_shared(stored: FakeTopic, mirror: TopicMirror, how: str) -> None:
    """A follower shared the refresh of another, whose client had left, and missed a committed change."""
    stored.holds = True
    first = asyncio.create_task(mirror.refresh())
    await until(lambda: len(stored.asks) == 1)
    second, third = (asyncio.create_task(mirror.refresh()) for _ in range(2))
    await asyncio.sleep(0)
    stored.asks[0].set_result(None)
    await until(lambda: len(stored.asks) == 2)
    stored.change("run_1")
    stored.holds = False
    if how == "cancelled":
        second.cancel()
    else:
        stored.asks[1].set_exception(BrokerUnavailable("the connection was lost"))
    await asyncio.gather(first, third)
    assert await run_ids(mirror) == ["run_1"]
    with pytest.raises((asyncio.CancelledError, BrokerUnavailable)):
        await second


async def test_callers_share_a_refresh_that_began_after_they_called(stored: FakeTopic, mirror: TopicMirror) -> None:
    stored.holds = True
    first = asyncio.create_task(mirror.refresh())
    await until(lambda: len(stored.asks) == 1)
    later = [asyncio.create_task(mirror.refresh()) for _ in range(5)]
    await asyncio.sleep(0)
    stored.holds = False
    stored.asks[0].set_result(None)
    await asyncio.gather(first, *later)
    assert len(stored.asks) == 2


async def test_the_followers_of_an_unreadable_topic_get_an_error(
    stored: FakeTopic, mirror: TopicMirror, jobs: Jobs
) -> None:
    """Its followers kept the old index forever: feeds and `RunWatch` silently missed all changes."""
    woken = asyncio.create_task(mirror.waiting.wait())
    await asyncio.sleep(0)
    stored.failure = ValueError("an answer of another version")
    mirror.check(routine=False)
    async with asyncio.timeout(5):
        await woken
    with pytest.raises(BrokerUnavailable, match="an answer of another version"):
        await mirror.changes(None)
    with pytest.raises(BrokerUnavailable, match="an answer of another version"):
        async with asyncio.timeout(5):
            await mirror.refresh()
    mirror.on_message(b"t epoch 0 1 1 run_1")
    assert not mirror._pending, "messages do not wait for a read that will never happen"


async def test_a_refresh_fails_if_the_topic_becomes_unreadable(
    stored: FakeTopic, mirror: TopicMirror, jobs: Jobs
) -> None:
    stored.failure = ValueError("an answer of another version")
    mirror.check(routine=False)
    with pytest.raises(BrokerUnavailable, match="an answer of another version"):
        async with asyncio.timeout(5):
            await mirror.refresh()


# States


def test_every_state_has_its_transitions() -> None:
    for states, transitions in ((MirrorState, TRANSITIONS), (ConnectionState, pubsub_connection.TRANSITIONS)):
        assert set(transitions) == set(states)


async def test_a_closed_mirror_cannot_change_its_state(mirror: TopicMirror) -> None:
    mirror.close()
    mirror.close()
    with pytest.raises(RuntimeError, match="cannot go from CLOSED to LIVE"):
        mirror._enter(MirrorState.LIVE)
    mirror.on_message(b"w")
    mirror.check(routine=False)
    assert not mirror._pending and not mirror.is_usable


async def test_messages_during_a_read_are_applied_after_it(stored: FakeTopic, mirror: TopicMirror) -> None:
    stored.change("run_1")
    mirror.check(routine=False)
    mirror.on_message(b"t epoch 1 2 1 run_2")
    await until(lambda: mirror._state is MirrorState.LIVE)
    assert await run_ids(mirror) == ["run_1", "run_2"]


async def test_a_message_that_leaves_a_gap_makes_the_mirror_read_again(stored: FakeTopic, mirror: TopicMirror) -> None:
    for run_id in ("run_1", "run_2"):
        stored.change(run_id)
    mirror.on_message(b"t epoch 1 2 1 run_2")
    await until(lambda: mirror._state is MirrorState.LIVE)
    assert await run_ids(mirror) == ["run_1", "run_2"]


@pytest.mark.parametrize("routine", [True, False])
async def test_a_routine_check_that_finds_a_change_reports_the_connection(
    stored: FakeTopic, mirror: TopicMirror, pubsub: FakePubSub, routine: bool
) -> None:
    stored.change("run_1")
    mirror.check(routine=routine)
    await until(lambda: mirror._state is MirrorState.LIVE)
    assert pubsub.missed_channels == ([Keys("test").topic_channel("tag:a")] if routine else [])


async def test_followers_are_woken_if_a_connection_is_lost_during_a_routine_check(mirror: TopicMirror) -> None:
    """They had failed to load a run during the outage, and nothing made them try again."""
    woken = asyncio.create_task(mirror.waiting.wait())
    await asyncio.sleep(0)
    mirror.check(routine=True)
    mirror.check(routine=False)
    async with asyncio.timeout(5):
        await woken


async def test_an_unavailable_broker_is_retried_by_one_job(stored: FakeTopic, mirror: TopicMirror, jobs: Jobs) -> None:
    stored.failure = BrokerUnavailable("down")
    before = len(jobs.tasks)
    for _ in range(100):
        mirror.check(routine=False)
        mirror.on_message(b"?")
        await asyncio.sleep(0)
    assert len(jobs.tasks) == before + 1
    stored.failure = None
    stored.change("run_1")
    await until(lambda: mirror._state is MirrorState.LIVE)
    assert await run_ids(mirror) == ["run_1"]


class Registry(FakePubSub):
    def __init__(self) -> None:
        super().__init__()
        self.moved: list[str] = []

    def on_message(self, channel: str, message: bytes) -> None: ...

    def on_confirmed(self, channel: str) -> None: ...

    def on_moved(self, channels: Sequence[str], *, by: MovedError | None = None) -> None:
        self.moved += channels

    def on_lost(self) -> None: ...

    def check(self, channels: Iterable[str], *, routine: bool) -> None: ...

    def is_needed(self, connection: PubSubConnection) -> bool:
        return True


class Reporter(ServerReporter):
    def __init__(self) -> None:
        self.reports: list[str] = []

    def broke(self, reason: Exception) -> None:
        self.reports.append("broke")

    def failed(self, reason: Exception) -> None:
        self.reports.append("failed")

    def works(self) -> None:
        self.reports.append("works")


async def test_a_connection_whose_last_open_subscription_moves_elsewhere_works() -> None:
    """It counted as failing until another channel was confirmed, and the health check failed."""
    registry, reporter = Registry(), Reporter()
    connection = PubSubConnection(
        registry, Address("127.0.0.1", 1), connect=Connection, reporter=reporter, timeout_s=1, silence_s=1
    )
    for channel in ("{a}", "{b}"):
        connection.subscribe(channel)
    connection.failure = ConnectionError("it was lost")
    connection._subscribe_all()
    connection._commands(connection._to_send)
    connection._on_confirmed("{a}")
    assert reporter.reports == []
    connection._on_refused(MovedError(f"{pubsub_connection._slot('{b}')} 127.0.0.1:2"))
    assert (registry.moved, reporter.reports) == (["{b}"], ["works"])
    assert not connection.failure
