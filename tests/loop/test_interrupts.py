from __future__ import annotations

import asyncio
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime.loop.interrupts import make_interrupt

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_left")]


async def call(function: Callable[[], None]) -> None:
    function()


async def test_an_interrupt_ends_the_body_and_nothing_beyond_it() -> None:
    reached: list[str] = []
    async with anyio.create_task_group() as group:
        with make_interrupt() as interrupt:
            group.start_soon(call, interrupt.interrupt)
            await anyio.sleep_forever()
        reached.append("after")
        await anyio.lowlevel.checkpoint()
        reached.append("later")
    assert reached == ["after", "later"]
    assert interrupt.interrupted


async def test_a_body_that_returns_is_not_interrupted() -> None:
    with make_interrupt() as interrupt:
        await anyio.lowlevel.checkpoint()
    interrupt.interrupt()
    interrupt.interrupt()
    assert not interrupt.interrupted
    await anyio.lowlevel.checkpoint()


async def test_a_body_can_interrupt_itself() -> None:
    with make_interrupt() as interrupt:
        interrupt.interrupt()
        interrupt.interrupt()
        await anyio.sleep_forever()
    assert interrupt.interrupted
    await anyio.lowlevel.checkpoint()


async def test_an_interrupt_that_the_body_does_not_receive_is_taken_back() -> None:
    """Before Python 3.13 a task cannot take back its own cancellation: the next await after the body raised it."""
    with make_interrupt() as interrupt:
        interrupt.interrupt()
    for _ in range(3):
        await anyio.lowlevel.checkpoint()


async def test_an_error_of_the_body_passes_an_interrupt() -> None:
    with pytest.raises(ZeroDivisionError):
        with make_interrupt():
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        with make_interrupt() as interrupt:
            interrupt.interrupt()
            try:
                await anyio.sleep_forever()
            finally:
                raise ZeroDivisionError
    assert not interrupt.interrupted
    await anyio.lowlevel.checkpoint()


async def test_a_cancellation_from_outside_passes_an_interrupt() -> None:
    reached: list[str] = []
    with anyio.CancelScope() as outside:
        with make_interrupt() as interrupt:
            outside.cancel()
            await anyio.sleep_forever()
        reached.append("after")
    assert outside.cancelled_caught
    assert not interrupt.interrupted
    assert reached == []


async def test_an_interrupt_and_a_cancellation_from_outside_at_once() -> None:
    reached: list[str] = []
    with anyio.CancelScope() as outside:
        with make_interrupt() as interrupt:
            async with anyio.create_task_group() as group:
                group.start_soon(call, outside.cancel)
                group.start_soon(call, interrupt.interrupt)
                await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        reached.append("after")
    assert outside.cancelled_caught
    assert reached == []


async def test_a_shielded_body_can_be_interrupted_while_its_task_is_cancelled() -> None:
    """The earlier cancellation was mistaken for a new one, so the interrupt broke through the shield."""
    reached: list[str] = []
    with anyio.CancelScope() as outside:
        outside.cancel()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as group:
                    with make_interrupt() as interrupt:
                        group.start_soon(call, interrupt.interrupt)
                        await anyio.sleep_forever()
                await anyio.lowlevel.checkpoint()
                reached.append("still shielded")
    assert reached == ["still shielded"]
    assert interrupt.interrupted


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_body_can_be_left_in_another_task(anyio_backend: str) -> None:
    """User code can enter a context manager in one task and leave it in another."""
    interrupt = make_interrupt().__enter__()
    left = asyncio.ensure_future(_leave(interrupt.__exit__))
    assert await left is False
    interrupt.interrupt()
    await anyio.lowlevel.checkpoint()
    assert not interrupt.interrupted


async def _leave(leave: Callable[[None, None, None], bool]) -> bool:
    return leave(None, None, None)
