"""Following a stream: the join of history and tail, gaps, ends, and the release of everything on leaving."""

from __future__ import annotations

from itertools import count
from typing import NamedTuple

import anyio
import anyio.abc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_realtime.brokers.base import Broker, End, Producer, StreamKey
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.core.errors import StreamClosed
from asgi_realtime.core.runs import RunError, Status
from asgi_realtime.testing.conformance.kit import (
    COMPLETE,
    PROPERTY,
    Backend,
    MakeBroker,
    Reader,
    cancelled_at,
    create,
    data,
    finished,
    have,
    items,
    new_key,
    next_version,
    open_backend,
    pause,
    read_all,
    seqs,
    store,
    until_waiting,
)


@pytest.mark.anyio
async def test_a_reader_gets_the_history_and_then_each_append(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, items(3))
        reader = Reader(backend.broker, key)
        async with anyio.create_task_group() as group:
            group.start_soon(reader.run)
            while len(reader.seen) < 3:
                await pause(1)
            await backend.peer.append(key, items(2, start=3))
            await backend.broker.append(key, items(1, start=5), end=COMPLETE)
        assert data(reader.seen) == items(6)
        assert reader.end == COMPLETE


@pytest.mark.anyio
async def test_a_reader_can_start_before_the_first_writer(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        reader = Reader(backend.broker, key)
        async with anyio.create_task_group() as group:
            group.start_soon(reader.run)
            async with backend.broker.live(key) as live:
                await until_waiting(live)
            await backend.peer.append(key, items(2), end=COMPLETE)
        assert data(reader.seen) == items(2)


@pytest.mark.anyio
async def test_a_reader_resumes_where_it_left(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, items(4))
        reader = await Reader(backend.broker, key).run(enough=have(2))
        await backend.peer.append(key, items(4, start=4), end=COMPLETE)
        await reader.run()
        assert data(reader.seen) == items(8)
        reader.assert_seamless()


@pytest.mark.anyio
async def test_a_cursor_in_the_middle_and_at_the_end(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, items(5), end=COMPLETE)
        for after in range(-1, 5):
            reader = await Reader(backend.peer, key, after=after).run()
            assert seqs(reader.seen) == list(range(after + 1, 5))
            assert reader.end == COMPLETE


@pytest.mark.anyio
async def test_a_cursor_beyond_the_end_waits_for_its_successor(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, items(2))
        reader = Reader(backend.broker, key, after=4)
        async with anyio.create_task_group() as group:
            group.start_soon(reader.run)
            for number in range(2, 8):
                await backend.peer.append(key, items(1, start=number))
                await pause(3)
            await backend.peer.append(key, [], end=COMPLETE)
        assert seqs(reader.seen) == [5, 6, 7]


@pytest.mark.anyio
async def test_every_reader_of_a_stream_gets_everything(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        readers = [Reader(backend.processes[number % 2], key) for number in range(20)]
        async with anyio.create_task_group() as group:
            for reader in readers:
                group.start_soon(reader.run)
            for number in range(50):
                await backend.processes[number % 2].append(key, items(1, start=number))
            await backend.broker.append(key, [], end=COMPLETE)
        assert {tuple(data(reader.seen)) for reader in readers} == {tuple(items(50))}


class Visit(NamedTuple):
    """A reader's visit: it joins after `late` loop iterations and leaves after `entries` more entries."""

    late: int
    entries: int


class Call(NamedTuple):
    """One append of `items` items, after `late` loop iterations."""

    late: int
    items: int


STEPS = st.integers(0, 5)
VISITS = st.lists(st.builds(Visit, STEPS, st.integers(0, 8)), max_size=4)
CALLS = st.lists(st.builds(Call, STEPS, st.integers(0, 4)), max_size=12)


async def _write(broker: Broker, key: StreamKey, name: str, calls: list[Call]) -> None:
    sent = 0
    for call in calls:
        await pause(call.late)
        chunks = [b'["%b",%d]' % (name.encode(), number) for number in range(sent, sent + call.items)]
        for _ in range(1 + call.late % 2):  # every other call is repeated
            await broker.append(key, chunks, producer=Producer(name, sent))
        sent += call.items


async def _visit(reader: Reader, visits: list[Visit]) -> None:
    for visit in visits:
        await pause(visit.late)
        if reader.end is None:
            await reader.run(enough=have(len(reader.seen) + visit.entries))
    if reader.end is None:
        await reader.run()


async def _interleave(
    backend: Backend, writers: list[tuple[bool, list[Call]]], readers: list[tuple[bool, list[Visit]]]
) -> tuple[StreamKey, list[Reader]]:
    key = await new_key(backend)
    reading = [(Reader(backend.processes[elsewhere], key), visits) for elsewhere, visits in readers]
    async with anyio.create_task_group() as everyone:
        for reader, visits in reading:
            everyone.start_soon(_visit, reader, visits)
        async with anyio.create_task_group() as writing:
            for number, (elsewhere, calls) in enumerate(writers):
                writing.start_soon(_write, backend.processes[elsewhere], key, f"w{number}", calls)
        await backend.broker.append(key, [b'"last"'], end=COMPLETE)
    return key, [reader for reader, _ in reading]


@PROPERTY
@given(
    writers=st.lists(st.tuples(st.booleans(), CALLS), max_size=3),
    readers=st.lists(st.tuples(st.booleans(), VISITS), min_size=1, max_size=4),
)
@pytest.mark.anyio
async def test_whenever_a_reader_joins_and_leaves_nothing_is_lost_or_duplicated(
    make_broker: MakeBroker, writers: list[tuple[bool, list[Call]]], readers: list[tuple[bool, list[Visit]]]
) -> None:
    async with open_backend(make_broker) as backend:
        held = backend.held()
        key, reading = await _interleave(backend, writers, readers)
        stored = await read_all(backend.broker, key)
        assert len(stored) == 1 + sum(call.items for _, calls in writers for call in calls)
        for reader in reading:
            assert [(entry.seq, entry.data) for entry in reader.seen] == [(entry.seq, entry.data) for entry in stored]
            assert reader.gaps == []
        assert backend.held() == held


@PROPERTY
@given(
    writers=st.lists(st.tuples(st.booleans(), CALLS), min_size=1, max_size=3),
    readers=st.lists(st.tuples(st.booleans(), VISITS), min_size=1, max_size=4),
)
@pytest.mark.anyio
async def test_whenever_entries_are_trimmed_each_loss_is_reported(
    make_broker: MakeBroker, writers: list[tuple[bool, list[Call]]], readers: list[tuple[bool, list[Visit]]]
) -> None:
    async with open_backend(make_broker, stream_bytes=60) as backend:
        _, reading = await _interleave(backend, writers, readers)
        written = 1 + sum(call.items for _, calls in writers for call in calls)
        for reader in reading:
            reader.assert_seamless()
            assert reader.seen[-1].seq == written - 1
            lost = sum(first - cursor - 1 for cursor, first in reader.gaps)
            assert len(reader.seen) + lost == written


# Ends


@pytest.mark.anyio
async def test_the_end_of_a_run_ends_all_its_streams_at_their_last_entry(make_broker: MakeBroker) -> None:
    """Including streams that have readers but no writer, in any process."""
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        keys = [StreamKey(run.id, name) for name in ("written", "unread", "followed", "written elsewhere")]
        await backend.broker.append(keys[0], items(3))
        await backend.broker.append(keys[1], items(1))
        await backend.peer.append(keys[3], items(2))
        readers = [Reader(broker, key) for broker in backend.processes for key in (keys[0], keys[2], keys[3])]
        async with anyio.create_task_group() as group:
            for reader in readers:
                group.start_soon(reader.run)
            await pause(10)
            failed = next_version(
                run, status=Status.FAILED, completed_at_ms=backend.now_ms(), error=RunError("TaskError", "out of luck")
            )
            await store(backend.peer, failed)
        assert [len(reader.seen) for reader in readers] == [3, 0, 2] * 2
        assert {reader.end for reader in readers} == {End("failed", "out of luck")}
        assert (await backend.broker.read(keys[1])).end == End("failed", "out of luck")


@pytest.mark.anyio
async def test_a_stream_that_ended_before_its_run_keeps_its_own_end(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        key = StreamKey(run.id, "default")
        await backend.broker.append(key, items(1), end=COMPLETE)
        await store(backend.broker, next_version(run, status=Status.CANCELED, completed_at_ms=backend.now_ms()))
        assert (await Reader(backend.peer, key).run()).end == COMPLETE
        assert (await backend.broker.read(key)).end == COMPLETE


@pytest.mark.anyio
async def test_acknowledged_entries_can_be_read_once_the_terminal_record_can(make_broker: MakeBroker) -> None:
    """The end of the run cuts writers off. Each reader gets exactly the acknowledged entries, then the end."""
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        key = StreamKey(run.id, "default")
        acknowledged: list[bytes] = []
        readers = [Reader(broker, key) for broker in backend.processes]

        async def write(broker: Broker, writer: int) -> None:
            for call in count():  # pragma: no branch
                chunk = b"[%d,%d]" % (writer, call)
                try:
                    await broker.append(key, [chunk])
                except StreamClosed:
                    return
                acknowledged.append(chunk)
                await pause(1)

        async def read_at_the_end(broker: Broker) -> None:
            """From the moment the terminal record can be loaded, the stream does not change any more."""
            while not (record := (await broker.load([run.id]))[0]) or not record.is_completed:
                await pause(1)
            page = await broker.read(key, limit=10_000)
            assert page.end == COMPLETE
            first_reads.append(data(page.entries))

        first_reads: list[list[bytes]] = []
        async with anyio.create_task_group() as group:
            for reader in readers:
                group.start_soon(reader.run)
                group.start_soon(read_at_the_end, reader.broker)
            for writer in range(4):
                group.start_soon(write, backend.processes[writer % 2], writer)
            while len(acknowledged) < 30:
                await pause(1)
            await store(backend.peer, finished(backend, run))
            at_the_end = data(await read_all(backend.broker, key))

        assert sorted(at_the_end) == sorted(acknowledged)
        assert first_reads == [at_the_end, at_the_end]
        for reader in readers:
            assert data(reader.seen) == at_the_end


@pytest.mark.anyio
async def test_a_stream_of_an_ended_run_ends_at_once(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        await backend.broker.append(StreamKey(run.id, "written"), items(2))
        await store(backend.broker, finished(backend, run))
        for broker in backend.processes:
            for name, length in (("written", 2), ("never written", 0)):
                reader = await Reader(broker, StreamKey(run.id, name)).run()
                assert (len(reader.seen), reader.end) == (length, COMPLETE)


# Leaving


@pytest.mark.anyio
async def test_leaving_releases_everything(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        held = backend.held()
        await backend.broker.append(key, items(3))
        for _ in range(3):
            async with backend.broker.live(key) as live, backend.broker.live(key) as same:
                assert live is same, "there is one log for each stream and process"
                assert live.readers == 2
                assert live.take(-1) is not None
            assert (live.readers, len(live.waiting)) == (0, 0)
            assert backend.held() == held
        with pytest.raises(ZeroDivisionError):
            async with backend.broker.live(key) as live:
                raise ZeroDivisionError
        assert live.readers == 0
        assert backend.held() == held


@pytest.mark.anyio
async def test_cancelled_readers_release_everything(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        held = backend.held()
        readers = [Reader(backend.broker, key) for _ in range(10)]
        async with anyio.create_task_group() as group:
            for reader in readers:
                group.start_soon(reader.run)
            async with backend.broker.live(key) as live:
                await until_waiting(live, count=10)
            group.cancel_scope.cancel()
        assert (live.readers, len(live.waiting)) == (0, 0)
        assert backend.held() == held


@pytest.mark.anyio
async def test_leaving_does_not_affect_other_readers(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        staying = Reader(backend.broker, key)
        async with anyio.create_task_group() as group:
            group.start_soon(staying.run)
            async with anyio.create_task_group() as leaving:
                leaving.start_soon(Reader(backend.broker, key).run)
                async with backend.broker.live(key) as live:
                    await until_waiting(live, count=2)
                leaving.cancel_scope.cancel()
            await backend.peer.append(key, items(2), end=COMPLETE)
        assert data(staying.seen) == items(2)


@pytest.mark.anyio
async def test_entering_can_be_cancelled_at_every_await(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, items(3))
        held = backend.held()
        entered: list[LiveLog] = []

        async def enter_and_leave() -> None:
            async with backend.broker.live(key) as live:
                entered.append(live)

        for number in count():  # pragma: no branch
            has_finished = await cancelled_at(number, enter_and_leave())
            assert backend.held() == held, f"cancelled at {number}"
            assert all((live.readers, len(live.waiting)) == (0, 0) for live in entered)
            if has_finished:
                break
        assert data((await Reader(backend.broker, key).run(enough=have(3))).seen) == items(3)
