from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import anyio
import pytest

from asgi_realtime import BrokerUnavailable, Limits, Realtime, Run, RunError, Status, Timeouts
from asgi_realtime.brokers.base import ChangeMark
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.tasks import InProcessExecutor
from tests.inprocess import ended, make_realtime, until


class Subscriber:
    """A subscription, as far as the engine sees it."""

    def __init__(self, realtime: Realtime, *, broken: bool = False) -> None:
        self.realtime = realtime
        self.broken = broken
        self.ticks: list[float] = []
        self.shut = 0
        self.shut_in: int | None = None
        realtime.subscribers.add(self)

    def tick(self, now: float, steady: float) -> None:
        self.ticks.append(now)
        if self.broken:
            raise ValueError("broken")

    def shut_down(self) -> None:
        self.shut += 1
        self.shut_in = threading.get_ident()
        self.realtime.subscribers.discard(self)


def threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("asgi_realtime")]


# Start and stop


@pytest.mark.anyio
async def test_start_and_stop_are_idempotent() -> None:
    realtime = make_realtime()
    await realtime.stop()
    for _ in range(3):
        await realtime.start()
    supervisor = realtime.engine.supervisor
    await realtime.start()
    assert realtime.engine.supervisor is supervisor
    assert not realtime.closing
    for _ in range(3):
        await realtime.stop()
    assert realtime.engine.supervisor is None
    assert realtime.closing


@pytest.mark.anyio
async def test_many_tasks_can_start_and_stop_it_at_once() -> None:
    realtime = make_realtime()
    for _ in range(3):
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(realtime.start)
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(realtime.stop)
        assert realtime.engine.supervisor is None


@pytest.mark.parametrize("iterations", range(16))
@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.anyio
async def test_a_pipe_that_starts_at_any_point_of_a_stop_ends(iterations: int, busy: bool) -> None:
    """In the last loop iteration it hung, and so did the stop, at 100 % CPU."""
    realtime = make_realtime()
    async with realtime:
        if busy:
            realtime.pipe(["a"])
        async with anyio.create_task_group() as group:
            with anyio.fail_after(5):
                group.start_soon(realtime.stop)
                for _ in range(iterations):
                    await anyio.lowlevel.checkpoint()
                with suppress(ServerShutdown):
                    await realtime.pipe(["x"]).wait_until_complete()


@pytest.mark.anyio
async def test_constant_use_does_not_prevent_a_stop() -> None:
    realtime = make_realtime()

    @realtime.task("work")
    async def work(payload: int) -> int:
        return payload

    async def use() -> None:
        while True:
            with suppress(ServerShutdown):
                await realtime.trigger(work, 1)
            await anyio.lowlevel.checkpoint()

    await realtime.start()
    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(use)
        await anyio.sleep(0.05)
        with anyio.fail_after(5):
            await realtime.stop()
        group.cancel_scope.cancel()
    await realtime.stop()


@pytest.mark.anyio
async def test_a_start_during_a_stop_starts_again_after_it() -> None:
    """It returned at once, and then everything was stopped."""
    realtime = make_realtime()

    @realtime.task("t")
    async def task() -> None:
        await anyio.sleep(60)

    await realtime.start()
    await realtime.trigger(task)
    await until(lambda: realtime.engine.executions)
    async with anyio.create_task_group() as group:
        group.start_soon(realtime.stop)
        await until(lambda: realtime.closing)
        await realtime.start()
        assert realtime.engine.supervisor is not None and not realtime.engine.supervisor.stopping
        assert not realtime.closing
        async with realtime.open_run("r") as run:
            pass
        assert (await realtime.get_run(run)).status is Status.COMPLETED
    await realtime.stop()


@pytest.mark.anyio
async def test_the_memory_broker_retains_its_data_over_a_restart() -> None:
    realtime = make_realtime()
    async with realtime, realtime.open_run("r") as run:
        await realtime.append("kept")
    assert realtime.closing
    async with realtime:
        assert not realtime.closing
        assert (await realtime.get_run(run.id)).status is Status.COMPLETED
        assert [chunk async for chunk in realtime.read(run.id)] == ["kept"]


@pytest.mark.parametrize("first", ["asyncio", "trio"])
@pytest.mark.parametrize("second", ["asyncio", "trio"])
def test_it_can_be_started_again_on_another_loop(first: str, second: str) -> None:
    realtime = make_realtime(limits=Limits(task_threads=1))
    runs: list[str] = []

    @realtime.task("t", concurrency_limit=1)
    def task() -> str:
        return "done"

    async def use() -> None:
        async with realtime:
            handle = await realtime.trigger(task)
            assert await handle.result(timeout=5) == "done"
            runs.append(handle.id)
            for run_id in runs:
                assert (await realtime.get_run(run_id)).output == "done"

    anyio.run(use, backend=first)
    anyio.run(use, backend=second)
    anyio.run(use, backend=first)


def test_a_loop_that_was_closed_without_a_stop_is_detected() -> None:
    realtime = make_realtime()
    go = threading.Event()

    @realtime.task("t", concurrency_limit=1)
    async def task(payload: str) -> str:
        if payload == "first":
            await asyncio.get_running_loop().create_future()
        return payload

    @realtime.task("def")
    def in_thread() -> None:
        go.wait(5)

    async def begin() -> tuple[str, str]:
        handle, waiting = await realtime.trigger(task, "first"), await realtime.trigger(task, "second")
        await realtime.trigger(in_thread)
        await until(lambda: len(realtime.engine.executions) == 2)
        return handle.id, waiting.id

    loop = asyncio.new_event_loop()
    first, second = loop.run_until_complete(begin())
    left = asyncio.all_tasks(loop)
    loop.close()
    assert realtime.engine.supervisor is None

    async def again() -> None:
        async with realtime:
            assert await realtime.result(second, timeout=5) == "second"  # it waited, and is started now
            assert (await realtime.get_run(first)).status is Status.EXECUTING  # until its lease expires
            assert first not in realtime.engine.executions

    asyncio.run(again())
    go.set()
    for lost in left:
        lost._log_destroy_pending = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_program_that_never_stops_it_can_exit(backend: str) -> None:
    realtime = make_realtime()
    begun: list[str] = []

    @realtime.task("t")
    async def task(run: Run) -> None:
        begun.append(run.id)
        await anyio.sleep(60)

    async def main() -> None:
        await realtime.trigger(task)
        await until(lambda: begun)

    anyio.run(main, backend=backend)
    assert realtime.engine.supervisor is None

    async def look() -> None:
        async with realtime:
            assert (await realtime.get_run(begun[0])).status is Status.CANCELED

    anyio.run(look, backend=backend)


@pytest.mark.anyio
async def test_a_start_on_first_use_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="asgi_realtime")
    realtime = make_realtime()
    async with realtime.open_run("r"):
        pass
    async with realtime.open_run("r"):
        pass
    await realtime.stop()
    assert [record.message for record in caplog.records if "first use" in record.message] == [
        "started on first use: put realtime.lifespan or RealtimeMiddleware into the app to stop it too"
    ]
    caplog.clear()
    async with realtime, realtime.open_run("r"):
        pass
    assert caplog.records == []
    async with realtime.open_run("r"):  # the host has stopped it
        pass
    await realtime.stop()
    assert [record.message for record in caplog.records] == [
        "used after its host had stopped it, and started again: nothing but a signal stops it now"
    ]


@pytest.mark.anyio
async def test_the_lifespan_accepts_any_app() -> None:
    realtime = make_realtime()
    async with realtime.lifespan(object()):
        assert realtime.engine.supervisor is not None
    assert realtime.engine.supervisor is None
    async with realtime.lifespan():
        pass


# Other loops and threads


@pytest.mark.parametrize("theirs", ["asyncio", "trio", None])
@pytest.mark.anyio
async def test_use_from_another_loop_or_thread_is_refused(theirs: str | None) -> None:
    realtime = make_realtime()
    errors: list[Exception] = []

    async def use() -> None:
        attempts: list[Any] = [
            lambda: realtime.trigger("t"),
            lambda: realtime.get_run("run_x"),
            lambda: realtime.append(1, run="run_x"),
            lambda: realtime.cancel("run_x"),
            lambda: realtime.start(),
            lambda: realtime.stop(),
        ]
        for attempt in attempts:
            try:
                await attempt()
            except RuntimeError as exc:
                errors.append(exc)

    def without_loop() -> None:
        for attempt in (lambda: realtime.pipe([1]), lambda: realtime.read("run_x")):
            try:
                attempt()
            except RuntimeError as exc:
                errors.append(exc)

    def thread() -> None:
        if theirs is None:
            without_loop()
        else:
            anyio.run(use, backend=theirs)

    @realtime.task("t")
    async def task() -> None: ...

    async with realtime:
        worker = threading.Thread(target=thread)
        worker.start()
        await until(lambda: not worker.is_alive())
        assert len(errors) == (2 if theirs is None else 6)
        assert {type(error) for error in errors} == {RuntimeError}
        for error in errors:
            assert "this Realtime runs on another event loop or thread" in str(error)
        assert realtime.engine.supervisor is not None


def test_use_without_a_loop_is_refused() -> None:
    realtime = make_realtime()
    with pytest.raises(RuntimeError, match="no event loop runs in this thread: use realtime.sync"):
        realtime.pipe([1])
    with pytest.raises(RuntimeError, match="use realtime.sync"):
        realtime.read("run_x")
    assert realtime.engine.supervisor is None


# Shutdown


@pytest.mark.anyio
async def test_begin_shutdown_ends_subscriptions_once_and_nothing_else() -> None:
    realtime = make_realtime()
    realtime.begin_shutdown()
    assert not realtime.closing  # it was not running
    async with realtime:
        subscriber = Subscriber(realtime)
        realtime.begin_shutdown()
        realtime.begin_shutdown()
        assert not realtime.closing  # the call can come from a signal handler that interrupted any code
        await until(lambda: realtime.closing)
        assert subscriber.shut == 1
        async with realtime.open_run("r") as run:
            pass
        assert (await realtime.get_run(run)).status is Status.COMPLETED


@pytest.mark.anyio
async def test_begin_shutdown_can_be_called_from_a_thread() -> None:
    async with make_realtime() as realtime:
        subscriber = Subscriber(realtime)
        thread = threading.Thread(target=realtime.begin_shutdown)
        thread.start()
        await until(lambda: subscriber.shut)
        thread.join()
        assert realtime.closing
        assert subscriber.shut_in == threading.get_ident()


@pytest.mark.anyio
async def test_stop_ends_subscriptions() -> None:
    realtime = make_realtime()
    async with realtime:
        subscriber = Subscriber(realtime)
    assert subscriber.shut == 1


@pytest.mark.anyio
async def test_stop_waits_for_tasks_during_the_drain() -> None:
    realtime = make_realtime(timeouts=Timeouts(tick=0.01, drain=5))
    begun = anyio.Event()

    @realtime.task("t")
    async def task() -> str:
        begun.set()
        await until(lambda: realtime.closing)
        return "drained"

    async with realtime:
        handle = await realtime.trigger(task)
        await begun.wait()
    async with realtime:
        assert (await realtime.get_run(handle)).output == "drained"


@pytest.mark.anyio
async def test_stop_cancels_unfinished_runs_and_fails_them_with_server_shutdown() -> None:
    realtime = make_realtime()
    begun: list[str] = []
    cleaned: list[str] = []
    go = threading.Event()

    @realtime.task("t", concurrency_limit=1)
    async def task(payload: str, run: Run) -> None:
        begun.append(payload)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep, 60)
        finally:
            run.metadata.set("partial", True)
            cleaned.append(payload)

    @realtime.task("def")
    def in_thread() -> None:
        begun.append("def")
        go.wait(5)

    async def endless() -> AsyncIterator[int]:
        yield 1
        await anyio.sleep(60)

    async with realtime:
        running, waiting = await realtime.trigger(task, "running"), await realtime.trigger(task, "waiting")
        threaded = await realtime.trigger(in_thread)
        pipe = realtime.pipe(endless())
        await until(lambda: len(begun) == 2 and pipe.result.chunks == 1)
    go.set()
    assert realtime.engine.executions == {}
    assert cleaned == ["running"]
    async with realtime:
        for run_id in (running.id, waiting.id, threaded.id, pipe.run_id):
            record = await realtime.get_run(run_id)
            assert record.status is Status.FAILED
            assert record.error == RunError("ServerShutdown", "the server was shut down")
        assert (await realtime.get_run(running)).metadata == {"partial": True}
        assert begun.count("waiting") == 0


@pytest.mark.anyio
async def test_a_run_that_is_triggered_right_before_the_stop_ends() -> None:
    """It stayed QUEUED: the executor had accepted it and had not started it."""
    for _ in range(8):
        realtime = make_realtime()

        @realtime.task("t")
        async def task() -> None:
            await anyio.sleep(60)

        async with realtime:
            handle = await realtime.trigger(task)
        async with realtime:
            record = await realtime.get_run(handle)
        assert record.error == RunError("ServerShutdown", "the server was shut down")


@pytest.mark.anyio
async def test_runs_that_are_triggered_during_the_stop_end() -> None:
    realtime = make_realtime()
    ids: list[str] = []

    @realtime.task("t", concurrency_limit=1)
    async def task() -> None:
        try:
            await anyio.sleep(60)
        finally:
            with anyio.CancelScope(shield=True):
                if len(ids) < 4:
                    ids.append((await realtime.trigger(task)).id)

    async with realtime:
        ids.append((await realtime.trigger(task)).id)
        await until(lambda: realtime.engine.executions)
    async with realtime:
        records = [await realtime.get_run(run_id) for run_id in ids]
    assert {record.status for record in records} == {Status.FAILED}
    assert len(records) >= 2


class Slow(MemoryBroker):
    """Takes 5 ms for each commit."""

    async def commit(
        self, record: RunRecord, *, expect: int, change: ChangeMark, floors: Mapping[tuple[str, str], int] | None = None
    ) -> int:
        await anyio.sleep(0.005)
        return await super().commit(record, expect=expect, change=change, floors=floors)


@pytest.mark.anyio
async def test_all_waiting_runs_end_even_if_that_takes_longer_than_the_drain() -> None:
    """The drain interrupted this, and the rest stayed QUEUED."""
    realtime = make_realtime(broker=Slow())

    @realtime.task("t", concurrency_limit=1)
    async def task() -> None:
        await anyio.sleep(60)

    async with realtime:
        ids = [(await realtime.trigger(task)).id for _ in range(20)]
    async with realtime:
        records = [await realtime.get_run(run_id) for run_id in ids]
    assert {record.status for record in records} == {Status.FAILED}


@pytest.mark.anyio
async def test_a_task_that_ignores_its_cancellation_does_not_block_the_stop_forever() -> None:
    realtime = make_realtime(timeouts=Timeouts(tick=0.01, drain=0.01, cancel=0.02))
    begun = anyio.Event()
    go = threading.Event()

    @realtime.task("t")
    async def task() -> None:
        begun.set()
        try:
            await anyio.sleep(60)
        finally:
            with anyio.CancelScope(shield=True):
                await until(go.is_set)

    async with anyio.create_task_group() as group:
        await realtime.start()
        handle = await realtime.trigger(task)
        await begun.wait()
        group.start_soon(realtime.stop)
        await until(lambda: realtime.closing)
        go.set()
    async with realtime:
        assert (await realtime.get_run(handle)).is_completed


@pytest.mark.anyio
async def test_a_stop_leaves_no_tasks_or_threads() -> None:
    realtime = make_realtime()

    @realtime.task("t")
    async def task() -> None:
        await anyio.sleep(60)

    @realtime.task("def")
    def in_thread() -> None: ...

    async with realtime:
        for _ in range(5):
            await realtime.trigger(task)
            await ended(realtime, await realtime.trigger(in_thread))
        async with realtime.open_run("r"):
            await realtime.append(1)
    await until(lambda: not threads_of_ours())
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        import trio

        assert not [
            child
            for nursery in trio.lowlevel.current_root_task().child_nurseries  # type: ignore[union-attr]
            for child in nursery.child_tasks
            if "asgi_realtime" in child.name
        ]
    else:
        assert not [one for one in asyncio.all_tasks(loop) if "asgi_realtime" in repr(one.get_coro())]


@pytest.mark.anyio
async def test_a_stopped_realtime_is_garbage_collected() -> None:
    realtime = make_realtime()
    async with realtime, realtime.open_run("r"):
        pass
    gone = weakref.ref(realtime)
    del realtime
    gc.collect()
    assert gone() is None


# Unavailable brokers


class Unreachable(MemoryBroker):
    """Cannot be entered until `there` is set."""

    there = False

    async def __aenter__(self) -> Unreachable:
        if not self.there:
            raise BrokerUnavailable("connection refused")
        return self


@pytest.mark.anyio
async def test_a_start_without_its_broker_raises_and_can_be_retried(caplog: pytest.LogCaptureFixture) -> None:
    """Every later use raised the same error, even when the broker was available again."""
    broker = Unreachable()
    realtime = make_realtime(broker=broker)
    with pytest.raises(BrokerUnavailable, match="connection refused"):
        await realtime.start()
    await until(lambda: realtime.engine.supervisor is None)
    with pytest.raises(BrokerUnavailable, match="connection refused"):
        await realtime.get_run("run_x")
    await until(lambda: realtime.engine.supervisor is None)
    broker.there = True
    async with realtime, realtime.open_run("r") as run:
        pass
    async with realtime:
        assert (await realtime.get_run(run)).status is Status.COMPLETED


class NeverThere(MemoryBroker):
    """Waits forever when entered."""

    async def __aenter__(self) -> NeverThere:
        await anyio.sleep_forever()
        return self


@pytest.mark.anyio
async def test_a_call_that_waits_for_a_start_ends_with_a_stop() -> None:
    """A request that arrived while the broker was being entered hung forever if the server was stopped then."""
    realtime = make_realtime(broker=NeverThere())
    errors: list[str] = []

    async def use() -> None:
        try:
            await realtime.get_run("run_x")
        except ServerShutdown as exc:
            errors.append(str(exc))

    async with anyio.create_task_group() as group:
        group.start_soon(use)
        group.start_soon(use)
        await anyio.wait_all_tasks_blocked()
        await realtime.stop()
        await until(lambda: len(errors) == 2)
    assert set(errors) == {"this Realtime was stopped before its broker was available"}


class NoCommits(MemoryBroker):
    away = False

    async def commit(
        self, record: RunRecord, *, expect: int, change: ChangeMark, floors: Mapping[tuple[str, str], int] | None = None
    ) -> int:
        if self.away:
            raise BrokerUnavailable("no answer")
        return await super().commit(record, expect=expect, change=change, floors=floors)


@pytest.mark.anyio
async def test_a_stop_without_the_broker_ends() -> None:
    broker = NoCommits()
    realtime = make_realtime(broker=broker, timeouts=Timeouts(tick=0.01, drain=0.01, cancel=0.05, append=0.01))
    begun = anyio.Event()

    @realtime.task("t", concurrency_limit=1)
    async def task() -> None:
        begun.set()
        await anyio.sleep(60)

    async with realtime:
        await realtime.trigger(task)
        await realtime.trigger(task)
        await begun.wait()
        broker.away = True
    assert realtime.engine.supervisor is None
    assert realtime.engine.executions == {}


@pytest.mark.anyio
async def test_a_stop_without_the_broker_is_prompt_and_logs_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """It took as long as a commit is retried, 30 s, and logged the traceback of an expected error."""
    broker = NoCommits()
    realtime = make_realtime(broker=broker)

    @realtime.task("t")
    async def task() -> None:
        await anyio.sleep(60)

    async def endless() -> AsyncIterator[int]:
        yield 1
        await anyio.sleep(60)

    async with realtime:
        await realtime.trigger(task)
        pipe = realtime.pipe(endless())
        await until(lambda: pipe.result.chunks == 1 and len(realtime.engine.executions) == 2)
        broker.away = True
        began = anyio.current_time()
    assert anyio.current_time() - began < 0.9
    assert [record for record in caplog.records if record.exc_info] == []
    broker.away = False
    async with realtime, realtime.open_run("r") as run:  # the next start is patient again
        broker.away = True
        run.metadata.set("n", 1)
        async with anyio.create_task_group() as group:
            group.start_soon(run.metadata.flush)
            await anyio.sleep(0.1)
            broker.away = False


# The ticker


@pytest.mark.anyio
async def test_a_subscription_that_raises_does_not_stop_the_ticker(caplog: pytest.LogCaptureFixture) -> None:
    """It ended the ticker, and with it the broker."""
    realtime = make_realtime(clock=lambda: 5.0)
    async with realtime:
        broken, sound = Subscriber(realtime, broken=True), Subscriber(realtime)
        await until(lambda: len(sound.ticks) >= 3 and len(broken.ticks) >= 3)
        assert set(sound.ticks) == {5.0}
        async with realtime.open_run("r"):
            pass
    assert "the ticker failed for" in caplog.text


@pytest.mark.anyio
async def test_background_jobs_run_in_the_context_of_the_start() -> None:
    name: ContextVar[str] = ContextVar("name", default="unset")
    seen: list[str] = []
    realtime = make_realtime()

    async def job() -> None:
        seen.append(name.get())

    name.set("start")
    await realtime.start()
    name.set("request")
    realtime.engine.spawn_detached(job)
    await until(lambda: seen)
    await realtime.stop()
    assert seen == ["start"]


@pytest.mark.anyio
async def test_a_forked_child_is_another_owner_and_leaves_all_runs_to_its_parent() -> None:
    realtime = make_realtime()

    @realtime.task("t", concurrency_limit=1)
    async def task() -> None:
        await anyio.sleep(60)

    async with realtime:
        for _ in range(2):
            await realtime.trigger(task)
        await until(lambda: realtime.engine.executions)
        engine, owner = realtime.engine, realtime.engine.owner
        start = engine._start
        assert start is not None and len(engine.held) == 2
        engine._pid = -1  # a child has the memory of its parent, but another pid
        assert engine.supervisor is None
        assert engine.owner != owner
        assert isinstance(engine.dispatcher.executor, InProcessExecutor)
        assert engine.held == []
        engine._start = start
