from __future__ import annotations

import contextvars
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import anyio.to_thread
import pytest

from asgi_realtime import InvalidSource, Realtime, RunFailed, ServerShutdown, Status, SyncPipe
from tests.inprocess import GUARD_S, ended, make_realtime, until

pytestmark = pytest.mark.anyio


async def in_thread(function: Callable[[], Any]) -> Any:
    with anyio.fail_after(GUARD_S):
        return await anyio.to_thread.run_sync(function)


class Gate:
    """A source that yields its second item when the test allows it."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.is_closed = False

    def __iter__(self) -> Iterator[str]:
        try:
            yield "a"
            self.open.wait(GUARD_S)
            yield "b"
        finally:
            self.is_closed = True


async def test_a_def_route_returns_the_handle_while_its_source_is_read() -> None:
    gate = Gate()

    def route() -> SyncPipe[str]:
        pipe = realtime.sync.pipe(gate, tags=["user:1"])
        assert not pipe.done
        assert realtime.sync.get_run(pipe.handle).tags == ("user:1",)
        return pipe

    async with make_realtime() as realtime:
        pipe = await in_thread(route)
        chunks = aiter(realtime.read(pipe.handle))
        assert await anext(chunks) == "a"  # the route has returned, and its source has more
        gate.open.set()
        assert [chunk async for chunk in chunks] == ["b"]
        assert (await ended(realtime, pipe.run_id)).status is Status.COMPLETED
        assert pipe.result == await in_thread(pipe.wait_until_complete)
        again = pickle.loads(pickle.dumps(pipe.handle))
        assert (again, again.id) == (pipe.handle, pipe.run_id)


async def test_a_thread_waits_for_the_end_or_iterates() -> None:
    async def source() -> AsyncIterator[int]:
        for number in range(3):
            yield number

    def work() -> None:
        assert realtime.sync.pipe(source()).wait_until_complete().chunks == 3
        items = [object_ := {"n": 1}, {"n": 2}]
        pipe = realtime.sync.pipe(items)
        assert next(pipe) is object_
        assert list(pipe) == [{"n": 2}]
        assert next(pipe, None) is None
        assert pipe.wait_until_complete(timeout="5s").chunks == 2

    async with make_realtime() as realtime:
        await in_thread(work)


async def test_a_timeout_does_not_stop_a_pipe_and_close_does() -> None:
    gate = Gate()

    def work() -> None:
        pipe = realtime.sync.pipe(gate)
        assert next(pipe) == "a"
        with pytest.raises(TimeoutError, match=r"not ended within 0.01 s, and continues"):
            pipe.wait_until_complete(timeout=0.01)
        assert not pipe.done
        gate.open.set()
        pipe.close()
        assert pipe.done

    async with make_realtime() as realtime:
        await in_thread(work)
        await until(lambda: gate.is_closed)


async def test_an_error_in_the_source_fails_the_run_and_is_raised() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("source")

    def work() -> None:
        with pytest.raises(ValueError, match="source"):
            realtime.sync.pipe(broken()).wait_until_complete()
        with pytest.raises(ValueError, match="source"):
            list(realtime.sync.pipe(broken()))
        with pytest.raises(RunFailed):  # also if no code waits for the pipe
            realtime.sync.result(realtime.sync.pipe(broken()).handle, timeout=GUARD_S)
        with realtime.sync.open_run("host") as run:
            realtime.sync.pipe(broken())
        with pytest.raises(RunFailed):
            realtime.sync.result(run, timeout=GUARD_S)

    async with make_realtime() as realtime:
        await in_thread(work)


async def test_a_pipe_belongs_to_the_run_of_its_thread() -> None:
    realtime = make_realtime()

    @realtime.task("t")
    def task() -> str:
        return realtime.sync.pipe(["a", "b"]).run_id  # its run waits for it

    async with realtime:
        handle = await realtime.trigger(task)
        assert await handle.result(timeout=GUARD_S) == handle.id
        assert [chunk async for chunk in realtime.read(handle)] == ["a", "b"]


async def test_the_source_has_the_context_of_the_call() -> None:
    user = contextvars.ContextVar("user", default="")

    def source() -> Iterator[str]:
        yield user.get()

    def work() -> None:
        user.set("ada")
        assert list(realtime.sync.pipe(source())) == ["ada"]

    async with make_realtime() as realtime:
        await in_thread(work)


async def test_what_prevents_the_start_is_raised() -> None:
    def work() -> None:
        with pytest.raises(InvalidSource):
            realtime.sync.pipe("text")

    async with make_realtime() as realtime:
        await in_thread(work)


async def test_a_thread_learns_that_the_server_stops() -> None:
    gate = Gate()
    pipes: list[SyncPipe[str]] = []

    def work() -> None:
        pipes.append(pipe := realtime.sync.pipe(gate))
        with pytest.raises(ServerShutdown):
            list(pipe)
        with pytest.raises(ServerShutdown):
            pipe.wait_until_complete()

    async with anyio.create_task_group() as group:
        async with make_realtime() as realtime:
            group.start_soon(in_thread, work)
            await until(lambda: pipes)
        gate.open.set()


async def test_it_is_not_for_the_thread_of_an_event_loop() -> None:
    async with make_realtime() as realtime:
        pipe = await in_thread(lambda: realtime.sync.pipe(["a"]))
        for call in (lambda: next(pipe), pipe.wait_until_complete, pipe.close):
            with pytest.raises(RuntimeError, match="event loop"):
                call()


def test_a_pipe_without_a_loop_needs_a_shared_broker() -> None:
    with pytest.raises(RuntimeError, match="broker is in memory"):
        Realtime(secret_key="s" * 32).sync.pipe([1])
