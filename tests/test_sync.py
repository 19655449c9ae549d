from __future__ import annotations

import asyncio
import inspect
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import FrameType
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
    TaskError,
    ThreadBusy,
    Timeouts,
    UsageError,
    current_run,
)
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.runs import StoredRecord, run_topic
from asgi_realtime.engine import thread_bridge
from asgi_realtime.loop import thread_calls
from asgi_realtime.loop.thread_calls import LoopThread, ThreadCall
from asgi_realtime.sync import SyncRealtime
from tests.inprocess import make_realtime, until

pytestmark = pytest.mark.anyio


def with_tasks(**options: Any) -> Realtime:
    realtime = make_realtime(**options)

    @realtime.task("double")
    async def double(payload: int) -> int:
        return payload * 2

    @realtime.task("fails")
    async def fails() -> None:
        raise TaskError("no")

    return realtime


async def in_thread(function: Callable[[], Any]) -> Any:
    with anyio.fail_after(GUARD_S):
        return await anyio.to_thread.run_sync(function)


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


class Shared(MemoryBroker):
    """Claims to be shared between processes."""

    shared = True


def test_a_worker_process_starts_its_own_loop() -> None:
    class Nobody:
        async def enqueue(self, run_id: str, task_id: str) -> None: ...

    realtime = with_tasks(broker=Shared(), executor=Nobody())
    handle = realtime.sync.trigger("double", 21)
    assert realtime.sync.get_run(handle).status is Status.QUEUED
    realtime.sync.execute(handle.id)
    assert realtime.sync.result(handle, timeout=GUARD_S) == 42

    results: list[Any] = []

    def also() -> None:
        results.append(realtime.sync.get_run(handle).output)

    thread = threading.Thread(target=also)
    thread.start()
    thread.join()
    assert results == [42]
    realtime.sync.close()
    realtime.sync.close()
    assert realtime.engine.supervisor is None
    assert realtime.sync.get_run(handle).output == 42  # starts again
    realtime.sync.close()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_app_starts_after_its_module_made_calls(backend: str) -> None:
    """The calls of the module had started a loop in a thread, and the start on the server's loop failed."""
    realtime = with_tasks(broker=Shared())
    handle = realtime.sync.trigger("double", 21)
    assert realtime.sync.result(handle, timeout=GUARD_S) == 42

    async def serve() -> None:
        async with realtime:
            assert (await realtime.get_run(handle)).output == 42
            assert (
                await in_thread(lambda: realtime.sync.result(realtime.sync.trigger("double", 1), timeout=GUARD_S)) == 2
            )

    anyio.run(serve, backend=backend)
    assert realtime.sync.get_run(handle).output == 42
    realtime.sync.close()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_host_starts_and_stops_while_threads_make_calls(backend: str) -> None:
    """Some starts failed because a thread was starting its own loop at that moment."""
    realtime = with_tasks(broker=Shared())
    over = threading.Event()
    seen: list[str] = []

    def use() -> None:
        while not over.is_set():
            try:
                with realtime.sync.open_run("r"):
                    pass
            except ServerShutdown:
                pass
            except BaseException as exc:
                seen.append(repr(exc))

    async def host() -> None:
        for _ in range(30):
            async with realtime:
                await anyio.sleep(0.005)
            await anyio.sleep(0.005)

    threads = [threading.Thread(target=use, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        anyio.run(host, backend=backend)
    finally:
        over.set()
        for thread in threads:
            thread.join(GUARD_S)
        realtime.sync.close()
    assert not any(thread.is_alive() for thread in threads)
    assert seen == []


async def test_the_host_starts_after_a_thread_lost_the_race_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """`start` raised, because closing the thread's idle loop tried to stop the host's, and a lock stayed held."""
    realtime = with_tasks(broker=Shared())

    def lose_the_race() -> LoopThread:
        anyio.from_thread.run(realtime.ensure_started)  # the first use on the host's loop
        return LoopThread()

    monkeypatch.setattr(thread_bridge, "LoopThread", lose_the_race)
    with anyio.fail_after(GUARD_S):
        assert await in_thread(lambda: realtime.sync.result(realtime.sync.trigger("double", 1), timeout=GUARD_S)) == 2
        for _ in range(2):
            await realtime.start()
        await realtime.stop()
        async with realtime:
            pass


def test_a_start_that_fails_releases_its_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later call that had to start waited forever."""
    realtime = with_tasks(broker=Shared())
    realtime.sync.trigger("double", 1)
    close = LoopThread.close

    def fail(self: LoopThread) -> None:
        close(self)
        raise OSError("no thread")

    async def host() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(LoopThread, "close", fail)
            with pytest.raises(OSError, match="no thread"):
                await realtime.start()
        with anyio.fail_after(GUARD_S):
            async with realtime:
                pass

    anyio.run(host)


def test_a_start_that_is_cancelled_while_a_thread_starts_leaves_the_lock_free() -> None:
    """A worker thread took the lock for the cancelled start, and nothing released it."""
    realtime = with_tasks(broker=Shared())
    starting = realtime._bridge._starting

    async def host() -> None:
        starting.acquire()  # as a thread that starts
        start = asyncio.create_task(realtime.start())
        await anyio.sleep(0.02)
        start.cancel()
        await asyncio.wait([start])
        starting.release()
        await anyio.sleep(0.02)
        with anyio.fail_after(GUARD_S):
            async with realtime:
                pass

    anyio.run(host)


def test_several_threads_can_start_at_once() -> None:
    realtime = with_tasks(broker=Shared())
    results: list[Any] = []
    gate = threading.Barrier(4)

    def work() -> None:
        gate.wait(GUARD_S)
        results.append(realtime.sync.result(realtime.sync.trigger("double", 1), timeout=GUARD_S))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [2, 2, 2, 2]
    realtime.sync.close()


async def test_close_does_not_stop_the_loop_of_the_host() -> None:
    async with make_realtime() as realtime:
        await in_thread(realtime.sync.close)
        assert realtime.engine.supervisor is not None


def run_program(program: str) -> str:
    """Run a program in a new process and return its output."""
    prelude = """
        import os, signal, sys, threading, time
        from asgi_realtime import *
        from asgi_realtime.brokers.memory import MemoryBroker

        class Shared(MemoryBroker):
            shared = True

        class Nobody:
            async def enqueue(self, run_id, task_id): ...

        def make():
            realtime = Realtime(secret_key="k" * 32, broker=Shared(), executor=Nobody())

            @realtime.task("double")
            def double(payload: int) -> int:
                return payload * 2

            @realtime.task("wait")
            async def wait() -> None:
                await current_run().input("never").get()

            return realtime

        realtime = make()
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(prelude) + textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


GUARD_S = 60.0


@pytest.mark.slow
def test_a_program_that_closes_nothing_still_exits() -> None:
    """Once its work was done, it waited forever for its loop."""
    printed = run_program("""
        handle = realtime.sync.trigger("double", 21)
        realtime.sync.execute(handle.id)
        print(realtime.sync.result(handle))
    """)
    assert printed == "42\n"


@pytest.mark.slow
def test_a_loop_in_a_thread_installs_no_signal_handlers() -> None:
    printed = run_program("""
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        realtime.sync.trigger("double", 21)
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
        realtime.sync.close()
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
        print("as before")
    """)
    assert printed == "as before\n"


@pytest.mark.slow
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_forked_child_has_its_own_loop_and_owner_name(used: bool) -> None:
    """The child waited for the thread of its parent, and used its parent's owner name."""
    printed = run_program(f"""
        if {used}:
            first = realtime.sync.trigger("double", 1)
            realtime.sync.execute(first.id)
        owner = realtime.runs.owner

        def work(name):
            handle = realtime.sync.trigger("double", 21)
            realtime.sync.execute(handle.id)
            record = realtime.sync.get_run(handle)
            executed_by = record._stored.owner
            print(name, record.output, executed_by == owner, executed_by == realtime.runs.owner, flush=True)

        child = os.fork()
        if not child:
            work("child")
            sys.exit()
        assert os.waitpid(child, 0)[1] == 0
        work("parent")
    """)
    assert printed == "child 42 False True\nparent 42 True True\n"


@pytest.mark.slow
def test_an_exception_that_interrupts_an_execution_cancels_its_run() -> None:
    """The time limit of a queue ended the call, but the run continued on the loop's thread."""
    printed = run_program("""
        class TimeLimit(Exception): ...

        def on_alarm(number, frame):
            raise TimeLimit

        signal.signal(signal.SIGALRM, on_alarm)
        for used in (False, True):
            handle = realtime.sync.trigger("wait")
            if not used:
                realtime.sync.close()

            def alarm_once_it_runs():
                while realtime.engine.executions.get(handle.id) is None:
                    time.sleep(0.001)
                signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

            threading.Thread(target=alarm_once_it_runs).start()
            try:
                realtime.sync.execute(handle.id)
            except TimeLimit:
                try:
                    realtime.sync.result(handle)
                except RunCanceled:
                    print(realtime.sync.get_run(handle).status)
    """)
    assert printed == "CANCELED\nCANCELED\n"


class TimeLimit(Exception):
    """Raised by a signal handler, as job queues do."""


@contextmanager
def interrupted_at(line: int) -> Iterator[None]:
    """Raise `TimeLimit` when this thread is about to execute the n-th line of the functions that the body calls."""
    seen = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal seen
        seen += event == "line"
        if seen == line:
            raise TimeLimit
        return trace

    before = sys.gettrace()
    with pytest.raises(TimeLimit):
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)


@pytest.mark.slow
def test_a_call_that_is_interrupted_at_any_line_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it had been posted and before the wait began, the call continued. While the wait held a lock that the loop
    needs, the loop would have waited for it forever."""
    monkeypatch.setattr(thread_calls, "CHECK_PERIOD_S", 0.001)  # so that the waiting thread executes lines
    realtime = with_tasks(broker=Shared(), timeouts=Timeouts(tick=0.01, drain=0.02))
    begun = ended = 0

    async def wait() -> None:
        nonlocal begun, ended
        begun += 1
        try:
            await anyio.sleep_forever()
        finally:
            ended += 1

    def interrupt_at_each_line() -> None:
        bridge = realtime.sync._bridge
        supervisor = bridge.supervisor()
        for line in range(1, 120):
            with interrupted_at(line):
                ThreadCall(supervisor, wait).make()
            bridge.call(anyio.lowlevel.checkpoint)  # after this the interrupted call has begun, if it ever does
            wait_for(lambda: ended == begun)

    try:
        # In a thread of its own, which keeps the exception that is being handled at the interrupted line.
        with ThreadPoolExecutor() as pool:
            pool.submit(interrupt_at_each_line).result(GUARD_S)
        assert ended > 50
    finally:
        realtime.sync.close()


def test_an_interrupted_call_leaves_no_waiter() -> None:
    realtime = with_tasks(broker=Shared(), timeouts=Timeouts(tick=0.01, drain=0.02))

    @realtime.task("wait")
    async def wait() -> None:
        await anyio.sleep_forever()

    def on_signal(number: int, frame: object) -> None:
        raise TimeLimit

    def interrupted(fact: Callable[[], object]) -> None:
        """Wait for a result in this thread until a signal interrupts it, once the fact is true."""

        def interrupt() -> None:
            while not fact():
                time.sleep(0.001)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with pytest.raises(TimeLimit):
                realtime.sync.result(handle)
        finally:
            thread.join()

    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        handle = realtime.sync.trigger("wait")
        waiting = realtime.broker._topics[run_topic(handle.id)].waiting  # type: ignore[attr-defined]
        wait_for(lambda: len(waiting) == 1)  # the process that executes the run follows it
        for _ in range(3):
            interrupted(lambda: len(waiting) > 1)
            wait_for(lambda: len(waiting) == 1)
    finally:
        realtime.sync.close()
        signal.signal(signal.SIGUSR1, before)


def test_a_run_whose_opening_is_interrupted_does_not_stay_open() -> None:
    """An interrupted `open_run` left the run EXECUTING until the server stopped."""
    broker = Shared()
    realtime = with_tasks(broker=broker)
    commit, stored = broker.commit, threading.Event()

    async def interrupted_commit(record: StoredRecord, **options: Any) -> int:
        version = await commit(record, **options)
        if record.status is Status.EXECUTING:
            stored.set()
            with suppress(anyio.get_cancelled_exc_class()):
                await anyio.sleep_forever()  # until the signal cancels the call
        return version

    def on_signal(number: int, frame: object) -> None:
        raise TimeLimit

    def interrupt() -> None:
        assert stored.wait(GUARD_S)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, on_signal)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        realtime.sync.trigger("double", 1)
        broker.commit = interrupted_commit  # type: ignore[method-assign]
        with pytest.raises(TimeLimit):
            with realtime.sync.open_run("r"):
                raise AssertionError("it was interrupted before")
        (run,) = [run for run in broker._runs.values() if run.record.task == "r"]
        wait_for(lambda: run.record.status is Status.CANCELED)
    finally:
        thread.join()
        realtime.sync.close()
        signal.signal(signal.SIGUSR1, before)


def wait_for(fact: Callable[[], object]) -> None:
    """Block this thread until the fact is true."""
    deadline = time.monotonic() + GUARD_S
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.001)
