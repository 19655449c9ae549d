from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import anyio
import pytest

from asgi_realtime import (
    BrokerUnavailable,
    LimitExceeded,
    NoCurrentRun,
    Run,
    RunCanceled,
    RunError,
    Status,
    TaskError,
    Timeouts,
    UsageError,
    current_run,
)
from asgi_realtime.brokers.base import ChangeMark
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.core.runs import StoredRecord
from tests.brokers.backends import DistantBroker
from tests.inprocess import GUARD_S, ended, make_realtime, until

pytestmark = pytest.mark.anyio


async def test_leaving_completes_the_run_with_the_output_that_was_set() -> None:
    async with make_realtime() as realtime:
        async with realtime.open_run("report", tags=["user:1"], metadata={"n": 1}) as run:
            record = await realtime.runs.get(run.id)
            assert record.status is Status.EXECUTING
            assert (record.task, record.tags, record.metadata) == ("report", ("user:1",), {"n": 1})
            assert current_run() is run
            await realtime.append({"rows": 400}, stream="progress")
            run.set_output({"rows": 1000})
        record = await ended(realtime, run.id)
        assert record.status is Status.COMPLETED
        assert record.output == {"rows": 1000}
        assert record.streams == ("progress",)
        assert realtime.engine.executions == {}
        with pytest.raises(NoCurrentRun):
            current_run()


async def test_without_an_output_it_completes_with_none() -> None:
    async with make_realtime() as realtime:
        async with realtime.open_run("r") as run:
            pass
        record = await ended(realtime, run.id)
    assert record.status is Status.COMPLETED and record.output is None


@pytest.mark.parametrize(("error", "message"), [(ValueError("inside"), "task failed"), (TaskError("shown"), "shown")])
async def test_an_exception_fails_the_run_and_propagates(error: Exception, message: str) -> None:
    async with make_realtime() as realtime:
        with pytest.raises(type(error)) as caught:
            async with realtime.open_run("r") as run:
                raise error
        assert caught.value is error
        record = await ended(realtime, run.id)
    assert record.status is Status.FAILED
    assert record.error == RunError(type(error).__name__, message)


async def test_a_cancellation_by_the_host_cancels_the_run_and_propagates() -> None:
    async with make_realtime() as realtime:
        runs: list[Run] = []
        with anyio.CancelScope() as scope:
            async with realtime.open_run("r") as run:
                runs.append(run)
                scope.cancel()
                await anyio.sleep(60)
        assert scope.cancelled_caught
        assert (await ended(realtime, runs[0].id)).status is Status.CANCELED
        assert realtime.engine.executions == {}


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_cancelling_the_task_of_the_host_cancels_the_run_and_the_task() -> None:
    async with make_realtime() as realtime:
        runs: list[Run] = []

        async def host() -> None:
            async with realtime.open_run("r") as run:
                runs.append(run)
                await asyncio.sleep(60)

        task = asyncio.get_running_loop().create_task(host())
        await until(lambda: runs)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await ended(realtime, runs[0].id)).status is Status.CANCELED


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_host_that_is_cancelled_twice_still_ends_its_run() -> None:
    """The second cancellation arrived during the wait for pipes, and the run stayed open."""
    async with make_realtime() as realtime:
        runs: list[Run] = []
        ends: list[Status] = []
        closing = anyio.Event()
        go = anyio.Event()

        class Source:
            def __aiter__(self) -> Source:
                return self

            async def __anext__(self) -> int:
                await anyio.sleep(60)
                return 1

            async def aclose(self) -> None:
                closing.set()
                await go.wait()

        async def host() -> None:
            async with realtime.open_run("r", on_end=lambda end: ends.append(end.run.status)) as run:
                runs.append(run)
                realtime.pipe(Source())
                await asyncio.sleep(60)

        task = asyncio.get_running_loop().create_task(host())
        await until(lambda: runs)
        await anyio.wait_all_tasks_blocked()
        task.cancel()
        await closing.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await ended(realtime, runs[0].id)).status is Status.CANCELED
        await until(lambda: ends == [Status.CANCELED])
        go.set()


async def test_cancel_cancels_the_body_and_raises_run_canceled() -> None:
    async with make_realtime() as realtime:
        reached: list[str] = []

        async def cancel() -> None:
            await started.wait()
            await realtime.cancel(runs[0])

        started = anyio.Event()
        runs: list[Run] = []
        async with anyio.create_task_group() as group:
            group.start_soon(cancel)
            with pytest.raises(RunCanceled):
                async with realtime.open_run("r") as run:
                    runs.append(run)
                    started.set()
                    try:
                        await anyio.sleep(60)
                    finally:
                        reached.append("cleanup")
                    reached.append("body")
            reached.append("after")
            await anyio.lowlevel.checkpoint()  # the cancellation has ended
        assert reached == ["cleanup", "after"]
        assert run.canceled
        assert (await ended(realtime, run.id)).status is Status.CANCELED


async def test_a_body_that_cancels_its_run_sees_it_at_its_end_at_the_latest() -> None:
    async with make_realtime() as realtime:
        with pytest.raises(RunCanceled):
            async with realtime.open_run("r") as run:
                await realtime.cancel(run)
                run.set_output("ignored")
        record = await ended(realtime, run.id)
        assert record.status is Status.CANCELED and record.output is None
        with pytest.raises(RunCanceled):
            async with realtime.open_run("r") as run:
                await realtime.cancel(run)
                await anyio.sleep(60)
        await anyio.lowlevel.checkpoint()


async def test_an_error_of_a_canceled_body_propagates() -> None:
    async with make_realtime() as realtime:
        with pytest.raises(ValueError, match="cleanup"):
            async with realtime.open_run("r") as run:
                await realtime.cancel(run)
                try:
                    await anyio.sleep(60)
                finally:
                    raise ValueError("cleanup")
        assert (await ended(realtime, run.id)).status is Status.FAILED


async def test_a_task_group_that_fails_during_the_cancellation_fails_the_run() -> None:
    """On trio the run stayed EXECUTING and delayed the stop."""

    async def child() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("cleanup")

    async with make_realtime() as realtime:
        with pytest.raises(ExceptionGroup) as failed:
            async with realtime.open_run("r") as run:
                async with anyio.create_task_group() as group:
                    group.start_soon(child)
                    await anyio.wait_all_tasks_blocked()
                    await realtime.cancel(run)
                    await anyio.sleep_forever()
        assert str(failed.value.exceptions[0]) == "cleanup"
        record = await ended(realtime, run.id)
        assert record.error == RunError("ValueError", "task failed")
        assert not realtime.engine.executions


async def test_an_open_run_cannot_be_entered_twice() -> None:
    async with make_realtime() as realtime:
        opened = realtime.open_run("r")
        async with opened:
            with pytest.raises(RuntimeError, match="opened before"):
                await opened.__aenter__()
        with pytest.raises(RuntimeError, match="call open_run\\(\\) again"):
            await opened.__aenter__()


async def test_invalid_arguments_are_rejected_before_the_run_opens() -> None:
    async with make_realtime() as realtime:
        with pytest.raises(LimitExceeded):
            realtime.open_run("x" * 129)
        with pytest.raises(UsageError):
            realtime.open_run("a/b")
        with pytest.raises(LimitExceeded):
            realtime.open_run("r", tags=list("abcdefghijk"))
        with pytest.raises(UsageError):
            realtime.open_run("r", metadata={"a\n": 1})


async def test_runs_can_be_nested() -> None:
    async with make_realtime() as realtime, realtime.open_run("outer") as outer:
        async with realtime.open_run("inner") as inner:
            assert current_run() is inner
        assert current_run() is outer
        assert (await ended(realtime, inner.id)).status is Status.COMPLETED
        assert (await realtime.get_run(outer)).status is Status.EXECUTING


async def test_opening_a_run_starts_the_realtime_on_first_use() -> None:
    realtime = make_realtime()
    async with realtime.open_run("r") as run:
        run.set_output(1)
    assert await realtime.result(run) == 1
    await realtime.stop()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_run_can_be_left_in_another_task() -> None:
    """Some hosts close the generator of a streaming response in another task."""
    async with make_realtime() as realtime:
        runs: list[Run] = []

        async def body() -> AsyncIterator[int]:
            async with realtime.open_run("r") as run:
                runs.append(run)
                yield 1
                run.set_output("left")
                yield 2

        iterator = body()
        loop = asyncio.get_running_loop()

        async def advance() -> Any:
            return await anext(iterator, None)

        assert [await loop.create_task(advance()) for _ in range(3)] == [1, 2, None]
        record = await ended(realtime, runs[0].id)
        assert (record.status, record.output) == (Status.COMPLETED, "left")
        assert realtime.engine.executions == {}


async def test_the_stop_interrupts_the_body_with_server_shutdown() -> None:
    """On trio the cancellation propagated into the host and ended its program."""
    realtime = make_realtime()
    await realtime.start()
    runs: list[Run] = []
    raised: list[BaseException] = []

    async def host() -> None:
        try:
            async with realtime.open_run("r") as run:
                runs.append(run)
                await anyio.sleep(60)
        except ServerShutdown as exc:
            raised.append(exc)
        await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(host)
        await until(lambda: runs)
        await realtime.stop()
    assert len(raised) == 1
    record = await realtime.get_run(runs[0].id)
    await realtime.stop()
    assert record.status is Status.FAILED
    assert record.error == RunError("ServerShutdown", "the server was shut down")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_run_that_an_ended_task_left_open_does_not_delay_the_stop() -> None:
    """The stop waited five seconds for code that had already ended."""
    realtime = make_realtime(timeouts=Timeouts(drain=0.01, cancel=60))
    runs: list[Run] = []

    async def leave_open() -> None:
        runs.append(await realtime.open_run("r").__aenter__())

    async with realtime:
        async with anyio.create_task_group() as group:
            group.start_soon(leave_open)
        with anyio.fail_after(GUARD_S):
            await realtime.stop()
    record = await realtime.get_run(runs[0])
    await realtime.stop()
    assert (record.status, record.error) == (Status.FAILED, RunError("ServerShutdown", "the server was shut down"))


class NoEnd(MemoryBroker):
    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        if record.is_completed:
            raise BrokerUnavailable("the broker is away")
        return await super().commit(record, expect=expect, change=change, floors=floors)


async def test_an_end_that_cannot_be_stored_does_not_hide_the_error_of_the_body(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with make_realtime(broker=NoEnd(), timeouts=Timeouts(append=0.01)) as realtime:
        with pytest.raises(ValueError, match="mine"):
            async with realtime.open_run("r"):
                raise ValueError("mine")
        assert "could not be stored: the broker is away" in caplog.text
        with pytest.raises(BrokerUnavailable):
            async with realtime.open_run("r"):
                pass
        assert realtime.engine.executions == {}


async def test_leaving_waits_for_pipes_and_a_cancellation_stops_them() -> None:
    async with make_realtime() as realtime:
        go = anyio.Event()

        async def chunks() -> AsyncIterator[int]:
            yield 1
            await go.wait()
            yield 2

        async def interrupt(scope: anyio.CancelScope) -> None:
            await anyio.wait_all_tasks_blocked()
            scope.cancel()

        async with anyio.create_task_group() as group:

            async def release() -> None:
                await anyio.wait_all_tasks_blocked()
                go.set()

            group.start_soon(release)
            async with realtime.open_run("r") as run:
                realtime.pipe(chunks())
        assert [chunk async for chunk in realtime.read(run)] == [1, 2]
        assert (await ended(realtime, run.id)).status is Status.COMPLETED

        go = anyio.Event()
        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                async with realtime.open_run("r") as run:
                    pipe = realtime.pipe(chunks())
                    group.start_soon(interrupt, scope)
        assert scope.cancelled_caught
        assert (await ended(realtime, run.id)).status is Status.CANCELED
        assert pipe.result.chunks == 1


async def test_open_run_works_with_a_slow_broker() -> None:
    async with make_realtime(broker=DistantBroker()) as realtime:
        async with realtime.open_run("r") as run:
            run.metadata.set("n", 1)
            await realtime.append("x")
        record = await ended(realtime, run.id)
        assert (record.status, record.metadata) == (Status.COMPLETED, {"n": 1})
        with pytest.raises(RunCanceled):
            async with realtime.open_run("r") as run:
                await realtime.cancel(run)
                await anyio.sleep(60)


async def test_a_run_has_a_handle_for_a_browser() -> None:
    realtime = make_realtime()

    @realtime.task("t")
    async def task(run: Run) -> bool:
        return realtime.verify_token(run.handle.public_access_token).scopes[0] == f"read:runs:{run.id}"

    async with realtime:
        async with realtime.open_run("r") as run:
            assert run.handle is run.handle
            assert (run.handle.id, run.handle.is_cached) == (run.id, False)
            assert f"read:runs:{run.id}" in realtime.verify_token(run.handle.public_access_token).scopes
        assert await run.handle.result() is None
        assert await (await realtime.trigger(task)).result()
