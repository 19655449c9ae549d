"""The local copy, without a pipe."""

from __future__ import annotations

from contextlib import ExitStack

import anyio
import pytest

from asgi_realtime.core.errors import LocalCopyLost
from asgi_realtime.streams.local_copy import LocalCopy, Reader
from tests.faults import steps, take
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio


def filled(limit: int, count: int) -> LocalCopy[int]:
    copy: LocalCopy[int] = LocalCopy(limit)
    for number in range(count):
        copy.put(number)
    return copy


async def test_items_arrive_in_order_and_then_the_end() -> None:
    copy = filled(10, 3)
    copy.finish(None)
    assert [item async for item in Reader(copy)] == [0, 1, 2]
    assert [item async for item in Reader(copy)] == []


async def test_an_error_follows_the_items() -> None:
    copy = filled(10, 2)
    error = ValueError("the source broke")
    copy.finish(error)
    reader = Reader(copy)
    assert [await anext(reader), await anext(reader)] == [0, 1]
    assert not copy.error_seen
    with pytest.raises(ValueError) as caught:
        await anext(reader)
    assert caught.value is error
    assert copy.error_seen


async def test_the_first_finish_wins() -> None:
    copy = filled(10, 0)
    copy.finish(None)
    copy.finish(ValueError("too late"))
    assert [item async for item in Reader(copy)] == []


async def test_it_is_not_full_at_its_limit() -> None:
    copy = filled(3, 3)
    assert not copy.full
    with anyio.fail_after(GUARD_S):
        await copy.room()
    assert await anext(Reader(copy)) == 0


async def test_a_full_copy_without_a_reader_is_dropped() -> None:
    copy = filled(3, 4)
    assert copy.full
    await copy.room()
    assert not copy.full
    copy.put(4)
    with pytest.raises(LocalCopyLost, match="held 3 chunks"):
        await anext(Reader(copy))


async def test_a_full_copy_with_a_reader_makes_the_producer_wait() -> None:
    copy = filled(3, 4)
    reader = Reader(copy)
    ready: list[int] = []

    async def produce() -> None:
        await copy.room()
        ready.append(1)

    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as group:
            group.start_soon(produce)
            await steps(5)
            assert not ready
            assert await anext(reader) == 0
    assert ready
    assert [await anext(reader) for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("ending", ["the reader leaves", "the host waits for the end"])
async def test_a_waiting_producer_drops_the_copy_when(ending: str) -> None:
    copy = filled(3, 4)
    readers = [Reader(copy)]
    draining = ExitStack()
    with draining, anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as group:
            group.start_soon(copy.room)
            await steps(5)
            if ending == "the reader leaves":
                readers.clear()
            else:
                draining.enter_context(copy.draining())
    with pytest.raises(LocalCopyLost):
        await anext(Reader(copy))


async def test_after_a_drain_readers_count_again() -> None:
    copy = filled(3, 4)
    reader = Reader(copy)
    with copy.draining():
        pass
    with anyio.move_on_after(0) as scope:
        await copy.room()
    assert scope.cancelled_caught
    assert await anext(reader) == 0


async def test_a_cancelled_read_loses_nothing() -> None:
    copy = filled(3, 0)
    reader = Reader(copy)
    with anyio.move_on_after(0):
        await anext(reader)
    copy.put(7)
    assert await anext(reader) == 7


async def test_two_readers_share_the_items() -> None:
    copy = filled(10, 0)
    seen: list[int] = []

    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as group:
            group.start_soon(take, Reader(copy), seen)
            group.start_soon(take, Reader(copy), seen)
            await steps(3)
            for number in range(6):
                copy.put(number)
                await steps(1)
            copy.finish(None)
    assert sorted(seen) == list(range(6))
