"""The blocking calls, from threads and from `def` tasks."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

from asgi_realtime import (
    InvalidPayload,
    NoCurrentRun,
    Pipe,
    Realtime,
    Run,
    RunCanceled,
    RunFailed,
    RunNotFound,
    RunRecord,
    ServerShutdown,
    Status,
    StreamChunk,
    StreamClosed,
    SyncPipe,
    ThreadBusy,
    UsageError,
    current_run,
)
from asgi_realtime.sync import SyncRealtime
from tests.blocking import GUARD_S, in_thread, wait_for, with_tasks
from tests.inprocess import make_realtime, until

pytestmark = pytest.mark.anyio


async def test_all_calls_work_from_a_thread() -> None:
    realtime = with_tasks()
    sync = realtime.sync
    assert realtime.sync is sync

    def work() -> None:
        handle = sync.trigger("double", 4, tags="user:1")
        assert sync.result(handle, timeout=GUARD_S) == 8
        record = sync.get_run(handle)
        assert (record.status, record.tags) == (Status.COMPLETED, ("user:1",))
        assert sync.cancel(handle) == record
        batch = sync.batch_trigger([("double", 1), ("double", 2)])
        assert [sync.result(run_id, timeout=GUARD_S) for run_id in batch.runs] == [2, 4]
        assert sync.pipe([1, 2, 3], tags=["piped"]).wait_until_complete().chunks == 3
        later = sync.trigger("double", 5, delay="1h")
        sync.execute(later.id)  # it is not QUEUED
        assert sync.cancel(later.id).status is Status.CANCELED

    async with realtime:
        await in_thread(work)


async def test_a_stream_is_written_and_read_from_a_thread() -> None:
    async with make_realtime() as realtime:
        async with realtime.open_run("r") as run:

            def write() -> None:
                realtime.sync.append("a")  # to the current run: the thread has its caller's context
                realtime.sync.append("b", run=run)
                realtime.sync.pipe(iter(["c", "d"]), run=run.id).wait_until_complete()
                realtime.sync.send_input(run, "in", {"ok": True})
                reader = realtime.sync.read(run, start_index=1)
                assert [next(reader), next(reader)] == ["b", "c"]
                with pytest.raises(TimeoutError, match="no chunk arrived in stream 'empty'"):
                    next(realtime.sync.read(run, "empty", timeout=0.01))

            await in_thread(write)
            assert await run.input("in").get(timeout=GUARD_S) == {"ok": True}
        assert await in_thread(lambda: list(realtime.sync.read(run))) == ["a", "b", "c", "d"]


def test_the_calls_match_the_async_ones() -> None:
    """Calls that wait have the same name and arguments here. Calls that do not wait need no blocking form."""
    waits = {
        name
        for name, value in inspect.getmembers_static(Realtime)
        if not name.startswith("_") and inspect.isfunction(value) and is_async(value)
    }
    life = {"start", "ensure_started", "stop", "lifespan"}
    objects = {"writer", "read_as"}  # their methods are async; use `append` and `pipe`
    ours = {
        name for name, value in vars(SyncRealtime).items() if not name.startswith("_") and inspect.isfunction(value)
    }
    assert ours == (waits - life - objects) | {"close", "get_input"}
    for name in ours - {"close", "get_input"}:
        assert parameters(SyncRealtime, name) == parameters(Realtime, name)


def test_a_sync_pipe_has_the_calls_of_a_pipe() -> None:
    run_side = {"run", "fail", "stop", "settled", "unseen_error"}
    calls = {"aclose": "close", "__aiter__": "__iter__", "__anext__": "__next__"}
    theirs = {calls.get(name, name): name for name in public(Pipe) - run_side}
    assert public(SyncPipe) == theirs.keys() | {"error"}  # an attribute of `Pipe`
    for name, theirs_name in theirs.items():
        if inspect.isfunction(vars(SyncPipe)[name]):
            assert parameters(SyncPipe, name) == parameters(Pipe, theirs_name)


def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_") or name.strip("_") in CALLED_BY_SYNTAX}


CALLED_BY_SYNTAX = {"iter", "next", "aiter", "anext"}


def parameters(kind: type, name: str) -> list[tuple[str, Any, Any]]:
    """The names, kinds and defaults of a method's parameters."""
    found = inspect.signature(getattr(kind, name)).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in found]


def is_async(function: Callable[..., Any]) -> bool:
    returned = str(inspect.signature(function).return_annotation)
    return inspect.iscoroutinefunction(function) or any(
        word in returned for word in ("Async", "Pipe", "StreamWriterContext")
    )


async def test_threads_work_without_an_event_loop() -> None:
    realtime = with_tasks()

    def work() -> None:
        sync = realtime.sync
        with sync.open_run("answer", thread="chat:1") as run:
            active = sync.active_run("chat:1")
            assert active is not None and active.id == run.id
            for attempt in (
                lambda: sync.trigger("double", 1, thread="chat:1"),
                lambda: sync.open_run("answer", thread="chat:1").__enter__(),
            ):
                with pytest.raises(ThreadBusy):
                    attempt()
        with pytest.raises(RunCanceled), sync.open_run("answer", thread="chat:1") as replaced:
            sync.result(sync.trigger("double", 1, thread="chat:1", on_conflict="replace"), timeout=GUARD_S)
            assert replaced.canceled
        assert sync.active_run("chat:1") is None
        pipe = sync.pipe(["a"], thread="chat:1")
        pipe.wait_until_complete()
        assert sync.get_run(pipe.run_id).thread == "chat:1"

    async with realtime:
        await in_thread(work)


async def test_runs_are_followed_from_a_thread() -> None:
    realtime = with_tasks()

    def work() -> None:
        sync = realtime.sync
        batch = sync.batch_trigger([("double", 1, {"tags": ["a"]}), ("double", 2)])
        assert {record.id for record in sync.subscribe_to_batch(batch)} == set(batch.runs)
        states = list(sync.subscribe_to_run(batch.runs[1]))
        assert (states[-1].status, states[-1].output) == (Status.COMPLETED, 4)
        tagged = sync.subscribe_to_runs_with_tag("a")
        assert next(tagged).id == batch.runs[0]
        sync.pipe(["x", "y"], tags=["b"]).wait_until_complete()
        run = next(sync.subscribe_to_runs_with_tag("b"))
        seen = list(sync.subscribe_to_run(run, with_streams=True))
        assert [item.chunk for item in seen if isinstance(item, StreamChunk)] == ["x", "y"]
        with pytest.raises(RunNotFound):
            next(sync.subscribe_to_run("run_unknown"))

    async with realtime:
        await in_thread(work)


async def test_an_iterator_that_is_abandoned_leaves_no_waiter() -> None:
    async with with_tasks() as realtime:
        run = await realtime.trigger("double", 1, delay="1h", tags=["a"])  # nothing else follows this run

        def work() -> None:
            realtime.sync.append("a", run=run)
            for reader in (
                realtime.sync.read(run),
                realtime.sync.subscribe_to_run(run),
                realtime.sync.subscribe_to_runs_with_tag("a"),
            ):
                for _ in reader:
                    break

        await in_thread(work)
        broker: Any = realtime.broker
        assert not any(len(topic.waiting) for topic in broker._topics.values())


async def test_a_thread_holds_a_run_open() -> None:
    async with make_realtime() as realtime:

        def work() -> RunRecord:
            with realtime.sync.open_run("import", tags=["a"], metadata={"rows": 0}) as run:
                assert current_run() is run
                realtime.sync.append("chunk")
                run.metadata.set("rows", 3)
                assert realtime.sync.get_run(run).status is Status.EXECUTING
                run.set_output("done")
            with pytest.raises(NoCurrentRun):
                current_run()
            return realtime.sync.get_run(run)

        record = await in_thread(work)
        assert (record.status, record.output, record.metadata) == (Status.COMPLETED, "done", {"rows": 3})
        assert [chunk async for chunk in realtime.read(record)] == ["chunk"]
        assert realtime.engine.executions == {}


@pytest.mark.parametrize("error, status", [(ValueError("no"), Status.FAILED), (KeyboardInterrupt(), Status.CANCELED)])
async def test_an_exception_ends_the_run_that_a_thread_holds_open(error: BaseException, status: Status) -> None:
    async with make_realtime() as realtime:

        def work() -> RunRecord:
            with pytest.raises(type(error)) as raised:
                with realtime.sync.open_run("import") as run:
                    raise error
            assert raised.value is error
            return realtime.sync.get_run(run)

        record = await in_thread(work)
        assert record.status is status
        assert realtime.engine.executions == {}


async def test_a_run_that_a_thread_holds_open_can_be_canceled() -> None:
    async with make_realtime() as realtime:

        def work() -> RunRecord:
            with pytest.raises(RunCanceled):
                with realtime.sync.open_run("import") as run:
                    realtime.sync.cancel(run)
                    wait_for(lambda: realtime.sync.get_run(run).is_completed)
                    assert run.canceled
                    with pytest.raises(StreamClosed):
                        realtime.sync.append("late")
            with pytest.raises(RunCanceled) as raised:
                with realtime.sync.open_run("import") as run:
                    realtime.sync.cancel(run)
                    wait_for(lambda: realtime.sync.get_run(run).is_completed)
                    raise ValueError("on the way out")
            assert isinstance(raised.value.__cause__, ValueError)
            return realtime.sync.get_run(run)

        assert (await in_thread(work)).status is Status.CANCELED


async def test_a_run_that_a_thread_holds_open_ends_at_the_shutdown() -> None:
    realtime = make_realtime()
    opened, go = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with realtime.sync.open_run("import"):
                opened.set()
                go.wait(GUARD_S)
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=work)
    async with realtime:
        thread.start()
        await until(opened.is_set)
    go.set()
    await until(lambda: not thread.is_alive())
    assert [type(error) for error in errors] == [ServerShutdown]


async def test_a_run_that_cannot_be_opened_raises_the_reason() -> None:
    async with make_realtime() as realtime:

        def work() -> None:
            with realtime.sync.open_run("x" * 1000):
                raise AssertionError("opened")

        with pytest.raises(UsageError):
            await in_thread(work)


async def test_a_def_task_waits_for_input() -> None:
    realtime = make_realtime()

    @realtime.task("publish")
    def publish() -> Any:
        with pytest.raises(TimeoutError):
            realtime.sync.get_input("nothing", timeout=0.01)
        return [realtime.sync.get_input("approval", timeout=GUARD_S) for _ in range(2)]

    async with realtime:
        handle = await realtime.trigger(publish)
        for answer in ("yes", "no"):
            await realtime.send_input(handle, "approval", answer)
        assert await handle.result(timeout=GUARD_S) == ["yes", "no"]
        with pytest.raises(NoCurrentRun):
            await in_thread(lambda: realtime.sync.get_input("approval"))


async def test_each_call_raises_what_the_async_one_raises() -> None:
    realtime = with_tasks()

    def work() -> None:
        with pytest.raises(InvalidPayload):
            realtime.sync.trigger("double", "x")
        with pytest.raises(RunNotFound):
            realtime.sync.get_run("run_unknown")
        with pytest.raises(RunFailed, match="no"):
            realtime.sync.result(realtime.sync.trigger("fails"), timeout=GUARD_S)

        def broken() -> Any:
            yield 1
            raise ValueError("source")

        with pytest.raises(ValueError, match="source"):
            realtime.sync.pipe(broken()).wait_until_complete()

    async with realtime:
        await in_thread(work)


async def test_a_def_task_uses_the_calls_for_its_own_run() -> None:
    realtime = make_realtime()

    @realtime.task("t")
    def task(run: Run) -> Any:
        realtime.sync.append("chunk")
        run.metadata.set("n", 1)
        return realtime.sync.get_run(run).status

    async with realtime:
        handle = await realtime.trigger(task)
        assert await handle.result(timeout=GUARD_S) == "EXECUTING"
        assert [chunk async for chunk in realtime.read(handle)] == ["chunk"]


CALLS: list[Callable[[Realtime], Any]] = [
    lambda realtime: realtime.sync.trigger("double", 1),
    lambda realtime: realtime.sync.get_run("run_x"),
    lambda realtime: realtime.sync.append(1, run="run_x"),
    lambda realtime: next(realtime.sync.read("run_x")),
]


@pytest.mark.parametrize("call", CALLS)
async def test_the_calls_raise_on_the_thread_of_an_event_loop(call: Callable[[Realtime], Any]) -> None:
    realtime = with_tasks()
    with pytest.raises(RuntimeError, match="await the async call there"):
        call(realtime)  # not started, but on a loop
    assert realtime.engine.supervisor is None
    async with realtime:
        with pytest.raises(RuntimeError, match="await the async call there"):
            call(realtime)

        errors: list[BaseException] = []

        async def on_another_loop() -> None:
            try:
                call(realtime)
            except RuntimeError as exc:
                errors.append(exc)

        thread = threading.Thread(target=lambda: anyio.run(on_another_loop))
        thread.start()
        await until(lambda: not thread.is_alive())
        assert ["await the async call there" in str(error) for error in errors] == [True]


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_raise_without_a_loop_and_with_a_memory_broker(call: Callable[[Realtime], Any]) -> None:
    realtime = with_tasks()
    with pytest.raises(RuntimeError, match="its broker is in memory, so the call would have no effect"):
        call(realtime)
