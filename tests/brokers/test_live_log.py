"""A followed log: what readers get, what they share, and when they are woken."""

from __future__ import annotations

import anyio
import pytest

from asgi_realtime.brokers.live_log import MAX_BODY, LiveLog
from asgi_realtime.core.log import End, Log
from asgi_realtime.core.sse import chunk_frame
from asgi_realtime.loop.waiting import Waiter, make_waiter
from tests.inprocess import GUARD_S

COMPLETE = End("complete")


def followed(*items: bytes) -> LiveLog:
    live = LiveLog(Log())
    live.log.append(items, 1)
    return live


def test_a_reader_gets_the_frames_after_its_cursor_as_one_body() -> None:
    live = followed(b"0", b"1", b"2")
    assert live.take(-1) == (chunk_frame(0, b"0") + chunk_frame(1, b"1") + chunk_frame(2, b"2"), 2)
    assert live.take(1) == (chunk_frame(2, b"2"), 2)
    assert live.take(2) is None
    assert live.take(99) is None


def test_readers_at_one_cursor_share_one_body() -> None:
    live = followed(b"0", b"1")
    first, second = live.take(-1), live.take(-1)
    assert first is second
    live.log.append([b"2"], 1)
    grown = live.take(-1)
    assert grown is not None
    assert grown[1] == 2, "a body from before the append is not shared after it"


def test_a_single_frame_is_not_copied() -> None:
    live = followed(b"0")
    found = live.take(-1)
    assert found is not None
    assert found[0] is live.log.frames(-1, 1)[0]


def test_few_bodies_are_retained_and_none_without_readers() -> None:
    live = followed(*(b"%d" % number for number in range(20)))
    live.enter()
    live.enter()
    for after in range(19):
        assert live.take(after) is not None
    assert len(live._slices) == 4
    live.leave()
    assert len(live._slices) == 4
    live.leave()
    assert live._slices == {}


def test_a_body_is_at_most_about_a_write_buffer() -> None:
    item = b"x" * 20_000
    live = followed(*[item] * 10)
    found = live.take(-1)
    assert found is not None
    assert found[1] == 2
    assert len(found[0]) <= MAX_BODY < len(found[0]) + 20_000


def test_an_entry_larger_than_a_body_is_a_body_of_its_own() -> None:
    live = followed(b"x" * MAX_BODY, b"1")
    found = live.take(-1)
    assert found is not None
    assert (found[1], len(found[0]) > MAX_BODY) == (0, True)


def test_a_reader_before_the_retained_part_has_a_gap() -> None:
    live = followed(b"0", b"1", b"2")
    assert live.gap(-1) is None
    live.log.trim(1)
    assert live.gap(-1) == 2
    assert live.gap(0) == 2
    assert live.gap(1) is None
    assert live.take(-1) == (chunk_frame(2, b"2"), 2)
    assert [entry.seq for entry in live.entries(-1)] == [2]


def test_entries_are_limited() -> None:
    live = followed(b"0", b"1", b"2")
    assert [entry.data for entry in live.entries(0)] == [b"1", b"2"]
    assert [entry.data for entry in live.entries(-1, 2)] == [b"0", b"1"]


@pytest.mark.anyio
async def test_entries_ends_and_failures_wake_the_waiters() -> None:
    live = followed()
    waiter = make_waiter()

    async def woken_by(waiter: Waiter) -> None:
        woken = waiter.arm()
        live.waiting.add(waiter)
        await woken

    def grow() -> None:
        live.log.append([b"0"], 1)
        live.wake()

    def end() -> None:
        live.log.close(COMPLETE)
        live.wake()

    with anyio.fail_after(GUARD_S):
        for happens in (grow, end, lambda: live.fail(ConnectionError("gone"))):
            async with anyio.create_task_group() as group:
                group.start_soon(woken_by, waiter)
                while not len(live.waiting):
                    await anyio.lowlevel.checkpoint()
                happens()
    assert live.end == COMPLETE
    assert isinstance(live.failure, ConnectionError)
    assert len(live.waiting) == 0
