"""Topics: a snapshot and the changes after it miss nothing, late readers get the newest versions, unusable cursors a
snapshot.

A backend can publish a change more than once: these tests check for the newest version, never for how often it came.
"""

from __future__ import annotations

from itertools import count

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_realtime.brokers.base import Broker, Changes, Cursor
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import BatchMember, StoredRecord, run_topic
from asgi_realtime.testing.conformance.kit import (
    PROPERTY,
    MakeBroker,
    cancelled_at,
    create,
    finished,
    new_mark,
    new_tag,
    next_changes,
    next_version,
    open_backend,
    pause,
    store,
    until_waiting,
    versions,
    versions_in,
)


@pytest.mark.anyio
async def test_a_run_is_in_all_its_topics_when_the_commit_returns(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        tag, other, batch = new_tag(), new_tag(), new_tag()
        run = await create(backend, tags=(tag, other), batch=BatchMember(batch, 0, 1))
        newest = await store(backend.peer, next_version(run))
        for broker in backend.processes:
            for topic in (run_topic(run.id), f"tag:{tag}", f"tag:{other}", f"batch:{batch}"):
                assert await versions_in(broker, topic) == {run.id: newest.version}


@pytest.mark.anyio
async def test_a_tag_added_later_lists_the_run_from_then_on(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        tag = new_tag()
        run = await create(backend)
        assert await versions_in(backend.broker, f"tag:{tag}") == {}
        await store(backend.broker, next_version(run, tags=(tag,)))
        assert await versions_in(backend.broker, f"tag:{tag}") == {run.id: 2}


@pytest.mark.anyio
async def test_a_topic_without_runs_is_empty(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        held = backend.held()
        changes = await backend.broker.changes(f"tag:{new_tag()}")
        assert (changes.items, changes.snapshot) == ([], True)
        assert backend.held() == held


@pytest.mark.anyio
async def test_an_empty_snapshot_has_a_usable_cursor(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        tag = new_tag()
        before = (await backend.broker.changes(f"tag:{tag}")).cursor
        run = await create(backend, tags=(tag,))
        assert versions(await backend.broker.changes(f"tag:{tag}", after=before)) == {run.id: 1}


@pytest.mark.anyio
async def test_changes_are_ordered_by_each_runs_last_change(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        tag = new_tag()
        runs = [await create(backend, tags=(tag,)) for _ in range(4)]
        await store(backend.broker, next_version(runs[1]))
        await store(backend.peer, next_version(runs[0]))
        changes = await backend.broker.changes(f"tag:{tag}")
        assert [change.run_id for change in changes.items] == [runs[number].id for number in (2, 3, 1, 0)]
        positions = [change.position for change in changes.items]
        assert positions == sorted(set(positions))
        assert changes.cursor.position >= positions[-1]


@pytest.mark.anyio
async def test_a_late_reader_gets_each_changed_run_once_in_its_newest_version(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        tag = new_tag()
        busy, idle, late = [await create(backend, tags=(tag,)) for _ in range(3)]
        cursor = (await backend.broker.changes(f"tag:{tag}")).cursor
        for _ in range(5):
            busy = await store(backend.peer, next_version(busy))
        late = await store(backend.broker, next_version(late))
        changes = await backend.broker.changes(f"tag:{tag}", after=cursor)
        assert not changes.snapshot
        assert versions(changes) == {busy.id: 6, late.id: 2}, "without the run that did not change"
        assert changes.cursor.epoch == cursor.epoch
        assert idle.version == 1


@pytest.mark.anyio
async def test_many_changes_are_read_in_pages_without_gaps(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        tag = new_tag()
        start = (await create(backend, tags=(tag,))).id
        cursor = (await backend.broker.changes(f"tag:{tag}")).cursor
        runs = [await create(backend, tags=(tag,)) for _ in range(10)]
        seen: list[str] = []
        while (page := await backend.broker.changes(f"tag:{tag}", after=cursor, limit=3)).items:
            assert len(page.items) <= 3
            assert not page.snapshot
            seen += versions(page)
            cursor = page.cursor
        assert seen == [run.id for run in runs]
        assert start not in seen


@pytest.mark.anyio
async def test_a_limited_snapshot_has_the_newest_runs(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        tag = new_tag()
        runs = [await create(backend, tags=(tag,)) for _ in range(6)]
        snapshot = await backend.broker.changes(f"tag:{tag}", limit=2)
        assert snapshot.snapshot
        assert [change.run_id for change in snapshot.items] == [run.id for run in runs[-2:]]
        assert (await backend.broker.changes(f"tag:{tag}", after=snapshot.cursor)).items == []


@pytest.mark.anyio
async def test_an_unusable_cursor_gets_a_snapshot_at_once(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        tag = new_tag()
        run = await create(backend, tags=(tag,))
        epoch, position = (await backend.broker.changes(f"tag:{tag}")).cursor
        for useless in (Cursor("another", position), Cursor("another", 0), Cursor(epoch, position + 1000)):
            async with backend.broker.follow(f"tag:{tag}") as topic:
                for changes in (
                    await backend.broker.changes(f"tag:{tag}", after=useless),
                    await topic.changes(useless),
                ):
                    assert changes.snapshot
                    assert versions(changes) == {run.id: 1}
                    assert changes.cursor.epoch == epoch


@pytest.mark.anyio
async def test_a_topic_retains_its_newest_runs_and_older_cursors_get_a_snapshot(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, topic_runs=5) as backend:
        tag = new_tag()
        first = await create(backend, tags=(tag,))
        early = (await backend.broker.changes(f"tag:{tag}")).cursor
        runs = [await create(backend, tags=(tag,)) for _ in range(4)]
        within = await backend.broker.changes(f"tag:{tag}", after=early)
        assert (within.snapshot, len(within.items)) == (False, 4)
        runs += [await create(backend, tags=(tag,)) for _ in range(6)]
        behind = await backend.broker.changes(f"tag:{tag}", after=early)
        assert behind.snapshot, "the changes that this reader missed were dropped"
        assert versions(behind) == {run.id: 1 for run in runs[-5:]}
        assert await backend.broker.load([first.id]) == [first], "the run itself is not removed"


@pytest.mark.anyio
async def test_a_recreated_topic_has_a_new_epoch(make_broker: MakeBroker) -> None:
    """A position in a topic must not match one in a former topic of the same name."""
    async with open_backend(make_broker) as backend:
        tag = new_tag()
        run = await create(backend, tags=(tag,))
        old = (await backend.broker.changes(f"tag:{tag}")).cursor
        await store(backend.broker, finished(backend, run))
        await backend.broker.remove(run.id)
        runs = [await create(backend, tags=(tag,)) for _ in range(3)]
        changes = await backend.broker.changes(f"tag:{tag}", after=old)
        assert versions(changes) == {run.id: 1 for run in runs}


# Following


@pytest.mark.anyio
async def test_a_follower_gets_the_changes_of_every_process(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        tag = new_tag()
        feed = Feed(backend.broker, f"tag:{tag}")
        for number in range(6):
            run = await create(backend)
            async with anyio.create_task_group() as group:
                group.start_soon(feed.run, {run.id: 2})
                await pause(number * 3)
                await store(backend.processes[number % 2], next_version(run, tags=(tag,)))
        assert len(feed.rows) == 6


class Feed:
    """A subscriber of a topic: the snapshot, then each change; it loads the runs that changed."""

    def __init__(self, broker: Broker, topic: str) -> None:
        self.broker = broker
        self.topic = topic
        self.versions: dict[str, int] = {}
        self.rows: dict[str, StoredRecord] = {}
        self.cursor: Cursor | None = None

    async def run(self, expected: dict[str, int], limit: int = 1000) -> None:
        """Read until these versions have arrived. Can be called again and resumes at its cursor."""
        async with self.broker.follow(self.topic) as topic:
            while not self._has(expected):
                await self.take(await next_changes(topic, self.cursor, limit=limit))

    def _has(self, expected: dict[str, int]) -> bool:
        return all(self.versions.get(run_id, 0) >= version for run_id, version in expected.items())

    async def take(self, changes: Changes) -> None:
        self.cursor = changes.cursor
        for change in changes.items:
            assert change.version >= self.versions.get(change.run_id, 0), "an older version replaced a newer one"
            self.versions[change.run_id] = change.version
        records = await self.broker.load([change.run_id for change in changes.items])
        for change, record in zip(changes.items, records, strict=True):
            assert record is not None
            assert record.version >= change.version, "a record was older than its topic"
            self.rows[change.run_id] = record


@PROPERTY
@given(
    runs=st.lists(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=6), min_size=1, max_size=5),
    feeds=st.lists(st.tuples(st.integers(0, 12), st.booleans(), st.sampled_from([1, 2, 1000])), max_size=4),
)
@pytest.mark.anyio
async def test_whenever_a_feed_starts_it_misses_no_change(
    make_broker: MakeBroker, runs: list[list[tuple[int, bool]]], feeds: list[tuple[int, bool, int]]
) -> None:
    """Each run changes in its own task, after some loop iterations, in either process. Feeds start at any time."""
    async with open_backend(make_broker) as backend:
        held = backend.held()
        tag = new_tag()
        created = [await create(backend) for _ in runs]
        expected = {run.id: 2 + len(changes) for run, changes in zip(created, runs, strict=True)}
        reading = [(Feed(backend.processes[elsewhere], f"tag:{tag}"), late, limit) for late, elsewhere, limit in feeds]

        async def change(record: StoredRecord, changes: list[tuple[int, bool]]) -> None:
            record = await store(backend.broker, next_version(record, tags=(tag,)))
            for late, elsewhere in changes:
                await pause(late)
                record = await store(backend.processes[elsewhere], next_version(record))

        async def read(feed: Feed, late: int, limit: int) -> None:
            await pause(late)
            await feed.take(await feed.broker.changes(feed.topic))
            await pause(late % 3)
            await feed.run(expected, limit=limit)

        async with anyio.create_task_group() as group:
            for feed, late, limit in reading:
                group.start_soon(read, feed, late, limit)
            for record, changes in zip(created, runs, strict=True):
                group.start_soon(change, record, changes)
        for feed, _, _ in reading:
            assert feed.versions == expected
            assert {run_id: row.version for run_id, row in feed.rows.items()} == expected
        assert await versions_in(backend.broker, f"tag:{tag}") == expected
        assert backend.held() == held


@pytest.mark.anyio
async def test_no_older_version_replaces_a_newer_one_under_concurrent_committers(make_broker: MakeBroker) -> None:
    """Many commits of one run with many topics, in both processes, while others publish again: versions only grow."""
    async with open_backend(make_broker) as backend:
        tags = tuple(new_tag() for _ in range(4))
        run = await create(backend, tags=tags)
        feeds = [Feed(broker, f"tag:{tag}") for tag in tags for broker in backend.processes]
        committed = 30

        async def publish_again(broker: Broker) -> None:
            for _ in range(committed):
                await broker.publish(run.id)
                await pause(1)

        async def change(broker: Broker) -> None:
            record = run
            while record.version <= committed:
                changed = next_version(record)
                try:
                    await broker.commit(changed, expect=record.version, change=new_mark())
                except VersionConflict as conflict:
                    assert conflict.current is not None
                    record = conflict.current
                else:
                    record = changed
                await pause(1)

        async with anyio.create_task_group() as group:
            for feed in feeds:
                group.start_soon(feed.run, {run.id: 1 + committed})
            for broker in backend.processes:
                group.start_soon(publish_again, broker)
                group.start_soon(change, broker)
        for tag in tags:
            assert await versions_in(backend.peer, f"tag:{tag}") == {run.id: 1 + committed}


@pytest.mark.anyio
async def test_leaving_a_topic_releases_everything(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        tag = new_tag()
        held = backend.held()
        async with anyio.create_task_group() as group:
            async with backend.broker.follow(f"tag:{tag}") as topic:
                for _ in range(5):
                    group.start_soon(_follow, backend.broker, tag)
                await until_waiting(topic, count=5)
                group.cancel_scope.cancel()
        assert len(topic.waiting) == 0
        assert backend.held() == held


async def _follow(broker: Broker, tag: str) -> None:
    async with broker.follow(f"tag:{tag}") as topic:
        await topic.waiting.wait()


@pytest.mark.anyio
async def test_following_can_be_cancelled_at_every_await(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        tag = new_tag()
        await create(backend, tags=(tag,))
        held = backend.held()

        async def enter_and_leave() -> None:
            async with backend.broker.follow(f"tag:{tag}") as topic:
                await topic.changes(None)

        for number in count():  # pragma: no branch
            has_finished = await cancelled_at(number, enter_and_leave())
            assert backend.held() == held, f"cancelled at {number}"
            if has_finished:
                break
        async with backend.broker.follow(f"tag:{tag}") as topic:
            assert len((await topic.changes(None)).items) == 1
