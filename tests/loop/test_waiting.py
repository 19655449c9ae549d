"""Parkers, parkings, interrupts and guards, on both loop libraries."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from asgi_realtime.loop.waiting import WaitList, WakeSoon, make_guard, make_interrupt, make_waiter, on_asyncio

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
async def nothing_left_over() -> AsyncIterator[None]:
    """Every test ends in time, and leaves no task behind."""
    before = len(anyio.get_running_tasks())
    yield
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
    gc.collect()
    assert len(anyio.get_running_tasks()) == before


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def forever() -> None:
    await anyio.sleep_forever()


async def test_the_loop_library_is_recognised(anyio_backend: str) -> None:
    assert on_asyncio() is (anyio_backend == "asyncio")


# Parkers


async def test_a_parker_waits_for_the_next_wake() -> None:
    waiter = make_waiter()
    for _ in range(3):
        woken = waiter.arm()
        waiter.wake()
        waiter.wake()
        with anyio.fail_after(5):
            await woken


async def test_a_wake_before_arming_does_not_count() -> None:
    waiter = make_waiter()
    waiter.wake()
    woken = waiter.arm()
    waiter.wake()
    with anyio.fail_after(5):
        await woken
    waiter.wake()
    with anyio.move_on_after(0.01) as scope:
        await waiter.arm()
    assert scope.cancelled_caught


async def test_what_is_armed_need_not_be_awaited() -> None:
    """Whoever takes a seat, looks again and finds something goes away; on trio that left a coroutine unawaited."""
    parking, waiter = WaitList(), make_waiter()
    waiter.arm()
    parking.add(waiter)
    parking.wake()
    waiter.arm()


async def test_a_parker_can_be_used_again_after_a_cancelled_wait() -> None:
    waiter = make_waiter()
    with anyio.move_on_after(0):
        await waiter.arm()
    waiter.wake()
    woken = waiter.arm()
    waiter.wake()
    with anyio.fail_after(5):
        await woken


# Parkings


async def test_a_wake_wakes_all_and_empties_the_place() -> None:
    parking = WaitList()
    parking.wake()
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(parking.wait)
        await until(lambda: len(parking) == 5)
        parking.wake()
        assert len(parking) == 0


async def test_who_is_cancelled_while_waiting_leaves_the_place() -> None:
    parking = WaitList()
    async with anyio.create_task_group() as staying:
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(parking.wait)
            staying.start_soon(parking.wait)
            await until(lambda: len(parking) == 2)
            leaving.cancel_scope.cancel()
        assert len(parking) == 1
        parking.wake()


async def test_who_is_woken_and_cancelled_at_once_is_cancelled_once() -> None:
    parking = WaitList()
    async with anyio.create_task_group() as group:
        group.start_soon(parking.wait)
        await until(lambda: len(parking) == 1)
        parking.wake()
        group.cancel_scope.cancel()
    assert len(parking) == 0


async def test_a_seat_is_taken_once_and_given_back_at_any_time() -> None:
    parking, waiter = WaitList(), make_waiter()
    parking.add(waiter)
    parking.add(waiter)
    assert len(parking) == 1
    parking.discard(waiter)
    parking.discard(waiter)
    assert len(parking) == 0


def closed_loop_with_a_waiter(*places: WaitList) -> None:
    """A loop that is closed while one waits at each place."""

    async def wait() -> None:
        for place in places:
            waiter = make_waiter()
            waits = asyncio.ensure_future(waiter.arm())
            waits.add_done_callback(lambda _: None)  # as a task that waits
            place.add(waiter)

    def elsewhere() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(wait())
        loop.close()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()


async def test_who_waited_on_a_loop_that_was_closed_keeps_nobody_from_being_woken() -> None:
    """A host that starts a second loop, as test clients do, got "Event loop is closed" out of calls that had worked."""
    parking = WaitList()
    closed_loop_with_a_waiter(parking)
    async with anyio.create_task_group() as group:
        group.start_soon(parking.wait)
        await until(lambda: len(parking) == 2)
        parking.wake()
    assert len(parking) == 0


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_error_of_a_living_loop_is_raised() -> None:
    """Asyncio's debug mode tells who wakes from a wrong thread; that is a bug and not to be hidden."""
    waiter = make_waiter()
    asyncio.get_running_loop().set_debug(True)
    waits = asyncio.ensure_future(waiter.arm())
    waits.add_done_callback(lambda _: None)
    with pytest.raises(RuntimeError, match="Non-thread-safe"):
        await anyio.to_thread.run_sync(waiter.wake)
    asyncio.get_running_loop().set_debug(False)


# Places that are woken soon


class CountedPlace(WaitList):
    """Counts how often it was woken."""

    __slots__ = ("woken",)

    def __init__(self, *, waiters: int = 1) -> None:
        super().__init__()
        self.woken = 0
        for _ in range(waiters):
            self.add(make_waiter())

    def wake(self) -> None:
        self.woken += 1
        super().wake()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_place_is_woken_once_for_each_turn_of_the_loop() -> None:
    soon, first, second = WakeSoon(), CountedPlace(), CountedPlace()
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
async def test_places_of_several_logs_are_woken_in_one_call_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, scheduled = asyncio.get_running_loop(), []
    call_soon = loop.call_soon

    def noted(*arguments: Any, **options: Any) -> Any:
        scheduled.append(arguments[0])
        return call_soon(*arguments, **options)

    monkeypatch.setattr(loop, "call_soon", noted)
    soon, places = WakeSoon(), [CountedPlace() for _ in range(5)]
    for place in places:
        soon.wake(place)
    assert len(scheduled) == 1
    monkeypatch.undo()
    await asyncio.sleep(0)
    assert [place.woken for place in places] == [1] * 5


async def test_nothing_is_scheduled_where_nobody_waits(anyio_backend: str) -> None:
    soon, place = WakeSoon(), CountedPlace(waiters=0)
    soon.wake(place)
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    assert place.woken == 0


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_on_trio_places_are_woken_at_once() -> None:
    soon, place = WakeSoon(), CountedPlace()
    soon.wake(place)
    assert place.woken == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_who_waits_on_a_second_loop_is_woken_there() -> None:
    """A loop may be closed before its next turn; what was to be done in that turn is not waited for."""
    soon, place = WakeSoon(), WaitList()
    closed_loop_with_a_waiter(place)

    async def wake() -> None:
        soon.wake(place)
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
        group.start_soon(place.wait)
        await until(lambda: len(place) == 2)
        soon.wake(place)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_place_with_one_from_a_closed_loop_stops_no_other_place() -> None:
    """Readers of other streams were not woken: they had chunks to read and did not hear of them."""
    soon, stale, sound = WakeSoon(), WaitList(), WaitList()
    closed_loop_with_a_waiter(stale)
    async with anyio.create_task_group() as group:
        group.start_soon(sound.wait)
        await until(lambda: len(sound) == 1)
        soon.wake(stale)
        soon.wake(sound)


# Interrupts


async def test_an_interrupt_ends_the_body_at_its_border() -> None:
    reached: list[str] = []
    async with anyio.create_task_group() as group:
        with make_interrupt() as interrupt:
            group.start_soon(_call, interrupt.interrupt)
            await forever()
        reached.append("after")
        await anyio.lowlevel.checkpoint()
        reached.append("and on")
    assert reached == ["after", "and on"]
    assert interrupt.interrupted


async def _call(function: Callable[[], None]) -> None:
    function()


async def test_a_body_that_ends_by_itself_is_not_interrupted() -> None:
    with make_interrupt() as interrupt:
        await anyio.lowlevel.checkpoint()
    interrupt.interrupt()
    interrupt.interrupt()
    assert not interrupt.interrupted
    await anyio.lowlevel.checkpoint()


async def test_a_body_may_interrupt_itself() -> None:
    with make_interrupt() as interrupt:
        interrupt.interrupt()
        interrupt.interrupt()
        await forever()
    assert interrupt.interrupted
    await anyio.lowlevel.checkpoint()


async def test_an_interrupt_that_the_body_never_met_goes_no_further() -> None:
    """Before Python 3.13 a task cannot take back its own cancellation: it came at the next await behind the border."""
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
                await forever()
            finally:
                raise ZeroDivisionError
    assert not interrupt.interrupted
    await anyio.lowlevel.checkpoint()


async def test_a_cancellation_from_outside_passes_an_interrupt() -> None:
    reached: list[str] = []
    with anyio.CancelScope() as outside:
        with make_interrupt() as interrupt:
            outside.cancel()
            await forever()
        reached.append("behind the border")
    assert outside.cancelled_caught
    assert not interrupt.interrupted
    assert reached == []


async def test_an_interrupt_and_a_cancellation_from_outside_at_once() -> None:
    reached: list[str] = []
    with anyio.CancelScope() as outside:
        with make_interrupt() as interrupt:
            async with anyio.create_task_group() as group:
                group.start_soon(_call, outside.cancel)
                group.start_soon(_call, interrupt.interrupt)
                await forever()
        await anyio.lowlevel.checkpoint()
        reached.append("behind the border")
    assert outside.cancelled_caught
    assert reached == []


async def test_a_shielded_body_can_be_interrupted_while_its_task_is_cancelled() -> None:
    """The earlier cancellation was taken for one of now, so the interrupt broke through the shield."""
    reached: list[str] = []
    with anyio.CancelScope() as outside:
        outside.cancel()
        try:
            await forever()
        finally:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as group:
                    with make_interrupt() as interrupt:
                        group.start_soon(_call, interrupt.interrupt)
                        await forever()
                await anyio.lowlevel.checkpoint()
                reached.append("still shielded")
    assert reached == ["still shielded"]
    assert interrupt.interrupted


# Guards


async def test_the_end_of_the_watcher_cancels_the_body_and_only_that() -> None:
    leave = anyio.Event()
    reached: list[str] = []
    async with anyio.create_task_group() as group:
        group.start_soon(_call, leave.set)
        async with make_guard(leave.wait):
            try:
                await forever()
            finally:
                reached.append("cleaned up")
        reached.append("after")
        await anyio.lowlevel.checkpoint()
        reached.append("and on")
    assert reached == ["cleaned up", "after", "and on"]


async def test_the_end_of_the_body_ends_the_watcher() -> None:
    ended: list[str] = []

    async def watcher() -> None:
        try:
            await forever()
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
        await forever()
    async with make_guard(returns):
        pass
    await anyio.lowlevel.checkpoint()


async def test_a_guard_can_be_cancelled_from_inside_and_outside() -> None:
    async with make_guard(forever) as guard:
        guard.cancel()
        guard.cancel()
        await forever()
    async with anyio.create_task_group() as group:
        async with make_guard(forever) as guard:
            group.start_soon(_call, guard.cancel)
            await forever()
    guard.cancel()
    await anyio.lowlevel.checkpoint()


async def test_a_guard_that_is_cancelled_at_the_very_end_goes_no_further() -> None:
    async with make_guard(forever) as guard:
        guard.cancel()
    for _ in range(3):
        await anyio.lowlevel.checkpoint()


async def test_a_cancellation_from_outside_passes_a_guard() -> None:
    reached: list[str] = []
    with anyio.CancelScope() as outside:
        async with make_guard(forever):
            outside.cancel()
            await forever()
        reached.append("behind the border")
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
            await forever()
        await anyio.lowlevel.checkpoint()
        reached.append("behind the border")
    assert outside.cancelled_caught
    assert reached == []


async def test_an_error_of_the_body_comes_out_as_it_was_raised() -> None:
    """On trio it came out in an exception group, which no caller's `except` expected."""
    with pytest.raises(ZeroDivisionError):
        async with make_guard(forever):
            await anyio.lowlevel.checkpoint()
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        async with make_guard(forever) as guard:
            guard.cancel()
            try:
                await forever()
            finally:
                raise ZeroDivisionError
    await anyio.lowlevel.checkpoint()


async def test_an_error_of_the_watcher_is_the_end_of_the_watcher(caplog: pytest.LogCaptureFixture) -> None:
    """On asyncio the body went on for ever: a subscription whose server's `receive` had raised was never let go."""

    async def watcher() -> None:
        raise ZeroDivisionError

    with caplog.at_level("DEBUG", "asgi_realtime"):
        async with make_guard(watcher) as guard:
            await forever()
    assert [(record.levelname, record.exc_info is not None) for record in caplog.records] == [("DEBUG", True)]
    guard.cancel()
    await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_watcher_that_cancels_itself_ends_the_body() -> None:
    async def watcher() -> None:
        raise asyncio.CancelledError

    async with make_guard(watcher):
        await forever()


async def test_guards_may_be_nested() -> None:
    reached: list[str] = []
    async with make_guard(forever) as outer:
        async with make_guard(forever) as inner:
            inner.cancel()
            await forever()
        reached.append("between")
        outer.cancel()
        await forever()
    async with make_guard(forever) as outer:
        async with make_guard(forever):
            outer.cancel()
            await forever()
        reached.append("never here")
    assert reached == ["between"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_that_is_cancelled_by_asyncio_itself_passes_a_guard(anyio_backend: str) -> None:
    async def body() -> None:
        async with make_guard(forever):
            await forever()

    task = asyncio.ensure_future(body())
    await until(lambda: len(asyncio.all_tasks()) >= 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_interrupt_may_be_left_in_another_task(anyio_backend: str) -> None:
    """A context manager of the user's may be entered in one task and left in another; nobody is hurt."""
    interrupt = make_interrupt().__enter__()
    left = asyncio.ensure_future(_leave(interrupt.__exit__))
    assert await left is False
    interrupt.interrupt()
    await anyio.lowlevel.checkpoint()
    assert not interrupt.interrupted


async def _leave(leave: Callable[[None, None, None], bool]) -> bool:
    return leave(None, None, None)
