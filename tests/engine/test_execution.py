from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import anyio
import msgspec
import pytest

from asgi_realtime import Realtime, Run, RunCanceled, RunError, RunFailed, Status
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.run_changes import Finished, TagsAdded
from asgi_realtime.engine.execution import Phase
from tests.brokers.backends import DistantBroker
from tests.inprocess import GUARD_S, FakeClock, ended, make_realtime, until

pytestmark = pytest.mark.anyio


def two_processes() -> tuple[Realtime, Realtime, FakeClock]:
    clock = FakeClock()
    broker = MemoryBroker(clock=clock)
    return make_realtime(broker=broker, clock=clock), make_realtime(broker=broker, clock=clock), clock


async def test_a_cancellation_by_another_process_stops_the_task() -> None:
    """The code continued to its end, although the run was CANCELED after five seconds."""
    owner, other, _ = two_processes()
    started = anyio.Event()
    stopped: list[bool] = []

    @owner.task("t")
    async def task(run: Run) -> None:
        try:
            started.set()
            await anyio.sleep(60)
        finally:
            stopped.append(run.canceled)

    async with owner, other:
        handle = await owner.trigger(task)
        await started.wait()
        record = await other.cancel(handle.id)
        assert record.status is Status.EXECUTING
        assert (await ended(other, handle.id)).status is Status.CANCELED
        await until(lambda: stopped)
    assert stopped == [True]


async def test_a_cancellation_by_another_process_interrupts_an_open_run() -> None:
    owner, other, _ = two_processes()
    async with owner, other:
        with pytest.raises(RunCanceled):
            async with owner.open_run("r") as run:
                await other.cancel(run.id)
                await anyio.sleep(60)
        assert (await ended(other, run.id)).status is Status.CANCELED


async def test_any_process_cancels_a_run_after_5_s_if_its_owner_does_not() -> None:
    owner, other, clock = two_processes()
    refuses = anyio.Event()
    go = anyio.Event()

    @owner.task("t")
    async def task() -> str:
        with anyio.CancelScope(shield=True):
            refuses.set()
            await go.wait()
        return "too late"

    async with owner, other:
        handle = await owner.trigger(task)
        await refuses.wait()
        await owner.cancel(handle)
        clock.seconds += 4.9
        assert await other.broker.due("cancel") == []
        clock.seconds += 0.2
        record = await ended(other, handle.id)
        assert record.status is Status.CANCELED
        go.set()
        await until(lambda: not owner.engine.executions)
        assert await owner.runs.get(handle.id) == record


async def test_a_run_crashes_without_renewals_and_its_code_is_stopped() -> None:
    class Silent(MemoryBroker):
        async def renew(self, run_ids: Sequence[str], *, owner: str) -> None: ...

    clock = FakeClock()
    broker = Silent(clock=clock)
    owner, other = (make_realtime(broker=broker, clock=clock) for _ in range(2))
    async with owner, other:
        with pytest.raises(RunCanceled):
            async with owner.open_run("r") as run:
                await owner.append("kept")
                clock.seconds += 29
                assert await broker.due("lease") == []
                assert (await other.get_run(run.id)).status is Status.EXECUTING
                clock.seconds += 2
                await anyio.sleep(60)
        record = await ended(other, run.id)
        assert record.status is Status.CRASHED
        assert record.error == RunError("Crashed", "the process that executed the run died")
        with pytest.raises(RunFailed, match="the process that executed the run died"):
            [chunk async for chunk in other.read(run)]


async def test_a_live_owner_renews_its_lease() -> None:
    class Counting(MemoryBroker):
        renewals = 0

        async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
            await super().renew(run_ids, owner=owner)
            self.renewals += 1

    clock = FakeClock()
    broker = Counting(clock=clock)
    owner, other = (make_realtime(broker=broker, clock=clock) for _ in range(2))
    async with owner, other:
        async with owner.open_run("r") as run:
            for _ in range(5):
                before = broker.renewals
                clock.seconds += 20
                await until(lambda: broker.renewals > before)  # noqa: B023
            assert (await other.get_run(run.id)).status is Status.EXECUTING
        assert (await ended(owner, run.id)).status is Status.COMPLETED


async def test_code_is_stopped_if_another_process_ended_its_run() -> None:
    owner, other, _ = two_processes()
    started = anyio.Event()
    stopped = anyio.Event()

    @owner.task("t")
    async def task() -> None:
        try:
            started.set()
            await anyio.sleep(60)
        finally:
            stopped.set()

    async with owner, other:
        handle = await owner.trigger(task)
        await started.wait()
        await other.runs.update(handle.id, Finished(Status.CRASHED))
        with anyio.fail_after(GUARD_S):
            await stopped.wait()
        await until(lambda: not owner.engine.executions)
        assert (await owner.get_run(handle)).status is Status.CRASHED


async def test_a_run_that_ends_here_is_not_mistaken_for_one_that_another_process_ended() -> None:
    """A change at that moment made a completed run raise `RunCanceled`."""
    broker = DistantBroker()
    async with make_realtime(broker=broker) as realtime, make_realtime(broker=broker) as other:
        for number in range(40):
            async with anyio.create_task_group() as group:
                async with realtime.open_run("r") as run:
                    group.start_soon(other.runs.update, run.id, TagsAdded(("seen",)))  # at any moment
                    for _ in range(number):
                        await anyio.lowlevel.checkpoint()
            assert (await realtime.get_run(run)).status is Status.COMPLETED


async def test_cancelling_a_run_that_is_over_changes_nothing() -> None:
    async with make_realtime() as realtime:
        async with realtime.open_run("r") as run:
            pass
        before = await realtime.get_run(run)
        assert await realtime.cancel(run) == before
        assert await realtime.cancel(before) == before


async def test_a_run_waits_for_a_pipe_that_a_source_opens_at_its_end() -> None:
    """Its error was lost, and the run was COMPLETED."""
    realtime = make_realtime()

    async def failing() -> AsyncIterator[int]:
        yield 1
        await anyio.lowlevel.checkpoint()
        raise ValueError("inner")

    async def outer() -> AsyncIterator[int]:
        await anyio.lowlevel.checkpoint()
        yield 1
        realtime.pipe(failing(), "inner")

    @realtime.task("t")
    async def task() -> None:
        realtime.pipe(outer(), "outer")

    async with realtime:
        handle = await realtime.trigger(task)
        record = await ended(realtime, handle.id)
    assert (record.status, record.error) == (Status.FAILED, RunError("ValueError", "task failed"))


async def test_a_run_that_another_process_executes_after_a_data_loss_is_not_ended_here() -> None:
    """The result was stored over the record of the new owner, because both records had the same version."""

    class Shared(MemoryBroker):
        shared = True

    broker = Shared()
    async with make_realtime(broker=broker) as realtime:
        async with realtime.open_run("r") as run:
            stored = broker._runs[run.id]
            stored.record = msgspec.structs.replace(stored.record, owner="another process")
        assert (await realtime.get_run(run)).status is Status.EXECUTING


async def test_an_execution_moves_through_its_phases() -> None:
    async with make_realtime() as realtime:
        with pytest.raises(RunCanceled):
            async with realtime.open_run("r") as run:
                execution = realtime.engine.executions[run.id]
                phases = [execution.phase]
                await realtime.cancel(run)
                phases.append(execution.phase)
                await anyio.sleep(60)
        phases.append(execution.phase)
        assert phases == [Phase.RUNNING, Phase.STOPPING, Phase.ENDED]


async def test_a_run_that_has_ended_cannot_be_stopped() -> None:
    async with make_realtime() as realtime:
        async with realtime.open_run("r") as run:
            execution = realtime.engine.executions[run.id]
        execution.cancel()
        execution.shut_down()
        assert (execution.phase, execution.stopped_by) == (Phase.ENDED, None)
        assert (await realtime.get_run(run)).status is Status.COMPLETED


async def test_ending_a_run_again_keeps_its_result() -> None:
    async with make_realtime() as realtime:
        async with realtime.open_run("r") as run:
            execution = realtime.engine.executions[run.id]
        assert (await execution.finish_failed(ValueError("late"))).status is Status.COMPLETED
        assert execution.phase is Phase.ENDED
