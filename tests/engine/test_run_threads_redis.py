"""Threads on Redis, on one server and on a Cluster, where the claim of a thread and its runs are on different nodes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

import pytest

from asgi_realtime import Realtime, Run, RunCanceled, RunHandle, Status, ThreadBusy, Timeouts
from asgi_realtime.brokers.redis import RedisBroker
from tests.faults import SECRET

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

Make = Callable[[], Realtime]
TIMEOUTS = Timeouts(tick=0.05, drain=0.05)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["redis", pytest.param("cluster", marks=pytest.mark.cluster)])
def make(request: pytest.FixtureRequest) -> Make:
    """Creates the `Realtime` of one process."""
    is_cluster = request.param == "cluster"
    url = request.getfixturevalue("redis_cluster").url if is_cluster else request.getfixturevalue("redis_url")
    prefix = f"t{secrets.token_hex(4)}"

    def made() -> Realtime:
        broker = RedisBroker(url, prefix=prefix, timeouts=TIMEOUTS)
        realtime = Realtime(secret_key=SECRET, signals=False, broker=broker, timeouts=TIMEOUTS)

        @realtime.task("answer")
        async def answer(payload: Any, run: Run) -> Any:
            return await run.input("finish").get()

        return realtime

    return made


async def test_of_runs_that_start_at_once_one_is_accepted(make: Make) -> None:
    async with make() as ours, make() as theirs:
        for thread in ("chat:1", "größe {x}"):
            attempts = ((ours, theirs)[n % 2].trigger("answer", thread=thread) for n in range(30))
            results = await asyncio.gather(*attempts, return_exceptions=True)
            (accepted,) = [result for result in results if isinstance(result, RunHandle)]
            assert [busy.run_id for busy in results if isinstance(busy, ThreadBusy)] == [accepted.id] * 29
            active = await theirs.active_run(thread)
            assert active is not None and active.id == accepted.id


async def test_of_runs_that_replace_each_other_at_once_one_stays(make: Make) -> None:
    async with make() as ours, make() as theirs:
        handles = await asyncio.gather(
            *((ours, theirs)[n % 2].trigger("answer", thread="chat:1", on_conflict="replace") for n in range(20))
        )
        active = await ours.active_run("chat:1")
        assert active is not None
        replaced = [handle for handle in handles if handle.id != active.id]
        assert len(replaced) == 19
        for handle in replaced:
            assert (await theirs.runs.ended(handle.id)).status is Status.CANCELED
        assert not (await theirs.get_run(active)).is_completed


async def test_a_run_is_replaced_from_another_process(make: Make) -> None:
    async with make() as ours, make() as theirs:
        with pytest.raises(RunCanceled):
            async with ours.open_run("r", thread="chat:1") as run:
                await ours.append("a word")
                replacing = asyncio.ensure_future(theirs.trigger("answer", thread="chat:1", on_conflict="replace"))
                await asyncio.Event().wait()
        successor = await replacing  # not in the run: that can be canceled before the call returns
        record = await theirs.get_run(run)
        assert (record.status, record.thread) == (Status.CANCELED, "chat:1")
        active = await ours.active_run("chat:1")
        assert active is not None and active.id == successor.id


async def test_the_thread_is_free_when_a_reader_in_another_process_sees_the_end(make: Make) -> None:
    async with make() as ours, make() as theirs:
        for number in range(20):
            pipe = ours.pipe(range(number), thread="chat:1")
            await pipe.wait_until_started()
            assert [chunk async for chunk in theirs.read(pipe.run_id)] == list(range(number))
            assert await theirs.active_run("chat:1") is None
            assert await ours.active_run("chat:1") is None


async def test_a_removed_run_leaves_nothing_of_its_thread(make: Make) -> None:
    async with make() as realtime:
        async with realtime.open_run("r", thread="chat:1") as run:
            pass
        assert await realtime.broker.claimed("thread:chat:1") == run.id
        await realtime.broker.remove(run.id)
        assert await realtime.broker.claimed("thread:chat:1") is None
