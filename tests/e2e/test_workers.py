"""taskiq workers in separate processes, on a real Redis: they execute runs, and are canceled, killed and paused."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from asgi_realtime import RunCanceled, RunFailed, Status
from asgi_realtime.testing import Event, EventParser
from tests.e2e.stage import GUARD_S, ROOT, Stage, is_alive, staged, until
from tests.e2e.worker_app import SECRET, TIMEOUTS, make

pytestmark = [pytest.mark.slow, pytest.mark.redis, pytest.mark.anyio]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def stage(redis_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    async with staged(redis_url, tmp_path, lambda url, prefix: make(url, prefix).realtime) as stage:
        yield stage


async def test_a_worker_executes_with_full_context(stage: Stage) -> None:
    stage.start_worker()
    handle = await stage.realtime.trigger("context", {"count": 100}, tags=["user:1"])
    assert await stage.worker_of(handle) != os.getpid()
    await stage.realtime.send_input(handle, "first", {"go": 1})
    assert await handle.result() == {"input": {"go": 1}, "user": True}
    assert await stage.chunks(handle) == list(range(100))
    in_thread = await stage.realtime.trigger("sync", 20)
    assert await in_thread.result() == 20
    assert await stage.chunks(in_thread) == list(range(20))


def events_of(body: httpx.Response, parser: EventParser) -> Iterator[Event]:
    for data in body.iter_bytes():
        yield from parser.feed(data)


async def test_a_cancellation_over_http_reaches_the_worker(stage: Stage) -> None:
    stage.start_worker()
    web = stage.start_web()
    handle = await stage.realtime.trigger("endless")
    pid = await stage.begun(handle)

    def cancel_and_read() -> list[Event]:
        headers = {"authorization": f"Bearer {SECRET}"}
        with httpx.Client(base_url=web, headers=headers, timeout=GUARD_S) as client:
            with client.stream("GET", f"/realtime/v1/streams/{handle.id}/default") as stream:
                found = events_of(stream, EventParser())
                events = [next(found)]
                assert client.post(f"/realtime/api/v2/runs/{handle.id}/cancel").status_code == 200
                return [*events, *found]

    events = await anyio.to_thread.run_sync(cancel_and_read)
    record = await stage.ended(handle)
    assert (record.status, record.metadata["cleaned"]) == (Status.CANCELED, True)
    assert stage.note(handle) == "cancelled"
    chunks = await stage.chunks(handle)
    assert chunks[:-1] == list(range(len(chunks) - 1)) and chunks[-1] == "last word"
    assert [json.loads(event.data) for event in events[:-1]] == chunks
    assert (events[-1].event, json.loads(events[-1].data)["reason"]) == ("end", "canceled")
    assert await (await stage.realtime.trigger("quick", 7)).result() == 7
    assert is_alive(pid)


async def test_a_worker_that_is_killed_leaves_a_crashed_run(stage: Stage) -> None:
    stage.start_worker()
    web = stage.start_web()
    handle = await stage.realtime.trigger("endless")
    pid = await stage.begun(handle)

    def kill_and_read() -> list[Event]:
        headers = {"authorization": f"Bearer {SECRET}"}
        url = f"{web}/realtime/v1/streams/{handle.id}/default"
        with httpx.stream("GET", url, headers=headers, timeout=GUARD_S) as stream:
            found = events_of(stream, EventParser())
            events = [next(found)]
            os.kill(pid, signal.SIGKILL)
            return [*events, *found]

    events = await anyio.to_thread.run_sync(kill_and_read)
    record = await stage.ended(handle)
    assert record.status is Status.CRASHED
    chunks = await stage.chunks(handle)
    assert chunks == list(range(len(chunks)))
    assert [json.loads(event.data) for event in events[:-1]] == chunks
    assert (events[-1].event, json.loads(events[-1].data)["reason"]) == ("end", "crashed")
    with pytest.raises(RunFailed):
        await handle.result()
    assert await (await stage.realtime.trigger("quick", 7)).result() == 7  # taskiq has started another worker
    assert stage.executions(handle) == 1


async def test_a_run_that_nobody_reads_in_any_web_process_is_canceled(stage: Stage) -> None:
    """The last reader is in a web process that is killed."""
    stage.start_worker()
    (first, _), (second, killed) = (stage.start_web_process() for _ in range(2))
    handle = await stage.realtime.trigger("endless", on_unwatched="cancel", unwatched_grace=1)
    await stage.begun(handle)

    async def are_counted(readers: int) -> None:
        while await stage.realtime.broker.watchers(handle.id) != readers:  # noqa: ASYNC110 - of other processes
            await anyio.sleep(0.02)

    @asynccontextmanager
    async def reading(web: str) -> AsyncIterator[None]:
        headers = {"authorization": f"Bearer {SECRET}"}
        async with httpx.AsyncClient(base_url=web, headers=headers, timeout=GUARD_S) as client:
            async with client.stream("GET", f"/realtime/v1/streams/{handle.id}/default") as stream:
                assert stream.status_code == 200
                yield

    async with reading(second):
        async with reading(first):
            await are_counted(2)
        await are_counted(1)
        killed.kill()
    assert not (await stage.realtime.get_run(handle)).is_completed
    assert (await stage.ended(handle)).status is Status.CANCELED
    assert stage.note(handle) == "cancelled"


async def test_a_worker_paused_beyond_its_lease_cannot_write(stage: Stage) -> None:
    stage.start_worker()
    handle = await stage.realtime.trigger("endless")
    pid = await stage.begun(handle)
    os.kill(pid, signal.SIGSTOP)
    record = await stage.ended(handle)
    assert record.status is Status.CRASHED
    chunks = await stage.chunks(handle)
    os.kill(pid, signal.SIGCONT)
    await until(lambda: stage.note(handle))
    assert stage.note(handle) == "cancelled, refused"
    after = await stage.realtime.trigger("context", {"count": 1})
    assert await stage.worker_of(after) == pid  # it continues with other runs
    await stage.realtime.send_input(after, "first", 1)
    await after.result()
    assert await stage.realtime.runs.get(handle.id) == record
    assert await stage.chunks(handle) == chunks


async def test_a_loop_blocked_beyond_the_lease_does_not_crash_the_run(stage: Stage) -> None:
    stage.start_worker()
    blocking = await stage.realtime.trigger("blocking", 2 * TIMEOUTS.lease)
    assert await blocking.result() > 0


async def test_a_redelivered_run_executes_once(stage: Stage) -> None:
    """After 0.2 s without acknowledgment the queue delivers the message to another worker, although the run still
    executes. That worker finds the run claimed, and acknowledges."""
    stage.start_worker(workers=2)
    handle = await stage.realtime.trigger("patient")

    await until(lambda: stage.executions(handle))
    while stage.pending():
        await (await stage.realtime.trigger("quick", 7)).result()  # makes the workers check for pending messages
    assert (await stage.realtime.get_run(handle)).status is Status.EXECUTING
    await stage.realtime.send_input(handle, "enough", True)
    assert await handle.result() is True
    assert stage.executions(handle) == 1


async def test_a_process_that_dies_before_enqueueing_a_stored_run_loses_nothing(stage: Stage) -> None:
    program = f"""
import asyncio, os
from tests.e2e.worker_app import make

class Dies:
    async def enqueue(self, run_id, task_id):
        print(run_id, flush=True)
        os._exit(9)

async def main():
    realtime = make({stage.url!r}, {stage.prefix!r}, executor=Dies()).realtime
    async with realtime:
        await realtime.trigger("quick", 7)

asyncio.run(main())
"""
    done = await anyio.run_process([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == 9, done.stderr
    run_id = done.stdout.decode().strip()
    assert (await stage.realtime.get_run(run_id)).status is Status.QUEUED
    stage.start_worker()
    assert await stage.realtime.result(run_id) == 7


async def test_a_stopping_worker_fails_the_runs_it_cannot_finish(stage: Stage) -> None:
    worker = stage.start_worker("--wait-tasks-timeout", "0.2")
    handle = await stage.realtime.trigger("endless")
    await stage.begun(handle)
    worker.send_signal(signal.SIGTERM)
    record = await stage.ended(handle)
    assert record.error is not None
    assert (record.status, record.error.name) == (Status.FAILED, "ServerShutdown")
    assert (await stage.chunks(handle))[-1] == "last word"
    await until(lambda: worker.poll() is not None)
    waiting = await stage.realtime.trigger("quick", 7)  # for the next worker
    stage.start_worker()
    assert await waiting.result() == 7


async def test_the_queue_survives_the_id_of_an_expired_run(stage: Stage) -> None:
    stage.start_worker()
    executor: Any = stage.realtime.engine.dispatcher.executor
    await executor.enqueue("run_unknown", "quick")
    assert await (await stage.realtime.trigger("quick", 7)).result() == 7
    await until(lambda: not stage.pending())


async def test_a_web_process_can_cancel_a_run_in_another(stage: Stage) -> None:
    async def numbers() -> AsyncIterator[int]:
        for number in range(1_000_000):
            yield number
            await anyio.sleep(0.01)

    async with make(stage.url, stage.prefix).realtime as other:
        with pytest.raises(RunCanceled):
            async with stage.realtime.open_run("open") as run:
                await stage.realtime.append("kept")
                await other.cancel(run.id)
                await anyio.sleep_forever()
        assert (await other.runs.ended(run.id)).status is Status.CANCELED
        assert await stage.chunks(run) == ["kept"]

        pipe = stage.realtime.pipe(numbers())
        await until(lambda: pipe.result.chunks > 3)
        await other.cancel(pipe.handle)
        assert (await stage.ended(pipe.handle)).status is Status.CANCELED
        assert await stage.chunks(pipe.handle) == list(range(pipe.result.chunks))
        await until(lambda: not stage.realtime.engine.executions)
