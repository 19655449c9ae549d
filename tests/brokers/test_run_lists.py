"""Lists of runs in Redis, for the inspector, beyond what the conformance suite tests."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import pytest

from asgi_realtime import Realtime, Retention, TaskError, Timeouts
from asgi_realtime.brokers.base import RunLists
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.brokers.redis import RedisBroker
from tests.inprocess import ended, make_realtime

pytestmark = [pytest.mark.anyio, pytest.mark.redis]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def broker(redis_url: str, anyio_backend: str) -> AsyncIterator[RedisBroker]:
    async with RedisBroker(redis_url, prefix=f"t{secrets.token_hex(4)}", retention=Retention(after_end=5)) as broker:
        yield broker


def test_brokers_have_lists_if_they_are_shared() -> None:
    assert isinstance(RedisBroker("redis://localhost"), RunLists)
    assert not isinstance(MemoryBroker(), RunLists)


async def test_a_list_expires(broker: RedisBroker) -> None:
    await broker.note_runs("recent", [("run_1", 1, 1, b"1")], size=3)
    for key in broker._keys.run_list("recent"):
        assert 0 < await broker._open.servers.call(key, "PTTL", key) <= 5000


async def test_processes_list_the_runs_of_each_other_until_their_end(redis_url: str) -> None:
    prefix = f"t{secrets.token_hex(4)}"

    def process() -> Realtime:
        rare = Timeouts(tick=60, drain=1)  # between its start and its stop, nothing is stored
        return make_realtime(broker=RedisBroker(redis_url, prefix=prefix), inspector=True, timeouts=rare)

    async with process() as looking:
        async with process() as working:

            @working.task("fails")
            async def fails() -> None:
                raise TaskError("no luck")

            handle = await working.trigger(fails, tags="user:1")
            await ended(working, handle)
            async with working.open_run("cut") as run:
                pass
        assert looking.recent is not None
        listed = {run.id: run for run in await looking.recent.newest()}
        assert (listed[handle.id].status, listed[handle.id].error) == ("FAILED", "TaskError")
        assert listed[run.id].status == "COMPLETED", "a stop stores how the last runs ended"
