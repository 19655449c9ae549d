"""`on_end`: called once for each run that ends, whatever ends it, and by another process if the first one dies."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime import (
    InvalidConfiguration,
    Limits,
    Realtime,
    Retention,
    RunCanceled,
    RunEnd,
    RunNotFound,
    Status,
    SyncRunEnd,
    Timeouts,
    UsageError,
)
from asgi_realtime.ai.message import message_id_of
from asgi_realtime.brokers.base import ChangeMark, StreamKey
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.run_changes import Finished, Started, apply
from asgi_realtime.engine.on_end import ABANDONED_S
from tests.brokers.backends import DistantBroker
from tests.inprocess import GUARD_S, FakeClock, ended, make_realtime, until

pytestmark = pytest.mark.anyio


class Calls(list[tuple[str, Status, list[Any]]]):
    """An `on_end` function that notes its calls: the run, its status and its chunks."""

    async def __call__(self, end: RunEnd) -> None:
        self.append((end.run.id, end.run.status, await end.chunks()))


async def is_due(realtime: Realtime, run_id: str, clock: FakeClock) -> bool:
    clock.seconds += realtime.timeouts.lease + 1
    return run_id in await realtime.broker.due("on_end")


def add_tasks(realtime: Realtime, on_end: Any) -> None:
    @realtime.task("complete", on_end=on_end)
    async def complete() -> int:
        await realtime.append("a")
        return 1

    @realtime.task("fail", on_end=on_end)
    async def fail() -> None:
        await realtime.append("a")
        raise ValueError("a failure")

    @realtime.task("endless", on_end=on_end)
    async def endless() -> None:
        await realtime.append("a")
        await anyio.sleep_forever()


@pytest.mark.parametrize("is_sync", [False, True])
async def test_a_process_calls_a_limited_number_at_a_time(is_sync: bool) -> None:
    """Each call can need a connection to a database, and a thousand runs can end at once."""
    open_calls: set[str] = set()
    called: list[str] = []
    may_return = threading.Event()

    def on_end(end: SyncRunEnd) -> None:
        open_calls.add(end.run.id)
        may_return.wait()
        called.append(end.run.id)
        open_calls.discard(end.run.id)

    async def on_end_async(end: RunEnd) -> None:
        open_calls.add(end.run.id)
        await until(may_return.is_set)
        called.append(end.run.id)
        open_calls.discard(end.run.id)

    async with make_realtime(limits=Limits(on_end_calls=3), timeouts=Timeouts(tick=0.01, drain=GUARD_S)) as realtime:
        add_tasks(realtime, on_end if is_sync else on_end_async)
        handles = [await realtime.trigger("complete") for _ in range(20)]
        for handle in handles:
            await ended(realtime, handle)
        try:
            await until(lambda: len(open_calls) >= 3)
            async with realtime.open_run("unrelated"):
                await realtime.append("not delayed")
            assert (len(open_calls), called) == (3, [])
            assert len(realtime.engine.on_ends.ids) == 20, "those that wait are renewed, too"
        finally:
            may_return.set()
    assert sorted(called) == sorted(handle.id for handle in handles), "the shutdown waits for them"


async def test_a_call_that_waits_for_others_and_is_cut_remains_due() -> None:
    clock, started = FakeClock(), Calls()

    async def on_end(end: RunEnd) -> None:
        await started(end)
        await anyio.sleep_forever()

    async with make_realtime(clock=clock, limits=Limits(on_end_calls=1)) as realtime:
        add_tasks(realtime, on_end)
        handles = [await realtime.trigger("complete") for _ in range(2)]
        for handle in handles:
            await ended(realtime, handle)
        await until(lambda: started)
    assert len(started) == 1
    for handle in handles:
        assert await is_due(realtime, handle.id, clock)


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELED, Status.TIMED_OUT])
async def test_on_end_is_called_however_the_code_of_the_run_ends(status: Status) -> None:
    clock, calls = FakeClock(), Calls()
    realtime = make_realtime(clock=clock)
    add_tasks(realtime, calls)
    async with realtime:
        match status:
            case Status.COMPLETED:
                handle = await realtime.trigger("complete")
            case Status.FAILED:
                handle = await realtime.trigger("fail")
            case Status.CANCELED:
                handle = await realtime.trigger("endless")
                await anext(aiter(realtime.read(handle)))
                await realtime.cancel(handle)
            case _:
                handle = await realtime.trigger("endless", max_duration=0.05)
        await until(lambda: calls)
        await until(lambda: not realtime.engine.on_ends.ids)
        assert not await is_due(realtime, handle.id, clock)
        await realtime.engine.make_ticker().once()
    assert calls == [(handle.id, status, ["a"])]


async def test_on_end_is_called_for_runs_that_never_started() -> None:
    calls = Calls()
    realtime = make_realtime()
    add_tasks(realtime, calls)
    async with realtime:
        canceled = await realtime.trigger("complete", delay="1h")
        await realtime.cancel(canceled)
        expired = await realtime.trigger("complete", delay="1h", ttl="1m")
        await realtime.runs.update(expired.id, Finished(Status.EXPIRED))  # as the ticker of any process does
        await until(lambda: len(calls) == 2)
    assert sorted(calls) == sorted([(canceled.id, Status.CANCELED, []), (expired.id, Status.EXPIRED, [])])


async def test_a_run_without_on_end_is_never_due() -> None:
    clock = FakeClock()
    realtime = make_realtime(clock=clock)
    add_tasks(realtime, None)
    async with realtime:
        handle = await realtime.trigger("complete")
        await handle.result()
        assert not await is_due(realtime, handle.id, clock)


# Processes that die


async def left_by_a_dead_process(realtime: Realtime, task: str, status: Status) -> str:
    """A run with a chunk, as a process leaves it that is killed in this status."""
    record = realtime.tasks.prepare(task, None, {}).record
    await realtime.runs.create(record)
    started = apply(record, [Started("dead")], realtime.runs.now_ms())
    await realtime.broker.commit(started, expect=1, change=ChangeMark("dead", 0))
    await realtime.broker.append(StreamKey(record.id, "default"), [b'"a"'])
    if status is not Status.EXECUTING:
        over = apply(started, [Finished(status)], realtime.runs.now_ms())
        await realtime.broker.commit(over, expect=2, change=ChangeMark("dead", 1))
    return record.id


@pytest.mark.parametrize(("left", "found"), [(Status.EXECUTING, Status.CRASHED), (Status.CANCELED, Status.CANCELED)])
async def test_another_process_calls_the_on_end_of_a_process_that_died(left: Status, found: Status) -> None:
    """It died while it executed the run, or after the commit and before the function had returned."""
    clock, calls = FakeClock(), Calls()
    realtime = make_realtime(clock=clock)
    add_tasks(realtime, calls)
    async with realtime:
        run_id = await left_by_a_dead_process(realtime, "endless", left)
        await realtime.engine.make_ticker().once()
        assert calls == [], "its lease has not expired"
        clock.seconds += realtime.timeouts.lease + 1
        await until(lambda: calls and not realtime.engine.on_ends.ids)
        assert not await is_due(realtime, run_id, clock)
        await realtime.engine.make_ticker().once()
    assert calls == [(run_id, found, ["a"])]


async def test_of_several_processes_one_takes_over() -> None:
    clock, calls = FakeClock(), Calls()
    broker = DistantBroker(clock=clock)
    async with AsyncExitStack() as started:
        processes = [make_realtime(broker=broker, clock=clock) for _ in range(3)]
        for process in processes:
            add_tasks(process, calls)
            await started.enter_async_context(process)
        run_id = await left_by_a_dead_process(processes[0], "endless", Status.COMPLETED)
        clock.seconds += processes[0].timeouts.lease + 1
        async with anyio.create_task_group() as group:
            for process in processes:
                group.start_soon(process.engine.make_ticker().once)
        await until(lambda: not any(process.engine.on_ends.ids for process in processes))
    assert calls == [(run_id, Status.COMPLETED, ["a"])]


async def test_a_process_without_the_task_leaves_the_on_end_to_others() -> None:
    clock, calls = FakeClock(), Calls()
    broker = MemoryBroker(clock=clock)
    knows, knows_not = (make_realtime(broker=broker, clock=clock) for _ in range(2))
    add_tasks(knows, calls)
    async with knows_not:
        run_id = await left_by_a_dead_process(knows, "endless", Status.EXECUTING)
        clock.seconds += knows.timeouts.lease + 1
        assert (await ended(knows_not, run_id)).status is Status.CRASHED
        clock.seconds += knows.timeouts.lease + 1
        await knows_not.engine.make_ticker().once()
        async with knows:
            await until(lambda: calls)
    assert calls == [(run_id, Status.CRASHED, ["a"])]


async def test_the_lease_of_a_long_call_is_renewed() -> None:
    clock, begun, go = FakeClock(), anyio.Event(), anyio.Event()
    realtime = make_realtime(clock=clock)
    calls: list[str] = []

    async def long(end: RunEnd) -> None:
        calls.append(end.run.id)
        begun.set()
        await go.wait()

    add_tasks(realtime, long)
    async with realtime:
        handle = await realtime.trigger("complete")
        await begun.wait()
        for _ in range(5):
            clock.seconds += realtime.timeouts.lease / 2
            await realtime.engine.make_ticker().once()
            assert await realtime.broker.due("on_end") == []
        clock.seconds += realtime.timeouts.lease + 1
        await realtime.engine.on_ends.take_over(handle.id)  # the ticker was late: this is still our own call
        go.set()
        await until(lambda: not realtime.engine.on_ends.ids)
        assert not await is_due(realtime, handle.id, clock)
    assert calls == [handle.id]


class RenewedByThread(MemoryBroker):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.renewed: list[str] = []

    def renew_from_thread(self, run_ids: Sequence[str], *, owner: str) -> None:
        self.renewed += run_ids


async def test_a_thread_renews_the_lease_of_a_call_that_was_taken_over() -> None:
    clock = FakeClock()
    timeouts = Timeouts(tick=0.01, lease=0.03)
    broker = RenewedByThread(clock=clock, timeouts=timeouts)
    realtime = make_realtime(broker=broker, clock=clock, timeouts=timeouts)

    async def long(end: RunEnd) -> None:
        await until(lambda: broker.renewed)

    add_tasks(realtime, long)
    async with realtime:
        run_id = await left_by_a_dead_process(realtime, "endless", Status.COMPLETED)
        clock.seconds += 1
        await until(lambda: broker.renewed and not realtime.engine.on_ends.ids)
    assert set(broker.renewed) == {run_id}


async def test_a_run_is_retained_until_its_on_end_was_called() -> None:
    clock, go = FakeClock(), anyio.Event()
    realtime = make_realtime(clock=clock, retention=Retention(after_end=1))
    found: list[Any] = []

    async def slow(end: RunEnd) -> None:
        await go.wait()
        found.extend(await end.chunks())

    add_tasks(realtime, slow)
    async with realtime:
        handle = await realtime.trigger("complete")
        await handle.result()
        clock.seconds += 2
        await realtime.engine.make_ticker().once()
        go.set()
        await until(lambda: not realtime.engine.on_ends.ids)
        assert found == ["a"]
        await realtime.engine.make_ticker().once()
        with pytest.raises(RunNotFound):
            await realtime.get_run(handle)


async def test_an_on_end_that_no_process_has_anymore_is_given_up_after_a_day(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    broker = MemoryBroker(clock=clock)
    old, new = (make_realtime(broker=broker, clock=clock, retention=Retention(after_end=1)) for _ in range(2))
    add_tasks(old, Calls())
    async with new:
        run_id = await left_by_a_dead_process(old, "endless", Status.COMPLETED)
        clock.seconds += ABANDONED_S
        await new.engine.make_ticker().once()
        assert (await new.get_run(run_id)).is_completed
        clock.seconds += 2
        for _ in range(2):
            await new.engine.make_ticker().once()
        with pytest.raises(RunNotFound):
            await new.get_run(run_id)
    assert f"the on_end of run {run_id} was not called: no process has its task 'endless'" in caplog.text


# The function


async def test_a_failure_is_logged_and_not_repeated(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    realtime = make_realtime(clock=clock)
    calls: list[str] = []

    async def failing(end: RunEnd) -> None:
        calls.append(end.run.id)
        raise SystemExit("a bug in on_end")

    add_tasks(realtime, failing)
    async with realtime:
        handle = await realtime.trigger("complete")
        assert await handle.result() == 1
        await until(lambda: calls and not realtime.engine.on_ends.ids)
        assert not await is_due(realtime, handle.id, clock)
        assert (await realtime.get_run(handle)).status is Status.COMPLETED
    assert calls == [handle.id]
    assert f"the on_end of run {handle.id} (task 'complete') failed" in caplog.text


async def test_a_def_function_runs_in_a_thread_with_blocking_calls() -> None:
    realtime = make_realtime()
    found: list[Any] = []

    def save(end: SyncRunEnd) -> None:
        found.append((threading.current_thread().name, repr(end), end.chunks(), end.message()["parts"][0]["text"]))

    add_tasks(realtime, save)
    async with realtime:
        handle = await realtime.trigger("complete")
        await until(lambda: found)
    assert found == [("asgi_realtime task", f"<RunEnd {handle.id} COMPLETED>", ["a"], "a")]


async def test_a_lambda_can_return_an_awaitable() -> None:
    realtime = make_realtime()
    saved: list[str] = []

    async def save(run_id: str) -> None:
        saved.append(run_id)

    add_tasks(realtime, lambda end: save(end.run.id))
    async with realtime:
        handle = await realtime.trigger("complete")
        await until(lambda: saved)
    assert saved == [handle.id]


async def test_the_message_is_assembled_from_the_parts_of_the_run() -> None:
    realtime = make_realtime()
    messages: list[dict[str, Any]] = []

    async def save(end: RunEnd) -> None:
        messages.append(await end.message("answer"))

    async with realtime:
        async with realtime.open_run("chat", on_end=save) as run:
            for part in (
                {"type": "text-start", "id": "1"},
                {"type": "text-delta", "id": "1", "delta": "Hello"},
            ):
                await realtime.append(part, "answer")
        await until(lambda: messages)
    (message,) = messages
    assert (message["id"], message["role"]) == (message_id_of(run.id), "assistant")
    assert message["parts"][0]["text"] == "Hello"


async def test_what_is_not_a_function_of_one_argument_is_rejected() -> None:
    realtime = make_realtime()
    for wrong in (3, lambda: None, lambda end, more: None):
        with pytest.raises(InvalidConfiguration, match="allowed is a function that takes one argument, a RunEnd"):
            realtime.task("t", on_end=wrong)(anyio.sleep_forever)  # type: ignore[arg-type]
        with pytest.raises(InvalidConfiguration, match="allowed is"):
            realtime.pipe(["a"], on_end=wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidConfiguration, match="allowed is"):
            realtime.open_run("r", on_end=wrong)  # type: ignore[arg-type]
    async with realtime, realtime.open_run("r"):
        with pytest.raises(UsageError, match="on_end= is for a run that pipe"):
            realtime.pipe(["a"], on_end=lambda end: None)


# Pipes and open runs


async def numbers() -> AsyncIterator[int]:
    yield 1
    await anyio.sleep_forever()


async def test_the_on_end_of_a_pipe_is_called_when_its_source_ends_or_fails() -> None:
    calls = Calls()

    async def broken() -> AsyncIterator[int]:
        yield 2
        raise ValueError("the source failed")

    async with make_realtime() as realtime:
        handles = [realtime.pipe(source, on_end=calls).handle for source in ([1], broken())]
        await until(lambda: len(calls) == 2)
    expected = zip(handles, (Status.COMPLETED, Status.FAILED), ([1], [2]), strict=True)
    assert sorted(calls) == sorted((handle.id, status, chunks) for handle, status, chunks in expected)


async def test_the_on_end_of_an_open_run_is_called_whichever_process_ends_it() -> None:
    """The ticker of another process ends a run whose owner did not react to its cancellation."""
    calls = Calls()
    broker = MemoryBroker()
    ours, theirs = make_realtime(broker=broker), make_realtime(broker=broker)
    async with ours, theirs:
        with pytest.raises(RunCanceled):
            async with ours.open_run("r", on_end=calls) as run:
                await ours.append("a")
                await theirs.runs.update(run.id, Finished(Status.CANCELED))
                await anyio.sleep_forever()
        await until(lambda: calls)
    assert calls == [(run.id, Status.CANCELED, ["a"])]


async def test_the_on_end_of_a_run_that_is_ended_twice_is_called_once() -> None:
    """A shutdown can end a run while its own code does."""
    calls = Calls()
    async with make_realtime() as realtime:
        async with realtime.open_run("r", on_end=calls) as run:
            await realtime.engine.executions[run.id].finish_failed(ValueError("the first end wins"))
        await until(lambda: calls and not realtime.engine.on_ends.ids)
    assert calls == [(run.id, Status.FAILED, [])]


# Shutdown


async def test_a_shutdown_is_over_with_the_last_on_end() -> None:
    realtime = make_realtime(timeouts=Timeouts(tick=0.01, drain=600))
    begun = anyio.Event()

    async def save(end: RunEnd) -> None:
        begun.set()
        await until(lambda: realtime.closing)
        await anyio.lowlevel.checkpoint()

    add_tasks(realtime, save)
    async with realtime:
        await realtime.trigger("complete")
        await begun.wait()


async def test_a_shutdown_waits_for_the_on_end_of_drained_and_cut_runs() -> None:
    saved: list[Status] = []
    realtime = make_realtime(timeouts=Timeouts(tick=0.01, drain=0.02, cancel=5))

    async def save(end: RunEnd) -> None:
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        saved.append(end.run.status)

    add_tasks(realtime, save)
    async with realtime:
        handle = await realtime.trigger("complete")
        await handle.result()
        cut = await realtime.trigger("endless")
        await anext(aiter(realtime.read(cut)))
        pipe = realtime.pipe(numbers(), on_end=save)
        await pipe.wait_until_started()
    assert saved == [Status.COMPLETED, Status.FAILED, Status.FAILED]


async def test_what_a_shutdown_cuts_is_called_by_another_process(caplog: pytest.LogCaptureFixture) -> None:
    clock, calls, begun = FakeClock(), Calls(), anyio.Event()
    broker = MemoryBroker(clock=clock)
    timeouts = Timeouts(tick=0.01, drain=0.02, cancel=0.02)
    ours, theirs = (make_realtime(broker=broker, clock=clock, timeouts=timeouts) for _ in range(2))

    async def endless(end: RunEnd) -> None:
        begun.set()
        await anyio.sleep_forever()

    add_tasks(ours, endless)
    add_tasks(theirs, calls)
    async with ours:
        handle = await ours.trigger("complete")
        await begun.wait()
    assert f"the on_end of run {handle.id} (task 'complete') was cut by the shutdown" in caplog.text
    async with theirs:
        await theirs.engine.make_ticker().once()
        assert calls == []
        clock.seconds += timeouts.lease + 1
        await until(lambda: calls)
    assert calls == [(handle.id, Status.COMPLETED, ["a"])]
