"""Claims, due times, leases and removal: what a broker knows by its own clock.

Where real time has to pass, the tests wait a fraction of a second and then for a condition. They never assume that the
machine is fast: that something is *not* due is checked against the broker's clock, and renewals show in the order in
which runs become due.
"""

from __future__ import annotations

import anyio
import pytest

from asgi_realtime.brokers.base import Broker, StreamKey
from asgi_realtime.brokers.following import Follower, following
from asgi_realtime.core.errors import RunNotFound
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import BatchMember, RunRecord, Status, run_topic
from asgi_realtime.testing.conformance.kit import (
    SHORT_S,
    STEP_S,
    TIMEOUTS,
    Backend,
    MakeBroker,
    create,
    eventually,
    finished,
    in_time,
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

SHORT_MS = int(SHORT_S * 1000)
LEASE_MS = int(TIMEOUTS.lease * 1000)

# Claims


@pytest.mark.anyio
async def test_the_first_claim_wins(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = new_tag()
        assert await backend.broker.claim(key, "first", ttl_s=60) == "first"
        assert await backend.peer.claim(key, "second", ttl_s=60) == "first"
        assert await backend.broker.claim(key, "first", ttl_s=60) == "first"
        assert await backend.broker.claim(new_tag(), "second", ttl_s=60) == "second"


@pytest.mark.anyio
async def test_concurrent_claims_all_return_one_winner(make_broker: MakeBroker) -> None:
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

        async def claim_twice() -> tuple[str, str]:
            key = new_tag()
            await backend.broker.claim(key, "first", ttl_s=SHORT_S)
            return key, await backend.peer.claim(key, "second", ttl_s=60)

        key, second = await in_time(backend, SHORT_S, claim_twice)
        assert second == "first"

        async def third_wins() -> bool:
            return await backend.peer.claim(key, "third", ttl_s=60) == "third"

        await eventually(backend, third_wins, "the claim expires; the second one has not prolonged it")
        assert await backend.broker.claim(key, "fourth", ttl_s=60) == "third"


@pytest.mark.anyio
async def test_a_claim_can_be_looked_up(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        assert await backend.peer.claimed(new_tag()) is None

        async def claim_and_look_up() -> tuple[str, list[str | None]]:
            key = new_tag()
            assert await backend.peer.claimed(key) is None
            assert await backend.broker.claim(key, "first: 1", ttl_s=SHORT_S) == "first: 1", "a look-up claims nothing"
            await backend.peer.claim(key, "second", ttl_s=60)
            return key, [await broker.claimed(key) for broker in backend.processes]

        key, found = await in_time(backend, SHORT_S, claim_and_look_up)
        assert found == ["first: 1"] * 2

        async def has_expired() -> bool:
            return [await broker.claimed(key) for broker in backend.processes] == [None, None]

        await eventually(backend, has_expired, "the claim expires; look-ups do not prolong it")
        await backend.peer.claim(key, "third", ttl_s=60)
        assert await backend.broker.claimed(key) == "third"


@pytest.mark.anyio
async def test_a_claim_replaces_only_the_expected_value(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = new_tag()
        assert await backend.broker.claim(key, "first", ttl_s=60, instead_of="none") == "first", "it had no value"
        assert await backend.peer.claim(key, "second", ttl_s=60, instead_of="another") == "first"
        assert await backend.peer.claim(key, "second", ttl_s=60, instead_of="first") == "second"
        assert [await broker.claimed(key) for broker in backend.processes] == ["second"] * 2
        assert await backend.peer.claim(key, "second", ttl_s=60, instead_of="first") == "second", "a retry"
        assert await backend.broker.claim(key, "third", ttl_s=60, instead_of="first") == "second"


@pytest.mark.anyio
async def test_of_concurrent_replacements_one_succeeds(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        key = new_tag()
        await backend.broker.claim(key, "old", ttl_s=60)
        found: list[str] = []

        async def replace(broker: Broker, value: str) -> None:
            found.append(await broker.claim(key, value, ttl_s=60, instead_of="old"))

        async with anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(replace, backend.processes[number % 2], f"value {number}")
        assert len(found) == 10
        assert set(found) == {await backend.peer.claimed(key)} != {"old"}


@pytest.mark.anyio
async def test_a_replacement_has_its_own_lifetime(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        short, long = new_tag(), new_tag()

        async def replace_both() -> bool:
            await backend.broker.claim(long, "old", ttl_s=SHORT_S)
            await backend.broker.claim(short, "old", ttl_s=60)
            return await backend.peer.claim(long, "new", ttl_s=60, instead_of="old") == "new"

        assert await in_time(backend, SHORT_S, replace_both)
        assert await backend.peer.claim(short, "new", ttl_s=SHORT_S, instead_of="old") == "new"

        async def has_expired() -> bool:
            return await backend.broker.claimed(short) is None

        await eventually(backend, has_expired, "the shorter lifetime is over")
        assert await backend.broker.claimed(long) == "new"
        assert await backend.broker.claim(short, "third", ttl_s=60, instead_of="new") == "third"


# Due times


async def _due(backend: Backend, kind: str) -> list[str]:
    """The due runs. Both processes must return the same, unless one becomes due between the two calls."""
    for _ in range(10):
        ours, theirs = await backend.broker.due(kind), await backend.peer.due(kind)
        if ours == theirs:
            return ours
    raise AssertionError(f"the processes disagree on {kind}: {ours}, {theirs}")


async def _assert_due(backend: Backend, kind: str, *run_ids: str) -> None:
    """Wait until as many runs are due, and check that they are these, in this order."""

    async def are_due() -> bool:
        return len(await _due(backend, kind)) >= len(run_ids)

    await eventually(backend, are_due, f"{len(run_ids)} runs are due for {kind}")
    assert await _due(backend, kind) == list(run_ids)


async def _assert_due_from(backend: Backend, kind: str, run_id: str, at_ms: int) -> None:
    """The run is due from a time on, not before, and stays due."""
    while backend.now_ms() < at_ms:
        found = await _due(backend, kind)
        assert run_id not in found or backend.now_ms() >= at_ms, f"the run is due for {kind} too early"
        await backend.advance(STEP_S)
    await _assert_due(backend, kind, run_id)
    assert await _due(backend, kind) == [run_id], "it stays due until something is done"


@pytest.mark.anyio
async def test_a_delayed_run_is_due_at_the_end_of_its_delay(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        at_ms = backend.now_ms() + SHORT_MS
        run = await create(backend, status=Status.DELAYED, delay_until_ms=at_ms)
        await _assert_due_from(backend, "delay", run.id, at_ms)
        await store(backend.peer, next_version(run, status=Status.QUEUED))
        assert await _due(backend, "delay") == []


@pytest.mark.anyio
async def test_a_waiting_run_is_due_when_its_ttl_has_passed(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        for status in (Status.DELAYED, Status.QUEUED):
            at_ms = backend.now_ms() + SHORT_MS
            run = await create(backend, status=status, expires_at_ms=at_ms)
            await _assert_due_from(backend, "ttl", run.id, at_ms)
            await store(backend.peer, next_version(run, status=Status.EXPIRED, completed_at_ms=backend.now_ms()))
            assert await _due(backend, "ttl") == []


@pytest.mark.anyio
async def test_a_run_that_has_started_has_no_ttl(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        at_ms = backend.now_ms() + SHORT_MS
        run, waiting = [await create(backend, expires_at_ms=at_ms) for _ in range(2)]
        await store(backend.broker, next_version(run, status=Status.EXECUTING, owner="us"))
        await _assert_due_from(backend, "ttl", waiting.id, at_ms)


@pytest.mark.anyio
async def test_a_cancellation_that_the_owner_ignores_is_due(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend, status=Status.EXECUTING, owner="us")
        requested_ms = backend.now_ms()
        run = await store(backend.broker, next_version(run, cancel_requested_at_ms=requested_ms))
        await _assert_due_from(backend, "cancel", run.id, requested_ms + int(TIMEOUTS.cancel * 1000))
        await store(backend.peer, next_version(run, status=Status.CANCELED, completed_at_ms=backend.now_ms()))
        assert await _due(backend, "cancel") == []


@pytest.mark.anyio
async def test_a_run_that_has_ended_expires_and_can_be_removed(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, after_end=SHORT_S) as backend:
        run = await store(backend.broker, finished(backend, await create(backend)))
        assert run.completed_at_ms is not None
        await _assert_due_from(backend, "expiry", run.id, run.completed_at_ms + SHORT_MS)
        await backend.peer.remove(run.id)
        assert await _due(backend, "expiry") == []


@pytest.mark.anyio
async def test_due_runs_are_listed_oldest_first_up_to_a_limit(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        now_ms = backend.now_ms()
        last, first, second = [
            (await create(backend, status=Status.DELAYED, delay_until_ms=now_ms + at)).id for at in (90, 30, 60)
        ]
        await _assert_due(backend, "delay", first, second, last)
        assert await backend.broker.due("delay", limit=2) == [first, second]
        assert await backend.broker.due("delay", limit=2, skip=1) == [second, last]
        assert await backend.broker.due("delay", skip=2) == [last]
        assert await backend.broker.due("delay", skip=3) == []


# Leases


@pytest.mark.anyio
async def test_a_lease_starts_with_the_execution_and_is_due_unless_renewed(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        await _assert_due(backend, "enqueue", run.id)
        assert await _due(backend, "lease") == [], "a run that waits has no lease"
        started_ms = backend.now_ms()
        run = await store(backend.broker, next_version(run, status=Status.EXECUTING, owner="us"))
        await _assert_due_from(backend, "lease", run.id, started_ms + LEASE_MS)
        await store(backend.peer, next_version(run, status=Status.CRASHED, completed_at_ms=backend.now_ms()))
        assert await _due(backend, "lease") == []


@pytest.mark.anyio
async def test_a_change_of_the_run_does_not_renew_its_lease(make_broker: MakeBroker) -> None:
    """Any process can add a tag; that says nothing about the health of the owner."""
    async with open_backend(make_broker) as backend:
        run = await create(backend, status=Status.EXECUTING, owner="us")
        await backend.advance(STEP_S)
        later = await create(backend, status=Status.EXECUTING, owner="us")
        await backend.advance(STEP_S)
        await store(backend.peer, next_version(run, tags=(new_tag(),)))
        await _assert_due(backend, "lease", run.id, later.id)


@pytest.mark.anyio
async def test_only_the_owner_renews_a_lease(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend, status=Status.EXECUTING, owner="us")
        ended = await store(
            backend.broker, finished(backend, await create(backend, status=Status.EXECUTING, owner="us"))
        )
        await backend.advance(STEP_S)
        neighbor = await create(backend, status=Status.EXECUTING, owner="us")
        await backend.advance(STEP_S)
        await backend.broker.renew([run.id, ended.id, "run_unknown"], owner="us")
        await backend.advance(STEP_S)
        await backend.broker.renew([neighbor.id], owner="them")
        await _assert_due(backend, "lease", neighbor.id, run.id)

        async def renew() -> list[str]:
            await backend.peer.renew([neighbor.id], owner="us")
            return await _due(backend, "lease")

        assert await in_time(backend, TIMEOUTS.lease, renew) == [run.id], "a lease that is due can still be renewed"
        await _assert_due(backend, "lease", run.id, neighbor.id)


# Handing over to a queue


@pytest.mark.anyio
async def test_a_queued_run_that_no_process_renews_is_due(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        created_ms = backend.now_ms()
        run = await create(backend)
        await _assert_due_from(backend, "enqueue", run.id, created_ms + LEASE_MS)
        started_ms = backend.now_ms()
        await store(backend.peer, next_version(run, status=Status.EXECUTING, owner="us"))
        due = await _due(backend, "lease")
        assert not due or backend.now_ms() >= started_ms + LEASE_MS, "its lease starts with the execution"
        assert await _due(backend, "enqueue") == []
        canceled = await create(backend)
        await store(backend.peer, next_version(canceled, status=Status.CANCELED, completed_at_ms=backend.now_ms()))
        later = await create(backend)
        await _assert_due(backend, "enqueue", later.id)


@pytest.mark.anyio
async def test_a_delayed_run_is_due_for_enqueueing_from_the_end_of_its_delay(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend, status=Status.DELAYED, delay_until_ms=backend.now_ms())
        await backend.broker.enqueued(run.id)  # does nothing yet
        later = await create(backend)
        await _assert_due(backend, "enqueue", later.id)
        await backend.broker.enqueued(later.id)
        queued_ms = backend.now_ms()
        run = await store(backend.broker, next_version(run, status=Status.QUEUED))
        await _assert_due_from(backend, "enqueue", run.id, queued_ms + LEASE_MS)


@pytest.mark.anyio
async def test_a_run_that_a_queue_has_is_not_due(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run, late = await create(backend), await create(backend)
        await backend.advance(STEP_S)
        neighbor = await create(backend)
        await backend.broker.enqueued(run.id)
        await backend.peer.enqueued(run.id)
        await backend.broker.enqueued("run_unknown")
        await _assert_due(backend, "enqueue", late.id, neighbor.id)
        await backend.peer.enqueued(late.id)
        assert await _due(backend, "enqueue") == [neighbor.id]

        await store(backend.peer, next_version(run, tags=(new_tag(),)))
        await backend.broker.renew([run.id], owner="us")
        later = await create(backend)
        await _assert_due(backend, "enqueue", neighbor.id, later.id)


@pytest.mark.anyio
async def test_an_executing_run_keeps_its_lease_when_it_is_reported_as_enqueued(make_broker: MakeBroker) -> None:
    """A worker can be faster than the process that put the run into the queue."""
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        started_ms = backend.now_ms()
        await store(backend.peer, next_version(run, status=Status.EXECUTING, owner="us"))
        await backend.broker.enqueued(run.id)
        await _assert_due_from(backend, "lease", run.id, started_ms + LEASE_MS)


@pytest.mark.anyio
async def test_any_process_that_holds_a_queued_run_renews_it(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        await backend.advance(STEP_S)
        neighbor = await create(backend)
        await backend.advance(STEP_S)
        await backend.peer.renew([run.id], owner="anyone")
        await backend.advance(STEP_S)
        await store(backend.peer, next_version(neighbor, tags=(new_tag(),)))  # does not renew it
        await _assert_due(backend, "enqueue", neighbor.id, run.id)

        async def renew() -> list[str]:
            await backend.broker.renew([neighbor.id], owner="us")
            return await _due(backend, "enqueue")

        assert await in_time(backend, TIMEOUTS.lease, renew) == [run.id]
        await _assert_due(backend, "enqueue", run.id, neighbor.id)
        await store(backend.broker, next_version(run, status=Status.EXECUTING, owner="us"))
        assert await _due(backend, "enqueue") == [neighbor.id]


# Calling the `on_end` of a run


async def _end_with_on_end(backend: Backend) -> RunRecord:
    return await store(backend.broker, finished(backend, await create(backend, has_on_end=True)))


@pytest.mark.anyio
async def test_an_on_end_is_due_a_lease_after_the_end_and_taken_once(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        for run in [await create(backend), await create(backend, has_on_end=True)]:
            assert not await backend.broker.take_on_end(run.id), "the run is not over"
            ended_ms = backend.now_ms()
            await store(backend.broker, finished(backend, run))
        await _assert_due_from(backend, "on_end", run.id, ended_ms + LEASE_MS)

        taken: list[bool] = []

        async def take(broker: Broker) -> None:
            taken.append(await broker.take_on_end(run.id))

        async with anyio.create_task_group() as group:
            taken_ms = backend.now_ms()
            for number in range(6):
                group.start_soon(take, backend.processes[number % 2])
        assert sorted(taken) == [False] * 5 + [True]
        await _assert_due_from(backend, "on_end", run.id, taken_ms + LEASE_MS)


@pytest.mark.anyio
async def test_an_on_end_is_renewed_and_due_until_it_was_called(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await _end_with_on_end(backend)
        await backend.advance(STEP_S)
        neighbor = await _end_with_on_end(backend)
        await backend.advance(STEP_S)
        await backend.peer.renew([run.id], owner="anyone")
        await _assert_due(backend, "on_end", neighbor.id, run.id)
        await backend.peer.on_end_called(neighbor.id)
        await backend.broker.on_end_called(neighbor.id)
        await backend.broker.on_end_called("run_unknown")
        await backend.broker.renew([neighbor.id], owner="us")
        assert not await backend.peer.take_on_end(neighbor.id)
        await backend.advance(TIMEOUTS.lease)
        await _assert_due(backend, "on_end", run.id)


@pytest.mark.anyio
async def test_a_run_is_not_removed_before_its_on_end_was_called(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, after_end=STEP_S) as backend:
        tag = new_tag()
        run = await create(backend, has_on_end=True, tags=(tag,))
        await store(backend.broker, finished(backend, run))
        await _assert_due(backend, "expiry", run.id)
        await backend.peer.remove(run.id)
        assert await backend.broker.load([run.id]) != [None]
        assert await versions_in(backend.broker, f"tag:{tag}") != {}
        await backend.broker.on_end_called(run.id)
        await backend.peer.remove(run.id)
        assert await backend.broker.load([run.id]) == [None]
        assert await _due(backend, "expiry") == []


# Readers


async def _watch(
    backend: Backend,
    run_id: str,
    *,
    ours: int | None = None,
    theirs: int | None = None,
    grace_s: float | None = SHORT_S,
) -> None:
    for broker, process, readers in ((backend.broker, "ours", ours), (backend.peer, "theirs", theirs)):
        if readers is not None:
            await broker.watch(run_id, process=process, readers=readers, grace_s=grace_s)


async def _watchers(backend: Backend, run_id: str) -> list[int]:
    return [await broker.watchers(run_id) for broker in backend.processes]


@pytest.mark.anyio
async def test_a_run_is_unwatched_a_grace_period_after_its_last_reader(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        never, run, other = [await create(backend) for _ in range(3)]
        await _watch(backend, other.id, ours=1, theirs=0, grace_s=None)
        await _watch(backend, run.id, ours=3)
        await _watch(backend, run.id, ours=2)
        left_ms = backend.now_ms()
        await _watch(backend, run.id, ours=0)
        await _watch(backend, other.id, ours=0, grace_s=None)
        await _assert_due_from(backend, "unwatched", run.id, left_ms + SHORT_MS)
        assert await backend.peer.watchers(never.id) == 0
        await _watch(backend, run.id, theirs=1)
        assert await _due(backend, "unwatched") == [], "a reader is back"


@pytest.mark.anyio
async def test_the_readers_of_all_processes_count_until_they_expire(make_broker: MakeBroker) -> None:
    """A process that dies leaves its count behind."""
    async with open_backend(make_broker) as backend:

        async def count() -> tuple[RunRecord, int, list[int]]:
            run, counted_ms = await create(backend), backend.now_ms()
            await _watch(backend, run.id, ours=2, theirs=3)
            await _watch(backend, run.id, ours=1)
            return run, counted_ms, await _watchers(backend, run.id)

        run, counted_ms, found = await in_time(backend, TIMEOUTS.lease, count)
        assert found == [4, 4]
        await _watch(backend, run.id, ours=0)
        await _assert_due_from(backend, "unwatched", run.id, counted_ms + LEASE_MS + SHORT_MS)
        assert await _watchers(backend, run.id) == [0, 0]


@pytest.mark.anyio
async def test_a_run_with_a_reader_that_is_counted_again_is_not_unwatched(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        left, run = [await create(backend) for _ in range(2)]
        await _watch(backend, run.id, theirs=1)
        await backend.advance(STEP_S)
        await _watch(backend, left.id, theirs=1)
        await backend.advance(STEP_S)
        await _watch(backend, run.id, theirs=1)
        await _watch(backend, run.id, ours=0)
        await _assert_due(backend, "unwatched", left.id, run.id)


@pytest.mark.anyio
async def test_the_readers_of_a_run_that_is_over_do_not_count(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        left, ended, other = [await create(backend) for _ in range(3)]
        await _watch(backend, left.id, ours=0)
        await _watch(backend, ended.id, ours=1)
        for run in (left, ended):
            await store(backend.broker, finished(backend, run))
        assert await _watchers(backend, ended.id) == [0, 0]
        for run_id in (ended.id, "run_unknown", other.id):
            await _watch(backend, run_id, ours=0)
        await _assert_due(backend, "unwatched", other.id)
        await backend.broker.remove(ended.id)
        assert await _watchers(backend, "run_unknown") == [0, 0]


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
async def test_ping_returns_if_the_broker_answers(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        for broker in backend.processes:
            await broker.ping()
            assert isinstance(broker.shared, bool)
