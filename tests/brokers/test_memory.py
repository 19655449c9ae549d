"""The memory broker: its size, what it removes when it is full, and that it leaks nothing."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from asgi_realtime.brokers import MemoryBroker, open_broker
from asgi_realtime.brokers.base import Broker, ChangeMark, ImmediateBroker, Position, Producer, StreamKey
from asgi_realtime.brokers.memory_costs import MARK
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.core.errors import InvalidConfiguration, LimitExceeded, ProducerGap, RunNotFound, StreamClosed
from asgi_realtime.core.log import End
from asgi_realtime.core.metadata import encode_metadata
from asgi_realtime.core.runs import Status, StoredRecord
from asgi_realtime.testing.conformance.kit import next_version
from tests.brokers.backends import Clock, held
from tests.inprocess import FakeClock

pytestmark = pytest.mark.anyio

COMPLETE = End("complete")
KIB = b"x" * 1000


def record(run_id: str, **fields: object) -> StoredRecord:
    return StoredRecord(
        **{"id": run_id, "task": "test", "status": Status.QUEUED, "created_at_ms": 0, "updated_at_ms": 0} | fields  # type: ignore[arg-type]
    )


async def create(broker: Broker, run_id: str, **fields: object) -> StoredRecord:
    made = record(run_id, **fields)
    await broker.commit(made, expect=0, change=ChangeMark(run_id, 0))
    return made


async def finish(broker: Broker, run: StoredRecord, *, at_ms: int = 0, **fields: object) -> StoredRecord:
    ended = next_version(run, status=Status.COMPLETED, completed_at_ms=at_ms, **fields)
    await broker.commit(ended, expect=run.version, change=ChangeMark(run.id, run.version))
    return ended


async def lengths(broker: Broker, *run_ids: str) -> list[int | None]:
    """How many entries each run's stream retains; None for a run that was removed."""
    found: list[int | None] = []
    for run_id in run_ids:
        try:
            page = await broker.read(StreamKey(run_id, "s"), limit=100_000)
        except RunNotFound:
            found.append(None)
        else:
            found.append(page.next - page.first)
    return found


# Size


async def test_the_size_covers_all_data_and_returns_to_zero() -> None:
    broker = MemoryBroker()
    assert broker.size == 0
    run = await create(broker, "a", payload_json=b"p" * 500)
    empty = broker.size
    assert empty > 500
    await broker.append(StreamKey("a", "s"), [KIB] * 3)
    await broker.append(StreamKey("a", "t"), [KIB])
    assert 4000 + 2 * 1024 + 4 * 64 < broker.size - empty < 7000, "streams and entries cost more than their bytes"
    before = broker.size
    run = await finish(broker, run, output_json=b"o" * 700)
    assert broker.size == before + 700 + MARK
    await broker.remove("a")
    assert broker.size == 0


async def test_trimming_reduces_the_size() -> None:
    broker = MemoryBroker(retention=Retention(stream_bytes=5000))
    await create(broker, "a")
    empty = broker.size
    for _ in range(50):
        await broker.append(StreamKey("a", "s"), [KIB])
    assert 3900 < broker.size - empty <= 5000 + 1024 + 5 * 72
    await broker.remove("a")
    assert broker.size == 0


async def test_a_retry_costs_nothing() -> None:
    broker = MemoryBroker()
    await create(broker, "a")
    await broker.append(StreamKey("a", "s"), [KIB], producer=Producer("p", 0))
    before = broker.size
    await broker.append(StreamKey("a", "s"), [KIB], producer=Producer("p", 0))
    assert broker.size == before


async def test_the_counts_of_producers_have_a_size() -> None:
    """Each append over HTTP had a producer that outlived its chunk, so a run could grow without limit."""
    broker = MemoryBroker(retention=Retention(stream_bytes=1000, total_bytes=130_000))
    run = await create(broker, "a")
    empty = broker.size
    for number in range(100):
        await broker.append(StreamKey("a", "s"), [b"1"], producer=Producer(f"request:{number}", 0))
    assert broker.size - empty > 20_000
    await finish(broker, run)
    await create(broker, "b")
    for number in range(400):
        await broker.append(StreamKey("b", "s"), [b"1"], producer=Producer(f"request:{number}", 0))
    assert await lengths(broker, "a") == [None]
    assert broker.size < 130_000
    await broker.remove("b")
    assert broker.size == 0


# Full


async def test_runs_that_ended_first_are_removed_first() -> None:
    broker = MemoryBroker(retention=Retention(total_bytes=45_000))
    runs = {}
    for name in ("open", "early", "late", "middle"):
        runs[name] = await create(broker, name)
        await broker.append(StreamKey(name, "s"), [KIB] * 5)
    for name, at_ms in (("late", 3000), ("early", 1000), ("middle", 2000)):
        await finish(broker, runs[name], at_ms=at_ms)
    await broker.append(StreamKey("open", "s"), [KIB] * 12)
    assert await lengths(broker, "open", "early", "middle", "late") == [17, None, 5, 5]
    await broker.append(StreamKey("open", "s"), [KIB] * 7)
    assert await lengths(broker, "open", "early", "middle", "late") == [24, None, None, 5]
    assert broker.size <= 45_000


async def test_metadata_has_a_size() -> None:
    """A hundred runs with large metadata were stored in a broker of a quarter of their size."""
    broker = MemoryBroker(retention=Retention(total_bytes=100_000))
    for number in range(30):
        run = await create(broker, f"run {number}", metadata_json=encode_metadata({"a": "x" * 5000}))
        run = next_version(run, metadata={"a": "x" * 10_000})
        await broker.commit(run, expect=1, change=ChangeMark("w", number))
        await finish(broker, run, at_ms=number)
        assert broker.size <= 100_000
    assert 5 <= len(broker._runs) <= 7
    for run_id in list(broker._runs):
        await broker.remove(run_id)
    assert broker.size == 0


async def test_a_large_output_makes_room_too() -> None:
    broker = MemoryBroker(retention=Retention(total_bytes=40_000))
    old, new = await create(broker, "old"), await create(broker, "new")
    await finish(broker, old, at_ms=1, output_json=b"x" * 20_000)
    await finish(broker, new, at_ms=2, output_json=b"x" * 20_000)
    assert await lengths(broker, "old", "new") == [None, 0]


async def test_the_run_that_was_just_written_to_is_not_removed() -> None:
    """A run whose output exceeded the total was removed as it ended, so its result was never read."""
    broker = MemoryBroker(retention=Retention(total_bytes=10_000))
    await finish(broker, await create(broker, "old"))
    await finish(broker, await create(broker, "huge"), output_json=b"x" * 20_000)
    assert await lengths(broker, "old", "huge") == [None, 0]
    await create(broker, "next")
    assert await lengths(broker, "huge", "next") == [None, 0]
    assert len(broker._due["expiry"]._heap) <= 2


async def test_a_reader_of_a_removed_run_gets_an_error() -> None:
    broker = MemoryBroker(retention=Retention(total_bytes=10_000))
    await finish(broker, await create(broker, "old"))
    async with broker.live(StreamKey("old", "s")) as live:
        await create(broker, "new")
        await broker.append(StreamKey("new", "s"), [KIB] * 5)
        assert isinstance(live.failure, RunNotFound)
    assert held(broker) == 0


# No leaks


async def test_a_rejected_append_leaves_no_stream() -> None:
    broker = MemoryBroker()
    run = await create(broker, "a")
    with pytest.raises(ProducerGap):
        await broker.append(StreamKey("a", "hole"), [b"1"], producer=Producer("p", 1))
    await finish(broker, run)
    for number in range(10):
        with pytest.raises(StreamClosed):
            await broker.append(StreamKey("a", f"late {number}"), [b"1"])
    assert broker._runs["a"].streams == {}


async def test_a_stream_that_was_only_read_is_dropped_with_its_readers() -> None:
    broker = MemoryBroker()
    run = await create(broker, "a")
    async with broker.live(StreamKey("a", "s")), broker.live(StreamKey("a", "s")):
        assert len(broker._runs["a"].streams) == 1
    assert broker._runs["a"].streams == {}
    async with broker.live(StreamKey("a", "s")):
        await finish(broker, run)
    assert broker._runs["a"].streams == {}
    async with broker.live(StreamKey("a", "s")) as live:
        assert live.end == COMPLETE
    assert broker._runs["a"].streams == {}


async def test_a_topic_is_dropped_with_its_last_run_and_follower() -> None:
    broker = MemoryBroker()
    async with broker.follow("tag:t"):
        run = await create(broker, "a", tags=("t",))
        await broker.remove(run.id)
        assert list(broker._topics) == ["tag:t"]
    assert broker._topics == {}
    await broker.changes("tag:t")
    assert broker._topics == {}


async def test_leaving_a_dropped_topic_does_not_drop_its_successor() -> None:
    broker = MemoryBroker(limits=Limits(topic_runs=1))
    await create(broker, "a", tags=("t",))
    await create(broker, "b", tags=("t",))  # "a" is no longer in the topic
    await broker.remove("a")
    assert [change.run_id for change in (await broker.changes("tag:t")).items] == ["b"]
    await broker.remove("b")
    assert broker._topics == {}

    await create(broker, "a", tags=("t",))
    await create(broker, "b", tags=("t",))
    await broker.remove("b")
    assert "tag:t" not in broker._topics, "though it listed a run that still exists"
    await broker.remove("a")
    assert broker._topics == {}


async def test_a_thousand_runs_come_and_go() -> None:
    clock = Clock()
    broker = MemoryBroker(clock=clock, retention=Retention(after_end=1))
    for number in range(1000):
        run = await create(broker, f"run_{number}", tags=("t",), status=Status.EXECUTING, owner="us")
        await broker.append(StreamKey(run.id, "s"), [b"1"])
        await broker.claim(f"key {number}", run.id, ttl_s=1)
        async with broker.live(StreamKey(run.id, "s")), broker.follow(f"run:{run.id}"):
            await broker.renew([run.id], owner="us")
        await finish(broker, run, at_ms=int(clock() * 1000))
        await clock.advance(1.1)
        for expired in await broker.due("expiry"):
            await broker.remove(expired)
    await broker.claim("last", "value", ttl_s=1)
    assert (broker._runs, broker._topics, [*broker._claims]) == ({}, {}, ["last"])
    assert broker.size < 500, "that one claim"
    for schedule in (*broker._due.values(), broker._claims_expire):
        assert len(schedule) <= 1
        assert len(schedule._heap) <= 70


async def test_renewing_forever_costs_nothing() -> None:
    clock = Clock()
    broker = MemoryBroker(clock=clock, timeouts=Timeouts(lease=30))
    await create(broker, "a", status=Status.EXECUTING, owner="us")
    for _ in range(1000):
        await clock.advance(10)
        await broker.renew(["a"], owner="us")
    assert len(broker._due["lease"]._heap) <= 70
    assert await broker.due("lease") == []
    await clock.advance(31)
    assert await broker.due("lease") == ["a"]


async def test_a_time_that_is_moved_forth_and_back_is_due_once() -> None:
    clock = Clock()
    broker = MemoryBroker(clock=clock)
    now_ms = int(clock() * 1000)
    run = await create(broker, "a", status=Status.DELAYED, delay_until_ms=now_ms + 1000)
    for at_ms in (now_ms + 2000, now_ms + 1000):
        run = next_version(run, delay_until_ms=at_ms)
        await broker.commit(run, expect=run.version - 1, change=ChangeMark("w", run.version))
    await clock.advance(3)
    assert await broker.due("delay") == ["a"]
    assert await broker.due("delay") == ["a"]


async def test_the_marks_of_a_run_are_bounded() -> None:
    broker = MemoryBroker()
    run = await create(broker, "a")
    for number in range(200):
        run = next_version(run)
        await broker.commit(run, expect=run.version - 1, change=ChangeMark("w", number))
    assert len(broker._runs["a"].marks) == 64


async def test_expired_claims_are_dropped_a_hundred_at_a_time() -> None:
    clock = Clock()
    broker = MemoryBroker(clock=clock)
    for number in range(300):
        await broker.claim(f"key {number}", "old", ttl_s=1)
    await clock.advance(2)
    assert await broker.claim("key 299", "new", ttl_s=1) == "new", "even one that has not been dropped yet"
    assert len(broker._claims) == 200
    for number in range(3):
        await broker.claim(f"more {number}", "new", ttl_s=1)
    assert set(broker._claims) == {"key 299", "more 0", "more 1", "more 2"}


# Life cycle


async def test_every_call_can_be_made_without_suspending() -> None:
    broker = MemoryBroker()
    await create(broker, "a")
    assert isinstance(broker, ImmediateBroker)
    assert broker.append_nowait(StreamKey("a", "s"), [b"1"]) == Position(0, 1)
    assert not broker.shared
    with anyio.CancelScope() as scope:
        scope.cancel()
        assert await broker.append(StreamKey("a", "s"), [b"2"]) == Position(1, 2)
        assert len((await broker.read(StreamKey("a", "s"))).entries) == 2


@pytest.mark.parametrize("second", ["asyncio", "trio"])
def test_the_broker_can_be_entered_again_on_another_loop(second: str) -> None:
    broker = MemoryBroker()
    key = StreamKey("a", "s")
    followed: list[bytes] = []

    async def follow(count: int) -> None:
        async with broker.live(key) as live:
            while live.log.next < count:
                await live.waiting.wait()
            followed.extend(entry.data for entry in live.entries(len(followed) - 1))

    async def first_life() -> None:
        async with broker:
            await create(broker, "a", tags=("t",))
            async with anyio.create_task_group() as group:
                group.start_soon(follow, 1)
                await anyio.lowlevel.checkpoint()
                await broker.append(key, [b"1"])

    async def second_life() -> None:
        async with broker:
            assert (await broker.load(["a"]))[0] is not None
            async with anyio.create_task_group() as group:
                group.start_soon(follow, 2)
                await anyio.lowlevel.checkpoint()
                await broker.append(key, [b"2"])
            async with broker.follow("tag:t") as topic:
                assert len((await topic.changes(None)).items) == 1

    anyio.run(first_life)
    assert held(broker) == 0
    anyio.run(second_life, backend=second)
    assert followed == [b"1", b"2"]
    assert held(broker) == 0


def test_the_url_selects_the_broker() -> None:
    settings: Any = {"limits": Limits(), "retention": Retention(), "timeouts": Timeouts(), "clock": Clock()}
    assert isinstance(open_broker("memory://", **settings), MemoryBroker)
    with pytest.raises(InvalidConfiguration, match="'amqp://' is not known"):
        open_broker("amqp://host", **settings)


async def test_claims_have_a_size_and_return_to_zero() -> None:
    clock = FakeClock()
    broker = MemoryBroker(clock=clock)
    await broker.claim("key", "value", ttl_s=10)
    held = broker.size
    assert held > len("key" + "value")
    await broker.claim("key", "another", ttl_s=10)
    assert broker.size == held
    clock.seconds += 11
    await broker.claim("key", "another", ttl_s=10)
    assert broker.size == held + 2
    clock.seconds += 11
    await broker.claim("k", "v", ttl_s=1)
    clock.seconds += 2
    await broker.claim("k", "v", ttl_s=1)
    assert broker.size < held


async def test_a_full_broker_rejects_claims_until_some_have_expired() -> None:
    clock = FakeClock()
    broker = MemoryBroker(retention=Retention(total_bytes=100_000), clock=clock)
    number = 0
    with pytest.raises(LimitExceeded) as refused:
        while True:
            await broker.claim(f"key {number}", "x" * 1000, ttl_s=10)
            number += 1
    assert refused.value.status == 503
    assert number < 100
    assert await broker.claim("key 0", "y", ttl_s=10) == "x" * 1000, "a valid claim is still returned"
    clock.seconds += 11
    assert await broker.claim("another", "y", ttl_s=10) == "y"
    assert broker.size < 100_000
