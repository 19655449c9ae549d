"""Producers count their items: a retried append stores nothing twice, and a gap in the count is rejected."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_realtime.brokers.base import Broker, Position, Producer, StreamKey
from asgi_realtime.core.errors import ProducerGap, RestoreOutOfOrder, StreamClosed, StreamLost
from asgi_realtime.testing.conformance.kit import (
    CHUNK,
    COMPLETE,
    PROPERTY,
    MakeBroker,
    create,
    data,
    finished,
    items,
    new_key,
    open_backend,
    read_all,
    store,
)


@pytest.mark.anyio
async def test_a_retried_append_stores_nothing_twice(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        assert await backend.broker.append(key, items(2), producer=Producer("p", 0)) == Position(1, 2)
        await backend.broker.append(key, [b'"other"'])
        assert await backend.peer.append(key, items(2), producer=Producer("p", 0)) == Position(1, 3)
        assert data(await read_all(backend.broker, key)) == [*items(2), b'"other"']


@pytest.mark.anyio
async def test_only_the_new_part_of_an_overlapping_append_is_stored(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, items(3), producer=Producer("p", 0))
        assert await backend.peer.append(key, items(4, start=1), producer=Producer("p", 1)) == Position(4, 5)
        assert data(await read_all(backend.broker, key)) == items(5)


@pytest.mark.anyio
async def test_a_gap_in_the_count_of_a_producer_is_rejected(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        for stored in (0, 2):
            with pytest.raises(ProducerGap) as refusal:
                await backend.broker.append(key, items(1), producer=Producer("p", stored + 1), end=COMPLETE)
            assert refusal.value.expected == stored
            page = await backend.broker.read(key)
            assert (page.next, page.end) == (stored, None), "a rejected append stores neither its items nor its end"
            await backend.broker.append(key, items(2, start=stored), producer=Producer("p", stored))


@pytest.mark.anyio
async def test_each_producer_counts_its_items_per_stream(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        sibling = StreamKey(key.run, "sibling")
        await backend.broker.append(key, items(2), producer=Producer("p", 0))
        await backend.broker.append(key, items(1, start=2), producer=Producer("q", 0))
        await backend.broker.append(key, items(1, start=3))
        await backend.broker.append(key, items(1, start=4), producer=Producer("p", 2))
        await backend.broker.append(sibling, items(1), producer=Producer("p", 0))
        assert data(await read_all(backend.broker, key)) == items(5)
        assert data(await read_all(backend.broker, sibling)) == items(1)


@pytest.mark.anyio
async def test_the_count_of_a_producer_can_be_read(make_broker: MakeBroker) -> None:
    """A writer that reconnects, possibly to another process, continues after what is stored."""
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        sibling, inputs = StreamKey(key.run, "sibling"), StreamKey(key.run, "$input")
        assert await backend.broker.produced(key, "p") == 0
        await backend.broker.append(key, items(3))
        assert await backend.peer.produced(key, "p") == 0, "items without a producer do not count"
        await backend.broker.append(key, items(3, start=3), producer=Producer("p", 0))
        await backend.broker.append(key, items(2, start=6), producer=Producer("p:1", 0))
        await backend.broker.append(key, items(3, start=4), producer=Producer("p", 1))
        await backend.broker.append(inputs, items(5), producer=Producer("p", 0))
        with pytest.raises(ProducerGap):
            await backend.broker.append(key, items(1), producer=Producer("p", 7))
        for broker in backend.processes:
            assert await broker.produced(key, "p") == 4
            assert await broker.produced(key, "p:1") == 2
            assert await broker.produced(sibling, "p") == 0
            assert await broker.produced(inputs, "p") == 5
        assert (await backend.broker.read(sibling))[1:] == (0, 0, None), "reading the count creates no stream"


@pytest.mark.anyio
async def test_the_count_of_a_producer_outlives_its_entries_and_the_run(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, stream_bytes=200) as backend:
        run = await create(backend)
        key = StreamKey(run.id, "default")
        await backend.broker.append(key, [CHUNK] * 10, producer=Producer("p", 0))
        await backend.broker.append(key, [CHUNK] * 10)
        assert await backend.peer.produced(key, "p") == 10
        await backend.broker.append(key, [], end=COMPLETE)
        assert await backend.peer.produced(key, "p") == 10
        await store(backend.broker, finished(backend, run))
        assert await backend.peer.produced(key, "p") == 10
        assert await backend.peer.produced(StreamKey(run.id, "fresh"), "p") == 0


@pytest.mark.anyio
async def test_a_retry_of_the_ending_append_succeeds(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        producer = Producer("p", 0)
        first = await backend.broker.append(key, items(2), producer=producer, end=COMPLETE)
        assert await backend.peer.append(key, items(2), producer=producer, end=COMPLETE) == first
        with pytest.raises(StreamClosed):
            await backend.broker.append(key, items(3), producer=producer, end=COMPLETE)  # one item is new
        assert data(await read_all(backend.broker, key)) == items(2)


@pytest.mark.anyio
async def test_a_retry_succeeds_after_the_run_has_ended(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        key = StreamKey(run.id, "default")
        first = await backend.broker.append(key, items(2), producer=Producer("p", 0))
        await store(backend.broker, finished(backend, run))
        assert await backend.peer.append(key, items(2), producer=Producer("p", 0)) == first
        assert data(await read_all(backend.broker, key)) == items(2)


@pytest.mark.anyio
async def test_concurrent_retries_of_one_append_are_stored_once(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        positions: list[Position] = []

        async def write(broker: Broker) -> None:
            positions.append(await broker.append(key, items(3), producer=Producer("p", 0)))

        async with anyio.create_task_group() as group:
            for attempt in range(6):
                group.start_soon(write, backend.processes[attempt % 2])
        assert positions == [Position(2, 3)] * 6
        assert data(await read_all(backend.broker, key)) == items(3)


@PROPERTY
@given(calls=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(1, 4), st.booleans()), max_size=20))
@pytest.mark.anyio
async def test_whatever_producers_retry_each_item_is_stored_once(
    make_broker: MakeBroker, calls: list[tuple[int, int, int, bool]]
) -> None:
    """Each call has a producer, a start in its count, a number of items, and a process that writes."""
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        stored = dict.fromkeys(range(3), 0)
        expected: list[bytes] = []
        for producer, start, length, elsewhere in calls:
            chunks = [b"[%d,%d]" % (producer, index) for index in range(start, start + length)]
            call = backend.processes[elsewhere].append(key, chunks, producer=Producer(f"p{producer}", start))
            if start > stored[producer]:
                with pytest.raises(ProducerGap) as refusal:
                    await call
                assert refusal.value.expected == stored[producer]
                continue
            assert (await call).next == len(expected) + max(0, start + length - stored[producer])
            expected += chunks[stored[producer] - start :]
            stored[producer] = max(stored[producer], start + length)
        assert data(await read_all(backend.broker, key)) == expected


@pytest.mark.anyio
async def test_lost_items_are_restored_in_their_place_or_not_at_all(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, items(3), producer=Producer("p", 0))
        again = await backend.peer.append(key, items(5), producer=Producer("p", 0), at=0)
        assert again == Position(4, 5), "stored items are skipped, the rest follows them"
        with pytest.raises(StreamLost):
            await backend.broker.append(key, items(1), producer=Producer("p", 5), at=4)
        with pytest.raises(RestoreOutOfOrder):  # earlier items have to be restored first
            await backend.broker.append(key, items(1), producer=Producer("p", 5), at=7, end=COMPLETE)
        with pytest.raises(ProducerGap):
            await backend.broker.append(key, [], producer=Producer("p", 6))
        assert (await backend.broker.read(key))[1:] == (0, 5, None), "a rejected append stores nothing"
        assert await backend.broker.append(key, items(1), producer=Producer("p", 5), at=5) == Position(5, 6)
