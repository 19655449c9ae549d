"""Reading streams and following runs from the host's own code."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_realtime import Realtime
from asgi_realtime.brokers import MemoryBroker
from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.core.errors import RunNotFound, StreamGap, UsageError
from asgi_realtime.core.run_errors import RunCanceled, RunFailed
from asgi_realtime.core.runs import RunRecord, Status, run_topic
from asgi_realtime.streams.readers import StreamChunk
from tests.faults import RemoteBroker, make, others, steps, stored, take, until

pytestmark = pytest.mark.anyio


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


def broker_for(where: str) -> dict[str, Any]:
    return {"broker": RemoteBroker()} if where == "remote" else {}


where = pytest.mark.parametrize("where", ["memory", "remote"])


# Streams


@where
async def test_what_is_there_and_what_comes_until_the_run_completes(where: str) -> None:
    async with make(**broker_for(where)) as realtime:
        got: list[int] = []
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                async with realtime.open_run("report") as run:
                    await realtime.append(0)
                    group.start_soon(take, realtime.read(run), got)
                    await until(lambda: got == [0])
                    await realtime.append(1)
                    await until(lambda: got == [0, 1])
                    await realtime.append(2)
        assert got == [0, 1, 2]
        assert [chunk async for chunk in realtime.read(run)] == [0, 1, 2]


async def test_more_than_one_page_is_read() -> None:
    async with make() as realtime:
        pipe = realtime.pipe(range(1234))
        with anyio.fail_after(10):
            assert [chunk async for chunk in realtime.read(pipe.run_id)] == list(range(1234))


async def test_the_start_index_counts_from_zero() -> None:
    async with make() as realtime:
        async with realtime.open_run("report") as run:
            await realtime.pipe(numbers(5)).wait_until_complete()
        for start in range(7):
            assert [chunk async for chunk in realtime.read(run, start_index=start)] == list(range(5))[start:]


async def test_who_waits_when_a_run_is_removed_is_told() -> None:
    """A run that had to make room was forgotten in silence: its followers and `result()` waited for ever."""
    async with make() as realtime:
        failures: list[str] = []

        async def expect_no_run(name: str, wait: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(RunNotFound):
                await wait()
            failures.append(name)

        with anyio.fail_after(10):
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


async def test_a_batch_is_over_when_all_that_is_left_of_it_is_over() -> None:
    """A member that was past its retention never counted as over, so the batch never was."""
    async with make() as realtime:
        go = anyio.Event()

        @realtime.task("wait")
        async def wait(payload: bool) -> None:
            if payload:
                await go.wait()

        batch = await realtime.batch_trigger([("wait", True), ("wait", False), ("wait", True)])
        with anyio.fail_after(10):
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


async def test_a_reader_of_a_run_that_ended_and_was_removed_gets_its_end() -> None:
    """The run was removed before its reader had its turn, and all that it wrote seemed to have failed."""
    async with make() as realtime:
        got: list[int] = []
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                async with realtime.open_run("report") as run:
                    await realtime.append(0)
                    group.start_soon(take, realtime.read(run), got)
                    await until(lambda: got == [0])
                    await realtime.append(1)
                await realtime.broker.remove(run.id)
        assert got == [0, 1]


@pytest.mark.parametrize("index", [-1, 1.5, "3", True, None])
async def test_a_bad_start_index_is_refused_at_the_call(index: Any) -> None:
    async with make() as realtime:
        with pytest.raises(UsageError, match="start_index is .*; allowed are whole numbers from 0"):
            realtime.read("run_1", start_index=index)


async def test_a_start_beyond_the_end_waits() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        await realtime.append(0)
        reader = realtime.read(run, start_index=2)
        with anyio.move_on_after(0) as scope:
            await anext(reader)
        assert scope.cancelled_caught
        await realtime.append(1)
        await realtime.append(2)
        assert await anext(reader) == 2


async def test_chunks_past_their_retention_are_a_gap() -> None:
    async with make(retention=Retention(stream_bytes=200)) as realtime:
        async with realtime.open_run("report") as run:
            await realtime.pipe(numbers(100)).wait_until_complete()
        kept = await stored(realtime, run.id)
        reader = realtime.read(run)
        with pytest.raises(StreamGap, match="chunk 0 of stream 'default' is past its retention") as caught:
            await anext(reader)
        assert (caught.value.requested, caught.value.first) == (0, kept[0])
        assert [chunk async for chunk in reader] == kept, "it was told once; the reader could never go on"
        with_streams = realtime.subscribe_to_run(run, with_streams=True)
        with pytest.raises(StreamGap):
            await anext(with_streams)
        seen = [update async for update in with_streams]
        assert [update.chunk for update in seen if isinstance(update, StreamChunk)] == kept
        assert [chunk async for chunk in realtime.read(run, start_index=caught.value.first)] == kept


async def test_a_reader_that_falls_behind_its_retention_is_told() -> None:
    async with make(retention=Retention(stream_bytes=200)) as realtime, realtime.open_run("report") as run:
        await realtime.append(0)
        reader = realtime.read(run)
        assert await anext(reader) == 0
        await realtime.pipe(numbers(100)).wait_until_complete()
        with pytest.raises(StreamGap) as caught:
            await anext(reader)
        assert caught.value.requested == 1


async def test_silence_beyond_the_timeout_is_raised_and_reading_can_go_on() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        reader = realtime.read(run, timeout=0.01)
        with pytest.raises(TimeoutError):
            await anext(reader)
        await realtime.append("later")
        assert await anext(reader) == "later"


async def test_a_bad_timeout_is_refused_at_the_call() -> None:
    async with make() as realtime:
        with pytest.raises(UsageError, match="timeout is"):
            realtime.read("run_1", timeout="soon")


async def test_a_failed_run_is_raised_after_the_last_chunk() -> None:
    async with make() as realtime:
        with pytest.raises(KeyError):
            async with realtime.open_run("report") as run:
                await realtime.append(0)
                raise KeyError
        reader = realtime.read(run)
        assert await anext(reader) == 0
        for _ in range(2):
            with pytest.raises(RunFailed, match="the run ended failed: task failed"):
                await anext(reader)


async def test_a_canceled_run_is_raised_after_the_last_chunk() -> None:
    async with make() as realtime:
        with pytest.raises(RunCanceled):
            async with realtime.open_run("report") as run:
                await realtime.append(0)
                reader = realtime.read(run)
                await realtime.cancel(run)
                await anyio.sleep_forever()
        assert await anext(reader) == 0
        with pytest.raises(RunCanceled, match="the run was canceled"):
            await anext(reader)


@where
async def test_an_unknown_run_is_raised(where: str) -> None:
    async with make(**broker_for(where)) as realtime:
        with pytest.raises(RunNotFound, match="run_unknown"):
            await anext(realtime.read("run_unknown"))
        for with_streams in (False, True):
            with pytest.raises(RunNotFound, match="run_unknown"):
                await anext(realtime.subscribe_to_run("run_unknown", with_streams=with_streams))


async def test_a_run_that_is_removed_while_it_is_read_is_raised() -> None:
    async with make() as realtime:
        broker = realtime.broker
        assert isinstance(broker, MemoryBroker)
        caught: list[Exception] = []
        async with realtime.open_run("report") as run:
            reader = realtime.read(run, start_index=5)

            async def read() -> None:
                try:
                    await anext(reader)
                except RunNotFound as exc:
                    caught.append(exc)

            with anyio.fail_after(5):
                async with anyio.create_task_group() as group:
                    group.start_soon(read)
                    await steps(5)
                    broker._runs[run.id].streams["default"].fail(RunNotFound("past its retention"))
        assert len(caught) == 1


async def test_a_run_that_pipe_is_about_to_create_is_waited_for() -> None:
    broker = RemoteBroker()
    realtime = make(broker=broker)
    pipe = realtime.pipe(numbers(3))
    assert not broker.entered
    with anyio.fail_after(5):
        assert [chunk async for chunk in realtime.read(pipe.run_id)] == [0, 1, 2]
    await realtime.stop()


@pytest.mark.parametrize("call", ["read", "run", "run with streams", "tag", "batch"])
async def test_the_first_use_starts_the_broker_before_it_is_asked(call: str) -> None:
    """Iterators used to begin the start and then not wait for it."""
    broker = RemoteBroker()
    async with make(broker=broker) as first, first.open_run("report", tags=["a"]) as run:
        await first.append(0)
        first.task("t")(lambda: None)
        batch = await first.batch_trigger([("t", None)])
        broker.entered = False
        realtime = make(broker=broker)
        iterators: dict[str, Any] = {
            "read": realtime.read(run.id),
            "run": realtime.subscribe_to_run(run.id),
            "run with streams": realtime.subscribe_to_run(run.id, with_streams=True),
            "tag": realtime.subscribe_to_runs_with_tag("a"),
            "batch": realtime.subscribe_to_batch(batch),
        }
        with anyio.fail_after(5):
            assert await anext(iterators[call]) is not None
        assert broker.entered
        await realtime.stop()
        broker.entered = True


@where
async def test_a_cancelled_read_loses_nothing_at_any_step(where: str) -> None:
    for turns in range(100):
        async with make(**broker_for(where)) as realtime, realtime.open_run("report") as run:
            await realtime.pipe(numbers(3)).wait_until_complete()
            reader = realtime.read(run)
            got: list[int] = []
            await cancelled_after(turns, reader, got)
            ended = len(got) == 3
            with anyio.fail_after(5):
                while len(got) < 3:
                    got.append(await anext(reader))
            assert got == [0, 1, 2]
        if ended:
            return
    raise AssertionError("it never got there")


async def cancelled_after(turns: int, items: AsyncIterator[Any], into: list[Any]) -> None:
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(take, items, into)
            await steps(turns)
            group.cancel_scope.cancel()


# Runs


@where
async def test_a_run_is_followed_from_its_present_state_to_its_end(where: str) -> None:
    async with make(**broker_for(where)) as realtime:
        got: list[RunRecord] = []
        with anyio.fail_after(10):
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
async def test_following_may_go_on_after_the_end(with_streams: bool) -> None:
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
    """The cursor used to move before the record was there, so a cancelled `anext` swallowed a change."""
    for turns in range(100):
        async with make(**broker_for(where)) as realtime:
            async with realtime.open_run("report") as run:
                pass
            for states in (realtime.subscribe_to_run(run), realtime.subscribe_to_run(run, with_streams=True)):
                got: list[Any] = []
                await cancelled_after(turns, states, got)
                ended = bool(got)
                with anyio.fail_after(5):
                    await take(states, got)
                assert [record.status for record in got] == [Status.COMPLETED], turns
        if ended:
            return
    raise AssertionError("it never got there")


@where
async def test_with_streams_the_terminal_record_comes_after_the_last_chunk(where: str) -> None:
    async with make(**broker_for(where)) as realtime:
        got: list[RunRecord | StreamChunk] = []
        with anyio.fail_after(10):
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


async def test_with_streams_a_run_that_is_over_gives_its_chunks_and_then_its_end() -> None:
    async with make() as realtime:
        async with realtime.open_run("report") as run:
            await realtime.append("one")
        got = [item async for item in realtime.subscribe_to_run(run, with_streams=True)]
        assert got[0] == StreamChunk("default", 0, "one")
        assert isinstance(got[1], RunRecord) and got[1].status is Status.COMPLETED
        assert len(got) == 2


async def test_with_streams_the_end_waits_for_a_log_that_lags_behind() -> None:
    """A broker elsewhere may tell of the end of the run before its chunks have arrived here."""
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


async def test_with_streams_a_change_while_a_stream_is_being_joined_is_not_missed() -> None:
    """The waiter used to be set after the streams were joined: an end in between was never seen."""
    broker = RemoteBroker()
    async with make(broker=broker) as realtime:
        joined = anyio.Event()
        go = anyio.Event()

        async def before_live() -> None:
            joined.set()
            await go.wait()

        got: list[RunRecord | StreamChunk] = []
        with anyio.fail_after(5):
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


async def test_runs_that_are_too_old_are_left_out() -> None:
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
        with anyio.fail_after(5):
            records = [record async for record in realtime.subscribe_to_batch(batch)]
            again = [record async for record in realtime.subscribe_to_batch(batch.id)]
        assert {record.id for record in records} == set(batch.runs)
        assert [record.status for record in again] == [Status.COMPLETED] * 2


# Leaving


@where
@pytest.mark.parametrize("left", ["dropped", "cancelled", "break"])
async def test_an_iterator_that_is_left_early_leaves_nothing_behind(where: str, left: str) -> None:
    before = others()
    async with make(**broker_for(where), timeouts=Timeouts(tick=60)) as realtime:  # so nobody follows the run but we
        broker = realtime.broker.inner if isinstance(realtime.broker, RemoteBroker) else realtime.broker
        assert isinstance(broker, MemoryBroker)
        async with realtime.open_run("report", tags=["a"]) as run:
            await realtime.append(0)
            running = others()
            iterators: list[Any] = [
                realtime.read(run),
                realtime.subscribe_to_run(run),
                realtime.subscribe_to_run(run, with_streams=True),
                realtime.subscribe_to_runs_with_tag("a"),
            ]
            for iterator in iterators:
                if left == "break":
                    async for _ in iterator:
                        break
                elif left == "dropped":
                    await anext(iterator)
                else:
                    await cancelled_after(20, iterator, [])
            del iterator, iterators
            gc.collect()
            live = broker._runs[run.id].streams["default"]
            assert (live.readers, len(live.waiting)) == (0, 0)
            for topic in (run_topic(run.id), "tag:a"):
                assert broker._topics[topic].followers == 0
                assert len(broker._topics[topic].waiting) == 0
            assert others() <= running
    assert others() <= before


async def test_a_reader_of_a_stream_that_nobody_writes_leaves_no_stream() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        with anyio.move_on_after(0):
            await anext(realtime.read(run, "never"))
        assert isinstance(realtime.broker, MemoryBroker)
        assert "never" not in realtime.broker._runs[run.id].streams
        assert (await realtime.broker.read(StreamKey(run.id, "never"))).entries == []


async def test_a_shutdown_ends_a_reader_by_the_end_of_its_run() -> None:
    async with make(timeouts=Timeouts(drain=0.001)) as realtime:

        async def endless() -> AsyncIterator[int]:
            yield 0
            await anyio.sleep_forever()

        pipe = realtime.pipe(endless())
        reader = realtime.read(pipe.run_id)
        assert await anext(reader) == 0
        raised: list[BaseException] = []

        async def read() -> None:
            try:
                await anext(reader)
            except RunFailed as exc:
                raised.append(exc)

        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                group.start_soon(read)
                await steps(3)
                await realtime.stop()
        assert "ServerShutdown" in repr(raised) or "shut down" in repr(raised)


plans = st.lists(st.tuples(st.sampled_from(["append", "read", "turn", "cancel"]), st.integers(0, 5)), max_size=40)


@pytest.mark.slow
@given(plan=plans, remote=st.booleans())
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_whenever_it_is_read_every_chunk_comes_once(backend: str, plan: list[tuple[str, int]], remote: bool) -> None:
    async def drive() -> None:
        async with make(**broker_for("remote" if remote else "memory")) as realtime:
            got: list[int] = []
            count = 0
            with anyio.fail_after(10):
                async with realtime.open_run("report") as run:
                    reader = realtime.read(run)
                    for act, number in plan:
                        if act == "append":
                            for _ in range(number):
                                await realtime.append(count)
                                count += 1
                        elif act == "read" and len(got) < count:
                            got.append(await anext(reader))
                        elif act == "turn":
                            await steps(number)
                        elif act == "cancel":
                            await cancelled_after(number, reader, got)
                await take(reader, got)
            assert got == list(range(count))

    anyio.run(drive, backend=backend)


def test_reading_needs_a_loop() -> None:
    realtime: Realtime = make()
    with pytest.raises(RuntimeError, match=r"realtime\.sync"):
        realtime.read("run_1")


async def test_a_list_by_two_tags_has_runs_that_are_old_in_the_first() -> None:
    """The newest runs of the first tag were taken and filtered after that, so older runs with both were missed."""
    async with make(limits=Limits(feed_runs=2)) as realtime:
        both = realtime.pipe([1], tags=["a", "b"]).run_id
        await realtime.result(both)
        for _ in range(3):
            await realtime.result(realtime.pipe([1], tags=["a"]).run_id)
        with anyio.fail_after(5):
            assert (await anext(realtime.subscribe_to_runs_with_tag(["a", "b"]))).id == both


async def test_a_list_begins_with_its_newest_runs() -> None:
    async with make(limits=Limits(feed_runs=2)) as realtime:
        runs = []
        for _ in range(4):
            runs.append(realtime.pipe([1], tags=["a"]).run_id)
            await realtime.result(runs[-1])
        feed = realtime.subscribe_to_runs_with_tag("a")
        with anyio.fail_after(5):
            assert {(await anext(feed)).id, (await anext(feed)).id} == set(runs[2:])
