"""Several processes on one Redis: `Realtime` objects that share nothing but the server."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Any

import anyio
import pytest

from asgi_realtime import (
    InvalidPayload,
    Realtime,
    RunExists,
    RunHandle,
    RunRecord,
    Status,
    StreamChunk,
    Timeouts,
    current_run,
)
from asgi_realtime.brokers.redis import RedisBroker
from asgi_realtime.testing import AsgiClient
from tests.faults import SECRET
from tests.inprocess import GUARD_S, until

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

Make = Callable[[], Realtime]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def make(redis_url: str) -> Make:
    """Creates the `Realtime` of one process."""
    prefix = f"t{secrets.token_hex(4)}"
    timeouts = Timeouts(tick=0.05)

    def made() -> Realtime:
        broker = RedisBroker(redis_url, prefix=prefix, timeouts=timeouts)
        return Realtime(secret_key=SECRET, signals=False, broker=broker, timeouts=timeouts)

    return made


async def test_many_producers_into_one_stream_interleave_by_append_order(make: Make) -> None:
    async with make() as ours, make() as theirs, AsyncExitStack() as leaving:
        run = await leaving.enter_async_context(ours.open_run("r"))
        readers = [asyncio.ensure_future(collect(process, run.id)) for process in (ours, theirs)]

        async def source(name: str) -> AsyncIterator[list[Any]]:
            for number in range(100):
                yield [name, number]
                await asyncio.sleep(0)

        pipes = [
            process.pipe(source(f"{place}{n}"), run=run.id) for place, process in both(ours, theirs) for n in "123"
        ]
        results = [await pipe.wait_until_complete() for pipe in pipes]
        assert [result.chunks for result in results] == [100] * 6
        assert max(result.last_index or 0 for result in results) == 599
        await leaving.aclose()
        first, second = await asyncio.gather(*readers)
    assert first == second, "all readers see one order"
    assert len(first) == 600
    for pipe in {name for name, _ in first}:
        assert [number for name, number in first if name == pipe] == list(range(100))


async def test_an_id_that_the_host_chooses_is_for_one_run_in_all_processes(make: Make) -> None:
    async with make() as ours, make() as theirs:
        for process in (ours, theirs):

            @process.task("quick")
            async def quick() -> None:
                pass

        async with ours.open_run("r", run_id="42"):
            with pytest.raises(RunExists):
                await theirs.trigger("quick", run_id="42")
        with pytest.raises(RunExists):
            await theirs.pipe(["a"], run_id="42").wait_until_started()
        with pytest.raises(RunExists):
            async with theirs.open_run("r", run_id="42"):
                pass
        assert (await theirs.get_run("42")).status is Status.COMPLETED


def both(ours: Realtime, theirs: Realtime) -> list[tuple[str, Realtime]]:
    return [("ours ", ours), ("theirs ", theirs)]


async def collect(realtime: Realtime, run_id: str) -> list[Any]:
    return [chunk async for chunk in realtime.read(run_id)]


async def test_a_run_that_several_processes_change_at_once_loses_no_operation(make: Make) -> None:
    async with make() as ours, make() as theirs, make() as others:

        @ours.task("parent")
        async def parent() -> None:
            await done.wait()

        done = asyncio.Event()
        handle = await ours.trigger(parent)

        async def child(process: Realtime, name: str) -> None:
            @process.task(name)
            async def count() -> None:
                above = current_run().parent
                assert above is not None
                for number in range(40):
                    above.metadata.increment("count", 1)
                    above.metadata.append("by", f"{name}{number}")
                    if number % 10 == 0:
                        await above.metadata.flush()

            await (await process.trigger(count, parent=handle.id)).result(timeout=GUARD_S)

        await asyncio.gather(*(child(p, name) for p, name in ((ours, "a"), (theirs, "b"), (others, "c"))))
        record = await theirs.get_run(handle)
        done.set()
        await handle.result(timeout=GUARD_S)
        assert record.metadata["count"] == 120
        counted = Counter(record.metadata["by"])
        assert len(counted) == 120
        assert set(counted.values()) == {1}
        for name in "abc":
            own = [entry for entry in record.metadata["by"] if entry.startswith(name)]
            assert own == [f"{name}{number}" for number in range(40)]


async def test_an_idempotency_key_creates_one_run_however_many_requests_use_it(make: Make) -> None:
    async with make() as ours, make() as theirs:
        ran: list[str] = []
        for process in (ours, theirs):

            @process.task("t")
            async def task(payload: int) -> int:
                ran.append(current_run().id)
                return payload

        handles = await asyncio.gather(
            *((ours, theirs)[n % 2].trigger("t", 1, idempotency_key="one") for n in range(60))
        )
        assert len({handle.id for handle in handles}) == 1
        assert sum(not handle.is_cached for handle in handles) == 1
        assert await ours.result(handles[0].id, timeout=GUARD_S) == 1
        assert ran == [handles[0].id]
        with pytest.raises(InvalidPayload):
            await ours.trigger("t", "not a number", idempotency_key="one")


async def test_one_of_many_concurrent_claims_wins(make: Make) -> None:
    """One-time tokens rely on this."""
    async with make() as ours, make() as theirs:
        claims = ((ours, theirs)[n % 2].runs.claim("token", f"run {n}", ttl_s=60) for n in range(100))
        assert len(set(await asyncio.gather(*claims))) == 1


async def test_a_subscriber_in_another_process_sees_the_last_chunk_before_the_end(make: Make) -> None:
    async with make() as ours, make() as theirs:

        @ours.task("t")
        async def task(count: int) -> str:
            ours.pipe(range(count), "one")
            await ours.append("last", "two")
            return "over"

        for count in (0, 1, 50, 700):
            handle = await ours.trigger(task, count)
            seen: list[RunRecord | StreamChunk] = []
            with anyio.fail_after(GUARD_S):
                seen.extend([item async for item in theirs.subscribe_to_run(handle.id, with_streams=True)])
            terminal = seen[-1]
            assert isinstance(terminal, RunRecord)
            assert terminal.status is Status.COMPLETED
            assert sum(isinstance(item, RunRecord) and item.is_completed for item in seen) == 1
            chunks = [item for item in seen if isinstance(item, StreamChunk)]
            assert [chunk.chunk for chunk in chunks if chunk.stream == "one"] == list(range(count))
            assert [chunk.chunk for chunk in chunks if chunk.stream == "two"] == ["last"]


async def test_versions_seen_by_another_process_only_increase(make: Make) -> None:
    async with make() as ours, make() as theirs:

        @ours.task("t")
        async def task() -> None:
            for number in range(30):
                current_run().metadata.set("n", number)
                await current_run().metadata.flush()

        handle = await ours.trigger(task, tags=["a"])
        versions = [record.version async for record in theirs.subscribe_to_run(handle.id)]
        assert all(earlier < later for earlier, later in pairwise(versions))
        assert (await anext(theirs.subscribe_to_runs_with_tag("a"))).status is Status.COMPLETED


async def test_a_run_gets_input_from_another_process(make: Make) -> None:
    async with make() as ours, make() as theirs:

        @ours.task("t")
        async def task() -> list[Any]:
            approval = current_run().input("approval")
            return [await approval.get(timeout=GUARD_S), await approval.get(timeout=GUARD_S)]

        handle = await ours.trigger(task)
        await theirs.send_input(handle.id, "approval", {"yes": True})
        await ours.send_input(handle.id, "approval", 2)
        assert await theirs.result(handle.id, timeout=GUARD_S) == [{"yes": True}, 2]


async def test_a_process_that_drains_loses_no_reader_of_any_process(make: Make) -> None:
    ours, theirs = make(), make()
    go = anyio.Event()

    async def source() -> AsyncIterator[int]:
        yield 0
        await go.wait()
        yield 1

    async def events(process: Realtime, run: RunHandle[Any], seen: list[str], **headers: str) -> None:
        headers = {"authorization": f"Bearer {run.public_access_token}", **headers}
        async with AsgiClient(process).stream(f"/v1/streams/{run.id}/default", headers=headers) as response:
            while not response.ended:
                seen.extend(
                    event.data if event.event == "message" else event.event for event in await response.read_events()
                )

    async with theirs:
        async with ours, anyio.create_task_group() as tasks:
            drained, other = ours.pipe(source()).handle, theirs.pipe(source()).handle
            of_ours: list[str] = []
            of_theirs: list[str] = []
            moved: list[str] = []
            tasks.start_soon(events, ours, drained, of_ours)
            tasks.start_soon(events, theirs, drained, of_theirs)
            tasks.start_soon(events, ours, other, moved)
            await until(lambda: of_ours and of_theirs and moved)
            ours.begin_shutdown()
            await until(lambda: "reconnect" in moved)
            go.set()
            await events(theirs, other, moved, **{"last-event-id": "0"})
    assert of_ours == of_theirs == ["0", "1", "end"]
    assert moved == ["0", "reconnect", "1", "end"]
