"""Runs: compare-and-set, retried commits, record and run topic in one step, cancelled commits."""

from __future__ import annotations

from collections import Counter
from itertools import count

import anyio
import pytest

from asgi_realtime.brokers.base import MARKS_KEPT, Broker, ChangeMark, Producer, StreamKey
from asgi_realtime.core.errors import StreamBehind
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import BatchMember, RunError, Status, StoredRecord, run_topic
from asgi_realtime.testing.conformance.kit import (
    Backend,
    MakeBroker,
    cancelled_at,
    create,
    eventually,
    finished,
    new_mark,
    new_record,
    new_tag,
    next_changes,
    next_version,
    open_backend,
    pause,
    store,
    versions,
    versions_in,
)


@pytest.mark.anyio
async def test_a_record_is_loaded_as_it_was_stored(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        record = await create(
            backend,
            status=Status.EXECUTING,
            started_at_ms=backend.now_ms(),
            tags=(new_tag(), "user:ü"),
            metadata={"progress": 0.5, "steps": ["a", {"b": None}], "text": "line\nline"},
            payload_json=b'{"prompt":"hello","at":"2026-01-15T09:30:00.000Z"}',
            payload_meta_json=b'{"values":{"at":["Date"]}}',
            streams=("default", "ai"),
            idempotency_key="key",
            batch=BatchMember("batch_1", 2, 3),
            parent_id="run_parent",
            root_id="run_root",
            depth=2,
            owner="owner-1",
            ttl_s=12.5,
            max_duration_s=3.5,
        )
        assert await backend.broker.load([record.id]) == [record]
        ended = finished(backend, record, output_json=b'{"text":"hi"}', error=RunError("E", "m"))
        await store(backend.peer, ended)
        assert await backend.broker.load([record.id]) == [ended]
        assert await backend.peer.load([record.id]) == [ended]


@pytest.mark.anyio
async def test_records_are_loaded_in_the_requested_order(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        first, second = await create(backend), await create(backend)
        asked = [second.id, "run_unknown", first.id, second.id]
        assert await backend.peer.load(asked) == [second, None, first, second]
        assert await backend.peer.load([]) == []


@pytest.mark.anyio
async def test_a_run_is_created_once(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        record = await create(backend)
        for broker in backend.processes:
            with pytest.raises(VersionConflict) as conflict:
                await broker.commit(record, expect=0, change=new_mark())
            assert conflict.value.current == record


@pytest.mark.anyio
async def test_a_run_that_does_not_exist_cannot_be_changed(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        record = next_version(new_record(backend))
        with pytest.raises(VersionConflict) as conflict:
            await backend.broker.commit(record, expect=1, change=new_mark())
        assert conflict.value.current is None
        assert await backend.broker.load([record.id]) == [None]


@pytest.mark.anyio
async def test_a_commit_on_another_version_is_rejected_with_the_stored_record(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        record = await create(backend)
        newest = await store(backend.peer, next_version(record, metadata={"by": "other"}))
        for expect in (0, 1, 3):
            stale = next_version(record, version=expect + 1, metadata={"by": "us"})
            with pytest.raises(VersionConflict) as conflict:
                await backend.broker.commit(stale, expect=expect, change=new_mark())
            assert conflict.value.current == newest
        assert await backend.broker.load([record.id]) == [newest]


@pytest.mark.anyio
async def test_a_run_can_be_created_in_the_version_that_its_owner_knows(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        record = next_version(next_version(new_record(backend, status=Status.EXECUTING, owner="us")))
        assert await backend.broker.commit(record, expect=0, change=new_mark()) == 3
        assert await backend.peer.load([record.id]) == [record]
        await store(backend.peer, next_version(record))


@pytest.mark.anyio
async def test_a_run_does_not_end_before_its_streams_have_what_was_acknowledged(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        key = StreamKey(run.id, "s")
        await backend.broker.append(key, [b"1", b"2"], producer=Producer("p", 0))
        await backend.broker.append(key, [b"3"], producer=Producer("q", 0))
        over = finished(backend, run)
        for missing in ({("s", "p"): 3}, {("s", "p"): 2, ("another", "p"): 1}, {("s", "another"): 1}):
            with pytest.raises(StreamBehind):
                await backend.peer.commit(over, expect=1, change=new_mark(), floors=missing)
        assert await backend.broker.load([run.id]) == [run]
        floors = {("s", "p"): 2, ("s", "q"): 1, ("never", "p"): 0}
        assert await backend.peer.commit(over, expect=1, change=new_mark(), floors=floors) == 2


@pytest.mark.anyio
async def test_nothing_follows_a_terminal_record(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        over = await store(backend.broker, finished(backend, await create(backend)))
        with pytest.raises(VersionConflict) as conflict:
            await backend.peer.commit(next_version(over, status=Status.EXECUTING), expect=2, change=new_mark())
        assert conflict.value.current == over


@pytest.mark.anyio
async def test_one_of_concurrent_committers_wins_each_version(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend, metadata={"count": 0})
        won: list[int] = []

        async def increment(broker: Broker, times: int) -> None:
            record = run
            for _ in range(times):
                while True:
                    changed = next_version(record, metadata={"count": record.metadata["count"] + 1})
                    await pause(1)
                    try:
                        won.append(await broker.commit(changed, expect=record.version, change=new_mark()))
                    except VersionConflict as conflict:
                        assert conflict.current is not None
                        assert conflict.current.version > record.version
                        record = conflict.current
                    else:
                        record = changed
                        break

        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(increment, backend.processes[number % 2], 6)
        (stored,) = await backend.broker.load([run.id])
        assert stored is not None
        assert stored.metadata == {"count": 30}
        assert Counter(won) == Counter(range(2, 32))


@pytest.mark.anyio
async def test_one_of_concurrent_creators_wins(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        record = new_record(backend)
        losers: list[StoredRecord | None] = []

        async def try_to_create(broker: Broker) -> None:
            try:
                await broker.commit(record, expect=0, change=new_mark())
            except VersionConflict as conflict:
                losers.append(conflict.current)

        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(try_to_create, backend.processes[number % 2])
        assert losers == [record] * 5


@pytest.mark.anyio
async def test_a_retried_commit_changes_nothing(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        record = new_record(backend)
        created = ChangeMark("writer", 0)
        assert await backend.broker.commit(record, expect=0, change=created) == 1
        assert await backend.peer.commit(record, expect=0, change=created) == 1
        changed = next_version(record, metadata={"n": 1})
        assert await backend.broker.commit(changed, expect=1, change=ChangeMark("writer", 1)) == 2
        assert await backend.broker.commit(changed, expect=1, change=ChangeMark("writer", 1)) == 2
        assert await backend.broker.load([record.id]) == [changed]


@pytest.mark.anyio
async def test_a_retried_commit_is_recognized_after_later_ones(make_broker: MakeBroker) -> None:
    """A commit whose answer was lost is retried after others, or another task of its writer, have committed."""
    async with open_backend(make_broker) as backend:
        tag = new_tag()
        record = await create(backend, tags=(tag,))
        ours, first = ChangeMark("writer", 7), next_version(record, metadata={"n": 1})
        assert await backend.broker.commit(first, expect=1, change=ours) == 2
        newest = first
        for number in range(MARKS_KEPT - 1):
            newest = next_version(newest, metadata={"n": number})
            mark = ChangeMark(("writer", "other")[number % 2], 100 + number)
            await backend.peer.commit(newest, expect=newest.version - 1, change=mark)
        assert await backend.broker.commit(first, expect=1, change=ours) == 2
        assert await backend.broker.load([record.id]) == [newest]
        for topic in (run_topic(record.id), f"tag:{tag}"):
            assert await versions_in(backend.broker, topic) == {record.id: newest.version}


@pytest.mark.anyio
async def test_a_late_commit_is_not_mistaken_for_a_retry(make_broker: MakeBroker) -> None:
    """Two tasks of one writer commit, and the higher number arrives first. The other must get a conflict."""
    async with open_backend(make_broker) as backend:
        record = await create(backend)
        newest = next_version(record, metadata={"by": "second"})
        await backend.broker.commit(newest, expect=1, change=ChangeMark("writer", 2))
        with pytest.raises(VersionConflict) as conflict:
            late = next_version(record, metadata={"by": "first"})
            await backend.broker.commit(late, expect=1, change=ChangeMark("writer", 1))
        assert conflict.value.current == newest


@pytest.mark.anyio
async def test_marks_of_different_runs_are_different(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        first, second = new_record(backend), new_record(backend)
        for record in (first, second):
            await backend.broker.commit(record, expect=0, change=ChangeMark("writer", 0))
        assert await backend.broker.load([first.id, second.id]) == [first, second]


@pytest.mark.anyio
async def test_a_rejected_commit_leaves_no_mark(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        record = await create(backend)
        changed = next_version(record, metadata={"n": 1})
        mark = new_mark()
        with pytest.raises(VersionConflict):
            await backend.broker.commit(next_version(changed), expect=2, change=mark)
        assert await backend.broker.commit(changed, expect=1, change=mark) == 2
        assert await backend.broker.load([record.id]) == [changed]


@pytest.mark.anyio
async def test_record_and_run_topic_change_in_one_step(make_broker: MakeBroker) -> None:
    """In any process: the topic is never older than a record loaded before, or newer than one loaded after."""
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        over = anyio.Event()

        async def compare(broker: Broker) -> None:
            while not over.is_set():
                (before,) = await broker.load([run.id])
                listed = (await versions_in(broker, run_topic(run.id)))[run.id]
                (after,) = await broker.load([run.id])
                assert before is not None
                assert after is not None
                assert before.version <= listed <= after.version
                await pause(1)

        async with anyio.create_task_group() as group:
            for broker in backend.processes:
                group.start_soon(compare, broker)
            record = run
            for _ in range(20):
                record = await store(backend.peer, next_version(record))
                await pause(1)
            over.set()


@pytest.mark.anyio
async def test_a_cancelled_commit_takes_full_effect_or_none(make_broker: MakeBroker) -> None:
    """If it took effect, another process publishes it to every topic."""
    async with open_backend(make_broker) as backend:
        held = backend.held()
        commits: list[tuple[StoredRecord, StoredRecord, ChangeMark]] = []
        for number in count():  # pragma: no branch
            record = await create(backend, tags=(new_tag(),), batch=BatchMember(new_tag(), 0, 1))
            changed, mark = next_version(record, metadata={"n": 1}), new_mark()
            commits.append((record, changed, mark))
            if await cancelled_at(number, backend.broker.commit(changed, expect=1, change=mark)):
                break
        await backend.advance(1.1)  # by then no call is under way, and every mark that is left is due
        for number, (record, changed, mark) in enumerate(commits):
            assert await published_at_last(backend, record) in (record, changed), f"cancelled at {number}"
            assert await backend.broker.commit(changed, expect=1, change=mark) == 2
            assert await backend.broker.load([record.id]) == [changed]
        assert backend.held() == held


async def published_at_last(backend: Backend, record: StoredRecord) -> StoredRecord:
    """Do what the ticker of another process does, until all topics have the stored version and no mark is left."""
    topics = [run_topic(record.id), *record.topics]
    stored: StoredRecord | None = None

    async def is_published() -> bool:
        nonlocal stored
        for unpublished in await backend.peer.due("unpublished"):
            await backend.peer.publish(unpublished)
        (stored,) = await backend.peer.load([record.id])
        assert stored is not None
        published = [await versions_in(backend.broker, topic) for topic in topics]
        return all(each == {record.id: stored.version} for each in published)

    await eventually(backend, is_published, f"{topics} have the version that is stored")
    assert record.id not in await backend.peer.due("unpublished")
    assert stored is not None
    return stored


@pytest.mark.anyio
async def test_publishing_again_is_harmless(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        tag = new_tag()
        record = await create(backend, tags=(tag,))
        newest = await store(backend.broker, next_version(record))
        for broker in backend.processes:
            await broker.publish(record.id)
            await broker.publish("run_unknown")
        assert await versions_in(backend.broker, f"tag:{tag}") == {record.id: newest.version}


@pytest.mark.anyio
async def test_a_commit_wakes_the_followers_of_the_run(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        async with backend.broker.follow(run_topic(run.id)) as topic:
            cursor = (await topic.changes(None)).cursor
            record = run
            for _ in range(5):
                async with anyio.create_task_group() as group:
                    record = next_version(record)
                    group.start_soon(store, backend.peer, record)
                    changes = await next_changes(topic, cursor)
                    while versions(changes) != {run.id: record.version}:
                        changes = await next_changes(topic, changes.cursor)
                    cursor = changes.cursor
