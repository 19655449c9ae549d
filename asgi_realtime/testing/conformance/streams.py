"""Streams: order, pages, ends, cancelled appends."""

from __future__ import annotations

from itertools import count

import anyio
import pytest

from asgi_realtime.brokers.base import Broker, End, Position, Producer, StreamKey
from asgi_realtime.core.errors import RunNotFound, StreamClosed
from asgi_realtime.testing.conformance.kit import (
    COMPLETE,
    STEP_S,
    MakeBroker,
    Reader,
    cancelled_at,
    create,
    data,
    finished,
    items,
    new_key,
    open_backend,
    pause,
    read_all,
    seqs,
    store,
)

UNKNOWN = StreamKey("run_unknown", "default")


@pytest.mark.anyio
async def test_entries_are_read_in_order_with_seqs_from_zero(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        assert await backend.broker.append(key, [b'"a"']) == Position(0, 1)
        assert await backend.peer.append(key, [b'"b"', b'{"c": 1}']) == Position(2, 3)
        for broker in backend.processes:
            page = await broker.read(key)
            assert [(entry.seq, entry.data) for entry in page.entries] == [(0, b'"a"'), (1, b'"b"'), (2, b'{"c": 1}')]
            assert (page.first, page.next, page.end) == (0, 3, None)


@pytest.mark.anyio
async def test_data_is_read_byte_for_byte(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend, name="a b/ü:{1}")
        chunks = [b"null", b'""', b'"id: 7"', b'"data: "', '"ü \u2028 🙂"'.encode(), b'"' + b"x" * 200_000 + b'"']
        await backend.broker.append(key, chunks)
        assert data(await read_all(backend.peer, key)) == chunks


@pytest.mark.anyio
async def test_entries_carry_the_time_of_their_append(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        before_ms = backend.now_ms()
        await backend.broker.append(key, items(1))
        await backend.advance(STEP_S)
        await backend.broker.append(key, items(1))
        first, second = (await backend.broker.read(key)).entries
        assert before_ms <= first.time_ms < second.time_ms <= backend.now_ms() + 1


@pytest.mark.anyio
async def test_an_append_of_nothing_changes_nothing(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        assert await backend.broker.append(key, []) == Position(-1, 0)
        await backend.broker.append(key, items(2))
        assert await backend.broker.append(key, []) == Position(1, 2)
        assert data(await read_all(backend.broker, key)) == items(2)


@pytest.mark.anyio
async def test_concurrent_appends_are_serialized_and_never_interleaved(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        positions: list[tuple[int, Position]] = []

        async def write(broker: Broker, writer: int) -> None:
            for call in range(10):
                chunk = b"[%d,%d]" % (writer, call)
                positions.append((writer, await broker.append(key, [chunk, chunk, chunk])))

        async with anyio.create_task_group() as group:
            for writer in range(6):
                group.start_soon(write, backend.processes[writer % 2], writer)

        entries = await read_all(backend.broker, key)
        assert seqs(entries) == list(range(180))
        triples = [data(entries[start : start + 3]) for start in range(0, 180, 3)]
        assert all(len(set(triple)) == 1 for triple in triples)
        assert sorted(position.last for _, position in positions) == list(range(2, 180, 3))
        for writer, position in positions:
            assert entries[position.last].data.startswith(b"[%d," % writer)
        for writer in range(6):
            own = [triple[0] for triple in triples if triple[0].startswith(b"[%d," % writer)]
            assert own == [b"[%d,%d]" % (writer, call) for call in range(10)]


@pytest.mark.anyio
async def test_no_reader_sees_part_of_an_append(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        reader = Reader(backend.broker, key)
        lengths: list[int] = []

        async def read(broker: Broker) -> None:
            while not (page := await broker.read(key)).end:
                lengths.append(page.next)
                lengths.append(len(page.entries))
                await pause(1)

        async def watch() -> None:
            async with backend.broker.live(key) as live:
                while live.end is None:
                    lengths.append(live.log.next)
                    await live.waiting.wait()

        async with anyio.create_task_group() as group:
            for broker in backend.processes:
                group.start_soon(read, broker)
            group.start_soon(watch)
            group.start_soon(reader.run)
            for call in range(20):
                await backend.peer.append(key, items(5, start=call * 5))
                await pause(call % 3)
            await backend.peer.append(key, [], end=COMPLETE)
        assert {length % 5 for length in lengths} == {0}
        assert data(reader.seen) == items(100)


@pytest.mark.anyio
async def test_streams_are_independent(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        sibling = StreamKey(key.run, "sibling")
        unrelated = await new_key(backend)
        await backend.broker.append(key, items(3), end=COMPLETE)
        await backend.broker.append(sibling, items(2))
        assert await backend.broker.append(unrelated, items(1)) == Position(0, 1)
        assert (await backend.broker.read(sibling)).end is None
        assert [len(await read_all(backend.broker, each)) for each in (key, sibling, unrelated)] == [3, 2, 1]


@pytest.mark.anyio
async def test_a_stream_that_was_never_written_is_empty(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        assert await backend.broker.read(await new_key(backend)) == ([], 0, 0, None)


@pytest.mark.anyio
async def test_a_run_that_does_not_exist_has_no_streams(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        with pytest.raises(RunNotFound):
            await backend.broker.append(UNKNOWN, items(1))
        with pytest.raises(RunNotFound):
            await backend.broker.read(UNKNOWN)
        with pytest.raises(RunNotFound):
            await backend.broker.produced(UNKNOWN, "p")
        with pytest.raises(RunNotFound):
            async with backend.broker.live(UNKNOWN):
                raise AssertionError("entered")  # pragma: no cover
        assert backend.held() == 0


@pytest.mark.anyio
async def test_pages_are_read_after_a_cursor_up_to_a_limit(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, items(10), end=COMPLETE)

        async def page(after: int, limit: int) -> list[int]:
            found = await backend.broker.read(key, after=after, limit=limit)
            assert (found.first, found.next, found.end) == (0, 10, COMPLETE), "every page reports the range and the end"
            return seqs(found.entries)

        assert await page(-1, 3) == [0, 1, 2]
        assert await page(2, 3) == [3, 4, 5]
        assert await page(7, 3) == [8, 9]
        assert await page(8, 1) == [9]
        assert await page(9, 3) == []
        assert await page(1000, 3) == []


# Ends


@pytest.mark.anyio
async def test_a_stream_can_end_with_its_last_append(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        end = End("failed", "the model went away")
        assert await backend.broker.append(key, items(2), end=end) == Position(1, 2)
        page = await backend.peer.read(key)
        assert (data(page.entries), page.end) == (items(2), end)


@pytest.mark.anyio
async def test_an_ended_stream_rejects_appends(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, items(1), end=COMPLETE)
        for broker in backend.processes:
            with pytest.raises(StreamClosed):
                await broker.append(key, items(1))
            with pytest.raises(StreamClosed):
                await broker.append(key, items(1), end=COMPLETE)
            with pytest.raises(StreamClosed):
                await broker.append(key, items(1), producer=Producer("late", 0))
        assert data(await read_all(backend.broker, key)) == items(1)


@pytest.mark.anyio
async def test_the_first_end_is_final(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, items(1), end=COMPLETE)
        assert await backend.peer.append(key, [], end=End("failed")) == Position(0, 1)
        assert (await backend.broker.read(key)).end == COMPLETE


@pytest.mark.anyio
async def test_an_end_without_an_entry_is_durable_too(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        assert await backend.broker.append(key, [], end=COMPLETE) == Position(-1, 0)
        reader = await Reader(backend.peer, key).run()  # a reader that leaves does not drop the end
        assert (reader.seen, reader.end) == ([], COMPLETE)
        assert (await backend.peer.read(key)).end == COMPLETE
        with pytest.raises(StreamClosed):
            await backend.broker.append(key, items(1))


@pytest.mark.anyio
async def test_concurrent_appends_and_an_end_leave_exactly_what_was_acknowledged(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        acknowledged: list[bytes] = []
        refused: list[bytes] = []

        async def write(broker: Broker, writer: int) -> None:
            for call in range(20):
                chunk = b"[%d,%d]" % (writer, call)
                try:
                    await broker.append(key, [chunk])
                except StreamClosed:
                    refused.append(chunk)
                else:
                    acknowledged.append(chunk)
                await pause(1)

        async with anyio.create_task_group() as group:
            for writer in range(4):
                group.start_soon(write, backend.processes[writer % 2], writer)
            while len(acknowledged) < 20:
                await pause(1)
            await backend.broker.append(key, [b'"last"'], end=COMPLETE)

        stored = data(await read_all(backend.peer, key))
        assert stored[-1] == b'"last"'
        assert sorted(stored[:-1]) == sorted(acknowledged)
        assert refused


@pytest.mark.anyio
async def test_an_ended_run_rejects_appends(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        written, fresh = StreamKey(run.id, "written"), StreamKey(run.id, "fresh")
        await backend.broker.append(written, items(2))
        await store(backend.broker, finished(backend, run))
        for broker in backend.processes:
            for key in (written, fresh):
                with pytest.raises(StreamClosed):
                    await broker.append(key, items(1))
                with pytest.raises(StreamClosed):
                    await broker.append(key, items(1), producer=Producer("late", 0))
        assert (await backend.broker.read(written))[1:] == (0, 2, COMPLETE)
        assert await backend.broker.read(fresh) == ([], 0, 0, COMPLETE)


# Cancellation


@pytest.mark.anyio
async def test_a_cancelled_append_takes_full_effect_or_none(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        held = backend.held()
        for number in count():  # pragma: no branch
            key = await new_key(backend)
            append = backend.broker.append(key, items(3), producer=Producer("p", 0), end=COMPLETE)
            has_finished = await cancelled_at(number, append)
            page = await backend.peer.read(key)
            assert (data(page.entries), page.end) in (([], None), (items(3), COMPLETE)), f"cancelled at {number}"
            again = await backend.peer.append(key, items(3), producer=Producer("p", 0), end=COMPLETE)
            assert again == Position(2, 3)
            assert data(await read_all(backend.broker, key)) == items(3)
            assert backend.held() == held
            if has_finished:
                return
