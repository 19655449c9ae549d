"""Due times, leases and the hand-over to a queue: what a broker knows by its own clock.

Where real time has to pass, the tests wait a fraction of a second and then for a condition. They never assume that the
machine is fast: that something is *not* due is checked against the broker's clock, and renewals show in the order in
which runs become due.
"""

from __future__ import annotations

import pytest

from asgi_realtime.core.runs import Status
from asgi_realtime.testing.conformance.kit import (
    LEASE_MS,
    SHORT_MS,
    SHORT_S,
    STEP_S,
    TIMEOUTS,
    MakeBroker,
    assert_due,
    assert_due_from,
    create,
    due_runs,
    finished,
    in_time,
    new_tag,
    next_version,
    open_backend,
    store,
)


@pytest.mark.anyio
async def test_a_delayed_run_is_due_at_the_end_of_its_delay(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        at_ms = backend.now_ms() + SHORT_MS
        run = await create(backend, status=Status.DELAYED, delay_until_ms=at_ms)
        await assert_due_from(backend, "delay", run.id, at_ms)
        await store(backend.peer, next_version(run, status=Status.QUEUED))
        assert await due_runs(backend, "delay") == []


@pytest.mark.anyio
async def test_a_waiting_run_is_due_when_its_ttl_has_passed(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        for status in (Status.DELAYED, Status.QUEUED):
            at_ms = backend.now_ms() + SHORT_MS
            run = await create(backend, status=status, expires_at_ms=at_ms)
            await assert_due_from(backend, "ttl", run.id, at_ms)
            await store(backend.peer, next_version(run, status=Status.EXPIRED, completed_at_ms=backend.now_ms()))
            assert await due_runs(backend, "ttl") == []


@pytest.mark.anyio
async def test_a_run_that_has_started_has_no_ttl(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        at_ms = backend.now_ms() + SHORT_MS
        run, waiting = [await create(backend, expires_at_ms=at_ms) for _ in range(2)]
        await store(backend.broker, next_version(run, status=Status.EXECUTING, owner="us"))
        await assert_due_from(backend, "ttl", waiting.id, at_ms)


@pytest.mark.anyio
async def test_a_cancellation_that_the_owner_ignores_is_due(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend, status=Status.EXECUTING, owner="us")
        requested_ms = backend.now_ms()
        run = await store(backend.broker, next_version(run, cancel_requested_at_ms=requested_ms))
        await assert_due_from(backend, "cancel", run.id, requested_ms + int(TIMEOUTS.cancel * 1000))
        await store(backend.peer, next_version(run, status=Status.CANCELED, completed_at_ms=backend.now_ms()))
        assert await due_runs(backend, "cancel") == []


@pytest.mark.anyio
async def test_a_run_that_has_ended_expires_and_can_be_removed(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker, after_end=SHORT_S) as backend:
        run = await store(backend.broker, finished(backend, await create(backend)))
        assert run.completed_at_ms is not None
        await assert_due_from(backend, "expiry", run.id, run.completed_at_ms + SHORT_MS)
        await backend.peer.remove(run.id)
        assert await due_runs(backend, "expiry") == []


@pytest.mark.anyio
async def test_due_runs_are_listed_oldest_first_up_to_a_limit(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        now_ms = backend.now_ms()
        last, first, second = [
            (await create(backend, status=Status.DELAYED, delay_until_ms=now_ms + at)).id for at in (90, 30, 60)
        ]
        await assert_due(backend, "delay", first, second, last)
        assert await backend.broker.due("delay", limit=2) == [first, second]
        assert await backend.broker.due("delay", limit=2, skip=1) == [second, last]
        assert await backend.broker.due("delay", skip=2) == [last]
        assert await backend.broker.due("delay", skip=3) == []


# Leases


@pytest.mark.anyio
async def test_a_lease_starts_with_the_execution_and_is_due_unless_renewed(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        await assert_due(backend, "enqueue", run.id)
        assert await due_runs(backend, "lease") == [], "a run that waits has no lease"
        started_ms = backend.now_ms()
        run = await store(backend.broker, next_version(run, status=Status.EXECUTING, owner="us"))
        await assert_due_from(backend, "lease", run.id, started_ms + LEASE_MS)
        await store(backend.peer, next_version(run, status=Status.CRASHED, completed_at_ms=backend.now_ms()))
        assert await due_runs(backend, "lease") == []


@pytest.mark.anyio
async def test_a_change_of_the_run_does_not_renew_its_lease(make_broker: MakeBroker) -> None:
    """Any process can add a tag; that says nothing about the health of the owner."""
    async with open_backend(make_broker) as backend:
        run = await create(backend, status=Status.EXECUTING, owner="us")
        await backend.advance(STEP_S)
        later = await create(backend, status=Status.EXECUTING, owner="us")
        await backend.advance(STEP_S)
        await store(backend.peer, next_version(run, tags=(new_tag(),)))
        await assert_due(backend, "lease", run.id, later.id)


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
        await assert_due(backend, "lease", neighbor.id, run.id)

        async def renew() -> list[str]:
            await backend.peer.renew([neighbor.id], owner="us")
            return await due_runs(backend, "lease")

        assert await in_time(backend, TIMEOUTS.lease, renew) == [run.id], "a lease that is due can still be renewed"
        await assert_due(backend, "lease", run.id, neighbor.id)


# Handing over to a queue


@pytest.mark.anyio
async def test_a_queued_run_that_no_process_renews_is_due(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        created_ms = backend.now_ms()
        run = await create(backend)
        await assert_due_from(backend, "enqueue", run.id, created_ms + LEASE_MS)
        started_ms = backend.now_ms()
        await store(backend.peer, next_version(run, status=Status.EXECUTING, owner="us"))
        due = await due_runs(backend, "lease")
        assert not due or backend.now_ms() >= started_ms + LEASE_MS, "its lease starts with the execution"
        assert await due_runs(backend, "enqueue") == []
        canceled = await create(backend)
        await store(backend.peer, next_version(canceled, status=Status.CANCELED, completed_at_ms=backend.now_ms()))
        later = await create(backend)
        await assert_due(backend, "enqueue", later.id)


@pytest.mark.anyio
async def test_a_delayed_run_is_due_for_enqueueing_from_the_end_of_its_delay(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run = await create(backend, status=Status.DELAYED, delay_until_ms=backend.now_ms())
        await backend.broker.enqueued(run.id)  # does nothing yet
        later = await create(backend)
        await assert_due(backend, "enqueue", later.id)
        await backend.broker.enqueued(later.id)
        queued_ms = backend.now_ms()
        run = await store(backend.broker, next_version(run, status=Status.QUEUED))
        await assert_due_from(backend, "enqueue", run.id, queued_ms + LEASE_MS)


@pytest.mark.anyio
async def test_a_run_that_a_queue_has_is_not_due(make_broker: MakeBroker) -> None:
    async with open_backend(make_broker) as backend:
        run, late = await create(backend), await create(backend)
        await backend.advance(STEP_S)
        neighbor = await create(backend)
        await backend.broker.enqueued(run.id)
        await backend.peer.enqueued(run.id)
        await backend.broker.enqueued("run_unknown")
        await assert_due(backend, "enqueue", late.id, neighbor.id)
        await backend.peer.enqueued(late.id)
        assert await due_runs(backend, "enqueue") == [neighbor.id]

        await store(backend.peer, next_version(run, tags=(new_tag(),)))
        await backend.broker.renew([run.id], owner="us")
        later = await create(backend)
        await assert_due(backend, "enqueue", neighbor.id, later.id)


@pytest.mark.anyio
async def test_an_executing_run_keeps_its_lease_when_it_is_reported_as_enqueued(make_broker: MakeBroker) -> None:
    """A worker can be faster than the process that put the run into the queue."""
    async with open_backend(make_broker) as backend:
        run = await create(backend)
        started_ms = backend.now_ms()
        await store(backend.peer, next_version(run, status=Status.EXECUTING, owner="us"))
        await backend.broker.enqueued(run.id)
        await assert_due_from(backend, "lease", run.id, started_ms + LEASE_MS)


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
        await assert_due(backend, "enqueue", neighbor.id, run.id)

        async def renew() -> list[str]:
            await backend.broker.renew([neighbor.id], owner="us")
            return await due_runs(backend, "enqueue")

        assert await in_time(backend, TIMEOUTS.lease, renew) == [run.id]
        await assert_due(backend, "enqueue", run.id, neighbor.id)
        await store(backend.broker, next_version(run, status=Status.EXECUTING, owner="us"))
        assert await due_runs(backend, "enqueue") == [neighbor.id]
