"""Stopping a `Realtime`: what happens to its runs, with the broker and without it."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Mapping

import anyio
import pytest

from asgi_realtime import BrokerUnavailable, Run, RunError, Status, Timeouts
from asgi_realtime.brokers.base import ChangeMark
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.engine import drain as drain_module
from tests.inprocess import GUARD_S, ended, make_realtime, until


def threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("asgi_realtime")]


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
        go.wait(GUARD_S)

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
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        await anyio.sleep(0.005)
        return await super().commit(record, expect=expect, change=change, floors=floors)


@pytest.mark.anyio
async def test_all_waiting_runs_end_even_if_that_takes_longer_than_the_drain() -> None:
    """The drain interrupted this, and the rest stayed QUEUED."""
    realtime = make_realtime(broker=Slow(), timeouts=Timeouts(tick=0.01, drain=0.02, cancel=GUARD_S))

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
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
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
async def test_a_stop_without_the_broker_is_prompt_and_logs_no_traceback(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took as long as a commit is retried, 30 s, and logged the traceback of an expected error."""
    monkeypatch.setattr(drain_module, "PATIENCE_S", 0.05)
    broker = NoCommits()
    realtime = make_realtime(broker=broker, timeouts=Timeouts(tick=0.01, drain=0.02, cancel=600))

    @realtime.task("t")
    async def task() -> None:
        await anyio.sleep(60)

    async def endless() -> AsyncIterator[int]:
        yield 1
        await anyio.sleep(60)

    await realtime.start()
    await realtime.trigger(task)
    pipe = realtime.pipe(endless())
    await until(lambda: pipe.result.chunks == 1 and len(realtime.engine.executions) == 2)
    broker.away = True
    with anyio.fail_after(GUARD_S):
        await realtime.stop()
    assert [record for record in caplog.records if record.exc_info] == []
    broker.away = False
    async with realtime, realtime.open_run("r") as run:  # the next start is patient again
        broker.away = True
        run.metadata.set("n", 1)
        async with anyio.create_task_group() as group:
            group.start_soon(run.metadata.flush)
            await anyio.sleep(0.1)
            broker.away = False


class Hanging(MemoryBroker):
    """Does not respond while `hangs`. Leaving it ends its calls."""

    hangs = False

    def __init__(self) -> None:
        super().__init__()
        self._left = anyio.Event()

    async def _respond(self) -> None:
        if self.hangs:
            await self._left.wait()
            raise ServerShutdown

    async def ping(self) -> None:
        await self._respond()

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        await self._respond()
        return await super().commit(record, expect=expect, change=change, floors=floors)

    async def __aexit__(self, *exc_info: object) -> None:
        self._left.set()


@pytest.mark.anyio
async def test_a_stop_does_not_wait_for_a_broker_that_does_not_respond(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took `timeouts.cancel`, 5 s."""
    monkeypatch.setattr(drain_module, "PATIENCE_S", 0.05)
    broker = Hanging()
    realtime = make_realtime(broker=broker, timeouts=Timeouts(tick=0.01, drain=0.02, cancel=600))

    @realtime.task("t")
    async def task() -> None:
        await anyio.sleep(60)

    await realtime.start()
    await realtime.trigger(task)
    await until(lambda: realtime.engine.executions)
    broker.hangs = True
    with anyio.fail_after(GUARD_S):
        await realtime.stop()
    assert [record for record in caplog.records if record.exc_info] == []
