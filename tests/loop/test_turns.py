"""Coroutines that a callback of the loop begins for a parked task."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextvars import ContextVar
from traceback import extract_tb
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import sniffio

from asgi_realtime.loop.turns import ParkedTask

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

VALUE: ContextVar[str] = ContextVar("VALUE", default="unset")


class Worker:
    """A task that parks again and again, and what became of the coroutines that were begun for it."""

    def __init__(self) -> None:
        self.turns = 0
        self.error: BaseException | None = None
        self.began: list[bool] = []
        self.task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        VALUE.set("of the task")
        self.parked = parked = ParkedTask(asyncio.get_running_loop())
        try:
            while True:
                try:
                    await parked.arm()
                except BaseException as exc:
                    if parked.rest is None:
                        raise
                    parked.rest.cancel(exc)
                if parked.rest is not None:
                    await parked.take_rest()
                self.turns += 1
        except BaseException as exc:
            self.error = exc

    async def begin(self, coroutine: Awaitable[None], *then: Callable[[], object]) -> bool:
        """Begin a coroutine in a callback of the loop, and make the other calls in the same callback."""
        await asyncio.sleep(0)

        def begin() -> None:
            self.began.append(self.parked.begin(coroutine))
            for call in then:
                call()

        asyncio.get_running_loop().call_soon(begin)
        await asyncio.sleep(0)
        return self.began[-1]

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


async def test_a_coroutine_that_does_not_suspend_leaves_the_task_parked() -> None:
    worker, ran = Worker(), list[str]()

    async def send() -> None:
        ran.append("sent")

    for _ in range(3):
        assert await worker.begin(send())
    assert ran == ["sent"] * 3
    assert worker.parked.is_parked
    assert worker.turns == 0
    await worker.stop()


async def test_it_runs_as_the_parked_task_in_its_context() -> None:
    worker, seen = Worker(), list[object]()

    async def send() -> None:
        seen.extend([asyncio.current_task(), VALUE.get(), sniffio.current_async_library()])
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.lowlevel.checkpoint()
        seen.append(scope.cancelled_caught)

    VALUE.set("of the caller")
    await worker.begin(send())
    await anyio.wait_all_tasks_blocked()
    assert seen == [worker.task, "of the task", "asyncio", True]
    assert VALUE.get() == "of the caller"
    await worker.stop()


async def test_the_task_continues_what_suspends_in_the_same_context() -> None:
    worker, may_end, seen = Worker(), asyncio.Event(), list[object]()

    async def send() -> None:
        token = VALUE.set("while sending")
        await asyncio.sleep(0)
        await may_end.wait()
        seen.extend([asyncio.current_task(), VALUE.get()])
        VALUE.reset(token)  # raises in another context
        seen.append(VALUE.get())

    assert not await worker.begin(send())
    assert not worker.parked.is_parked
    await anyio.wait_all_tasks_blocked()
    assert worker.turns == 0
    may_end.set()
    await anyio.wait_all_tasks_blocked()
    assert seen == [worker.task, "while sending", "of the task"]
    assert worker.turns == 1
    assert worker.parked.is_parked
    await worker.stop()


async def test_an_exception_is_raised_in_the_task() -> None:
    worker = Worker()

    async def send() -> None:
        raise ConnectionError("the client has disconnected")

    assert not await worker.begin(send())
    await asyncio.wait([worker.task])
    assert isinstance(worker.error, ConnectionError)
    assert "send" in [frame.name for frame in extract_tb(worker.error.__traceback__)]


@pytest.mark.parametrize("suspends", [False, True])
async def test_any_awaitable_can_be_begun(suspends: bool) -> None:
    worker, ended = Worker(), list[bool]()

    class Sending:
        def __await__(self) -> Generator[Any, Any, None]:
            if suspends:
                yield from asyncio.sleep(0).__await__()
            ended.append(True)

    assert await worker.begin(Sending()) is not suspends
    await anyio.wait_all_tasks_blocked()
    assert ended == [True]
    assert worker.error is None
    await worker.stop()


async def test_a_cancellation_before_the_task_continues_reaches_the_coroutine() -> None:
    worker, inner, seen = Worker(), asyncio.get_running_loop().create_future(), list[str]()

    async def send() -> None:
        try:
            await inner
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # it can still clean up
            seen.append("cancelled")
            raise

    await worker.begin(send(), lambda: worker.task.cancel())
    await asyncio.wait([worker.task])
    assert seen == ["cancelled"]
    assert inner.cancelled()
    assert isinstance(worker.error, asyncio.CancelledError)


async def test_a_cancellation_while_the_task_continues_reaches_the_coroutine() -> None:
    worker, seen = Worker(), list[str]()

    async def send() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    await worker.begin(send())
    await anyio.wait_all_tasks_blocked()
    await worker.stop()
    assert seen == ["cancelled"]
    assert isinstance(worker.error, asyncio.CancelledError)


async def test_a_coroutine_that_cancels_its_own_task_is_cancelled_at_its_next_wait() -> None:
    worker, seen = Worker(), list[str]()

    async def send() -> None:
        worker.task.cancel()
        seen.append("goes on")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    await worker.begin(send())
    await asyncio.wait([worker.task])
    assert seen == ["goes on", "cancelled"]


async def test_a_deadline_in_the_coroutine_ends_it() -> None:
    worker, seen = Worker(), list[bool]()

    async def send() -> None:
        with anyio.move_on_after(0) as scope:
            await anyio.sleep_forever()
        seen.append(scope.cancelled_caught)
        ended.set()

    ended = asyncio.Event()
    await worker.begin(send())
    await ended.wait()
    assert seen == [True]
    assert worker.error is None
    await worker.stop()


async def test_a_task_that_was_woken_or_cancelled_is_not_parked() -> None:
    worker = Worker()
    await asyncio.sleep(0)
    assert worker.parked.is_parked
    worker.parked.wake()
    assert not worker.parked.is_parked
    await asyncio.sleep(0)
    assert worker.parked.is_parked
    worker.task.cancel()
    assert not worker.parked.is_parked
    await asyncio.wait([worker.task])
