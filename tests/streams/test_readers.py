"""Reading streams from the host's own code."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_realtime import Realtime
from asgi_realtime.brokers import MemoryBroker
from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.config import Retention, Timeouts
from asgi_realtime.core.errors import RunNotFound, StreamGap, StreamNotFound, UsageError
from asgi_realtime.core.run_errors import RunCanceled, RunFailed
from asgi_realtime.core.runs import run_topic
from asgi_realtime.streams.followers import StreamChunk
from tests.faults import RemoteBroker, make, others, steps, stored, take, until
from tests.inprocess import GUARD_S
from tests.streams.reading import broker_for, cancelled_after, numbers, where

pytestmark = pytest.mark.anyio


# Streams


@where
async def test_chunks_are_read_until_the_run_completes(where: str) -> None:
    async with make(**broker_for(where)) as realtime:
        got: list[int] = []
        with anyio.fail_after(GUARD_S):
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


@where
async def test_a_misspelled_stream_of_a_completed_run_is_an_error(where: str) -> None:
    """The reader got nothing, without an error."""
    async with make(**broker_for(where)) as realtime:
        async with realtime.open_run("report") as run:
            await realtime.append(0)
            await realtime.append(1, stream="log")
        with pytest.raises(StreamNotFound, match=f"run '{run.id}' completed without a stream 'defualt'; it has 'defau"):
            await anext(realtime.read(run, "defualt"))


@where
async def test_a_completed_run_without_streams_is_read_as_empty(where: str) -> None:
    async with make(**broker_for(where)) as realtime:
        async with realtime.open_run("report") as run:
            pass
        assert [chunk async for chunk in realtime.read(run)] == []
        pipe = realtime.pipe(numbers(0))
        assert [chunk async for chunk in realtime.read(pipe.run_id)] == []


async def test_a_misspelled_stream_of_a_failed_run_raises_how_the_run_ended() -> None:
    async with make() as realtime:
        with pytest.raises(ValueError):
            async with realtime.open_run("report") as run:
                await realtime.append(0)
                raise ValueError
        with pytest.raises(RunFailed):
            await anext(realtime.read(run, "defualt"))


async def test_more_than_one_page_is_read() -> None:
    async with make() as realtime:
        pipe = realtime.pipe(range(1234))
        with anyio.fail_after(GUARD_S):
            assert [chunk async for chunk in realtime.read(pipe.run_id)] == list(range(1234))


async def test_the_start_index_counts_from_zero() -> None:
    async with make() as realtime:
        async with realtime.open_run("report") as run:
            await realtime.pipe(numbers(5)).wait_until_complete()
        for start in range(7):
            assert [chunk async for chunk in realtime.read(run, start_index=start)] == list(range(5))[start:]


async def test_a_reader_gets_the_end_of_a_run_that_is_removed_at_once() -> None:
    """The run was removed before its reader ran, and the reader took that for a failure."""
    async with make() as realtime:
        got: list[int] = []
        with anyio.fail_after(GUARD_S):
            async with anyio.create_task_group() as group:
                async with realtime.open_run("report") as run:
                    await realtime.append(0)
                    group.start_soon(take, realtime.read(run), got)
                    await until(lambda: got == [0])
                    await realtime.append(1)
                await realtime.broker.remove(run.id)
        assert got == [0, 1]


@pytest.mark.parametrize("index", [-1, 1.5, "3", True, None])
async def test_an_invalid_start_index_is_rejected_by_the_call(index: Any) -> None:
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


async def test_trimmed_chunks_are_a_gap() -> None:
    async with make(retention=Retention(stream_bytes=200)) as realtime:
        async with realtime.open_run("report") as run:
            await realtime.pipe(numbers(100)).wait_until_complete()
        kept = await stored(realtime, run.id)
        reader = realtime.read(run)
        with pytest.raises(StreamGap, match="chunk 0 of stream 'default' was trimmed") as caught:
            await anext(reader)
        assert (caught.value.requested, caught.value.first) == (0, kept[0])
        assert [chunk async for chunk in reader] == kept, "the gap is raised once; the reader used to raise it forever"
        with_streams = realtime.subscribe_to_run(run, with_streams=True)
        with pytest.raises(StreamGap):
            await anext(with_streams)
        seen = [update async for update in with_streams]
        assert [update.chunk for update in seen if isinstance(update, StreamChunk)] == kept
        assert [chunk async for chunk in realtime.read(run, start_index=caught.value.first)] == kept


async def test_a_slow_reader_gets_a_gap() -> None:
    async with make(retention=Retention(stream_bytes=200)) as realtime, realtime.open_run("report") as run:
        await realtime.append(0)
        reader = realtime.read(run)
        assert await anext(reader) == 0
        await realtime.pipe(numbers(100)).wait_until_complete()
        with pytest.raises(StreamGap) as caught:
            await anext(reader)
        assert caught.value.requested == 1


async def test_silence_raises_a_timeout_and_reading_can_continue() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        reader = realtime.read(run, timeout=0.01)
        words = f"no chunk arrived in stream 'default' of run '{run.id}' within 0.01 s"
        with pytest.raises(TimeoutError, match=words):
            await anext(reader)
        await realtime.append("later")
        assert await anext(reader) == "later"


async def test_an_invalid_timeout_is_rejected_by_the_call() -> None:
    async with make() as realtime:
        with pytest.raises(UsageError, match="timeout is"):
            realtime.read("run_1", timeout="soon")


async def test_the_failure_of_a_run_is_raised_after_the_last_chunk() -> None:
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


async def test_the_cancellation_of_a_run_is_raised_after_the_last_chunk() -> None:
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
async def test_an_unknown_run_raises(where: str) -> None:
    async with make(**broker_for(where)) as realtime:
        with pytest.raises(RunNotFound, match="run_unknown"):
            await anext(realtime.read("run_unknown"))
        for with_streams in (False, True):
            with pytest.raises(RunNotFound, match="run_unknown"):
                await anext(realtime.subscribe_to_run("run_unknown", with_streams=with_streams))


async def test_a_run_that_is_removed_while_it_is_read_raises() -> None:
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

            with anyio.fail_after(GUARD_S):
                async with anyio.create_task_group() as group:
                    group.start_soon(read)
                    await steps(5)
                    broker._runs[run.id].streams["default"].fail(RunNotFound("past its retention"))
        assert len(caught) == 1


async def test_a_reader_waits_for_a_run_that_pipe_is_creating() -> None:
    broker = RemoteBroker()
    realtime = make(broker=broker)
    pipe = realtime.pipe(numbers(3))
    assert not broker.entered
    with anyio.fail_after(GUARD_S):
        assert [chunk async for chunk in realtime.read(pipe.run_id)] == [0, 1, 2]
    await realtime.stop()


@pytest.mark.parametrize("call", ["read", "run", "run with streams", "tag", "batch"])
async def test_the_first_use_waits_for_the_start_of_the_broker(call: str) -> None:
    """Iterators used to begin the start without waiting for it."""
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
        with anyio.fail_after(GUARD_S):
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
            with anyio.fail_after(GUARD_S):
                while len(got) < 3:
                    got.append(await anext(reader))
            assert got == [0, 1, 2]
        if ended:
            return
    raise AssertionError("it never got there")


# Leaving


@where
@pytest.mark.parametrize("left", ["dropped", "cancelled", "break"])
async def test_an_abandoned_iterator_leaves_nothing_behind(where: str, left: str) -> None:
    before = others()
    async with make(
        **broker_for(where), timeouts=Timeouts(tick=60)
    ) as realtime:  # so that nothing else follows the run
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


async def test_reading_an_unwritten_stream_does_not_create_it() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        with anyio.move_on_after(0):
            await anext(realtime.read(run, "never"))
        assert isinstance(realtime.broker, MemoryBroker)
        assert "never" not in realtime.broker._runs[run.id].streams
        assert (await realtime.broker.read(StreamKey(run.id, "never"))).entries == []


async def test_a_shutdown_ends_a_reader_with_the_end_of_its_run() -> None:
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

        with anyio.fail_after(GUARD_S):
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
def test_every_chunk_is_read_once_in_any_interleaving(backend: str, plan: list[tuple[str, int]], remote: bool) -> None:
    async def drive() -> None:
        async with make(**broker_for("remote" if remote else "memory")) as realtime:
            got: list[int] = []
            count = 0
            with anyio.fail_after(GUARD_S):
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


def test_reading_requires_an_event_loop() -> None:
    realtime: Realtime = make()
    with pytest.raises(RuntimeError, match=r"realtime\.sync"):
        realtime.read("run_1")
