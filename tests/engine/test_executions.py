from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from asgi_realtime import BrokerUnavailable, Run
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.runs import StoredRecord
from tests.inprocess import GUARD_S, make_realtime

pytestmark = pytest.mark.anyio


class FailsOnce(MemoryBroker):
    """Fails the next load of exactly these runs."""

    failing: list[str] | None = None

    async def load(self, run_ids: Sequence[str]) -> list[StoredRecord | None]:
        if list(run_ids) == self.failing:
            self.failing = None
            raise BrokerUnavailable("no answer")
        return await super().load(run_ids)


async def test_a_run_executes_although_its_parent_cannot_be_loaded_at_first() -> None:
    """The run had become EXECUTING and nothing executed it, so it ended CRASHED when its lease expired."""
    broker = FailsOnce()
    realtime = make_realtime(broker=broker)

    @realtime.task("child")
    async def child(run: Run) -> bool:
        return run.parent is not None

    async with realtime, realtime.open_run("parent") as parent:
        broker.failing = [parent.id]
        handle = await realtime.trigger(child)
        with anyio.fail_after(GUARD_S):
            assert await handle.result() is True
        assert broker.failing is None


async def test_a_run_without_a_parent_loads_no_other_run() -> None:
    class Counting(MemoryBroker):
        loads = 0

        async def load(self, run_ids: Sequence[str]) -> list[StoredRecord | None]:
            self.loads += 1
            return await super().load(run_ids)

    broker = Counting()
    async with make_realtime(broker=broker) as realtime:
        async with realtime.open_run("r"):
            assert broker.loads == 0
