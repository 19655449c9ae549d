"""The writer of one stream: group commit, retries, failures."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_realtime import Realtime
from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.config import Limits, Timeouts
from asgi_realtime.core.errors import BrokerUnavailable, EncodingError, LimitExceeded, RunNotFound, StreamClosed
from asgi_realtime.streams.outbox import CALL_BYTES, CALL_ITEMS
from asgi_realtime.streams.writer import StreamWriter, encode_within, name_chunk
from tests.faults import RemoteBroker, make, steps, stored, until
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio


def writer_of(realtime: Realtime, run_id: str, name: str = "default") -> StreamWriter:
    return realtime._producers.writer(StreamKey(run_id, name))


def counts(writer: StreamWriter) -> tuple[int, int, int | None]:
    return writer.chunks, writer.bytes, writer.last_index


async def test_in_memory_a_chunk_is_in_the_log_when_write_returns() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        writer = writer_of(realtime, run.id)
        await writer.open()
        writer.write(b'"a"')
        writer.write(b"1")
        assert await stored(realtime, run.id) == ["a", 1]
        assert counts(writer) == (2, 4, 1)
        assert not writer.full
        await writer.drain()


async def test_chunks_are_collected_while_an_append_is_in_flight() -> None:
    broker = RemoteBroker()
    async with make(broker=broker) as realtime, realtime.open_run("report") as run:
        writer = writer_of(realtime, run.id)
        await writer.open()
        broker.hold = anyio.Event()
        writer.write(b"0")
        await steps(20)
        for number in range(1, 10):
            writer.write(str(number).encode())
        assert counts(writer) == (0, 0, None)
        broker.hold.set()
        with anyio.fail_after(GUARD_S):
            await writer.drain()
        assert broker.appends == [1, 9]
        assert counts(writer) == (10, 10, 9)
        assert await stored(realtime, run.id) == list(range(10))


async def test_the_writers_of_a_stream_keep_their_common_order() -> None:
    """The last word of a canceled task used to overtake chunks that its pipe had written before."""
    broker = RemoteBroker()
    async with make(broker=broker) as realtime, realtime.open_run("report") as run:
        broker.hold = anyio.Event()
        pipe = realtime.pipe(["0", "1", "2"])
        await steps(20)
        async with realtime.writer("default") as writer, anyio.create_task_group() as group:
            await writer.write("3")
            group.start_soon(realtime.append, "4")
            await steps(20)
            await writer.write("5")
            broker.hold.set()
        with anyio.fail_after(GUARD_S):
            assert await pipe.wait_until_complete() == (3, 9, 2)
        assert await stored(realtime, run.id) == ["0", "1", "2", "3", "4", "5"]


async def test_a_failed_call_fails_only_the_writers_whose_chunks_it_held() -> None:
    broker = RemoteBroker()
    async with make(broker=broker, timeouts=Timeouts(append=0.01)) as realtime, realtime.open_run("report") as run:
        other, writer = writer_of(realtime, run.id), writer_of(realtime, run.id)
        other.write(b"0")
        await other.drain()
        broker.away = {"append"}
        writer.write(b"1")
        with anyio.fail_after(GUARD_S), pytest.raises(BrokerUnavailable):
            await writer.drain()
        broker.away = set()
        other.write(b"2")
        await other.drain()
        assert counts(other) == (2, 2, 1)
        with pytest.raises(BrokerUnavailable):
            writer.write(b"3")
        assert await stored(realtime, run.id) == [0, 2]


async def test_one_call_carries_a_limited_number_of_items_and_bytes() -> None:
    broker = RemoteBroker()
    big = b'"' + b"x" * (CALL_BYTES // 2) + b'"'
    async with make(broker=broker) as realtime, realtime.open_run("report") as run:
        writer = writer_of(realtime, run.id)
        for _ in range(CALL_ITEMS + 1):
            writer.write(b"1")
        for _ in range(3):
            writer.write(big)
        with anyio.fail_after(GUARD_S):
            await writer.drain()
        assert broker.appends == [CALL_ITEMS, 2, 1, 1]
        assert counts(writer) == (CALL_ITEMS + 4, CALL_ITEMS + 1 + 3 * len(big), CALL_ITEMS + 3)


async def test_a_lost_response_duplicates_nothing() -> None:
    broker = RemoteBroker()
    async with make(broker=broker) as realtime, realtime.open_run("report") as run:
        writer = writer_of(realtime, run.id)
        broker.lose_answers = 2
        for number in range(5):
            writer.write(str(number).encode())
        with anyio.fail_after(GUARD_S):
            await writer.drain()
        assert counts(writer) == (5, 5, 4)
        assert await stored(realtime, run.id) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("call", ["append", "load", "commit"])
async def test_the_writer_waits_for_an_unavailable_broker(call: str) -> None:
    """A broker that was unavailable when the run was loaded used to fail the stream immediately."""
    broker = RemoteBroker()
    async with make(broker=broker) as realtime, realtime.open_run("report") as run:
        broker.away = {call}
        writer = writer_of(realtime, run.id)
        await writer.open()
        writer.write(b"1")
        await until(lambda: broker.failed == 2)
        broker.away = set()
        with anyio.fail_after(GUARD_S):
            await writer.drain()
        assert await stored(realtime, run.id) == [1]


async def test_a_broker_that_stays_unavailable_fails_the_writer() -> None:
    broker = RemoteBroker()
    async with make(broker=broker, timeouts=Timeouts(append=0.01)) as realtime, realtime.open_run("report") as run:
        broker.away = {"append"}
        writer = writer_of(realtime, run.id)
        writer.write(b"1")
        writer.write(b"2")
        with anyio.fail_after(GUARD_S), pytest.raises(BrokerUnavailable):
            await writer.drain()
        assert not writer.full
        with pytest.raises(BrokerUnavailable):
            writer.write(b"3")
        await writer.room()
        assert counts(writer) == (0, 0, None)
        broker.away = set()


async def test_a_run_that_is_over_rejects_chunks() -> None:
    for broker in ({}, {"broker": RemoteBroker()}):
        async with make(**broker) as realtime:
            async with realtime.open_run("report") as run:
                await realtime.append("last")
            writer = writer_of(realtime, run.id)
            await writer.open()
            with anyio.fail_after(GUARD_S), pytest.raises(StreamClosed):
                writer.write(b"1")
                await writer.drain()


async def test_an_unknown_run_is_rejected() -> None:
    for broker in ({}, {"broker": RemoteBroker()}):
        async with make(**broker) as realtime:
            writer = writer_of(realtime, "run_unknown")
            with anyio.fail_after(GUARD_S), pytest.raises(RunNotFound):
                await writer.open()
                writer.write(b"1")
                await writer.drain()


async def test_room_waits_until_enough_is_acknowledged() -> None:
    broker = RemoteBroker()
    async with make(broker=broker, limits=Limits(pending_bytes=3)) as realtime, realtime.open_run("report") as run:
        writer = writer_of(realtime, run.id)
        broker.hold = anyio.Event()
        for _ in range(3):
            writer.write(b"1")
        assert not writer.full
        writer.write(b"1")
        assert writer.full
        with anyio.move_on_after(0) as scope:
            await writer.room()
        assert scope.cancelled_caught
        broker.hold.set()
        with anyio.fail_after(GUARD_S):
            await writer.room()
            await writer.drain()
        assert writer.chunks == 4


async def test_drain_waits_only_for_chunks_written_before_it() -> None:
    """With several concurrent appends, it used to return only once all of them paused at the same time."""
    broker = RemoteBroker()
    async with make(broker=broker) as realtime, realtime.open_run("report") as run:
        writer = writer_of(realtime, run.id)
        drained = False

        async def drain() -> None:
            nonlocal drained
            await writer.drain()
            drained = True

        writer.write(b"1")
        with anyio.fail_after(GUARD_S):
            async with anyio.create_task_group() as group:
                group.start_soon(drain)
                while not drained:
                    writer.write(b"2")
                    await steps(1)
            await writer.drain()


async def test_a_cancelled_drain_can_be_repeated() -> None:
    broker = RemoteBroker()
    async with make(broker=broker) as realtime, realtime.open_run("report") as run:
        writer = writer_of(realtime, run.id)
        broker.hold = anyio.Event()
        writer.write(b"1")
        with anyio.move_on_after(0):
            await writer.drain()
        broker.hold.set()
        with anyio.fail_after(GUARD_S):
            await writer.drain()
        assert await stored(realtime, run.id) == [1]


async def test_a_shutdown_before_the_acknowledgement_raises() -> None:
    """`wait_until_complete` used to report success for chunks that were never stored."""
    broker = RemoteBroker()
    async with make(broker=broker, timeouts=Timeouts(drain=0.001)) as realtime:
        async with realtime.open_run("report") as run:
            pass
        writer = writer_of(realtime, run.id)
        broker.hold = anyio.Event()
        writer.write(b"1")
        await steps(10)
        with anyio.fail_after(GUARD_S):
            await realtime.stop()
            with pytest.raises(BrokerUnavailable, match="stopped the writer"):
                await writer.drain()


async def test_a_bug_in_the_broker_raises(caplog: pytest.LogCaptureFixture) -> None:
    class Buggy(RemoteBroker):
        async def append(self, *args: Any, **kwargs: Any) -> Any:
            raise ZeroDivisionError

    async with make(broker=Buggy()) as realtime, realtime.open_run("report") as run:
        writer = writer_of(realtime, run.id)
        writer.write(b"1")
        with anyio.fail_after(GUARD_S), pytest.raises(BrokerUnavailable, match="ZeroDivisionError stopped the writer"):
            await writer.drain()
    assert "a background job failed" in caplog.text


def test_a_chunk_is_limited_in_size() -> None:
    assert encode_within("12345678", 10) == b'"12345678"'
    with pytest.raises(LimitExceeded, match="a chunk is 11 bytes, limit 10"):
        encode_within("123456789", 10)


def test_an_error_names_its_chunk() -> None:
    errors = [LimitExceeded("a chunk is 11 bytes", status=413), EncodingError("no JSON form"), KeyError("delta")]
    for error in errors:
        name_chunk(error, StreamKey("run_1", "ai"), 3)
    assert [str(error) for error in errors] == [
        "chunk 3 of stream 'ai' of run 'run_1': a chunk is 11 bytes",
        "chunk 3 of stream 'ai' of run 'run_1': no JSON form",
        "'delta'",
    ]
    assert errors[2].__notes__ == ["raised by encode= for chunk 3 of stream 'ai' of run 'run_1'"]


# `Realtime.append`


@pytest.mark.parametrize("remote", [False, True])
async def test_append_is_stored_when_it_returns(remote: bool) -> None:
    async with make(**({"broker": RemoteBroker()} if remote else {})) as realtime, realtime.open_run("report") as run:
        for number in range(3):
            await realtime.append(number)
            assert await stored(realtime, run.id) == list(range(number + 1))


async def test_concurrent_appends_store_each_chunk_once() -> None:
    broker = RemoteBroker()
    async with make(broker=broker) as realtime, realtime.open_run("report") as run:
        async with anyio.create_task_group() as group:
            for number in range(100):
                group.start_soon(realtime.append, number)
        assert sorted(await stored(realtime, run.id)) == list(range(100))
        assert len(broker.appends) < 20, "they shared their calls"


async def test_append_recovers_after_a_long_outage() -> None:
    broker = RemoteBroker()
    async with make(broker=broker, timeouts=Timeouts(append=0.01)) as realtime, realtime.open_run("report") as run:
        broker.away = {"append"}
        with anyio.fail_after(GUARD_S), pytest.raises(BrokerUnavailable):
            await realtime.append("lost")
        broker.away = set()
        await realtime.append("stored")
        assert await stored(realtime, run.id) == ["stored"]


async def test_append_of_an_unencodable_chunk_names_its_type() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        with pytest.raises(EncodingError, match="object has no JSON form"):
            await realtime.append(object())
        with pytest.raises(EncodingError, match="bytes has no JSON form; pass text"):
            await realtime.append(b"bytes")
        await realtime.append("usable")
        assert await stored(realtime, run.id) == ["usable"]


writes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 3), st.booleans()), max_size=30)


@pytest.mark.slow
@given(plan=writes, lost=st.integers(0, 1))
@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_chunks_are_stored_once_and_in_order(backend: str, plan: list[tuple[int, int, int, bool]], lost: int) -> None:
    async def drive() -> None:
        broker = RemoteBroker()
        async with make(broker=broker, limits=Limits(pending_bytes=60)) as realtime, realtime.open_run("report") as run:
            writers = [writer_of(realtime, run.id) for _ in range(3)]
            broker.lose_answers = lost
            expected = []
            for number, (which, size, pause, wait) in enumerate(plan):
                writer = writers[which]
                chunk = f"{number}:" + "x" * size
                writer.write(encode_within(chunk, 1000))
                expected.append(chunk)
                await steps(pause)
                if wait:
                    await writer.room()
            with anyio.fail_after(GUARD_S):
                for writer in writers:
                    await writer.drain()
            assert await stored(realtime, run.id) == expected
            assert sum(writer.chunks for writer in writers) == len(expected)

    anyio.run(drive, backend=backend)
