from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import anyio
import msgspec
import pytest

from asgi_realtime import LimitExceeded, Realtime, Run, RunError, Status, Timeouts, UnknownTask
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.tasks import ExecutorHost, InProcessExecutor, Task
from tests.brokers.backends import DistantBroker
from tests.faults import RemoteBroker
from tests.inprocess import GUARD_S, FakeClock, ended, make_realtime, until

pytestmark = pytest.mark.anyio


class Queue:
    """Accepts ids without executing the runs."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.away = False

    async def enqueue(self, run_id: str, task_id: str) -> None:
        if self.away:
            raise ConnectionError("the queue is away")
        self.sent.append((run_id, task_id))


def make_record(realtime: Realtime) -> StoredRecord:
    """A run of the task "t" as `trigger` stores it, before it is dispatched."""
    return msgspec.structs.replace(
        realtime.tasks.records.new_open_run("t", {}).record,
        status=Status.QUEUED,
        owner=None,
        started_at_ms=None,
        payload_json=b"null",
    )


async def test_the_concurrency_limit_holds_and_runs_start_in_order() -> None:
    realtime = make_realtime()
    started: list[int] = []
    go = anyio.Event()
    at_once = most = 0

    @realtime.task("t", concurrency_limit=2)
    async def task(payload: int) -> None:
        nonlocal at_once, most
        started.append(payload)
        at_once += 1
        most = max(most, at_once)
        await go.wait()
        at_once -= 1

    @realtime.task("other")
    async def other() -> str:
        return "beside"

    async with realtime:
        handles = [await realtime.trigger(task, number) for number in range(6)]
        await until(lambda: len(started) == 2)
        assert await (await realtime.trigger(other)).result(timeout=GUARD_S) == "beside"
        states = [(await realtime.get_run(handle)).status for handle in handles]
        assert states == [Status.EXECUTING] * 2 + [Status.QUEUED] * 4
        go.set()
        for handle in handles:
            await ended(realtime, handle)
    assert sorted(started[:2]) == [0, 1]  # two that start together have no order on trio
    assert sorted(started) == list(range(6))
    assert most == 2


async def test_with_a_limit_of_one_runs_execute_in_the_order_of_arrival() -> None:
    realtime = make_realtime()
    started: list[int] = []

    @realtime.task("t", concurrency_limit=1)
    async def task(payload: int) -> None:
        started.append(payload)
        await anyio.lowlevel.checkpoint()

    async with realtime:
        handles = [await realtime.trigger(task, number) for number in range(10)]
        for handle in handles:
            await ended(realtime, handle)
    assert started == list(range(10))


async def test_waiting_runs_of_a_task_start_in_turn_one_of_each_owner() -> None:
    spawned: list[Callable[[], Awaitable[None]]] = []
    started: list[str] = []

    async def execute(run_id: str) -> None:
        started.append(run_id)

    tasks: dict[str, Task[..., None]] = {"t": Task("t", execute, max_duration_s=None, concurrency_limit=1)}
    executor = InProcessExecutor(execute, tasks, spawn=spawned.append, on_end=lambda: None)
    for number in range(99):
        await executor.enqueue(f"a{number}", "t", owner="a")
    await executor.enqueue("b0", "t", owner="b")
    for run_id in ("host0", "host1"):
        await executor.enqueue(run_id, "t")
    await executor.enqueue("b1", "t", owner="b")
    assert len(executor.waiting) == 102
    for job in spawned:  # grows: each run that ends starts the next
        await job()
    assert started[:8] == ["a0", "a1", "b0", "host0", "a2", "b1", "host1", "a3"]
    assert started[8:] == [f"a{number}" for number in range(4, 99)]
    assert executor.waiting == executor.held == []


async def test_a_waiting_run_that_is_canceled_never_starts() -> None:
    realtime = make_realtime()
    started: list[str] = []
    go = anyio.Event()

    @realtime.task("t", concurrency_limit=1)
    async def task(payload: str) -> None:
        started.append(payload)
        await go.wait()

    async with realtime:
        first, second, third = [await realtime.trigger(task, name) for name in ("a", "b", "c")]
        await until(lambda: started)
        canceled = await realtime.cancel(second)
        assert canceled.status is Status.CANCELED
        assert canceled.finished_at is not None
        go.set()
        assert (await ended(realtime, third)).status is Status.COMPLETED
        assert (await ended(realtime, first)).status is Status.COMPLETED
        assert (await realtime.get_run(second)) == canceled
    assert started == ["a", "c"]


async def test_a_queue_adapter_receives_ids_and_calls_execute() -> None:
    queue = Queue()
    realtime = make_realtime(executor=queue)

    @realtime.task("t")
    async def task(payload: int, run: Run) -> int:
        return payload + 1

    async with realtime:
        handle = await realtime.trigger(task, 1)
        assert queue.sent == [(handle.id, "t")]
        await realtime.execute(handle.id)
        assert await handle.result(timeout=GUARD_S) == 2


class Refusing:
    """A queue that is unavailable."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self.error = error or ConnectionError("the queue is away")

    async def enqueue(self, run_id: str, task_id: str) -> None:
        self.calls += 1
        raise self.error


@pytest.mark.parametrize("error", [ConnectionError("the queue is away"), LimitExceeded("the queue is full")])
async def test_a_run_waits_for_an_executor_that_does_not_accept_it_now(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """The run failed, and a retry with the same idempotency key returned the failed run."""
    clock = FakeClock()
    broker, queue = MemoryBroker(clock=clock), Queue()
    refusing, taking = (make_realtime(broker=broker, executor=e, clock=clock) for e in (Refusing(error), queue))
    for realtime in (refusing, taking):
        realtime.task("t")(lambda: None)
    async with refusing:
        handle = await refusing.trigger("t", idempotency_key="k")
        again = await refusing.trigger("t", idempotency_key="k")
        assert (again.id, again.is_cached) == (handle.id, True)
        other = await refusing.trigger("t")
        assert (await refusing.get_run(handle)).status is Status.QUEUED
        await refusing.engine.make_ticker().once()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["the executor does not accept runs; the ticker retries"], "once, and not for each run"
    async with taking:
        clock.seconds += taking.timeouts.lease + 0.1
        await until(lambda: len(queue.sent) == 2)
        assert sorted(queue.sent) == sorted([(handle.id, "t"), (other.id, "t")])


@pytest.mark.parametrize("delay", [None, 5])
async def test_a_run_that_the_executor_never_accepts_fails_and_the_error_is_raised(delay: float | None) -> None:
    clock = FakeClock()
    realtime = make_realtime(executor=Refusing(UnknownTask("no queue has the task")), clock=clock)

    @realtime.task("t")
    async def task() -> None: ...

    async with realtime:
        if delay is None:
            with pytest.raises(UnknownTask, match="no queue has the task"):
                await realtime.trigger(task, tags="x")
        else:
            await realtime.trigger(task, tags="x", delay=delay)
            clock.seconds += delay + 1
        (change,) = (await realtime.broker.changes("tag:x")).items
        record = await ended(realtime, change.run_id)
    assert record.status is Status.FAILED
    assert record.error == RunError("NotQueued", "the executor does not accept the run")


async def test_an_executor_that_fails_does_not_end_the_ticker(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that was due afterwards happened: no leases, no expiry, no heartbeats."""
    clock = FakeClock()
    refusing = Refusing()
    realtime = make_realtime(executor=refusing, clock=clock)

    @realtime.task("t")
    async def task() -> None: ...

    async with realtime:
        delayed = await realtime.trigger(task, delay=5)
        clock.seconds += 6
        await until(lambda: refusing.calls)
        expiring = await realtime.trigger(task, delay=5, ttl=1)
        clock.seconds += 20
        await ended(realtime, expiring)
        assert (await realtime.get_run(delayed)).status is Status.QUEUED
    assert [record.message for record in caplog.records if record.exc_info] == [
        "the executor does not accept runs; the ticker retries"
    ]


async def test_refused_runs_are_dispatched_again_once_the_executor_accepts_runs() -> None:
    """One refusal by a restarting queue failed every delayed run."""
    clock = FakeClock()
    queue = Queue()
    queue.away = True
    realtime = make_realtime(executor=queue, clock=clock)

    @realtime.task("t")
    async def task() -> None: ...

    async with realtime:
        handles = [await realtime.trigger(task, delay=5) for _ in range(3)]
        clock.seconds += 6
        ticker = realtime.engine.make_ticker()
        for _ in range(3):
            await ticker.once()
        assert queue.sent == []
        queue.away = False
        clock.seconds += realtime.timeouts.lease
        for _ in range(3):
            await ticker.once()
        assert sorted(queue.sent) == sorted((handle.id, "t") for handle in handles)
        clock.seconds += 3 * realtime.timeouts.lease
        await ticker.once()
        assert len(queue.sent) == 3  # the queue has them now


class Silent(Queue):
    """A queue that does not respond."""

    async def enqueue(self, run_id: str, task_id: str) -> None:
        if self.away:
            await anyio.sleep_forever()
        await super().enqueue(run_id, task_id)


async def test_enqueuing_into_an_unresponsive_queue_times_out() -> None:
    queue = Silent()
    queue.away = True
    realtime = make_realtime(executor=queue, timeouts=Timeouts(append=0.01))

    @realtime.task("t")
    async def task() -> None: ...

    async with realtime:
        handle = await realtime.trigger(task)
        assert (await realtime.get_run(handle)).status is Status.QUEUED


async def test_an_unresponsive_queue_does_not_block_the_ticker() -> None:
    clock = FakeClock()
    queue = Silent()
    realtime = make_realtime(executor=queue, clock=clock)

    @realtime.task("t")
    async def task() -> None: ...

    async with realtime:
        delayed = await realtime.trigger(task, delay=5)
        expiring = await realtime.trigger(task, ttl=10)
        queue.away = True
        clock.seconds += 6
        with anyio.fail_after(GUARD_S):
            async for record in realtime.subscribe_to_run(delayed):
                if record.status is Status.QUEUED:
                    break
        clock.seconds += 6
        assert (await ended(realtime, expiring)).status is Status.EXPIRED


async def test_another_process_dispatches_a_run_if_its_process_died_before() -> None:
    """The run stayed QUEUED forever."""
    clock = FakeClock()
    broker, queue = MemoryBroker(clock=clock), Queue()
    dead, alive = (make_realtime(broker=broker, executor=queue, clock=clock) for _ in range(2))
    async with alive:
        record = make_record(dead)
        await dead.runs.create(record)  # then it dies
        await alive.engine.make_ticker().once()
        assert queue.sent == []
        clock.seconds += alive.timeouts.lease + 0.1
        await alive.engine.make_ticker().once()
        assert queue.sent == [(record.id, "t")]


async def test_only_one_process_enqueues_a_run_that_is_due() -> None:
    clock = FakeClock()
    broker, queue = MemoryBroker(clock=clock), Queue()
    processes = [make_realtime(broker=broker, executor=queue, clock=clock) for _ in range(5)]
    async with AsyncExitStack() as stack:
        for realtime in processes:
            await stack.enter_async_context(realtime)
        record = make_record(processes[0])
        await processes[0].runs.create(record)
        clock.seconds += realtime.timeouts.lease + 0.1
        for realtime in processes:
            await realtime.engine.make_ticker().once()
        assert queue.sent == [(record.id, "t")]


async def test_a_broker_that_fails_after_enqueuing_does_not_fail_the_trigger() -> None:
    clock = FakeClock()
    broker, queue = RemoteBroker(MemoryBroker(clock=clock)), Queue()
    realtime = make_realtime(broker=broker, executor=queue, clock=clock)

    @realtime.task("t")
    async def task() -> None: ...

    async with realtime:
        broker.away = {"enqueued"}
        handle = await realtime.trigger(task)
        assert queue.sent == [(handle.id, "t")]
        broker.away = set()
        clock.seconds += realtime.timeouts.lease + 0.1
        await until(lambda: len(queue.sent) == 2)  # once more, which is harmless
        clock.seconds += realtime.timeouts.lease + 0.1
        await realtime.engine.make_ticker().once()
        assert len(queue.sent) == 2


async def test_a_run_that_waits_in_a_live_process_stays_there() -> None:
    clock = FakeClock()
    broker = MemoryBroker(clock=clock)
    go = anyio.Event()
    started: list[str] = []

    def process(name: str) -> Realtime:
        realtime = make_realtime(broker=broker, clock=clock)

        @realtime.task("t", concurrency_limit=1)
        async def task(run: Run) -> str:
            started.append(run.id)
            await go.wait()
            return name

        return realtime

    one, two = process("one"), process("two")
    async with one, two:
        handles = [await one.trigger("t") for _ in range(3)]
        assert one.engine.held == [handle.id for handle in handles]
        for _ in range(6):
            clock.seconds += one.timeouts.lease / 2
            await one.engine.make_ticker().once()
            await two.engine.make_ticker().once()
        assert two.engine.held == []
        assert started == [handles[0].id]
        go.set()
        assert [await handle.result(timeout=GUARD_S) for handle in handles] == ["one"] * 3
        assert one.engine.held == []


async def test_a_run_that_is_dispatched_twice_executes_once() -> None:
    clock = FakeClock()
    broker = DistantBroker(clock=clock)
    executions: list[str] = []

    def process() -> Realtime:
        realtime = make_realtime(broker=broker, clock=clock)

        @realtime.task("t")
        async def task(run: Run) -> str:
            executions.append(run.id)
            return "done"

        return realtime

    async with process() as one, process() as two:
        records = [make_record(one) for _ in range(5)]
        for record in records:
            await one.runs.create(record)
        clock.seconds += one.timeouts.lease + 0.1
        async with anyio.create_task_group() as group:
            for realtime in (one, two, one):
                group.start_soon(realtime.engine.make_ticker().once)
        for record in records:
            assert await one.result(record.id, timeout=GUARD_S) == "done"
    assert sorted(executions) == sorted(record.id for record in records)


async def test_a_run_of_an_unknown_task_is_left_to_processes_that_know_it() -> None:
    clock = FakeClock()
    broker = MemoryBroker(clock=clock)
    knows, knows_not = (make_realtime(broker=broker, clock=clock) for _ in range(2))

    @knows.task("t")
    async def task() -> str:
        return "done"

    record = make_record(knows)
    async with knows_not:
        await knows_not.runs.create(record)
        clock.seconds += knows.timeouts.lease + 0.1
        await knows_not.engine.make_ticker().once()
        assert knows_not.engine.held == []
        async with knows:
            assert await knows.result(record.id, timeout=GUARD_S) == "done"


async def test_a_worker_that_does_not_know_the_task_fails_the_run() -> None:
    """The queue has removed the run, so no other worker would start it."""
    broker = MemoryBroker()
    web, worker = (make_realtime(broker=broker, executor=Queue()) for _ in range(2))

    @web.task("t")
    async def task() -> None: ...

    async with web, worker:
        handle = await web.trigger(task)
        with pytest.raises(UnknownTask):
            await worker.execute(handle.id)
        record = await web.get_run(handle)
    assert record.status is Status.FAILED
    assert record.error == RunError("UnknownTask", "the worker does not know the task")


class Attached(Queue):
    """An executor that starts and stops with its `Realtime`."""

    def __init__(self) -> None:
        super().__init__()
        self.host: ExecutorHost | None = None
        self.calls: list[str] = []
        self.failure: Exception | None = None

    def attach(self, host: ExecutorHost) -> None:
        self.host = host

    async def start(self) -> None:
        self.calls.append("start")
        if self.failure is not None:
            raise self.failure

    async def stop(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.calls.append("stop")
        if self.failure is not None:
            raise self.failure


async def test_an_attached_executor_starts_and_stops_with_its_realtime() -> None:
    executor = Attached()
    realtime = make_realtime(executor=executor)

    @realtime.task("t")
    async def task() -> str:
        return "done"

    host = executor.host
    assert host is not None
    for times in (1, 2):
        await host.start()
        handle = await realtime.trigger(task)
        await host.execute(handle.id)
        assert await handle.result(timeout=GUARD_S) == "done"
        assert executor.calls == ["start", "stop"] * (times - 1) + ["start"]
        await host.stop()
        assert executor.calls == ["start", "stop"] * times
    assert realtime.engine.supervisor is None


async def test_an_executor_that_cannot_start_prevents_the_start() -> None:
    executor = Attached()
    executor.failure = ConnectionError("no queue there")
    realtime = make_realtime(executor=executor)
    with pytest.raises(ConnectionError):
        await realtime.start()
    executor.failure = None
    async with realtime:
        executor.failure = ConnectionError("lost")
    assert executor.calls == ["start", "start", "stop"]


async def test_a_restart_on_another_loop_frees_the_slots_of_lost_runs() -> None:
    spawned: list[Callable[[], Awaitable[None]]] = []
    started: list[str] = []

    async def execute(run_id: str) -> None:
        started.append(run_id)

    tasks: dict[str, Task[..., None]] = {"t": Task("t", execute, max_duration_s=None, concurrency_limit=1)}
    executor = InProcessExecutor(execute, tasks, spawn=spawned.append, on_end=lambda: None)
    await executor.enqueue("run_1", "t")
    await executor.enqueue("run_2", "t")
    (lost,) = spawned
    assert executor.running == ["run_1"]
    executor.restart()
    assert executor.running == ["run_2"]
    await lost()  # ends late, and frees no slot
    assert executor.running == ["run_2"]
    await spawned[1]()
    assert executor.running == []
    assert started == ["run_1", "run_2"]
    assert executor.knows("t") and not executor.knows("other")
