"""Waiters and wait lists, on both loop libraries."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from asgi_realtime.loop.waiting import MANY, WaitList, WakeSoon, make_waiter, on_asyncio
from tests.inprocess import GUARD_S, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_left")]


async def test_the_loop_library_is_detected(anyio_backend: str) -> None:
    assert on_asyncio() is (anyio_backend == "asyncio")


# Waiters


async def test_a_waiter_waits_for_the_next_wake() -> None:
    waiter = make_waiter()
    for _ in range(3):
        woken = waiter.arm()
        waiter.wake()
        waiter.wake()
        with anyio.fail_after(GUARD_S):
            await woken


async def test_a_wake_before_arming_does_not_count() -> None:
    waiter = make_waiter()
    waiter.wake()
    woken = waiter.arm()
    waiter.wake()
    with anyio.fail_after(GUARD_S):
        await woken
    waiter.wake()
    with anyio.move_on_after(0.01) as scope:
        await waiter.arm()
    assert scope.cancelled_caught


async def test_what_is_armed_need_not_be_awaited() -> None:
    """A reader that arms and then finds something does not wait; on trio that left a coroutine unawaited."""
    waiting, waiter = WaitList(), make_waiter()
    waiter.arm()
    waiting.add(waiter)
    waiting.wake()
    waiter.arm()


async def test_a_waiter_is_reusable_after_a_cancelled_wait() -> None:
    waiter = make_waiter()
    with anyio.move_on_after(0):
        await waiter.arm()
    waiter.wake()
    woken = waiter.arm()
    waiter.wake()
    with anyio.fail_after(GUARD_S):
        await woken


# Wait lists


async def test_a_wake_wakes_and_removes_all_waiters() -> None:
    waiting = WaitList()
    waiting.wake()
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(waiting.wait)
        await until(lambda: len(waiting) == 5)
        waiting.wake()
        assert len(waiting) == 0


async def test_a_cancelled_wait_leaves_the_list() -> None:
    waiting = WaitList()
    async with anyio.create_task_group() as staying:
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(waiting.wait)
            staying.start_soon(waiting.wait)
            await until(lambda: len(waiting) == 2)
            leaving.cancel_scope.cancel()
        assert len(waiting) == 1
        waiting.wake()


async def test_a_wait_that_is_woken_and_cancelled_at_once_is_cancelled_once() -> None:
    waiting = WaitList()
    async with anyio.create_task_group() as group:
        group.start_soon(waiting.wait)
        await until(lambda: len(waiting) == 1)
        waiting.wake()
        group.cancel_scope.cancel()
    assert len(waiting) == 0


async def test_a_waiter_is_in_a_list_once_and_can_be_discarded_at_any_time() -> None:
    waiting, waiter = WaitList(), make_waiter()
    waiting.add(waiter)
    waiting.add(waiter)
    assert len(waiting) == 1
    waiting.discard(waiter)
    waiting.discard(waiter)
    assert len(waiting) == 0


def closed_loop_with_a_waiter(*lists: WaitList) -> None:
    """Leave a waiter of a closed loop in each list."""

    async def wait() -> None:
        for waiting in lists:
            waiter = make_waiter()
            waits = asyncio.ensure_future(waiter.arm())
            waits.add_done_callback(lambda _: None)  # as a task that waits
            waiting.add(waiter)

    def elsewhere() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(wait())
        loop.close()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()


async def test_a_waiter_of_a_closed_loop_does_not_keep_others_from_waking() -> None:
    """A host that starts a second loop, as test clients do, got "Event loop is closed" from calls that had worked."""
    waiting = WaitList()
    closed_loop_with_a_waiter(waiting)
    async with anyio.create_task_group() as group:
        group.start_soon(waiting.wait)
        await until(lambda: len(waiting) == 2)
        waiting.wake()
    assert len(waiting) == 0


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_error_of_a_living_loop_is_raised() -> None:
    """Asyncio's debug mode reports a wake-up from a wrong thread; that is a bug and must not be hidden."""
    waiter = make_waiter()
    asyncio.get_running_loop().set_debug(True)
    waits = asyncio.ensure_future(waiter.arm())
    waits.add_done_callback(lambda _: None)
    with pytest.raises(RuntimeError, match="Non-thread-safe"):
        await anyio.to_thread.run_sync(waiter.wake)
    asyncio.get_running_loop().set_debug(False)


# Waking on the next loop iteration


class CountedList(WaitList):
    """Counts its wake-ups."""

    __slots__ = ("woken",)

    def __init__(self, *, waiters: int = 1) -> None:
        super().__init__()
        self.woken = 0
        for _ in range(waiters):
            self.add(make_waiter())

    def wake(self) -> None:
        self.woken += 1
        super().wake()

    take_turns = wake


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_list_is_woken_once_per_loop_iteration() -> None:
    soon, first, second = WakeSoon(), CountedList(), CountedList()
    for _ in range(3):
        soon.wake(first)
        soon.wake(second)
    assert (first.woken, second.woken) == (0, 0)
    await asyncio.sleep(0)
    assert (first.woken, second.woken) == (1, 1)
    first.add(make_waiter())
    soon.wake(first)
    await asyncio.sleep(0)
    assert (first.woken, second.woken) == (2, 1)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_many_lists_are_woken_by_one_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, scheduled = asyncio.get_running_loop(), []
    call_soon = loop.call_soon

    def noted(*arguments: Any, **options: Any) -> Any:
        scheduled.append(arguments[0])
        return call_soon(*arguments, **options)

    monkeypatch.setattr(loop, "call_soon", noted)
    soon, lists = WakeSoon(), [CountedList() for _ in range(5)]
    for waiting in lists:
        soon.wake(waiting)
    assert len(scheduled) == 1
    monkeypatch.undo()
    await asyncio.sleep(0)
    assert [waiting.woken for waiting in lists] == [1] * 5


async def test_nothing_is_scheduled_for_an_empty_list(anyio_backend: str) -> None:
    soon, waiting = WakeSoon(), CountedList(waiters=0)
    soon.wake(waiting)
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    assert waiting.woken == 0


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_on_trio_lists_are_woken_at_once() -> None:
    soon, waiting = WakeSoon(), CountedList()
    soon.wake(waiting)
    assert waiting.woken == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_waiter_on_a_second_loop_is_woken_there() -> None:
    """A loop can be closed before its next iteration, and then a wake-up that was scheduled there is lost."""
    soon, waiting = WakeSoon(), WaitList()
    closed_loop_with_a_waiter(waiting)

    async def wake() -> None:
        soon.wake(waiting)
        asyncio.get_running_loop().stop()

    def elsewhere() -> None:
        loop = asyncio.new_event_loop()
        loop.create_task(wake())
        loop.run_forever()
        loop.close()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    async with anyio.create_task_group() as group:
        group.start_soon(waiting.wait)
        await until(lambda: len(waiting) == 2)
        soon.wake(waiting)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_list_with_a_waiter_of_a_closed_loop_stops_no_other_list() -> None:
    """Readers of other streams were not woken although they had chunks to read."""
    soon, stale, sound = WakeSoon(), WaitList(), WaitList()
    closed_loop_with_a_waiter(stale)
    async with anyio.create_task_group() as group:
        group.start_soon(sound.wait)
        await until(lambda: len(sound) == 1)
        soon.wake(stale)
        soon.wake(sound)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_list_of_many_waiters_is_woken_one_iteration_later() -> None:
    soon, one, many = WakeSoon(), CountedList(), CountedList(waiters=MANY)
    soon.wake(many)
    soon.wake(one)
    await asyncio.sleep(0)
    assert (one.woken, many.woken) == (1, 0)
    soon.wake(many)
    await asyncio.sleep(0)
    assert many.woken == 1, "it is postponed once, however often it is woken"
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert many.woken == 1
