from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from asgi_realtime import RunHandle
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.runs import StoredRecord
from tests.brokers.backends import DistantBroker
from tests.inprocess import GUARD_S, FakeClock, ended, make_realtime, until
from tests.tasks.echo import SlowExecutor, count_runs, with_echo

pytestmark = pytest.mark.anyio


async def test_the_same_idempotency_key_returns_the_same_run() -> None:
    async with with_echo() as realtime:
        first = await realtime.trigger("echo", 1, idempotency_key="key")
        again = await realtime.trigger("echo", 2, idempotency_key="key")
        other = await realtime.trigger("echo", 3, idempotency_key="other")
        assert (first.is_cached, again.is_cached, other.is_cached) == (False, True, False)
        assert again["isCached"] is True
        assert again.id == first.id != other.id
        assert await again.result(timeout=GUARD_S) == 1
        assert (await realtime.get_run(first)).idempotency_key == "key"


async def test_a_key_creates_a_new_run_after_its_run_expired() -> None:
    """The new run reused the id of the expired one, so old tokens and cursors applied to it."""
    async with with_echo() as realtime:
        first = await realtime.trigger("echo", 1, idempotency_key="key")
        await first.result(timeout=GUARD_S)
        await realtime.broker.remove(first.id)
        second = await realtime.trigger("echo", 2, idempotency_key="key")
        assert second.id != first.id and not second.is_cached
        assert await second.result(timeout=GUARD_S) == 2
        assert (await realtime.trigger("echo", 3, idempotency_key="key")).id == second.id


async def test_a_run_that_is_removed_during_the_lookup_of_its_key_is_not_created_again() -> None:
    class RemovesBeforeLoad(MemoryBroker):
        victim = ""

        async def load(self, run_ids: Sequence[str]) -> list[StoredRecord | None]:
            await self.remove(self.victim)
            return await super().load(run_ids)

    broker = RemovesBeforeLoad()
    async with with_echo(broker=broker) as realtime:
        first = await realtime.trigger("echo", 1, idempotency_key="key")
        await first.result(timeout=GUARD_S)
        broker.victim = first.id
        second = await realtime.trigger("echo", 2, idempotency_key="key")
        assert second.id != first.id and not second.is_cached


async def test_idempotency_keys_belong_to_a_task_and_last_a_day() -> None:
    clock = FakeClock()
    realtime = with_echo(clock=clock)

    @realtime.task("other")
    async def other() -> None: ...

    async with realtime:
        first = await realtime.trigger("echo", idempotency_key="key")
        assert (await realtime.trigger(other, idempotency_key="key")).id != first.id
        clock.seconds += 24 * 3600 + 1
        assert (await realtime.trigger("echo", idempotency_key="key")).id != first.id


async def test_the_lifetime_of_a_key_can_be_set() -> None:
    clock = FakeClock()
    async with with_echo(clock=clock) as realtime:
        first = await realtime.trigger("echo", idempotency_key="key", idempotency_key_ttl="1m")
        clock.seconds += 59
        assert (await realtime.trigger("echo", idempotency_key="key")).id == first.id
        clock.seconds += 2
        second = await realtime.trigger("echo", idempotency_key="key", idempotency_key_ttl="2d")
        assert second.id != first.id
        clock.seconds += 2 * 86400 - 1
        assert (await realtime.trigger("echo", idempotency_key="key")).id == second.id


@pytest.mark.parametrize("make_broker", [MemoryBroker, DistantBroker])
async def test_concurrent_triggers_with_one_key_create_one_run(make_broker: type[MemoryBroker]) -> None:
    executions = 0
    realtime = make_realtime(broker=make_broker())

    @realtime.task("t")
    async def task() -> None:
        nonlocal executions
        executions += 1

    handles: list[RunHandle[None]] = []

    async def trigger() -> None:
        handles.append(await realtime.trigger(task, idempotency_key="key", tags="x"))

    async with realtime:
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(trigger)
        assert len({handle.id for handle in handles}) == 1
        assert sorted(handle.is_cached for handle in handles) == [False, True, True, True, True]
        await ended(realtime, handles[0])
        assert await count_runs(realtime, "tag:x") == 1
    assert executions == 1


async def test_a_claim_without_a_run_gets_its_run_under_the_same_id() -> None:
    """A process that died between the two steps left a key without a run."""
    async with with_echo() as realtime:
        await realtime.broker.claim("idempotency:echo/key", "run_of_a_dead_process", ttl_s=60)
        handle = await realtime.trigger("echo", "filled", idempotency_key="key")
        assert handle.id == "run_of_a_dead_process"
        assert not handle.is_cached
        assert await handle.result(timeout=GUARD_S) == "filled"
        assert (await realtime.get_run(handle)).root_id == "run_of_a_dead_process"
        async with realtime.open_run("parent") as parent:
            await realtime.broker.claim("idempotency:echo/child", "run_of_a_dead_process_child", ttl_s=60)
            child = await realtime.get_run(await realtime.trigger("echo", idempotency_key="child"))
            assert (child.parent_id, child.root_id) == (parent.id, parent.id)


async def test_a_canceled_trigger_still_dispatches_its_run() -> None:
    """The client disconnected between storing and dispatching, so the run and its key were stuck in QUEUED."""
    broker = DistantBroker()
    executor = SlowExecutor()
    async with with_echo(executor=executor, broker=broker) as realtime:

        async def trigger() -> None:
            await realtime.trigger("echo", 1)

        async with anyio.create_task_group() as group:
            group.start_soon(trigger)
            await until(lambda: broker._runs)
            group.cancel_scope.cancel()
        executor.go.set()
        await until(lambda: executor.accepted)
        assert executor.accepted == list(broker._runs)
