from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import anyio
import pytest

from asgi_realtime import (
    Limits,
    NoCurrentRun,
    Run,
    RunCanceled,
    RunError,
    RunFailed,
    Status,
    TaskError,
    Timeouts,
    current_run,
)
from tests.inprocess import GUARD_S, ended, make_realtime, until

pytestmark = pytest.mark.anyio


async def test_a_run_is_queued_then_executing_then_completed_with_its_output() -> None:
    realtime = make_realtime()
    seen: list[Status] = []

    @realtime.task("t")
    async def task(payload: int, run: Run) -> dict[str, int]:
        seen.append((await realtime.get_run(run)).status)
        return {"doubled": payload * 2}

    async with realtime:
        handle = await realtime.trigger(task, 4)
        record = await ended(realtime, handle)
    assert seen == [Status.EXECUTING]
    assert record.status is Status.COMPLETED
    assert record.output == {"doubled": 8}
    assert record.payload == 4
    assert record.error is None
    assert record.queued_at_ms is not None and record.started_at_ms is not None and record.completed_at_ms is not None


async def test_states_come_in_order() -> None:
    realtime = make_realtime()
    go = anyio.Event()

    @realtime.task("t")
    async def task() -> str:
        await go.wait()
        return "done"

    async with realtime:
        handle = await realtime.trigger(task)
        states = []
        with anyio.fail_after(GUARD_S):
            async for record in realtime.subscribe_to_run(handle):
                states.append(record.status)
                if record.status is Status.EXECUTING:
                    go.set()
    assert states in (["QUEUED", "EXECUTING", "COMPLETED"], ["EXECUTING", "COMPLETED"])


async def test_set_output_is_the_output_if_the_task_returns_none() -> None:
    realtime = make_realtime()

    @realtime.task("set")
    async def sets(run: Run) -> None:
        run.set_output("set")

    @realtime.task("both")
    async def sets_and_returns(run: Run) -> str:
        run.set_output("set")
        return "returned"

    @realtime.task("none")
    async def gives_none() -> None: ...

    async with realtime:
        assert await realtime.result((await realtime.trigger(sets)).id, timeout=GUARD_S) == "set"
        assert await (await realtime.trigger(sets_and_returns)).result(timeout=GUARD_S) == "returned"
        record = await ended(realtime, await realtime.trigger(gives_none))
        assert record.output_json == b"null"


async def test_the_message_of_a_task_error_is_shown_and_its_data_is_not() -> None:
    realtime = make_realtime()

    class OutOfStock(TaskError): ...

    @realtime.task("t")
    async def task(payload: str) -> None:
        raise OutOfStock(f"no {payload} left", data="secret")

    async with realtime:
        handle = await realtime.trigger(task, "tea")
        with pytest.raises(RunFailed, match="no tea left"):
            await handle.result(timeout=GUARD_S)
        record = await realtime.get_run(handle)
    assert record.status is Status.FAILED
    assert record.error == RunError("OutOfStock", "no tea left")


@pytest.mark.parametrize(
    "error", [ValueError("password=hunter2"), NoCurrentRun("password=hunter2"), RunFailed("password=hunter2")]
)
@pytest.mark.parametrize("kind", ["async", "def"])
async def test_other_messages_are_hidden_unless_debug(
    error: Exception, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    for debug, message in ((False, "task failed"), (True, "password=hunter2")):
        realtime = make_realtime(debug=debug)

        async def fails() -> None:
            raise error

        def fails_in_thread() -> None:
            raise error

        task: Any = realtime.task("t")(fails if kind == "async" else fails_in_thread)
        async with realtime:
            record = await ended(realtime, await realtime.trigger(task))
        assert record.error == RunError(type(error).__name__, message)
        assert b"Traceback" not in repr(record).encode()
    assert "failed" in caplog.text  # the host's log contains the details


async def test_the_error_of_a_task_group_with_one_error_is_that_error() -> None:
    realtime = make_realtime()

    @realtime.task("t")
    async def task() -> None:
        async def fails() -> None:
            raise TaskError("inner")

        async with anyio.create_task_group() as group:
            group.start_soon(fails)

    async with realtime:
        record = await ended(realtime, await realtime.trigger(task))
    assert record.error == RunError("TaskError", "inner")


async def test_an_output_that_cannot_be_encoded_fails_the_run_with_the_reason() -> None:
    realtime = make_realtime()

    @realtime.task("t")
    async def task() -> Any:
        return {"rows": [1, object()]}

    async with realtime:
        record = await ended(realtime, await realtime.trigger(task))
    assert record.status is Status.FAILED
    assert record.error is not None and record.error.name == "EncodingError"
    assert "at ['rows'][1]: object has no JSON form" in record.error.message
    assert record.output_json is None


async def test_an_output_over_the_limit_fails_the_run_and_names_the_limit() -> None:
    realtime = make_realtime(limits=Limits(output_bytes=10))

    @realtime.task("t")
    async def task() -> str:
        return "x" * 9

    async with realtime:
        record = await ended(realtime, await realtime.trigger(task))
    assert record.error == RunError("LimitExceeded", f"the output of run {record.id!r} is 11 bytes, limit 10")


async def test_sys_exit_in_a_task_fails_only_its_run() -> None:
    """`sys.exit()` in a task ended the whole server."""
    realtime = make_realtime()

    @realtime.task("async")
    async def exits() -> None:
        sys.exit("bye")

    @realtime.task("def")
    def exits_in_thread() -> None:
        sys.exit("bye")

    @realtime.task("group")
    async def exits_in_group() -> None:
        async with anyio.create_task_group():
            sys.exit("bye")

    @realtime.task("other")
    async def other() -> str:
        return "fine"

    async with realtime:
        for task_id in ("async", "def", "group"):
            record = await ended(realtime, await realtime.trigger(task_id))
            assert record.error == RunError("SystemExit", "task failed")
        assert await (await realtime.trigger(other)).result(timeout=GUARD_S) == "fine"
    assert exits is not None and exits_in_thread is not None and exits_in_group is not None


async def test_a_canceled_task_that_fails_in_its_cleanup_ends_its_run() -> None:
    """On trio it stayed EXECUTING."""
    realtime = make_realtime()

    async def child() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("closing the connection failed")

    @realtime.task("t")
    async def task() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(child)
            await anyio.sleep_forever()

    async with realtime:
        handle = await realtime.trigger(task)
        await until(lambda: handle.id in realtime.engine.executions)
        await anyio.wait_all_tasks_blocked()
        await realtime.cancel(handle)
        record = await ended(realtime, handle)
        assert record.error == RunError("ValueError", "task failed")
        assert not realtime.engine.executions


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_that_cancels_itself_fails_only_its_run() -> None:
    """Awaiting a task that had been cancelled ended everything that ran in the `Realtime`."""
    realtime = make_realtime()
    go = anyio.Event()

    @realtime.task("t")
    async def awaits_cancelled() -> None:
        inner = asyncio.get_running_loop().create_task(asyncio.sleep(60))
        inner.cancel()
        await inner

    @realtime.task("other")
    async def other() -> str:
        await go.wait()
        return "fine"

    async with realtime:
        beside = await realtime.trigger(other)
        record = await ended(realtime, await realtime.trigger(awaits_cancelled))
        assert record.status is Status.FAILED
        assert record.error == RunError("CancelledError", "task failed")
        go.set()
        assert await beside.result(timeout=GUARD_S) == "fine"


async def test_the_current_run_is_available_anywhere_inside() -> None:
    realtime = make_realtime()
    seen: list[str] = []

    async def deeper() -> None:
        seen.append(current_run().id)

    @realtime.task("async")
    async def task(run: Run) -> None:
        await deeper()
        async with anyio.create_task_group() as group:
            group.start_soon(deeper)

    @realtime.task("def")
    def in_thread() -> None:
        seen.append(current_run().id)

    async with realtime:
        handles = [await realtime.trigger(task), await realtime.trigger(in_thread)]
        for handle in handles:
            await handle.result(timeout=GUARD_S)
        with pytest.raises(NoCurrentRun, match="pass run="):
            current_run()
    assert sorted(seen) == sorted([handles[0].id, handles[0].id, handles[1].id])


async def test_context_variables_of_a_request_do_not_leak_into_tasks() -> None:
    user: ContextVar[str] = ContextVar("user", default="unknown")
    realtime = make_realtime()

    @realtime.task("t")
    async def task() -> str:
        return user.get()

    @realtime.task("def")
    def in_thread() -> str:
        return user.get()

    user.set("host")
    async with realtime:
        user.set("ada")
        assert await (await realtime.trigger(task)).result(timeout=GUARD_S) == "host"
        assert await (await realtime.trigger(in_thread)).result(timeout=GUARD_S) == "host"
    user.set("first request")
    assert await (await realtime.trigger(task)).result(timeout=GUARD_S) == "unknown"  # started on first use
    await realtime.stop()


async def test_a_def_task_runs_in_a_thread() -> None:
    realtime = make_realtime()
    both = threading.Barrier(2)

    @realtime.task("t")
    def task(payload: int) -> int:
        both.wait(GUARD_S)
        return threading.get_ident()

    async with realtime:
        handles = [await realtime.trigger(task, number) for number in range(2)]
        threads = {await handle.result(timeout=GUARD_S) for handle in handles}
    assert len(threads) == 2
    assert threading.get_ident() not in threads


async def test_def_tasks_over_the_thread_limit_wait() -> None:
    realtime = make_realtime(limits=Limits(task_threads=1))
    go = threading.Event()
    at_once = 0
    most = 0

    @realtime.task("t")
    def task() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        go.wait(GUARD_S)
        at_once -= 1

    async with realtime:
        handles = [await realtime.trigger(task) for _ in range(3)]
        await until(lambda: at_once)
        go.set()
        for handle in handles:
            await handle.result(timeout=GUARD_S)
    assert most == 1


async def test_a_def_task_can_run_its_own_event_loop() -> None:
    realtime = make_realtime()

    async def answer() -> int:
        await anyio.lowlevel.checkpoint()
        return 42

    @realtime.task("t")
    def task() -> int:
        return anyio.run(answer)

    async with realtime:
        assert await (await realtime.trigger(task)).result(timeout=GUARD_S) == 42


async def test_cancelling_a_def_task_ends_its_run_at_once_and_its_thread_sees_it() -> None:
    realtime = make_realtime()
    runs: list[Run] = []
    go = threading.Event()
    left: list[bool] = []

    @realtime.task("t")
    def task(run: Run) -> str:
        runs.append(run)
        go.wait(GUARD_S)
        left.append(run.canceled)
        return "too late"

    async with realtime:
        handle = await realtime.trigger(task)
        await until(lambda: runs)
        assert not runs[0].canceled
        await realtime.cancel(handle)
        record = await ended(realtime, handle)
        go.set()
        await until(lambda: left)
    assert record.status is Status.CANCELED
    assert record.output is None
    assert left == [True]


@pytest.mark.slow
def test_a_def_task_that_blocks_does_not_delay_the_exit() -> None:
    """Python waited for the thread at its exit."""
    program = """
import asyncio, threading
from asgi_realtime import Realtime, Timeouts

realtime = Realtime(secret_key="s" * 32, timeouts=Timeouts(drain=0.01, cancel=0.01))
started = threading.Event()

@realtime.task("t")
def blocks():
    started.set()
    threading.Event().wait(60)

async def main():
    async with realtime:
        handle = await realtime.trigger(blocks)
        while not started.is_set():
            await asyncio.sleep(0.001)
    print((await realtime.broker.load([handle.id]))[0].status)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "FAILED\n", done.stderr


async def test_a_task_that_exceeds_max_duration_times_out() -> None:
    realtime = make_realtime()

    @realtime.task("t", max_duration=0.02)
    async def task(run: Run) -> None:
        run.metadata.set("progress", 1)
        await anyio.sleep(60)

    @realtime.task("def", max_duration="20ms")
    def in_thread() -> None:
        go.wait(GUARD_S)

    go = threading.Event()
    async with realtime:
        for task_id in ("t", "def"):
            handle = await realtime.trigger(task_id)
            with pytest.raises(RunFailed, match="the task took longer than its max_duration of 0.02 s"):
                await handle.result(timeout=GUARD_S)
            record = await realtime.get_run(handle)
            assert record.status is Status.TIMED_OUT
            assert record.max_duration_s == 0.02
        go.set()
    assert task is not None and in_thread is not None


async def test_max_duration_includes_the_pipes() -> None:
    realtime = make_realtime()

    @realtime.task("t", max_duration=0.02)
    async def task() -> None:
        async def endless() -> Any:
            yield 1
            await anyio.sleep(60)

        realtime.pipe(endless())

    async with realtime:
        record = await ended(realtime, await realtime.trigger(task))
    assert record.status is Status.TIMED_OUT


async def test_cancelling_a_running_task_stops_it_with_its_cleanup() -> None:
    realtime = make_realtime()
    started = anyio.Event()
    cleaned: list[str] = []

    @realtime.task("t")
    async def task(run: Run) -> None:
        try:
            run.metadata.set("progress", 0.5)
            started.set()
            await anyio.sleep(60)
        finally:
            cleaned.append("yes")

    async with realtime:
        handle = await realtime.trigger(task)
        await started.wait()
        asked = await realtime.cancel(handle)
        assert asked.cancel_requested_at is not None
        record = await ended(realtime, handle)
        with pytest.raises(RunCanceled):
            await handle.result()
        again = await realtime.cancel(handle)
        assert again.version == record.version
    assert record.status is Status.CANCELED
    assert record.metadata == {"progress": 0.5}
    assert cleaned == ["yes"]


async def test_a_task_can_cancel_its_own_run() -> None:
    realtime = make_realtime()

    @realtime.task("t")
    async def task(run: Run) -> str:
        await realtime.cancel(run)
        await anyio.sleep(60)
        return "not reached"

    @realtime.task("last")
    async def ends_right_after(run: Run) -> str:
        await realtime.cancel(run)
        return "asked to cancel, so this is not the result"

    async with realtime:
        for task_id in ("t", "last"):
            assert (await ended(realtime, await realtime.trigger(task_id))).status is Status.CANCELED
    assert task is not None and ends_right_after is not None


async def test_a_task_that_raises_during_its_cancellation_fails() -> None:
    realtime = make_realtime()
    started = anyio.Event()

    @realtime.task("t")
    async def task() -> None:
        try:
            started.set()
            await anyio.sleep(60)
        finally:
            raise TaskError("cleanup broke")

    async with realtime:
        handle = await realtime.trigger(task)
        await started.wait()
        await realtime.cancel(handle)
        record = await ended(realtime, handle)
    assert record.status is Status.FAILED
    assert record.error == RunError("TaskError", "cleanup broke")


async def test_a_run_executes_at_most_once() -> None:
    calls = 0

    class Nobody:
        async def enqueue(self, run_id: str, task_id: str) -> None: ...

    realtime = make_realtime(executor=Nobody())

    @realtime.task("t")
    async def task() -> str:
        nonlocal calls
        calls += 1
        await anyio.lowlevel.checkpoint()
        return "once"

    async with realtime:
        handle = await realtime.trigger(task)
        assert (await realtime.get_run(handle)).status is Status.QUEUED
        async with anyio.create_task_group() as group:
            group.start_soon(realtime.execute, handle.id)
            group.start_soon(realtime.execute, handle.id)
        assert (await realtime.get_run(handle)).status is Status.COMPLETED
        await realtime.execute(handle.id)
    assert calls == 1
    assert realtime.engine.executions == {}


async def test_cancelling_the_caller_of_execute_cancels_the_run() -> None:
    class Nobody:
        async def enqueue(self, run_id: str, task_id: str) -> None: ...

    realtime = make_realtime(executor=Nobody())
    started = anyio.Event()

    @realtime.task("t")
    async def task() -> None:
        started.set()
        await anyio.sleep(60)

    async with realtime:
        handle = await realtime.trigger(task)
        async with anyio.create_task_group() as group:
            group.start_soon(realtime.execute, handle.id)
            await started.wait()
            group.cancel_scope.cancel()
        assert (await realtime.get_run(handle)).status is Status.CANCELED
        assert realtime.engine.executions == {}


async def test_a_run_waits_for_its_pipes() -> None:
    realtime = make_realtime()

    @realtime.task("t")
    async def task() -> str:
        async def chunks() -> Any:
            for number in range(5):
                await anyio.lowlevel.checkpoint()
                yield number

        realtime.pipe(chunks())
        return "returned"

    async with realtime:
        handle = await realtime.trigger(task)
        assert await handle.result(timeout=GUARD_S) == "returned"
        assert [chunk async for chunk in realtime.read(handle)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("make_error", [lambda: ValueError("gone"), lambda: TaskError("gone")])
async def test_an_unseen_error_of_a_pipe_fails_the_run(make_error: Callable[[], Exception]) -> None:
    realtime = make_realtime()

    @realtime.task("t")
    async def task() -> str:
        async def chunks() -> Any:
            yield 1
            raise make_error()

        realtime.pipe(chunks())
        return "returned"

    async with realtime:
        record = await ended(realtime, await realtime.trigger(task))
    assert record.status is Status.FAILED
    assert record.error is not None and record.error.name == type(make_error()).__name__


async def test_a_handled_error_of_a_pipe_does_not_fail_the_run() -> None:
    realtime = make_realtime()

    @realtime.task("t")
    async def task() -> str:
        async def chunks() -> Any:
            yield 1
            raise ValueError("gone")

        try:
            await realtime.pipe(chunks()).wait_until_complete()
        except ValueError:
            return "handled"
        return "not reached"

    async with realtime:
        assert await (await realtime.trigger(task)).result(timeout=GUARD_S) == "handled"


async def test_nothing_remains_when_tasks_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    realtime = make_realtime(timeouts=Timeouts(tick=0.01, drain=1.0))

    @realtime.task("t")
    async def task(payload: int) -> int:
        return payload

    async with realtime:
        handles = [await realtime.trigger(task, number) for number in range(50)]
        assert [await handle.result(timeout=GUARD_S) for handle in handles] == list(range(50))
        assert realtime.engine.executions == {}
    assert caplog.records == []
