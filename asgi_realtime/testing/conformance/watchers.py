"""The readers of a run, which each process counts: when a run is unwatched."""

from __future__ import annotations

import pytest

from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.testing.conformance.kit import (
    LEASE_MS,
    SHORT_MS,
    SHORT_S,
    STEP_S,
    TIMEOUTS,
    Backend,
    MakeBroker,
    assert_due,
    assert_due_from,
    create,
    due_runs,
    finished,
    in_time,
    open_backend,
    store,
)


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
        await assert_due_from(backend, "unwatched", run.id, left_ms + SHORT_MS)
        assert await backend.peer.watchers(never.id) == 0
        await _watch(backend, run.id, theirs=1)
        assert await due_runs(backend, "unwatched") == [], "a reader is back"


@pytest.mark.anyio
async def test_the_readers_of_all_processes_count_until_they_expire(make_broker: MakeBroker) -> None:
    """A process that dies leaves its count behind."""
    async with open_backend(make_broker) as backend:
        runs: list[StoredRecord] = []

        async def count() -> tuple[StoredRecord, int, list[int]]:
            for earlier in runs:  # of an attempt that took too long
                await backend.broker.remove(earlier.id)
            run, counted_ms = await create(backend), backend.now_ms()
            runs.append(run)
            await _watch(backend, run.id, ours=2, theirs=3)
            await _watch(backend, run.id, ours=1)
            return run, counted_ms, await _watchers(backend, run.id)

        run, counted_ms, found = await in_time(backend, TIMEOUTS.lease, count)
        assert found == [4, 4]
        await _watch(backend, run.id, ours=0)
        await assert_due_from(backend, "unwatched", run.id, counted_ms + LEASE_MS + SHORT_MS)
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
        await assert_due(backend, "unwatched", left.id, run.id)


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
        await assert_due(backend, "unwatched", other.id)
        await backend.broker.remove(ended.id)
        assert await _watchers(backend, "run_unknown") == [0, 0]
