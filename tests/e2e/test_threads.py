"""Threads that two real processes share, on Redis: they start runs at once, and one of them is killed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from asgi_realtime import Status, ThreadBusy
from tests.e2e.stage import Stage, staged, until
from tests.e2e.thread_racer import PROCESSES, make

pytestmark = [pytest.mark.slow, pytest.mark.redis, pytest.mark.anyio]

ROUNDS = 30


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def stage(redis_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    async with staged(redis_url, tmp_path, make) as stage:
        yield stage


async def race(stage: Stage, on_conflict: str, rounds: int) -> None:
    for _ in range(PROCESSES):
        stage.start("tests.e2e.thread_racer", on_conflict, str(rounds))
    await until(lambda: stage.client.get(f"{stage.prefix}:done") == b"%d" % PROCESSES)


def listed(stage: Stage, name: str, number: int) -> list[str]:
    return [run_id.decode() for run_id in stage.client.lrange(f"{stage.prefix}:{name}:{number}", 0, -1)]  # type: ignore[union-attr]


async def active(stage: Stage, number: int) -> str:
    handle = await stage.realtime.active_run(f"chat:{number}")
    assert handle is not None
    return handle.id


async def test_of_two_processes_that_start_a_run_at_once_one_is_rejected(stage: Stage) -> None:
    await race(stage, "reject", ROUNDS)
    for number in range(ROUNDS):
        accepted = listed(stage, "accepted", number)
        assert accepted == [await active(stage, number)]
        assert listed(stage, "rejected", number) == accepted


async def test_of_two_processes_that_replace_at_once_one_has_the_active_run(stage: Stage) -> None:
    await race(stage, "replace", ROUNDS)
    for number in range(ROUNDS):
        assert listed(stage, "rejected", number) == []
        (replaced,) = {*listed(stage, "accepted", number)} - {await active(stage, number)}
        assert (await stage.realtime.runs.ended(replaced)).status is Status.CANCELED


async def test_the_runs_of_a_killed_process_block_their_threads_for_a_lease_at_most(stage: Stage) -> None:
    with stage.running("tests.e2e.thread_racer", "reject", "2") as killed:
        stage.client.set(f"{stage.prefix}:ready:0", 1)
        stage.client.set(f"{stage.prefix}:ready:1", 1)
        await until(lambda: stage.client.get(f"{stage.prefix}:done"))
        first, second = [await active(stage, number) for number in (0, 1)]
        async for chunk in stage.realtime.read(second):
            assert chunk == "a word"
            break
        killed.kill()
    with pytest.raises(ThreadBusy) as caught:
        await stage.realtime.trigger("wait", thread="chat:0")
    assert caught.value.run_id == first
    successor = await stage.realtime.trigger("wait", thread="chat:1", on_conflict="replace")
    assert await active(stage, 1) == successor.id, "replacing does not wait for the lease"
    assert (await stage.realtime.runs.ended(first)).status is Status.CRASHED
    assert await stage.realtime.active_run("chat:0") is None
    await stage.realtime.trigger("wait", thread="chat:0")
    assert (await stage.realtime.runs.ended(second)).is_completed
