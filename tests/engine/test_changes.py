from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_realtime import BrokerUnavailable, Run, RunNotFound, Timeouts
from asgi_realtime.brokers.base import ChangeMark
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.engine import changes
from asgi_realtime.engine.changes import COALESCE_S
from asgi_realtime.engine.run import RelatedRun
from tests.brokers.backends import DistantBroker
from tests.inprocess import GUARD_S, ended, make_realtime, run_without_anyio, until

pytestmark = pytest.mark.anyio


class Counting(MemoryBroker):
    """Records every version that was committed."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: list[StoredRecord] = []

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        self.commits.append(record)
        return await super().commit(record, expect=expect, change=change, floors=floors)


class Away(MemoryBroker):
    """Unavailable while `away`."""

    away = False
    refused = 0

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        if self.away:
            self.refused += 1
            raise BrokerUnavailable("no answer")
        return await super().commit(record, expect=expect, change=change, floors=floors)


async def test_changes_are_stored_together_within_50_ms() -> None:
    broker = Counting()
    async with make_realtime(broker=broker) as realtime, realtime.open_run("r") as run:
        created = len(broker.commits)
        began = anyio.current_time()
        for number in range(100):
            run.metadata.set("n", number)
            run.metadata.increment("sum", number)
            run.tags.add("a", "b")
        assert len(broker.commits) == created
        await until(lambda: len(broker.commits) > created)
        assert anyio.current_time() - began >= COALESCE_S
        assert len(broker.commits) == created + 1
        record = await realtime.get_run(run)
        assert record.metadata == {"n": 99, "sum": 4950}
        assert record.tags == ("a", "b")
        run.metadata.set("n", 100)  # a later change is stored too
        await until(lambda: len(broker.commits) == created + 2)


async def test_the_end_stores_waiting_changes_in_the_same_version() -> None:
    broker = Counting()
    async with make_realtime(broker=broker) as realtime:
        async with realtime.open_run("r") as run:
            run.metadata.set("progress", 1)
            run.tags.add("late")
            run.set_output("done")
        assert [record.version for record in broker.commits] == [1, 2]
        last = broker.commits[-1]
        assert (last.metadata, last.tags, last.output) == ({"progress": 1}, ("late",), "done")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_changes_by_a_def_task_are_stored_while_it_executes(backend: str) -> None:
    """Under a server (unlike under anyio's runner) subscribers saw no change before the run had ended."""
    realtime = make_realtime()
    go = threading.Event()

    @realtime.task("t")
    def task(run: Run) -> None:
        run.metadata.set("progress", 0.5)
        run.tags.add("half")
        go.wait(GUARD_S)

    async def main() -> None:
        async with realtime:
            handle = await realtime.trigger(task)
            try:
                async for record in realtime.subscribe_to_run(handle):
                    assert not record.is_completed
                    if (record.metadata, record.tags) == ({"progress": 0.5}, ("half",)):
                        break
            finally:
                go.set()

    run_without_anyio(main, backend)


@pytest.mark.parametrize("make_broker", [MemoryBroker, DistantBroker])
async def test_nothing_is_lost_when_two_processes_change_the_metadata_of_one_run(
    make_broker: type[MemoryBroker],
) -> None:
    broker = make_broker()
    one = make_realtime(broker=broker)
    two = make_realtime(broker=broker)

    @two.task("child")
    async def child(run: Run) -> None:
        assert run.parent is not None
        for number in range(20):
            run.parent.metadata.increment("n")
            run.parent.metadata.append("list", number)
            await run.parent.metadata.flush()

    async with one, two:
        async with one.open_run("parent") as parent:
            handle = await two.trigger(child, parent=parent.id)
            for number in range(20, 40):
                parent.metadata.increment("n")
                parent.metadata.append("list", number)
                await parent.metadata.flush()
            await handle.result(timeout=GUARD_S)
        record = await ended(one, parent.id)
    assert record.metadata["n"] == 40
    assert sorted(record.metadata["list"]) == list(range(40))


async def test_the_end_waits_for_changes_that_are_being_stored() -> None:
    """A change that was being stored while the run ended came too late and was dropped."""
    broker = DistantBroker()
    async with make_realtime(broker=broker) as realtime:
        for _ in range(10):
            async with anyio.create_task_group() as group:
                async with realtime.open_run("r") as run:
                    run.metadata.set("first", 1)
                    group.start_soon(run.metadata.flush)
                    await until(lambda: not run.buffer.pending())
                    run.metadata.set("second", 2)
                assert (await ended(realtime, run.id)).metadata == {"first": 1, "second": 2}


async def test_changes_are_stored_in_order() -> None:
    """Two changes that were stored at once could swap their order."""
    broker = DistantBroker()
    async with make_realtime(broker=broker) as realtime, realtime.open_run("r") as run:
        async with anyio.create_task_group() as group:
            for number in range(20):
                run.metadata.set("n", number)
                group.start_soon(run.metadata.flush)
                await anyio.lowlevel.checkpoint()
        assert (await realtime.get_run(run)).metadata == {"n": 19}


async def test_a_cancelled_flush_takes_effect_once() -> None:
    """Changes that a cancelled flush had stored were stored again."""
    async with make_realtime(broker=DistantBroker()) as realtime, realtime.open_run("r") as run:
        for steps in range(12):
            run.metadata.increment("n")
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(run.metadata.flush)
                    for _ in range(steps):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
        await run.metadata.flush()
        assert (await realtime.get_run(run)).metadata == {"n": 12}


async def test_changes_wait_while_the_broker_is_unavailable() -> None:
    broker = Away()
    timeouts = Timeouts(tick=0.01, append=0.01, drain=0.02)
    async with make_realtime(broker=broker, timeouts=timeouts) as realtime, realtime.open_run("r") as run:
        broker.away = True
        run.metadata.set("n", 1)
        with pytest.raises(BrokerUnavailable):
            await run.metadata.flush()
        assert run.metadata.get("n") == 1
        run.metadata.set("m", 2)
        refused = broker.refused
        await until(lambda: broker.refused > refused + 1)  # it is retried without another call
        broker.away = False
        await until(lambda: not run.buffer.pending())
        assert (await realtime.get_run(run)).metadata == {"n": 1, "m": 2}


async def test_lost_changes_of_a_removed_run_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    realtime = make_realtime()
    async with realtime:
        async with realtime.open_run("r") as opened:
            pass
        supervisor = realtime.engine.begin()
        run = RelatedRun(await realtime.runs.get(opened.id), runs=realtime.runs, supervisor=supervisor)
        await realtime.broker.remove(run.id)
        run.metadata.set("n", 1)
        with pytest.raises(RunNotFound):
            await run.metadata.flush()
        await until(lambda: "metadata of run" in caplog.text)
    assert f"metadata of run {run.id} is lost" in caplog.text


@given(st.lists(st.lists(st.sampled_from(["n", "m", "flush", "yield"]), max_size=10), min_size=2, max_size=4))
@settings(max_examples=30, deadline=None)
def test_increments_and_appends_of_several_processes_add_up(scripts: list[list[str]]) -> None:
    broker = DistantBroker()

    async def process(parent_id: str, number: int, script: list[str]) -> None:
        realtime = make_realtime(broker=broker)

        @realtime.task("child")
        async def child(run: Run) -> None:
            assert run.parent is not None
            for step, name in enumerate(script):
                if name == "flush":
                    await run.parent.metadata.flush()
                elif name == "yield":
                    await anyio.lowlevel.checkpoint()
                else:
                    run.parent.metadata.increment(name)
                    run.parent.metadata.append("log", [number, step])

        async with realtime:
            await (await realtime.trigger(child, parent=parent_id)).result(timeout=GUARD_S)

    async def main() -> dict[str, Any]:
        async with make_realtime(broker=broker) as realtime, realtime.open_run("parent") as parent:
            async with anyio.create_task_group() as group:
                for number, script in enumerate(scripts):
                    group.start_soon(process, parent.id, number, script)
            return (await realtime.get_run(parent)).metadata

    metadata = anyio.run(main)
    done = [
        (number, step, name)
        for number, script in enumerate(scripts)
        for step, name in enumerate(script)
        if name in ("n", "m")
    ]
    for name in ("n", "m"):
        assert metadata.get(name, 0) == sum(one[2] == name for one in done)
    log = metadata.get("log", [])
    for number in range(len(scripts)):  # those of each process, in order
        assert [step for one, step in log if one == number] == [step for one, step, _ in done if one == number]


async def test_changes_during_an_outage_add_no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change started another job that retried until the broker was available: a thousand runs had 500,000."""
    monkeypatch.setattr(changes, "COALESCE_S", 0.001)
    broker = Away()
    timeouts = Timeouts(tick=0.01, append=1, drain=0.02)
    async with make_realtime(broker=broker, timeouts=timeouts) as realtime, realtime.open_run("r") as run:
        supervisor = realtime.engine.supervisor
        assert supervisor is not None
        await until(lambda: realtime.engine.executions._watches)
        before = supervisor.jobs
        broker.away = True
        for number in range(3):
            run.metadata.set("n", number)
            refused = broker.refused
            await until(lambda: broker.refused > refused)  # noqa: B023
            assert supervisor.jobs <= before + 1
        broker.away = False
        await until(lambda: not run.buffer.pending() and supervisor.jobs == before)
        assert (await realtime.get_run(run)).metadata == {"n": 2}
