"""The adapter with taskiq's in-memory broker, which is client and worker in one. `tests/e2e` uses real workers."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import anyio
import pytest
from taskiq import InMemoryBroker, TaskiqEvents, TaskiqState
from taskiq.message import BrokerMessage

import asgi_realtime.tasks.taskiq as adapter
from asgi_realtime import BrokerUnavailable, Realtime, Run, RunNotFound, Status, UnknownTask, current_run
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.tasks.taskiq import TaskiqExecutor
from tests.inprocess import GUARD_S, ended, make_realtime, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # taskiq supports no other


class Queue(InMemoryBroker):
    """Records the tasks sent, and each startup and shutdown."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[BrokerMessage] = []
        self.ups: list[str] = []
        self.deliver = True
        self.add_event_handler(TaskiqEvents.CLIENT_STARTUP, lambda state: self.ups.append("up"))
        self.add_event_handler(TaskiqEvents.CLIENT_SHUTDOWN, lambda state: self.ups.append("down"))

    async def kick(self, message: BrokerMessage) -> None:
        self.sent.append(message)
        if self.deliver:
            await super().kick(message)

    async def deliver_again(self) -> None:
        for message in list(self.sent):
            await super().kick(message)
        await self.wait_all()


def make(queue: Queue, **options: Any) -> Realtime:
    return make_realtime(executor=TaskiqExecutor(queue), **options)


async def test_a_worker_executes_a_run_and_the_queue_carries_its_id() -> None:
    queue = Queue()
    realtime = make(queue)

    @realtime.task("t")
    async def task(payload: int, run: Run) -> int:
        assert current_run() is run
        await realtime.append(payload)
        return payload + 1

    async with realtime:
        handle = await realtime.trigger(task, 1)
        assert await handle.result(timeout=GUARD_S) == 2
        assert [chunk async for chunk in realtime.read(handle)] == [1]
    (message,) = queue.sent
    taskiq_message = queue.formatter.loads(message.message)
    assert taskiq_message.args == [handle.id] and taskiq_message.kwargs == {} and taskiq_message.labels == {}
    assert queue.ups == ["up", "down"]


async def test_a_run_that_is_delivered_twice_executes_once() -> None:
    queue = Queue()
    realtime = make(queue)
    executions: list[str] = []

    @realtime.task("t")
    async def task(run: Run) -> None:
        executions.append(run.id)

    async with realtime:
        handle = await realtime.trigger(task)
        await queue.deliver_again()
        await ended(realtime, handle)
        await queue.deliver_again()
    assert executions == [handle.id]


async def test_a_taskiq_broker_that_the_host_starts_is_left_to_the_host() -> None:
    queue = Queue()
    realtime = make(queue)
    for handler in list(queue.event_handlers[TaskiqEvents.WORKER_STARTUP]):
        queue.event_handlers[TaskiqEvents.WORKER_STARTUP].remove(handler)  # this process is only a client
    await queue.startup()
    async with realtime:
        pass
    assert queue.ups == ["up"]
    await queue.shutdown()
    async with realtime:
        assert queue.ups == ["up", "down", "up"]
    assert queue.ups == ["up", "down", "up", "down"]


async def test_a_queue_that_is_unavailable_at_the_start_is_started_by_a_later_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The web process did not start, although it could have served streams."""

    class Away(Queue):
        failures: list[Exception] = [ConnectionError("no server"), TimeoutError()]

        async def startup(self) -> None:
            await super().startup()  # the last step fails
            if self.failures:
                raise self.failures.pop(0)

    queue = Away()
    realtime = make(queue)

    @realtime.task("t")
    async def task() -> str:
        return "done"

    async with realtime:
        async with realtime.open_run("r") as run:
            pass
        assert (await realtime.get_run(run)).status is Status.COMPLETED
        handle = await realtime.trigger(task)
        assert (await realtime.get_run(handle)).status is Status.QUEUED  # enqueued again after a lease
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(realtime.trigger, task)
        await queue.wait_all()
    assert queue.ups == ["up"] * 3 + ["down"]
    assert [record.message for record in caplog.records] == [
        "the taskiq broker cannot be started yet: no server",
        "the executor does not accept runs; the ticker retries",
    ]


async def test_the_realtime_starts_and_stops_with_its_worker() -> None:
    queue = Queue()
    queue.is_worker_process = True
    realtime = make(queue)
    started = anyio.Event()

    @realtime.task("t")
    async def task() -> None:
        started.set()
        await anyio.sleep(60)

    for handler in queue.event_handlers[TaskiqEvents.WORKER_STARTUP]:
        await handler(TaskiqState())  # type: ignore[misc]
    assert realtime.engine.running
    assert queue.ups == []
    handle = await realtime.trigger(task)
    await started.wait()
    for handler in queue.event_handlers[TaskiqEvents.WORKER_SHUTDOWN]:
        await handler(TaskiqState())  # type: ignore[misc]
    assert realtime.engine.supervisor is None
    (record,) = await realtime.broker.load([handle.id])
    assert record is not None and record.error is not None
    assert (record.status, record.error.name) == (Status.FAILED, "ServerShutdown")
    await queue.wait_all()
    assert queue.ups == []


class Host:
    """A `Realtime` that cannot execute."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.asked: list[str] = []

    async def execute(self, run_id: str) -> None:
        self.asked.append(run_id)
        if self.errors:
            raise self.errors.pop(0)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


def attached(host: Host) -> tuple[Queue, TaskiqExecutor]:
    queue = Queue()
    executor = TaskiqExecutor(queue)
    executor.attach(host)
    return queue, executor


@pytest.mark.parametrize("error", [RunNotFound("no such run"), UnknownTask("no such task")])
async def test_a_run_that_cannot_be_executed_is_not_retried(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    host = Host(error)
    queue, executor = attached(host)
    await executor.enqueue("run_1", "t")
    await queue.wait_all()
    assert host.asked == ["run_1"]
    assert f"run run_1 from the queue cannot be executed: {error}" in caplog.text
    assert not queue.result_backend.results["run_1"].is_err


async def test_a_worker_waits_for_an_unavailable_broker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The queue delivers a run once, so the run stayed QUEUED."""
    monkeypatch.setattr(adapter, "_PAUSE_S", 0.001)
    host = Host(*(BrokerUnavailable("away") for _ in range(3)))
    queue, executor = attached(host)
    await executor.enqueue("run_1", "t")
    await queue.wait_all()
    assert host.asked == ["run_1"] * 4
    assert caplog.text.count("run run_1 from the queue waits: away") == 1


async def test_a_worker_that_stops_does_not_wait_for_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_PAUSE_S", 0.001)
    host = Host(*(BrokerUnavailable("away") for _ in range(100_000)))
    queue, executor = attached(host)
    await executor.enqueue("run_1", "t")
    await until(lambda: len(host.asked) > 2)
    await executor._worker_stops(TaskiqState())
    await queue.wait_all()


async def test_one_executor_serves_one_realtime() -> None:
    executor = TaskiqExecutor(Queue())
    make_realtime(executor=executor)
    with pytest.raises(RuntimeError, match="create one for each"):
        make_realtime(executor=executor)


async def test_two_realtimes_can_share_a_queue() -> None:
    queue = Queue()
    one = make_realtime(executor=TaskiqExecutor(queue), broker=MemoryBroker())
    two = make_realtime(executor=TaskiqExecutor(queue, task_name="two"), broker=MemoryBroker())

    @one.task("t")
    async def task_of_one() -> str:
        return "one"

    @two.task("t")
    async def task_of_two() -> str:
        return "two"

    async with one, two:
        assert await (await one.trigger("t")).result(timeout=GUARD_S) == "one"
        assert await (await two.trigger("t")).result(timeout=GUARD_S) == "two"


def test_without_taskiq_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "taskiq":
            raise ImportError("No module named 'taskiq'")
        return real(name, *args, **options)

    monkeypatch.delitem(sys.modules, "asgi_realtime.tasks.taskiq")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'asgi_realtime\[taskiq\]'"):
        import asgi_realtime.tasks.taskiq  # noqa: F401
