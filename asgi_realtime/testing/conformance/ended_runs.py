"""Runs that are over: the call of their `on_end`, and their removal."""

from __future__ import annotations

import anyio
import pytest

from asgi_realtime.brokers.base import Broker, StreamKey
from asgi_realtime.brokers.following import Follower, following
from asgi_realtime.core.errors import RunNotFound
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import BatchMember, StoredRecord, run_topic
from asgi_realtime.testing.conformance.kit import (
    COMPLETE,
    LEASE_MS,
    STEP_S,
    TIMEOUTS,
    Backend,
    MakeBroker,
    Reader,
    assert_due,
    assert_due_from,
    create,
    data,
    due_runs,
    finished,
    items,
    new_mark,
    new_record,
    new_tag,
    next_version,
    open_backend,
    pause,
    store,
    versions_in,
)

# Calling the `on_end` of a run


async def _end_with_on_end(backend: Backend) -> StoredRecord:
    return await store(backend.broker, finished(backend, await create(backend, has_on_end=True)))


@pytest.mark.anyio
async def test_an_on_end_is_due_a_lease_after_the_end_and_taken_once(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        for run in [await create(backend), await create(backend, has_on_end=True)]:
            assert not await backend.broker.take_on_end(run.id), "the run is not over"
            ended_ms = backend.now_ms()
            await store(backend.broker, finished(backend, run))
        await assert_due_from(backend, "on_end", run.id, ended_ms + LEASE_MS)

        taken: list[bool] = []

        async def take(broker: Broker) -> None:
            taken.append(await broker.take_on_end(run.id))

        async with anyio.create_task_group() as group:
            taken_ms = backend.now_ms()
            for number in range(6):
                group.start_soon(take, backend.processes[number % 2])
        assert sorted(taken) == [False] * 5 + [True]
        await assert_due_from(backend, "on_end", run.id, taken_ms + LEASE_MS)


@pytest.mark.anyio
async def test_an_on_end_is_renewed_and_due_until_it_was_called(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await _end_with_on_end(backend)
        await backend.advance(STEP_S)
        neighbor = await _end_with_on_end(backend)
        await backend.advance(STEP_S)
        await backend.peer.renew([run.id], owner="anyone")
        await assert_due(backend, "on_end", neighbor.id, run.id)
        await backend.peer.on_end_called(neighbor.id)
        await backend.broker.on_end_called(neighbor.id)
        await backend.broker.on_end_called("run_unknown")
        await backend.broker.renew([neighbor.id], owner="us")
        assert not await backend.peer.take_on_end(neighbor.id)
        await backend.advance(TIMEOUTS.lease)
        await assert_due(backend, "on_end", run.id)


@pytest.mark.anyio
async def test_a_run_is_not_removed_before_its_on_end_was_called(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, after_end=STEP_S) as backend:
        tag = new_tag()
        run = await create(backend, has_on_end=True, tags=(tag,))
        await store(backend.broker, finished(backend, run))
        await assert_due(backend, "expiry", run.id)
        await backend.peer.remove(run.id)
        assert await backend.broker.load([run.id]) != [None]
        assert await versions_in(backend.broker, f"tag:{tag}") != {}
        await backend.broker.on_end_called(run.id)
        await backend.peer.remove(run.id)
        assert await backend.broker.load([run.id]) == [None]
        assert await due_runs(backend, "expiry") == []


# Removal


@pytest.mark.anyio
async def test_a_removed_run_disappears_everywhere(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        tag, early, batch = new_tag(), new_tag(), new_tag()
        run = await create(backend, tags=(early,), batch=BatchMember(batch, 0, 2))
        other = await create(backend, tags=(tag,))
        key = StreamKey(run.id, "default")
        await backend.broker.append(key, items(3))
        run = await store(backend.broker, finished(backend, run, tags=(early, tag)))
        await backend.peer.remove(run.id)
        await backend.peer.remove(run.id)

        assert await backend.broker.load([run.id]) == [None]
        with pytest.raises(RunNotFound):
            await backend.broker.read(key)
        with pytest.raises(RunNotFound):
            await backend.broker.append(key, items(1))
        for topic in (run_topic(run.id), f"tag:{early}", f"batch:{batch}"):
            assert await versions_in(backend.broker, topic) == {}
        assert await versions_in(backend.broker, f"tag:{tag}") == {other.id: 1}
        with pytest.raises(VersionConflict) as conflict:
            await backend.broker.commit(next_version(run), expect=run.version, change=new_mark())
        assert conflict.value.current is None
        await backend.broker.publish(run.id)
        assert await versions_in(backend.broker, f"tag:{early}") == {}


@pytest.mark.anyio
async def test_a_claim_is_removed_with_its_run(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = new_record(backend, idempotency_key=new_tag(), thread=new_tag())
        assert len(run.claims) == 2
        for claim in run.claims:
            assert await backend.broker.claim(claim, run.id, ttl_s=60) == run.id
            assert await backend.peer.claim(claim, "another", ttl_s=60) == run.id, "even before the run exists"
        await backend.broker.commit(run, expect=0, change=new_mark())
        await store(backend.broker, finished(backend, run))
        for claim in run.claims:
            assert await backend.peer.claim(claim, "another", ttl_s=60) == run.id
        await backend.peer.remove(run.id)
        for claim in run.claims:
            assert await backend.broker.claimed(claim) is None
            assert await backend.broker.claim(claim, "another", ttl_s=60) == "another"


@pytest.mark.anyio
async def test_the_claim_of_another_run_is_not_removed(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend, idempotency_key=new_tag(), thread=new_tag())
        for claim in run.claims:
            await backend.broker.claim(claim, "a later run", ttl_s=60)
        await store(backend.broker, finished(backend, run))
        await backend.broker.remove(run.id)
        for claim in run.claims:
            assert await backend.peer.claim(claim, "another", ttl_s=60) == "a later run"


@pytest.mark.anyio
async def test_a_removal_wakes_the_followers_of_the_runs_topics(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        tag = new_tag()
        run = await store(backend.broker, finished(backend, await create(backend, tags=(tag,))))
        waiting: list[Follower] = []

        async def wait_for_removal(topic: str) -> None:
            async with following(backend.peer, topic) as follower:
                waiting.append(follower)
                await follower.changes(None)
                while await backend.peer.load([run.id]) != [None]:
                    await follower.wait()
                    await follower.changes(None)

        async with anyio.create_task_group() as group:
            for topic in (run_topic(run.id), f"tag:{tag}"):
                group.start_soon(wait_for_removal, topic)
            while len(waiting) < 2:
                await pause(1)
            await pause(10)
            await backend.broker.remove(run.id)


@pytest.mark.anyio
async def test_readers_of_a_removed_run_still_get_its_end(make_broker: MakeBroker) -> None:
    """A log has all entries before its end, so its readers need nothing more from the broker."""
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        key = StreamKey(run.id, "default")
        await backend.broker.append(key, items(3))
        reader = Reader(backend.peer, key)
        async with backend.peer.live(key) as live:
            await store(backend.broker, finished(backend, run))
            while live.end is None:
                await live.waiting.wait()
            await backend.broker.remove(run.id)
            await reader.follow(live)
        assert data(reader.seen) == items(3)
        assert reader.end == COMPLETE
        with pytest.raises(RunNotFound):
            await reader.run()
