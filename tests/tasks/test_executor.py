from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest

from asgi_realtime import Run, RunError, Status
from asgi_realtime.tasks import InProcessExecutor
from tests.inprocess import FakeClock, ended, make_realtime, until

pytestmark = pytest.mark.anyio


async def test_no_more_runs_of_a_task_than_its_limit_run_at_once_and_they_begin_in_order() -> None:
    realtime = make_realtime()
    begun: list[int] = []
    go = anyio.Event()
    at_once = most = 0

    @realtime.task("t", concurrency_limit=2)
    async def task(payload: int) -> None:
        nonlocal at_once, most
        begun.append(payload)
        at_once += 1
        most = max(most, at_once)
        await go.wait()
        at_once -= 1

    @realtime.task("other")
    async def other() -> str:
        return "beside"

    async with realtime:
        handles = [await realtime.trigger(task, number) for number in range(6)]
        await until(lambda: len(begun) == 2)
        assert await (await realtime.trigger(other)).result(timeout=5) == "beside"
        states = [(await realtime.get_run(handle)).status for handle in handles]
        assert states == [Status.EXECUTING] * 2 + [Status.QUEUED] * 4
        go.set()
        for handle in handles:
            await ended(realtime, handle)
    assert sorted(begun[:2]) == [0, 1]  # two that begin together have no order on trio
    assert sorted(begun) == list(range(6))
    assert most == 2


async def test_with_a_limit_of_one_runs_are_executed_in_the_order_of_arrival() -> None:
    realtime = make_realtime()
    begun: list[int] = []

    @realtime.task("t", concurrency_limit=1)
    async def task(payload: int) -> None:
        begun.append(payload)
        await anyio.lowlevel.checkpoint()

    async with realtime:
        handles = [await realtime.trigger(task, number) for number in range(10)]
        for handle in handles:
            await ended(realtime, handle)
    assert begun == list(range(10))


async def test_a_waiting_run_that_is_canceled_never_begins_and_gives_up_its_place() -> None:
    realtime = make_realtime()
    begun: list[str] = []
    go = anyio.Event()

    @realtime.task("t", concurrency_limit=1)
    async def task(payload: str) -> None:
        begun.append(payload)
        await go.wait()

    async with realtime:
        first, second, third = [await realtime.trigger(task, name) for name in ("a", "b", "c")]
        await until(lambda: begun)
        canceled = await realtime.cancel(second)
        assert canceled.status is Status.CANCELED
        assert canceled.completed_at_ms is not None
        go.set()
        assert (await ended(realtime, third)).status is Status.COMPLETED
        assert (await ended(realtime, first)).status is Status.COMPLETED
        assert (await realtime.get_run(second)) == canceled
    assert begun == ["a", "c"]


async def test_a_queue_adapter_gets_ids_and_calls_execute() -> None:
    class Queue:
        def __init__(self) -> None:
            self.sent: list[tuple[str, str]] = []

        async def enqueue(self, run_id: str, task_id: str) -> None:
            self.sent.append((run_id, task_id))

    queue = Queue()
    realtime = make_realtime(executor=queue)

    @realtime.task("t")
    async def task(payload: int, run: Run) -> int:
        return payload + 1

    async with realtime:
        handle = await realtime.trigger(task, 1)
        assert queue.sent == [(handle.id, "t")]
        await realtime.execute(handle.id)
        assert await handle.result(timeout=5) == 2


class Refusing:
    """A queue that is away."""

    def __init__(self) -> None:
        self.calls = 0

    async def enqueue(self, run_id: str, task_id: str) -> None:
        self.calls += 1
        raise ConnectionError("the queue is away")


async def test_a_run_that_the_executor_refuses_is_failed_and_the_error_is_raised() -> None:
    """It stayed QUEUED for ever."""
    realtime = make_realtime(executor=Refusing())

    @realtime.task("t")
    async def task() -> None: ...

    async with realtime:
        with pytest.raises(ConnectionError):
            await realtime.trigger(task, tags="x")
        (change,) = (await realtime.broker.changes("tag:x")).items
        record = await realtime.get_run(change.run_id)
    assert record.status is Status.FAILED
    assert record.error == RunError("NotQueued", "the executor did not take the run")


async def test_an_executor_that_fails_does_not_end_the_ticker() -> None:
    """Whatever was due after that never happened: no leases, no expiry, no heartbeats."""
    clock = FakeClock()
    refusing = Refusing()
    realtime = make_realtime(executor=refusing, clock=clock)

    @realtime.task("t")
    async def task() -> None: ...

    async with realtime:
        delayed = await realtime.trigger(task, delay=5)
        clock.seconds += 6
        assert (await ended(realtime, delayed)).status is Status.FAILED
        expiring = await realtime.trigger(task, delay=5, ttl=1)
        clock.seconds += 20
        await ended(realtime, expiring)
    assert refusing.calls >= 1


async def test_a_run_whose_process_restarts_on_a_dead_loop_leaves_its_place() -> None:
    spawned: list[Callable[[], Awaitable[None]]] = []
    begun: list[str] = []

    async def execute(run_id: str) -> None:
        begun.append(run_id)

    executor = InProcessExecutor(
        execute,
        spawn=spawned.append,
        concurrency_limit={"t": 1}.get,
        on_end=lambda: None,
    )
    await executor.enqueue("run_1", "t")
    await executor.enqueue("run_2", "t")
    (lost,) = spawned
    assert executor.running == ["run_1"]
    executor.restart()
    assert executor.running == ["run_2"]
    await lost()  # ends late, and takes nobody's place
    assert executor.running == ["run_2"]
    await spawned[1]()
    assert executor.running == []
    assert begun == ["run_1", "run_2"]
    assert executor.knows("t") and not executor.knows("other")
