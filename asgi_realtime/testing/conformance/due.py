"""Claims, due times, leases and removal: what a broker knows by its own clock."""

from __future__ import annotations

import anyio
import pytest

from asgi_realtime.brokers.base import Broker, StreamKey
from asgi_realtime.brokers.following import Follower, following
from asgi_realtime.core.errors import RunNotFound
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import BatchMember, RunRecord, Status, run_topic
from asgi_realtime.testing.conformance.kit import (
    TIMEOUTS,
    Backend,
    MakeBroker,
    create,
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


@pytest.mark.anyio
async def test_the_first_claim_wins(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = new_tag()
        assert await backend.broker.claim(key, "first", ttl_s=60) == "first"
        assert await backend.peer.claim(key, "second", ttl_s=60) == "first"
        assert await backend.broker.claim(key, "first", ttl_s=60) == "first"
        assert await backend.broker.claim(new_tag(), "second", ttl_s=60) == "second"


@pytest.mark.anyio
async def test_of_concurrent_claims_all_learn_of_one_winner(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = new_tag()
        found: list[str] = []

        async def claim(broker: Broker, value: str) -> None:
            found.append(await broker.claim(key, value, ttl_s=60))

        async with anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(claim, backend.processes[number % 2], f"value {number}")
        assert len(found) == 10
        assert len(set(found)) == 1


@pytest.mark.anyio
async def test_a_claim_expires_by_the_brokers_clock(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = new_tag()
        await backend.broker.claim(key, "first", ttl_s=1.0)
        await backend.advance(0.5)
        assert await backend.peer.claim(key, "second", ttl_s=60) == "first", "a later claim does not prolong it either"
        await backend.advance(0.6)
        assert await backend.peer.claim(key, "third", ttl_s=60) == "third"
        assert await backend.broker.claim(key, "fourth", ttl_s=60) == "third"


@pytest.mark.anyio
async def test_what_is_claimed_can_be_asked_for(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = new_tag()
        assert await backend.peer.claimed(key) is None
        assert await backend.broker.claim(key, "first: 1", ttl_s=1.0) == "first: 1", "to ask claims nothing"
        await backend.peer.claim(key, "second", ttl_s=60)
        for broker in backend.processes:
            assert await broker.claimed(key) == "first: 1"
            assert await broker.claimed(new_tag()) is None
        await backend.advance(0.6)
        assert await backend.peer.claimed(key) == "first: 1"
        await backend.advance(0.5)
        for broker in backend.processes:
            assert await broker.claimed(key) is None, "to ask does not prolong it"
        await backend.peer.claim(key, "third", ttl_s=60)
        assert await backend.broker.claimed(key) == "third"


# Due times


async def _due(backend: Backend, kind: str) -> list[str]:
    """What is due, for which both processes must give the same answer."""
    found = await backend.broker.due(kind)
    assert await backend.peer.due(kind) == found
    return found


async def _assert_due_after(backend: Backend, kind: str, run: RunRecord, seconds: float) -> None:
    assert run.id not in await _due(backend, kind)
    await backend.advance(seconds + 0.1)
    assert await _due(backend, kind) == [run.id]
    assert await _due(backend, kind) == [run.id], "it stays due until something is done"


@pytest.mark.anyio
async def test_a_delayed_run_is_due_when_its_delay_is_over(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend, status=Status.DELAYED, delay_until_ms=backend.now_ms() + 1000)
        await _assert_due_after(backend, "delay", run, 1.0)
        await store(backend.peer, next_version(run, status=Status.QUEUED))
        assert await _due(backend, "delay") == []


@pytest.mark.anyio
async def test_a_waiting_run_is_due_when_its_ttl_is_over(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        for status in (Status.DELAYED, Status.QUEUED):
            run = await create(backend, status=status, expires_at_ms=backend.now_ms() + 1000)
            await _assert_due_after(backend, "ttl", run, 1.0)
            await store(backend.peer, next_version(run, status=Status.EXPIRED, completed_at_ms=backend.now_ms()))
            assert await _due(backend, "ttl") == []


@pytest.mark.anyio
async def test_a_run_that_has_started_has_no_ttl(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend, expires_at_ms=backend.now_ms() + 1000)
        await store(backend.broker, next_version(run, status=Status.EXECUTING, owner="us"))
        await backend.advance(1.1)
        assert await _due(backend, "ttl") == []


@pytest.mark.anyio
async def test_a_cancel_that_nobody_heeds_is_due(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend, status=Status.EXECUTING, owner="us")
        run = await store(backend.broker, next_version(run, cancel_requested_at_ms=backend.now_ms()))
        await _assert_due_after(backend, "cancel", run, TIMEOUTS.cancel)
        await store(backend.peer, next_version(run, status=Status.CANCELED, completed_at_ms=backend.now_ms()))
        assert await _due(backend, "cancel") == []


@pytest.mark.anyio
async def test_a_run_that_is_over_expires_and_can_be_removed(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, after_end=1.0) as backend:
        run = await store(backend.broker, finished(backend, await create(backend)))
        await _assert_due_after(backend, "expiry", run, 1.0)
        await backend.peer.remove(run.id)
        assert await _due(backend, "expiry") == []


@pytest.mark.anyio
async def test_what_is_due_longest_comes_first_up_to_a_limit(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        now_ms = backend.now_ms()
        runs = {
            at: (await create(backend, status=Status.DELAYED, delay_until_ms=now_ms + at)).id for at in (500, 100, 300)
        }
        await backend.advance(1.0)
        assert await _due(backend, "delay") == [runs[100], runs[300], runs[500]]
        assert await backend.broker.due("delay", limit=2) == [runs[100], runs[300]]
        assert await backend.broker.due("delay", limit=2, skip=1) == [runs[300], runs[500]]
        assert await backend.broker.due("delay", skip=2) == [runs[500]]
        assert await backend.broker.due("delay", skip=3) == []


# Leases


@pytest.mark.anyio
async def test_a_lease_begins_with_the_execution_and_is_due_when_nobody_renews_it(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        await backend.advance(TIMEOUTS.lease + 0.1)
        assert await _due(backend, "lease") == [], "nobody owes anything for a run that waits"
        run = await store(backend.broker, next_version(run, status=Status.EXECUTING, owner="us"))
        await _assert_due_after(backend, "lease", run, TIMEOUTS.lease)
        await store(backend.peer, next_version(run, status=Status.CRASHED, completed_at_ms=backend.now_ms()))
        assert await _due(backend, "lease") == []


@pytest.mark.anyio
async def test_a_change_of_the_run_is_no_renewal(make_broker: MakeBroker) -> None:
    """Any process may add a tag; that says nothing of the owner's health."""
    async with open_backend(make_broker) as backend:
        run = await create(backend, status=Status.EXECUTING, owner="us")
        await backend.advance(TIMEOUTS.lease / 2)
        await store(backend.peer, next_version(run, tags=(new_tag(),)))
        await backend.advance(TIMEOUTS.lease / 2 + 0.1)
        assert await _due(backend, "lease") == [run.id]


@pytest.mark.anyio
async def test_only_the_owner_renews_a_lease(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend, status=Status.EXECUTING, owner="us")
        neighbour = await create(backend, status=Status.EXECUTING, owner="us")
        over = await store(
            backend.broker, finished(backend, await create(backend, status=Status.EXECUTING, owner="us"))
        )
        await backend.advance(TIMEOUTS.lease / 2)
        await backend.broker.renew([run.id, over.id, "run_that_never_was"], owner="us")
        await backend.broker.renew([neighbour.id], owner="them")
        await backend.advance(TIMEOUTS.lease / 2 + 0.1)
        assert await _due(backend, "lease") == [neighbour.id]
        await backend.peer.renew([neighbour.id], owner="us")
        assert await _due(backend, "lease") == [], "a lease may be renewed as long as nobody has acted on its end"
        await backend.advance(TIMEOUTS.lease / 2)
        assert await _due(backend, "lease") == [run.id]


# Handing over to a queue


@pytest.mark.anyio
async def test_a_queued_run_that_nobody_has_in_hand_is_due(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        await _assert_due_after(backend, "enqueue", run, TIMEOUTS.lease)
        await store(backend.peer, next_version(run, status=Status.EXECUTING, owner="us"))
        assert await _due(backend, "enqueue") == []
        assert await _due(backend, "lease") == [], "its lease begins when it does"
        canceled = await create(backend)
        await store(backend.peer, next_version(canceled, status=Status.CANCELED, completed_at_ms=backend.now_ms()))
        await backend.advance(TIMEOUTS.lease + 0.1)
        assert await _due(backend, "enqueue") == []


@pytest.mark.anyio
async def test_a_delayed_run_is_to_be_handed_over_from_the_end_of_its_delay(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend, status=Status.DELAYED, delay_until_ms=backend.now_ms() + 1000)
        await backend.broker.enqueued(run.id)  # of no meaning yet
        await backend.advance(TIMEOUTS.lease + 0.1)
        assert await _due(backend, "enqueue") == []
        run = await store(backend.broker, next_version(run, status=Status.QUEUED))
        await _assert_due_after(backend, "enqueue", run, TIMEOUTS.lease)


@pytest.mark.anyio
async def test_a_run_that_a_queue_has_is_not_due(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run, late, neighbour = [await create(backend) for _ in range(3)]
        await backend.broker.enqueued(run.id)
        await backend.peer.enqueued(run.id)
        await backend.broker.enqueued("run_that_never_was")
        await backend.advance(TIMEOUTS.lease + 0.1)
        assert set(await _due(backend, "enqueue")) == {late.id, neighbour.id}
        await backend.peer.enqueued(late.id)
        assert await _due(backend, "enqueue") == [neighbour.id]

        await store(backend.peer, next_version(run, tags=(new_tag(),)))
        await backend.broker.renew([run.id], owner="us")
        await backend.advance(TIMEOUTS.lease + 0.1)
        assert await _due(backend, "enqueue") == [neighbour.id], "neither makes it due again"


@pytest.mark.anyio
async def test_a_run_that_executes_keeps_its_lease_when_its_queue_is_told(make_broker: MakeBroker) -> None:
    """A worker may be faster than the process that put the run into the queue."""
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        await store(backend.peer, next_version(run, status=Status.EXECUTING, owner="us"))
        await backend.broker.enqueued(run.id)
        await _assert_due_after(backend, "lease", run, TIMEOUTS.lease)


@pytest.mark.anyio
async def test_whoever_has_a_queued_run_in_hand_renews_it(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run, neighbour = await create(backend), await create(backend)
        await backend.advance(TIMEOUTS.lease / 2)
        await store(backend.peer, next_version(neighbour, tags=(new_tag(),)))  # says nothing of who has it
        await backend.peer.renew([run.id], owner="anyone")
        await backend.advance(TIMEOUTS.lease / 2 + 0.1)
        assert await _due(backend, "enqueue") == [neighbour.id]
        await backend.broker.renew([neighbour.id], owner="us")
        assert await _due(backend, "enqueue") == []
        await backend.advance(TIMEOUTS.lease / 2)
        assert await _due(backend, "enqueue") == [run.id]
        await store(backend.broker, next_version(run, status=Status.EXECUTING, owner="us"))
        assert await _due(backend, "enqueue") == []


# Removal


@pytest.mark.anyio
async def test_a_removed_run_is_gone_from_everywhere(make_broker: MakeBroker) -> None:
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
async def test_a_claim_goes_with_the_run_that_it_stands_for(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = new_record(backend, idempotency_key=new_tag())
        claim = run.claim
        assert claim is not None
        assert await backend.broker.claim(claim, run.id, ttl_s=60) == run.id
        assert await backend.peer.claim(claim, "another", ttl_s=60) == run.id, "also before the run is there"
        await backend.broker.commit(run, expect=0, change=new_mark())
        await store(backend.broker, finished(backend, run))
        assert await backend.peer.claim(claim, "another", ttl_s=60) == run.id
        await backend.peer.remove(run.id)
        assert await backend.broker.claimed(claim) is None
        assert await backend.broker.claim(claim, "another", ttl_s=60) == "another"


@pytest.mark.anyio
async def test_a_claim_that_stands_for_another_run_stays(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend, idempotency_key=new_tag())
        assert run.claim is not None
        await backend.broker.claim(run.claim, "a later run", ttl_s=60)
        await store(backend.broker, finished(backend, run))
        await backend.broker.remove(run.id)
        assert await backend.peer.claim(run.claim, "another", ttl_s=60) == "a later run"


@pytest.mark.anyio
async def test_a_removal_wakes_those_who_follow_the_topics_of_the_run(make_broker: MakeBroker) -> None:
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
async def test_a_broker_that_answers_says_so(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        for broker in backend.processes:
            await broker.ping()
            assert isinstance(broker.shared, bool)
