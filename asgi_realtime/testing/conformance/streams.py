"""Streams: order, ends, producers, pages, retention, cancelled appends."""

from __future__ import annotations

from itertools import count

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_realtime.brokers.base import INPUT_COST, Broker, End, Position, Producer, StreamKey
from asgi_realtime.core.errors import (
    LimitExceeded,
    ProducerGap,
    RestoreOutOfOrder,
    RunNotFound,
    StreamClosed,
    StreamLost,
)
from asgi_realtime.testing.conformance.kit import (
    COMPLETE,
    PROPERTY,
    STEP_S,
    MakeBroker,
    Reader,
    cancelled_at,
    create,
    data,
    finished,
    have,
    items,
    new_key,
    open_backend,
    pause,
    read_all,
    seqs,
    store,
)

UNKNOWN = StreamKey("run_unknown", "default")

CHUNK = b'"' + b"x" * 100 + b'"'


@pytest.mark.anyio
async def test_inputs_are_rejected_at_the_limit_and_never_trimmed(make_broker: MakeBroker) -> None:
    """Messages to a run were trimmed before the run had read them."""
    async with open_backend(make_broker, stream_bytes=2000, inputs_bytes=10_000 + 10 * INPUT_COST) as backend:
        run = await create(backend)
        one, other = (StreamKey(run.id, f"$input {name}") for name in ("one", "other"))
        for number in range(8):
            await backend.broker.append(one, [b'"%s"' % (b"x" * 1000)], producer=Producer("p", number))
        with pytest.raises(LimitExceeded, match="limit 12560") as caught:
            await backend.peer.append(other, [b'"%s"' % (b"x" * 4500)])
        assert caught.value.status == 429
        await backend.peer.append(other, [b"1"])
        await backend.broker.append(one, [b'"%s"' % (b"x" * 1000)] * 3, producer=Producer("p", 5))
        assert seqs(await read_all(backend.peer, one)) == list(range(8))
        await backend.broker.append(StreamKey(run.id, "default"), items(10_000)[-500:])


@pytest.mark.anyio
async def test_the_limit_of_inputs_counts_their_items(make_broker: MakeBroker) -> None:
    """Brokers counted differently, and small messages took 16 times the limit in memory."""
    limit = 50 * (2 + INPUT_COST)
    async with open_backend(make_broker, inputs_bytes=limit) as backend:
        run = await create(backend)
        one, other = (StreamKey(run.id, f"$input {name}") for name in ("one", "other"))
        await backend.broker.append(one, [b"12"] * 30, producer=Producer("p", 0))
        await backend.peer.append(other, [b"12"] * 20)
        with pytest.raises(LimitExceeded, match=f"hold {limit} bytes, limit {limit}"):
            await backend.broker.append(other, [b"1"])
        await backend.peer.append(one, [b"12"] * 30, producer=Producer("p", 0))  # a retry adds nothing
        with pytest.raises(LimitExceeded, match=f"hold {limit} bytes, limit {limit}"):
            await backend.peer.append(one, [b"12", b"1"], producer=Producer("p", 29))
        await store(backend.broker, finished(backend, run))
        with pytest.raises(StreamClosed):  # more room would not help
            await backend.peer.append(one, [b"1"])


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


# Producers


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


# Retention by bytes


@pytest.mark.anyio
async def test_trimming_drops_the_oldest_entries_and_keeps_positions(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, stream_bytes=1000) as backend:
        key = await new_key(backend)
        for _ in range(50):
            await backend.broker.append(key, [CHUNK])
        page = await backend.broker.read(key)
        assert page.first > 0, "nothing was trimmed"
        assert page.next == 50
        assert seqs(page.entries) == list(range(page.first, 50)), "a page reports where the retained part starts"
        assert len(page.entries) * len(CHUNK) <= 2000, "twice the limit, since backends can trim roughly"
        assert await backend.peer.append(key, [CHUNK]) == Position(50, 51)


@pytest.mark.anyio
async def test_the_last_entry_stays_whatever_its_size(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, stream_bytes=50) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, [CHUNK])
        await backend.broker.append(key, [CHUNK, b'"last"'])
        entries = await read_all(backend.broker, key)
        assert (entries[-1].seq, entries[-1].data) == (2, b'"last"')
        await backend.broker.append(key, [CHUNK], end=COMPLETE)
        page = await backend.broker.read(key)
        assert (seqs(page.entries)[-1], page.next, page.end) == (3, 4, COMPLETE)


@pytest.mark.anyio
async def test_a_retry_of_trimmed_items_is_still_recognized(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, stream_bytes=200) as backend:
        key = await new_key(backend)
        first = await backend.broker.append(key, [CHUNK] * 10, producer=Producer("p", 0))
        await backend.broker.append(key, [CHUNK] * 10)
        assert await backend.peer.append(key, [CHUNK] * 10, producer=Producer("p", 0)) == Position(first.last, 20)
        assert (await backend.broker.append(key, [CHUNK] * 2, producer=Producer("p", 9))).next == 21


@pytest.mark.anyio
async def test_a_reader_before_the_retained_part_gets_a_gap(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, stream_bytes=1000) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, [CHUNK] * 3)
        early = await Reader(backend.peer, key).run(enough=have(3))
        await backend.broker.append(key, [CHUNK] * 50, end=COMPLETE)
        late = await Reader(backend.peer, key).run()
        await early.run()
        first = (await backend.broker.read(key)).first
        assert early.gaps == [(2, first)]
        assert late.gaps == [(-1, first)]
        assert seqs(late.seen) == list(range(first, 53))
        early.assert_seamless()


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
