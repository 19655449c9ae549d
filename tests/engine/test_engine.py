from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import anyio
import pytest

from asgi_realtime import Limits, Run, Status
from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.tasks import InProcessExecutor
from tests.inprocess import GUARD_S, make_realtime, until

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
            with anyio.fail_after(GUARD_S):
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
        with anyio.fail_after(GUARD_S):
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
            assert await handle.result(timeout=GUARD_S) == "done"
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
        go.wait(GUARD_S)

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
            assert await realtime.result(second, timeout=GUARD_S) == "second"  # it waited, and is started now
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
    assert [record.message for record in caplog.records if "not started" in record.message] == [
        "not started by the app: add realtime.lifespan (or RealtimeMiddleware) so it also shuts down cleanly"
    ]
    caplog.clear()
    async with realtime, realtime.open_run("r"):
        pass
    assert caplog.records == []
    async with realtime.open_run("r"):  # the host has stopped it
        pass
    await realtime.stop()
    assert [record.message for record in caplog.records] == [
        "used after shutdown: started again, and will only stop on SIGTERM/SIGINT"
    ]


@pytest.mark.anyio
async def test_a_start_in_a_thread_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The log of each Celery worker recommended `realtime.lifespan`, but such a process serves no app."""
    caplog.set_level(logging.INFO, logger="asgi_realtime")
    realtime = make_realtime()

    async def use() -> None:
        async with realtime.open_run("r"):
            pass
        await realtime.stop()

    await anyio.to_thread.run_sync(anyio.run, use)
    assert caplog.records == []


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


# Jobs


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
