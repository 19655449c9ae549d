from __future__ import annotations

import asyncio
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime.loop.interrupts import make_guard
from tests.inprocess import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_left")]


async def call(function: Callable[[], None]) -> None:
    function()


async def test_the_end_of_the_watcher_cancels_the_body_and_nothing_beyond_it() -> None:
    leave = anyio.Event()
    reached: list[str] = []
    async with anyio.create_task_group() as group:
        group.start_soon(call, leave.set)
        async with make_guard(leave.wait):
            try:
                await anyio.sleep_forever()
            finally:
                reached.append("cleaned up")
        reached.append("after")
        await anyio.lowlevel.checkpoint()
        reached.append("later")
    assert reached == ["cleaned up", "after", "later"]


async def test_the_end_of_the_body_ends_the_watcher() -> None:
    ended: list[str] = []

    async def watcher() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("watcher")

    async with make_guard(watcher):
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
    await until(lambda: ended == ["watcher"])


async def test_a_watcher_that_returns_at_once_lets_the_body_reach_its_first_await() -> None:
    async def returns() -> None:
        return None

    async with make_guard(returns):
        await anyio.sleep_forever()
    async with make_guard(returns):
        pass
    await anyio.lowlevel.checkpoint()


async def test_a_guard_can_be_cancelled_from_inside_and_outside() -> None:
    async with make_guard(anyio.sleep_forever) as guard:
        guard.cancel()
        guard.cancel()
        await anyio.sleep_forever()
    async with anyio.create_task_group() as group:
        async with make_guard(anyio.sleep_forever) as guard:
            group.start_soon(call, guard.cancel)
            await anyio.sleep_forever()
    guard.cancel()
    await anyio.lowlevel.checkpoint()


async def test_a_cancellation_that_the_body_does_not_receive_is_taken_back() -> None:
    async with make_guard(anyio.sleep_forever) as guard:
        guard.cancel()
    for _ in range(3):
        await anyio.lowlevel.checkpoint()


async def test_a_cancellation_from_outside_passes_a_guard() -> None:
    reached: list[str] = []
    with anyio.CancelScope() as outside:
        async with make_guard(anyio.sleep_forever):
            outside.cancel()
            await anyio.sleep_forever()
        reached.append("after")
    assert outside.cancelled_caught
    assert reached == []


async def test_watcher_and_outside_at_once_is_a_cancellation_from_outside() -> None:
    reached: list[str] = []
    leave = anyio.Event()
    with anyio.CancelScope() as outside:
        async with make_guard(leave.wait):
            await anyio.lowlevel.checkpoint()
            leave.set()
            outside.cancel()
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        reached.append("after")
    assert outside.cancelled_caught
    assert reached == []


async def test_an_error_of_the_body_is_raised_without_a_group() -> None:
    """On trio it was wrapped in an exception group, which no caller's `except` expected."""
    with pytest.raises(ZeroDivisionError):
        async with make_guard(anyio.sleep_forever):
            await anyio.lowlevel.checkpoint()
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        async with make_guard(anyio.sleep_forever) as guard:
            guard.cancel()
            try:
                await anyio.sleep_forever()
            finally:
                raise ZeroDivisionError
    await anyio.lowlevel.checkpoint()


async def test_a_watcher_that_fails_ends_the_body(caplog: pytest.LogCaptureFixture) -> None:
    """On asyncio the body continued: a subscription whose `receive` had raised was never closed."""

    async def watcher() -> None:
        raise ZeroDivisionError

    with caplog.at_level("DEBUG", "asgi_realtime"):
        async with make_guard(watcher) as guard:
            await anyio.sleep_forever()
    assert [(record.levelname, record.exc_info is not None) for record in caplog.records] == [("DEBUG", True)]
    guard.cancel()
    await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_watcher_that_cancels_itself_ends_the_body() -> None:
    async def watcher() -> None:
        raise asyncio.CancelledError

    async with make_guard(watcher):
        await anyio.sleep_forever()


async def test_guards_can_be_nested() -> None:
    reached: list[str] = []
    async with make_guard(anyio.sleep_forever) as outer:
        async with make_guard(anyio.sleep_forever) as inner:
            inner.cancel()
            await anyio.sleep_forever()
        reached.append("between")
        outer.cancel()
        await anyio.sleep_forever()
    async with make_guard(anyio.sleep_forever) as outer:
        async with make_guard(anyio.sleep_forever):
            outer.cancel()
            await anyio.sleep_forever()
        reached.append("never here")
    assert reached == ["between"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_that_is_cancelled_by_asyncio_itself_passes_a_guard(anyio_backend: str) -> None:
    async def body() -> None:
        async with make_guard(anyio.sleep_forever):
            await anyio.sleep_forever()

    task = asyncio.ensure_future(body())
    await until(lambda: len(asyncio.all_tasks()) >= 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
