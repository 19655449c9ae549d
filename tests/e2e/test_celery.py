"""Celery workers as in the guide: forked processes that acknowledge before the work or after it."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from asgi_realtime import Status
from tests.e2e.celery_app import make
from tests.e2e.stage import Stage, is_alive, staged, until

pytestmark = [pytest.mark.slow, pytest.mark.redis, pytest.mark.anyio]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


either_acknowledgement = pytest.mark.parametrize("stage", ["early", "late"], indirect=True)


@pytest.fixture
async def stage(request: pytest.FixtureRequest, redis_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    """A worker of two processes, which acknowledge early if the test does not ask for late."""
    late = getattr(request, "param", "early") == "late"
    async with staged(redis_url, tmp_path, lambda url, prefix: make(url, prefix, late=late)[0]) as stage:
        quickly = ("--without-gossip", "--without-mingle", "--without-heartbeat")
        command = ("celery", "-A", "tests.e2e.celery_app:celery", "worker", "--concurrency", "2", *quickly)
        stage.start(*command, environment={"LATE": "1"} if late else {})
        yield stage


@either_acknowledgement
async def test_a_worker_executes_with_full_context(stage: Stage) -> None:
    for number in range(3):  # each process of the worker, and one of them twice
        handle = await stage.realtime.trigger("context", {"count": 100}, tags=["user:1"])
        assert await stage.worker_of(handle) != os.getpid()
        await stage.realtime.send_input(handle, "first", number)
        assert await handle.result() == {"input": number, "user": True}
        assert await stage.chunks(handle) == list(range(100))
    in_thread = await stage.realtime.trigger("sync", 20)
    assert await in_thread.result() == 20
    assert await stage.chunks(in_thread) == list(range(20))


async def test_processes_of_one_worker_are_different_owners(stage: Stage) -> None:
    handles = [await stage.realtime.trigger("endless") for _ in range(2)]
    pids = {await stage.begun(handle) for handle in handles}
    owners = {(await stage.realtime.runs.get(handle.id)).owner for handle in handles}
    assert len(pids) == len(owners) == 2
    for handle in handles:
        await stage.realtime.cancel(handle)
        assert (await stage.ended(handle)).status is Status.CANCELED


async def test_a_cancellation_reaches_the_worker(stage: Stage) -> None:
    handle = await stage.realtime.trigger("endless")
    pid = await stage.begun(handle)
    await stage.realtime.cancel(handle)
    record = await stage.ended(handle)
    assert (record.status, record.metadata["cleaned"]) == (Status.CANCELED, True)
    assert (await stage.chunks(handle))[-1] == "last word"
    assert await (await stage.realtime.trigger("quick", 7)).result() == 7
    assert is_alive(pid)


async def test_the_soft_time_limit_of_a_task_cancels_the_run(stage: Stage) -> None:
    handle = await stage.realtime.trigger("limited")
    pid = await stage.worker_of(handle)
    assert (await stage.ended(handle)).status is Status.CANCELED
    assert await stage.chunks(handle) == ["begun"]
    assert await (await stage.realtime.trigger("quick", 7)).result() == 7
    assert is_alive(pid)


@either_acknowledgement
async def test_a_process_that_is_killed_leaves_a_crashed_run_that_is_not_executed_again(
    stage: Stage, request: pytest.FixtureRequest
) -> None:
    """With late acknowledgement Celery delivers the run again, to a process that finds it claimed."""
    handle = await stage.realtime.trigger("endless")
    pid = await stage.begun(handle)
    os.kill(pid, signal.SIGKILL)
    assert (await stage.ended(handle)).status is Status.CRASHED
    chunks = await stage.chunks(handle)
    assert chunks == list(range(len(chunks)))
    if request.node.callspec.params["stage"] == "late":
        await until(lambda: stage.deliveries(handle) == 2)
    assert await (await stage.realtime.trigger("quick", 7)).result() == 7
    assert stage.executions(handle) == 1
    assert await stage.chunks(handle) == chunks


async def test_a_process_that_was_paused_beyond_its_lease_is_fenced_off(stage: Stage) -> None:
    handle = await stage.realtime.trigger("endless")
    pid = await stage.begun(handle)
    os.kill(pid, signal.SIGSTOP)
    record = await stage.ended(handle)
    assert record.status is Status.CRASHED
    chunks = await stage.chunks(handle)
    os.kill(pid, signal.SIGCONT)
    await until(lambda: stage.note(handle))
    assert stage.note(handle) == "cancelled, refused"
    assert await stage.realtime.runs.get(handle.id) == record
    assert await stage.chunks(handle) == chunks
