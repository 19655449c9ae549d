from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest

from asgi_realtime import BrokerUnavailable, Realtime, Run, RunCanceled, RunNotFound, Status, StreamClosed
from asgi_realtime.brokers.base import LiveTopic
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.run_changes import Finished
from asgi_realtime.core.runs import StoredRecord, run_topic
from asgi_realtime.engine import executions
from tests.brokers.backends import DistantBroker, held
from tests.inprocess import GUARD_S, ended, make_realtime, until

pytestmark = pytest.mark.anyio


class Counting(DistantBroker):
    """Counts requests; unavailable while `away`."""

    def __init__(self) -> None:
        super().__init__()
        self.loads = 0
        self.away = False
        self.follows = 0

    async def load(self, run_ids: Sequence[str]) -> list[StoredRecord | None]:
        self.loads += 1
        return await super().load(run_ids)

    @asynccontextmanager
    async def follow(self, topic: str) -> AsyncIterator[LiveTopic]:
        self.follows += 1
        if self.away:
            raise BrokerUnavailable("no answer")
        async with super().follow(topic) as followed:
            yield followed


def two_processes(broker: MemoryBroker | None = None) -> tuple[Realtime, Realtime]:
    shared = broker or MemoryBroker()
    return make_realtime(broker=shared), make_realtime(broker=shared)


async def numbers() -> AsyncIterator[int]:
    for number in range(1_000_000):
        yield number
        await anyio.lowlevel.checkpoint()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executions, "_PAUSE_S", 0.001)


async def test_another_process_can_cancel_the_run_of_a_pipe() -> None:
    owner, other = two_processes()
    async with owner, other:
        pipe = owner.pipe(numbers())
        await until(lambda: pipe.result.chunks > 3)
        await other.cancel(pipe.handle)
        assert (await ended(other, pipe.handle)).status is Status.CANCELED
        with pytest.raises(RunCanceled):
            await pipe.wait_until_complete()
        await until(lambda: not owner.engine.executions)


async def test_a_run_that_another_process_crashed_is_stopped() -> None:
    """A process that was paused for longer than its lease continued to write, and its run seemed to succeed."""
    owner, other = two_processes()
    raised: list[type[Exception]] = []

    @owner.task("t")
    async def task(run: Run) -> str:
        pipe = owner.pipe(numbers())
        await until(lambda: pipe.result.chunks > 3)
        await other.runs.update(run.id, Finished(Status.CRASHED))
        try:
            with anyio.CancelScope(shield=True):
                await owner.append("late")
        except StreamClosed as exc:
            raised.append(type(exc))
        run.metadata.set("late", True)
        await anyio.sleep(60)
        raise AssertionError("it should have been cancelled")

    async with owner, other:
        handle = await owner.trigger(task)
        record = await ended(other, handle)
        await until(lambda: not owner.engine.held)
        assert raised == [StreamClosed]
        after = await other.runs.get(handle.id)
        assert after == record and after.status is Status.CRASHED and after.metadata == {}


async def test_a_run_that_was_removed_is_stopped() -> None:
    owner, other = two_processes()
    async with owner, other:
        with pytest.raises(RunNotFound):  # no run is left to end
            async with owner.open_run("r") as run:
                await other.runs.update(run.id, Finished(Status.CRASHED))
                await other.broker.remove(run.id)
                await anyio.sleep(60)
        assert owner.engine.executions == {}


async def test_own_changes_cause_no_loads() -> None:
    broker = Counting()
    async with make_realtime(broker=broker) as realtime, realtime.open_run("r") as run:
        await realtime.append(0)
        await until(lambda: realtime.engine.executions._watches)
        own = next(iter(realtime.engine.executions._watches.values()))
        # It loads the run once for the new stream.
        await until(lambda: own._seen == 2 and broker._topics[run_topic(run.id)].waiting)
        for number in range(20):
            run.metadata.set("n", number)
            run.tags.add(f"tag-{number % 10}")
            loads = broker.loads
            await run.metadata.flush()
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            assert broker.loads == loads + 1  # the load that the change itself needs
        loads, follows = broker.loads, broker.follows
        for number in range(100):
            await realtime.append(number)
        assert (broker.loads, broker.follows) == (loads, follows)


async def test_a_cancellation_between_two_own_changes_is_noticed() -> None:
    owner, other = two_processes(DistantBroker())
    for iterations in range(12):
        async with owner, other:
            with pytest.raises(RunCanceled):
                async with owner.open_run("r") as run:
                    run.metadata.set("before", 1)
                    async with anyio.create_task_group() as group:
                        group.start_soon(other.cancel, run.id)
                        for _ in range(iterations):
                            await anyio.lowlevel.checkpoint()
                        await run.metadata.flush()
                    run.metadata.set("after", 1)
                    await run.metadata.flush()
                    await anyio.sleep(60)


async def test_a_broker_that_was_unavailable_is_followed_again() -> None:
    broker = Counting()
    owner, other = two_processes(broker)
    async with owner, other:
        broker.away = True
        with pytest.raises(RunCanceled):
            async with owner.open_run("r") as run:
                follows = broker.follows
                await until(lambda: broker.follows > follows)
                await other.cancel(run.id)  # no watch is notified
                broker.away = False
                await anyio.sleep(60)
        assert (await owner.get_run(run)).status is Status.CANCELED


async def test_a_topic_that_fails_is_followed_again(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(DistantBroker):
        failures: list[Exception] = []

        @asynccontextmanager
        async def follow(self, topic: str) -> AsyncIterator[LiveTopic]:
            async with super().follow(topic) as followed:
                if self.failures:
                    raise self.failures.pop()
                yield followed

    broker = Failing()
    owner, other = two_processes(broker)
    async with owner, other:
        broker.failures = [ValueError("strange"), BrokerUnavailable("cut off")]
        with pytest.raises(RunCanceled):
            async with owner.open_run("r") as run:
                await until(lambda: not broker.failures)
                await other.cancel(run.id)
                await anyio.sleep(60)
    assert [record.message for record in caplog.records] == [f"run {run.id} cannot be followed"]


async def test_an_ended_run_leaves_nothing_behind() -> None:
    broker = DistantBroker()
    async with make_realtime(broker=broker) as realtime:

        @realtime.task("t")
        async def task() -> None:
            await realtime.append(1)

        tasks = len(anyio.get_running_tasks())
        for _ in range(3):
            await (await realtime.trigger(task)).result(timeout=GUARD_S)
            async with realtime.open_run("r"):
                pass
            await realtime.pipe([1, 2]).wait_until_complete()
        await until(lambda: not held(broker) and len(anyio.get_running_tasks()) == tasks)
        assert realtime.engine.executions._watches == {}
