from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from asgi_realtime import BrokerUnavailable, Realtime, Retention, RunNotFound, Status
from asgi_realtime.brokers.memory import MemoryBroker
from tests.brokers.backends import DistantBroker
from tests.inprocess import GUARD_S, FakeClock, ended, make_realtime, until

pytestmark = pytest.mark.anyio


async def test_expired_runs_are_removed() -> None:
    clock = FakeClock()
    realtime = make_realtime(clock=clock, retention=Retention(after_end=60))
    async with realtime:
        async with realtime.open_run("r", tags="x") as run:
            await realtime.append(1)
        clock.seconds += 59
        await realtime.engine.make_ticker().once()
        assert (await realtime.get_run(run)).is_completed
        clock.seconds += 2
        await realtime.engine.make_ticker().once()
        with pytest.raises(RunNotFound):
            await realtime.get_run(run)
        assert (await realtime.broker.changes("tag:x")).items == []


async def test_a_delayed_run_is_started_by_a_process_that_has_its_task() -> None:
    """A process without the task accepted it, could not start it, and its ticker ended."""
    clock = FakeClock()
    broker = MemoryBroker(clock=clock)
    knows, knows_not = (make_realtime(broker=broker, clock=clock) for _ in range(2))

    @knows.task("t")
    async def task() -> str:
        return "done"

    async with knows_not:
        async with knows:
            handle = await knows.trigger(task, delay=5)
        clock.seconds += 6
        for _ in range(3):
            await knows_not.engine.make_ticker().once()
        assert (await knows_not.get_run(handle)).status is Status.DELAYED
        async with knows:
            assert await handle.result(timeout=GUARD_S) == "done"
        assert knows_not.engine.supervisor is not None


async def test_runs_of_unknown_tasks_do_not_delay_others() -> None:
    """After a hundred delayed runs of another service, which was down, no delayed run of this one ever started."""
    clock = FakeClock()
    broker = MemoryBroker(clock=clock)
    ours, theirs = (make_realtime(broker=broker, clock=clock) for _ in range(2))

    @ours.task("ours")
    async def our_task() -> str:
        return "done"

    @theirs.task("theirs")
    async def their_task() -> None: ...

    async with theirs:
        waiting = [await theirs.trigger(their_task, delay=5) for _ in range(250)]
    async with ours:
        handles = [await ours.trigger(our_task, delay=6) for _ in range(150)]
        clock.seconds += 7
        await ours.engine.make_ticker().once()
        for handle in handles:
            assert await handle.result(timeout=GUARD_S) == "done"
        assert (await ours.get_run(waiting[0])).status is Status.DELAYED


async def test_one_of_several_processes_starts_a_delayed_run() -> None:
    clock = FakeClock()
    broker = DistantBroker(clock=clock)
    executions = 0

    def process() -> Realtime:
        realtime = make_realtime(broker=broker, clock=clock)

        @realtime.task("t")
        async def task() -> str:
            nonlocal executions
            executions += 1
            return "done"

        return realtime

    async with process() as one, process() as two, process() as three:
        for _ in range(5):
            handle = await one.trigger("t", delay=5)
            clock.seconds += 6
            async with anyio.create_task_group() as group:
                for realtime in (one, two, three):
                    group.start_soon(realtime.engine.make_ticker().once)
            assert await handle.result(timeout=GUARD_S) == "done"
    assert executions == 5


async def test_missed_topic_updates_are_repeated() -> None:
    class Forgetful(DistantBroker):
        forget = True

        async def publish(self, run_id: str) -> None:
            if not self.forget:
                await super().publish(run_id)

    clock = FakeClock()
    broker = Forgetful(clock=clock)
    async with make_realtime(broker=broker, clock=clock) as realtime, realtime.open_run("r", tags="x") as run:
        assert (await broker.changes("tag:x")).items == []
        broker.forget = False
        clock.seconds += 2
        found = realtime.subscribe_to_runs_with_tag("x")
        with anyio.fail_after(GUARD_S):
            assert (await anext(found)).id == run.id


class Away(MemoryBroker):
    """Fails the ticker's requests with `error`."""

    error: Exception | None = None
    requests = 0

    async def due(self, kind: str, *, limit: int = 100, skip: int = 0) -> list[str]:
        self.requests += 1
        if self.error is not None:
            raise self.error
        return await super().due(kind, limit=limit, skip=skip)


async def test_an_unavailable_broker_is_logged_once_and_retried(caplog: pytest.LogCaptureFixture) -> None:
    broker = Away()
    async with make_realtime(broker=broker) as realtime:
        for _ in range(2):
            broker.error = BrokerUnavailable("no answer")
            requests = broker.requests
            await until(lambda: broker.requests > requests + 3)  # noqa: B023
            broker.error = None
            requests = broker.requests
            await until(lambda: broker.requests > requests + 10)  # noqa: B023
        async with realtime.open_run("r"):
            pass
    assert [record.message for record in caplog.records] == ["the broker is unavailable: no answer"] * 2


async def test_the_ticker_survives_unexpected_errors(caplog: pytest.LogCaptureFixture) -> None:
    broker = Away()
    async with make_realtime(broker=broker) as realtime:
        broker.error = ZeroDivisionError()
        requests = broker.requests
        await until(lambda: broker.requests > requests + 3)
        broker.error = None
        async with realtime.open_run("r") as run:
            pass
        assert (await ended(realtime, run.id)).status is Status.COMPLETED
    assert "the ticker failed" in caplog.text


async def test_a_due_run_that_fails_does_not_delay_the_others(caplog: pytest.LogCaptureFixture) -> None:
    class Picky(MemoryBroker):
        picky = ""

        async def remove(self, run_id: str) -> None:
            if run_id == self.picky:
                raise ValueError("not this one")
            await super().remove(run_id)

    clock = FakeClock()
    broker = Picky(clock=clock, retention=Retention(after_end=60))
    async with make_realtime(broker=broker, clock=clock) as realtime:
        ids = []
        for _ in range(3):
            async with realtime.open_run("r") as run:
                ids.append(run.id)
        broker.picky = ids[0]
        clock.seconds += 61
        removed: list[bool] = []

        async def check(run_ids: Sequence[str]) -> None:
            removed.extend(record is None for record in await realtime.runs.load(run_ids))

        with anyio.fail_after(GUARD_S):
            while removed != [False, True, True]:
                removed.clear()
                await check(ids)
                await anyio.lowlevel.checkpoint()
    assert f"run {ids[0]} is due (expiry), and acting on it failed" in caplog.text


async def test_the_ticker_does_nothing_without_runs() -> None:
    realtime: Realtime = make_realtime()
    async with realtime:
        await realtime.engine.make_ticker().once()


class CountingRenewals(MemoryBroker):
    renewals = 0

    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        self.renewals += 1
        await super().renew(run_ids, owner=owner)


async def test_leases_are_renewed_three_times_per_lease_and_not_at_every_tick() -> None:
    clock = FakeClock()
    broker = CountingRenewals(clock=clock)
    realtime = make_realtime(broker=broker, clock=clock)
    async with realtime, realtime.open_run("r"):
        ticker = realtime.engine.make_ticker()
        before = broker.renewals
        for _ in range(5):
            await ticker.once()
        assert broker.renewals - before <= 2  # one by this ticker and one by the engine's own
        before = broker.renewals
        clock.seconds += realtime.timeouts.lease / 3
        await ticker.once()
        assert broker.renewals > before
        before = broker.renewals
        clock.seconds -= 3600  # the clock was set back
        await ticker.once()
        assert broker.renewals > before
