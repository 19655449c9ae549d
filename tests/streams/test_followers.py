"""Following runs from the host's own code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import pytest

from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.core.errors import RunNotFound, StreamGap, UsageError
from asgi_realtime.core.run_record import RunRecord
from asgi_realtime.core.runs import Status, StoredRecord
from asgi_realtime.streams.followers import StreamChunk
from tests.faults import RemoteBroker, make, steps, take, until
from tests.inprocess import GUARD_S
from tests.streams.reading import broker_for, cancelled_after, numbers, where

pytestmark = pytest.mark.anyio


class CountingBroker(RemoteBroker):
    """Counts the records that it returns."""

    loaded = 0

    async def load(self, run_ids: Sequence[str]) -> list[StoredRecord | None]:
        self.loaded += len(run_ids)
        return await super().load(run_ids)


@where
async def test_a_run_is_followed_from_its_current_state_to_its_end(where: str) -> None:
    async with make(**broker_for(where)) as realtime:
        got: list[RunRecord] = []
        with anyio.fail_after(GUARD_S):
            async with anyio.create_task_group() as group:
                async with realtime.open_run("report") as run:
                    group.start_soon(take, realtime.subscribe_to_run(run), got)
                    await until(lambda: len(got) == 1)
                    run.metadata.set("progress", 1)
                    await run.metadata.flush()
                    await until(lambda: len(got) == 2)
        assert [record.status for record in got] == [Status.EXECUTING, Status.EXECUTING, Status.COMPLETED]
        assert got[1].metadata == {"progress": 1}
        assert [record.status async for record in realtime.subscribe_to_run(run)] == [Status.COMPLETED]


@pytest.mark.parametrize("with_streams", [False, True])
async def test_a_follower_can_continue_after_the_end(with_streams: bool) -> None:
    async with make() as realtime:
        async with realtime.open_run("report") as run:
            pass
        states = realtime.subscribe_to_run(run, stop_on_completion=False, with_streams=with_streams)  # type: ignore[call-overload]
        assert (await anext(states)).status is Status.COMPLETED
        with anyio.move_on_after(0.01) as scope:
            await anext(states)
        assert scope.cancelled_caught


@where
async def test_a_cancelled_follower_loses_no_state_at_any_step(where: str) -> None:
    """The cursor used to move before the record was loaded, so a cancelled `anext` lost a change."""
    for turns in range(100):
        async with make(**broker_for(where)) as realtime:
            async with realtime.open_run("report") as run:
                pass
            for states in (realtime.subscribe_to_run(run), realtime.subscribe_to_run(run, with_streams=True)):
                got: list[Any] = []
                await cancelled_after(turns, states, got)
                ended = bool(got)
                with anyio.fail_after(GUARD_S):
                    await take(states, got)
                assert [record.status for record in got] == [Status.COMPLETED], turns
        if ended:
            return
    raise AssertionError("it never got there")


@where
async def test_with_streams_the_terminal_record_comes_after_the_last_chunk(where: str) -> None:
    async with make(**broker_for(where)) as realtime:
        got: list[RunRecord | StreamChunk] = []
        with anyio.fail_after(GUARD_S):
            async with anyio.create_task_group() as group:
                async with realtime.open_run("report") as run:
                    group.start_soon(take, realtime.subscribe_to_run(run, with_streams=True), got)
                    realtime.pipe(numbers(600), "a")
                    realtime.pipe(numbers(3), "b")
        assert isinstance(got[0], RunRecord) and got[0].status is Status.EXECUTING
        assert isinstance(got[-1], RunRecord) and got[-1].status is Status.COMPLETED
        chunks = [item for item in got if isinstance(item, StreamChunk)]
        for name, count in (("a", 600), ("b", 3)):
            mine = [chunk for chunk in chunks if chunk.stream == name]
            assert [chunk.index for chunk in mine] == [chunk.chunk for chunk in mine] == list(range(count))


async def test_with_streams_a_finished_run_yields_its_chunks_and_then_its_end() -> None:
    async with make() as realtime:
        async with realtime.open_run("report") as run:
            await realtime.append("one")
        got = [item async for item in realtime.subscribe_to_run(run, with_streams=True)]
        assert got[0] == StreamChunk("default", 0, "one")
        assert isinstance(got[1], RunRecord) and got[1].status is Status.COMPLETED
        assert len(got) == 2


async def test_with_streams_the_end_waits_for_a_slower_log() -> None:
    """A remote broker can announce the end of a run before its last chunks arrive."""
    broker = RemoteBroker()
    async with make(broker=broker) as realtime:
        async with realtime.open_run("report") as run:
            await realtime.append("one")
        live = broker.inner._runs[run.id].streams["default"]
        end, live.log.end = live.log.end, None
        items = realtime.subscribe_to_run(run, with_streams=True)
        assert isinstance(await anext(items), StreamChunk)
        with anyio.move_on_after(0.05) as scope:
            await anext(items)
        assert scope.cancelled_caught
        live.log.end = end
        assert isinstance(await anext(items), RunRecord)


async def test_with_streams_a_change_during_the_join_of_a_stream_is_not_missed() -> None:
    """The follower used to start waiting after it had joined the streams, and missed an end in between."""
    broker = RemoteBroker()
    async with make(broker=broker) as realtime:
        joined = anyio.Event()
        go = anyio.Event()

        async def before_live() -> None:
            joined.set()
            await go.wait()

        got: list[RunRecord | StreamChunk] = []
        with anyio.fail_after(GUARD_S):
            async with anyio.create_task_group() as group:
                async with realtime.open_run("report") as run:
                    await realtime.append("one")
                    items = realtime.subscribe_to_run(run, with_streams=True)
                    got.append(await anext(items))
                    got.append(await anext(items))
                    broker.before_live = before_live
                    group.start_soon(take, items, got)
                    await joined.wait()
                go.set()
        assert [type(item) for item in got] == [RunRecord, StreamChunk, RunRecord]


async def test_with_streams_a_gap_is_raised() -> None:
    async with make(retention=Retention(stream_bytes=200)) as realtime:
        async with realtime.open_run("report") as run:
            await realtime.pipe(numbers(100)).wait_until_complete()
        with pytest.raises(StreamGap):
            await anext(realtime.subscribe_to_run(run, with_streams=True))


async def test_runs_are_followed_by_all_of_their_tags() -> None:
    async with make() as realtime:
        async with realtime.open_run("first", tags=["a", "b"]), realtime.open_run("other", tags=["a"]):
            runs = realtime.subscribe_to_runs_with_tag(["b", "a"])
            assert (await anext(runs)).task == "first"
            async with realtime.open_run("second", tags=["b", "a", "c"]):
                assert (await anext(runs)).task == "second"
        with pytest.raises(UsageError, match="tags are empty"):
            realtime.subscribe_to_runs_with_tag([])


async def test_older_runs_are_left_out() -> None:
    now = 1_000_000.0
    async with make(clock=lambda: now) as realtime:
        async with realtime.open_run("old", tags=["a"]):
            pass
        now += 100
        async with realtime.open_run("new", tags=["a"]):
            runs = realtime.subscribe_to_runs_with_tag("a", created_within="90s")
            assert (await anext(runs)).task == "new"


async def test_a_batch_ends_with_its_last_run() -> None:
    async with make() as realtime:

        @realtime.task("double")
        async def double(payload: int) -> int:
            return 2 * payload

        batch = await realtime.batch_trigger([(double, 1), (double, 2)])
        with anyio.fail_after(GUARD_S):
            records = [record async for record in realtime.subscribe_to_batch(batch)]
            again = [record async for record in realtime.subscribe_to_batch(batch.id)]
        assert {record.id for record in records} == set(batch.runs)
        assert [record.status for record in again] == [Status.COMPLETED] * 2


async def test_followers_of_a_removed_run_raise() -> None:
    """A run that a full broker evicted was removed silently: its followers and `result()` waited forever."""
    async with make() as realtime:
        failures: list[str] = []

        async def expect_no_run(name: str, wait: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(RunNotFound):
                await wait()
            failures.append(name)

        with anyio.fail_after(GUARD_S):
            async with anyio.create_task_group() as group:
                handle = realtime.pipe(numbers(3)).handle
                await realtime.result(handle)
                follower = realtime.subscribe_to_run(handle, stop_on_completion=False)
                with_streams = realtime.subscribe_to_run(handle, stop_on_completion=False, with_streams=True)
                assert (await anext(follower)).is_completed
                while not (isinstance(seen := await anext(with_streams), RunRecord) and seen.is_completed):
                    pass
                group.start_soon(expect_no_run, "follower", follower.__anext__)
                group.start_soon(expect_no_run, "with streams", with_streams.__anext__)
                await steps(20)
                await realtime.broker.remove(handle.id)
                await expect_no_run("result", handle.result)
        assert sorted(failures) == ["follower", "result", "with streams"]


async def test_removed_runs_of_a_batch_count_as_over() -> None:
    """A run that had expired never counted as over, so the batch never ended."""
    async with make() as realtime:
        go = anyio.Event()

        @realtime.task("wait")
        async def wait(payload: bool) -> None:
            if payload:
                await go.wait()

        batch = await realtime.batch_trigger([("wait", True), ("wait", False), ("wait", True)])
        with anyio.fail_after(GUARD_S):
            await realtime.result(batch.runs[1])
            await realtime.broker.remove(batch.runs[1])
            got: list[RunRecord] = []
            async with anyio.create_task_group() as group:
                group.start_soon(take, realtime.subscribe_to_batch(batch), got)
                await until(lambda: len(got) == 2)
                go.set()
        assert [record.is_completed for record in got].count(True) == 2
        with pytest.raises(RunNotFound, match="no batch 'batch_nope'"):
            await anext(realtime.subscribe_to_batch("batch_nope"))


async def test_a_feed_of_two_tags_includes_older_runs_of_the_first() -> None:
    """The newest runs of the first tag were filtered by the second, so older runs with both were missing."""
    async with make(limits=Limits(feed_runs=2)) as realtime:
        both = realtime.pipe([1], tags=["a", "b"]).run_id
        await realtime.result(both)
        for _ in range(3):
            await realtime.result(realtime.pipe([1], tags=["a"]).run_id)
        with anyio.fail_after(GUARD_S):
            assert (await anext(realtime.subscribe_to_runs_with_tag(["a", "b"]))).id == both


async def test_a_feed_starts_with_its_newest_runs() -> None:
    async with make(limits=Limits(feed_runs=2)) as realtime:
        runs = []
        for _ in range(4):
            runs.append(realtime.pipe([1], tags=["a"]).run_id)
            await realtime.result(runs[-1])
        feed = realtime.subscribe_to_runs_with_tag("a")
        with anyio.fail_after(GUARD_S):
            assert {(await anext(feed)).id, (await anext(feed)).id} == set(runs[2:])


async def test_chunks_load_no_record() -> None:
    """Each chunk of a followed run used to load the record twice, with its payload and output."""
    broker = CountingBroker()
    async with make(broker=broker, timeouts=Timeouts(tick=60)) as realtime, realtime.open_run("report") as run:
        await realtime.append(-1)
        items = realtime.subscribe_to_run(run, with_streams=True)
        assert isinstance(await anext(items), RunRecord)
        assert await anext(items) == StreamChunk("default", 0, -1)
        before = broker.loaded
        with anyio.fail_after(GUARD_S):
            for number in range(50):
                await realtime.append(number)
                assert await anext(items) == StreamChunk("default", number + 1, number)
        assert broker.loaded == before


async def test_each_change_of_a_run_loads_its_record_once() -> None:
    """Each change used to load the record three times."""
    broker = CountingBroker()
    async with make(broker=broker, timeouts=Timeouts(tick=60)) as realtime, realtime.open_run("report") as run:
        states = realtime.subscribe_to_run(run)
        await anext(states)
        for number in range(10):
            run.metadata.set("number", number)
            await run.metadata.flush()
            before = broker.loaded
            with anyio.fail_after(GUARD_S):
                assert (await anext(states)).metadata == {"number": number}
            assert broker.loaded == before + 1


async def test_a_change_of_a_batch_loads_the_changed_run_only() -> None:
    """Each change of one run used to load all open runs of its batch."""
    broker = CountingBroker()
    async with make(broker=broker, timeouts=Timeouts(tick=60)) as realtime:
        go = anyio.Event()

        @realtime.task("wait")
        async def wait(payload: int) -> None:
            await go.wait()

        batch = await realtime.batch_trigger([("wait", number) for number in range(10)])
        runs = realtime.subscribe_to_batch(batch)
        with anyio.fail_after(GUARD_S):
            await until(lambda: len(realtime.engine.executions) == 10)
            for _ in range(10):
                await anext(runs)
            execution = realtime.engine.executions[batch.runs[3]]
            execution.run.metadata.set("number", 1)
            await execution.run.metadata.flush()
            before = broker.loaded
            assert (await anext(runs)).id == batch.runs[3]
            assert broker.loaded == before + 1
            go.set()
            assert {record.id async for record in runs} == set(batch.runs)


async def test_the_first_runs_of_a_tag_load_no_more_than_they_need() -> None:
    """The snapshot used to load every run that the topic remembers."""
    broker = CountingBroker()
    async with make(broker=broker, limits=Limits(feed_runs=2)) as realtime:
        for _ in range(150):
            await realtime.result(realtime.pipe([1], tags=["a"]).run_id)
        before = broker.loaded
        await anext(realtime.subscribe_to_runs_with_tag("a"))
        assert broker.loaded <= before + 100
