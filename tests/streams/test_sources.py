"""Sources: how they are opened, read and closed."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from asgi_realtime.core.config import Limits, Timeouts
from asgi_realtime.core.errors import InvalidSource
from asgi_realtime.core.run_errors import RunCanceled
from asgi_realtime.core.runs import Status
from tests.faults import make, others, steps, stored
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio

Closed = list[str]
Make = Callable[[Closed, Callable[[], Any]], Any]

# Both protocols


class Proxy:
    """As the proxy of an instrumentation: it has both protocols, whatever it wraps."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        self.closed = 0

    def __iter__(self) -> Any:
        return iter(self.wrapped)

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        return await self.wrapped.__anext__()

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("broken", ["__anext__", "__aiter__", "async for"])
async def test_a_source_with_a_broken_async_protocol_is_read_by_a_thread(broken: str) -> None:
    class Broken(Proxy):
        def __aiter__(self) -> Any:
            if broken == "__aiter__":
                raise AttributeError("'list' object has no attribute '__aiter__'")
            return self._items() if broken == "async for" else self

        async def _items(self) -> AsyncIterator[Any]:
            async for item in self.wrapped:
                yield item

    source = Broken([1, 2, 3])
    async with make() as realtime, realtime.open_run("report") as run:
        pipe: Any = realtime.pipe(source)
        assert [item async for item in pipe] == [1, 2, 3]
        assert (await pipe.wait_until_complete()).chunks == 3
        assert await stored(realtime, run.id) == [1, 2, 3]
    assert source.closed == 1


async def test_a_source_with_both_protocols_is_read_by_the_async_one() -> None:
    async def items() -> AsyncIterator[int]:
        yield 1
        yield 2

    source = Proxy(items())
    async with make() as realtime, realtime.open_run("report"):
        pipe: Any = realtime.pipe(source)
        assert [item async for item in pipe] == [1, 2]
        await pipe.wait_until_complete()
    assert source.closed == 1


async def test_another_error_of_the_async_protocol_is_an_error_of_the_source() -> None:
    async def items() -> AsyncIterator[int]:
        raise AttributeError("'NoneType' object has no attribute 'choices'")
        yield 1

    async with make() as realtime, realtime.open_run("report"):
        with pytest.raises(AttributeError, match="choices"):
            await realtime.pipe(Proxy(items())).wait_until_complete()


# Closing. Each of these gives a, b, then asks `third` what to do, then gives c.


def _generator(closed: Closed, third: Callable[[], Any]) -> Any:
    async def source() -> AsyncIterator[Any]:
        try:
            yield "a"
            yield "b"
            yield await third()
            yield "c"
        finally:
            with anyio.CancelScope(shield=True):  # the cancellation is raised here
                await steps(2)
            closed.append("generator")

    return source()


class _Iterator:
    def __init__(self, closed: Closed, third: Callable[[], Any]) -> None:
        self.closed = closed
        self.inner = _generator([], third)

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        return await self.inner.__anext__()


class _AcloseWins(_Iterator):
    async def aclose(self) -> None:
        await steps(2)
        await self.inner.aclose()
        self.closed.append("aclose")

    def close(self) -> None:
        self.closed.append("close")


class _AwaitableClose(_Iterator):
    async def close(self) -> None:
        await steps(2)
        await self.inner.aclose()
        self.closed.append("awaited close")


class _SyncClose(_Iterator):
    def close(self) -> None:
        self.closed.append("sync close")


class _Response:
    """Iterates through a generator and has its own close, like the streams of openai and anthropic."""

    def __init__(self, closed: Closed, third: Callable[[], Any]) -> None:
        self.closed = closed
        self.third = third

    def __aiter__(self) -> AsyncIterator[Any]:
        return _generator(self.closed, self.third)  # type: ignore[no-any-return]

    async def close(self) -> None:
        await steps(1)
        self.closed.append("response")


def _manager(closed: Closed, third: Callable[[], Any]) -> Any:
    @asynccontextmanager
    async def manager() -> AsyncIterator[Any]:
        async with anyio.create_task_group():
            try:
                yield _Response(closed, third)
            finally:
                await steps(2)
                closed.append("manager")

    return manager()


SOURCES: list[tuple[str, Make, Closed]] = [
    ("generator", _generator, ["generator"]),
    ("aclose", _AcloseWins, ["aclose"]),
    ("awaitable close", _AwaitableClose, ["awaited close"]),
    ("iterator and source", _Response, ["generator", "response"]),
    ("manager", _manager, ["generator", "response", "manager"]),
]


@pytest.mark.parametrize("ending", ["exhausted", "raises", "unencodable", "aclose", "canceled", "shutdown", "lost"])
@pytest.mark.parametrize(("make_source", "expected"), [pytest.param(m, e, id=name) for name, m, e in SOURCES])
async def test_a_source_is_closed_in_every_case(make_source: Make, expected: Closed, ending: str) -> None:
    closed: Closed = []
    reached = anyio.Event()

    async def third() -> Any:
        reached.set()
        if ending == "exhausted":
            return "third"
        if ending == "raises":
            raise ConnectionError("to the model")
        if ending == "unencodable":
            return object()
        await anyio.sleep_forever()

    before = others()
    async with make(timeouts=Timeouts(drain=0.001)) as realtime:
        pipe = realtime.pipe(make_source(closed, third), run="run_unknown" if ending == "lost" else None)
        with anyio.fail_after(GUARD_S):
            if ending != "lost":
                await reached.wait()
            if ending == "aclose":
                await pipe.aclose()
            if ending == "canceled":
                await realtime.cancel(pipe.run_id)
            if ending == "shutdown":
                await realtime.stop()
            await pipe.settled()
        if ending == "lost":  # a generator that was not started runs no cleanup
            assert closed == [part for part in expected if part != "generator"]
        else:
            assert closed == expected
            assert (await stored(realtime, pipe.run_id))[:2] == ["a", "b"]
        if ending == "raises":
            assert isinstance(pipe.error, (ConnectionError, BaseExceptionGroup))
    assert others() <= before
    gc.collect()


async def test_close_can_be_sync() -> None:
    closed: Closed = []

    async def third() -> str:
        return "third"

    async with make() as realtime:
        await realtime.pipe(_SyncClose(closed, third)).wait_until_complete()
    assert closed == ["sync close"]


async def test_a_source_needs_no_close() -> None:
    async def third() -> str:
        return "third"

    async with make() as realtime:
        assert (await realtime.pipe(_Iterator([], third)).wait_until_complete()).chunks == 4


class _Resisting:
    """Yields one item; closing it fails or hangs."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.yielded = False
        self.closed = False

    def __aiter__(self) -> AsyncIterator[int]:
        return self if self.how != "hangs in the iterator" else _Resisting("hangs")

    async def __anext__(self) -> int:
        if self.yielded:
            raise StopAsyncIteration
        self.yielded = True
        return 1

    async def aclose(self) -> None:
        self.closed = True
        if self.how == "fails":
            raise OSError("the connection is lost")
        if self.how == "hangs":
            await anyio.sleep_forever()


async def test_an_error_while_closing_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with make() as realtime, realtime.open_run("report"):
        assert (await realtime.pipe(_Resisting("fails")).wait_until_complete()).chunks == 1
    assert "closing a piped _Resisting failed" in caplog.text


async def test_closing_has_a_time_limit(caplog: pytest.LogCaptureFixture) -> None:
    async with make(timeouts=Timeouts(close=0.01)) as realtime, realtime.open_run("report"):
        with anyio.fail_after(GUARD_S):
            assert (await realtime.pipe(_Resisting("hangs")).wait_until_complete()).chunks == 1
    assert "closing a piped _Resisting took longer than 0.01 s" in caplog.text


async def test_an_iterator_that_hangs_does_not_keep_its_source_from_being_closed() -> None:
    """Both used to share one time limit, so a stuck iterator kept its connection open."""
    source = _Resisting("hangs in the iterator")
    async with make(timeouts=Timeouts(close=0.01)) as realtime, realtime.open_run("report"):
        with anyio.fail_after(GUARD_S):
            await realtime.pipe(source).wait_until_complete()
    assert source.closed


# Managers


class _Manager:
    def __init__(self, result: Any, *, leaving: Callable[[], Any] | None = None, suppress: bool = False) -> None:
        self.result = result
        self.leaving = leaving
        self.suppress = suppress
        self.task: set[int] = set()
        self.left_with: list[BaseException | None] = []

    async def __aenter__(self) -> Any:
        self.task.add(anyio.get_current_task().id)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    async def __aexit__(self, exc_type: object, exc: BaseException | None, tb: object) -> bool:
        self.task.add(anyio.get_current_task().id)
        self.left_with.append(exc)
        if self.leaving is not None:
            await self.leaving()
        return self.suppress


async def _numbers(count: int, error: Exception | None = None) -> AsyncIterator[int]:
    for number in range(count):
        yield number
    if error is not None:
        raise error


async def test_a_manager_is_entered_and_exited_by_the_job() -> None:
    manager = _Manager(_numbers(3))
    async with make() as realtime, realtime.open_run("report"):
        assert [item async for item in realtime.pipe(manager)] == [0, 1, 2]
    assert len(manager.task) == 1
    assert anyio.get_current_task().id not in manager.task
    assert manager.left_with == [None]


@pytest.mark.parametrize("kind", [list, iter])
async def test_a_manager_can_return_a_sync_iterable(kind: Callable[[list[int]], Any]) -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        await realtime.pipe(_Manager(kind([1, 2]))).wait_until_complete()
        assert await stored(realtime, run.id) == [1, 2]


async def test_a_manager_that_cannot_be_entered_fails_the_pipe() -> None:
    async with make() as realtime:
        pipe = realtime.pipe(_Manager(ConnectionError("to the model")))
        with pytest.raises(ConnectionError):
            await pipe.wait_until_complete()


async def test_a_manager_that_returns_no_source_is_exited() -> None:
    manager = _Manager("text")
    async with make() as realtime:
        with pytest.raises(InvalidSource, match="a str is not a source"):
            await realtime.pipe(manager).wait_until_complete()
    assert len(manager.left_with) == 1


async def test_a_manager_sees_the_error_of_its_iterable() -> None:
    error = ConnectionError("to the model")
    manager = _Manager(_numbers(1, error))
    async with make() as realtime:
        with pytest.raises(ConnectionError):
            await realtime.pipe(manager).wait_until_complete()
    assert manager.left_with == [error]


async def test_a_manager_can_suppress_an_error() -> None:
    manager = _Manager(_numbers(1, ConnectionError("to the model")), suppress=True)
    async with make() as realtime:
        pipe = realtime.pipe(manager)
        assert (await pipe.wait_until_complete()).chunks == 1
        assert (await realtime.runs.ended(pipe.run_id)).status is Status.COMPLETED


async def test_the_exit_of_a_manager_is_shielded_from_the_cancellation_of_its_run() -> None:
    """The cancellation of a run used to interrupt the manager's cleanup at its first `await`."""
    left: list[bool] = []

    async def leave() -> None:
        await steps(5)
        left.append(True)

    async def endless() -> AsyncIterator[int]:
        yield 0
        await anyio.sleep_forever()

    async with make() as realtime:
        pipe = realtime.pipe(_Manager(endless(), leaving=leave))
        assert await anext(pipe) == 0
        await realtime.cancel(pipe.run_id)
        with pytest.raises(RunCanceled):
            await pipe.wait_until_complete()
    assert left == [True]


@pytest.mark.parametrize("fails", [False, True])
async def test_the_exit_of_a_manager_has_a_time_limit(fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    error = ConnectionError("to the model") if fails else None
    manager = _Manager(_numbers(1, error), leaving=anyio.sleep_forever)
    async with make(timeouts=Timeouts(close=0.01)) as realtime:
        pipe = realtime.pipe(manager)
        with anyio.fail_after(GUARD_S):
            if fails:
                with pytest.raises(ConnectionError):
                    await pipe.wait_until_complete()
            else:
                assert (await pipe.wait_until_complete()).chunks == 1
    assert "closing a piped _Manager took longer than 0.01 s" in caplog.text


async def test_a_source_inside_async_with_must_be_awaited_inside() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        async with anyio.create_task_group():
            send, receive = anyio.create_memory_object_stream[int](10)
            async with send, receive:
                for number in range(3):
                    send.send_nowait(number)
                send.close()
                await realtime.pipe(receive).wait_until_complete()
        assert await stored(realtime, run.id) == [0, 1, 2]


async def test_a_generator_with_a_task_group_is_closed_while_the_pipe_waits(caplog: pytest.LogCaptureFixture) -> None:
    """Its task group was exited in a scope that was entered later, which ended the whole `Realtime`."""

    async def words() -> AsyncIterator[str]:
        async with anyio.create_task_group():
            for word in "ab" * 50:
                yield word

    async with make(limits=Limits(pipe_buffer=4)) as realtime:
        pipe = realtime.pipe(words())
        reader = aiter(pipe)
        await anext(reader)
        await steps(20)
        await pipe.aclose()
        assert [word async for word in realtime.pipe(["still", "running"])] == ["still", "running"]
    assert caplog.messages == []
