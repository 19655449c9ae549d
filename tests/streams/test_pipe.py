"""What `Pipe` guarantees to the host's own code, to subscribers and to the run."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any
from uuid import UUID

import anyio
import anyio.lowlevel
import httpx
import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_realtime import Realtime, current_run
from asgi_realtime.core.config import Limits, Timeouts
from asgi_realtime.core.errors import (
    BrokerUnavailable,
    EncodingError,
    InvalidSource,
    LimitExceeded,
    LocalCopyLost,
    RunNotFound,
    ServerShutdown,
    StreamClosed,
    UsageError,
)
from asgi_realtime.core.run_errors import RunCanceled, RunFailed
from asgi_realtime.core.runs import Status
from asgi_realtime.streams.pipe import Pipe, PipeResult
from asgi_realtime.streams.writer import YIELD_EVERY
from tests.faults import RemoteBroker, make, others, steps, stored, take, until
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio


class Source:
    """Yields numbers, each after `go` if it is set, and records how it is used."""

    def __init__(self, count: int, *, error: Exception | None = None, steps: int = 1, gated: bool = False) -> None:
        self.count = count
        self.error = error
        self.steps = steps
        self.gate = anyio.Semaphore(0) if gated else None
        self.read = 0
        self.closed = 0
        self.closed_wholly = 0
        self.tasks: set[int] = set()

    def __aiter__(self) -> Source:
        self.tasks.add(anyio.get_current_task().id)
        return self

    async def __anext__(self) -> int:
        self.tasks.add(anyio.get_current_task().id)
        if self.gate is not None:
            await self.gate.acquire()
        await steps(self.steps)
        if self.read == self.count:
            if self.error is not None:
                raise self.error
            raise StopAsyncIteration
        self.read += 1
        return self.read - 1

    async def aclose(self) -> None:
        self.tasks.add(anyio.get_current_task().id)
        self.closed += 1
        await steps(2)
        self.closed_wholly += 1

    def let(self, count: int) -> None:
        assert self.gate is not None
        for _ in range(count):
            self.gate.release()


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


async def status_of(realtime: Realtime, run_id: str) -> Status:
    return (await realtime.get_run(run_id)).status


async def over(realtime: Realtime, run_id: str) -> Status:
    with anyio.fail_after(GUARD_S):
        return (await realtime.runs.ended(run_id)).status


# Forwarding and the local copy


async def test_pipe_returns_immediately_and_starts_forwarding() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        pipe = realtime.pipe(Source(3))
        assert await over_pipe(pipe) == PipeResult(3, 3, 2)
        assert await stored(realtime, run.id) == [0, 1, 2]


async def over_pipe(pipe: Pipe[Any]) -> PipeResult:
    with anyio.fail_after(GUARD_S):
        await pipe.settled()
    return pipe.result


async def test_the_consumer_gets_the_original_objects_unchanged() -> None:
    items = [{"n": number} for number in range(5)]

    async def source() -> AsyncIterator[dict[str, int]]:
        for item in items:
            yield item

    async with make() as realtime, realtime.open_run("report") as run:
        got = [item async for item in realtime.pipe(source())]
        assert [id(item) for item in got] == [id(item) for item in items]
        assert await stored(realtime, run.id) == items


async def test_one_task_creates_reads_and_closes_the_iterator() -> None:
    source = Source(5)
    async with make() as realtime, realtime.open_run("report"):
        await realtime.pipe(source).wait_until_complete()
    assert len(source.tasks) == 1
    assert anyio.get_current_task().id not in source.tasks
    assert source.closed_wholly == 1


async def test_the_source_runs_in_a_copy_of_the_callers_context() -> None:
    colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")
    seen: list[str] = []

    async def source() -> AsyncIterator[str]:
        seen.append(colour.get())
        colour.set("of the source")
        seen.append(current_run().id)
        yield "one"
        seen.append(colour.get())

    async with make() as realtime, realtime.open_run("report") as run:
        colour.set("of the caller")
        pipe = realtime.pipe(source())
        colour.set("later")
        await pipe.wait_until_complete()
        assert colour.get() == "later"
        assert seen == ["of the caller", run.id, "of the source"]


async def test_the_source_has_the_callers_context_on_first_use_too() -> None:
    colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")
    colour.set("of the caller")
    seen: list[str] = []

    async def source() -> AsyncIterator[int]:
        seen.append(colour.get())
        yield 1

    realtime = make()
    await realtime.pipe(source()).wait_until_complete()
    await realtime.stop()
    assert seen == ["of the caller"]


async def test_a_slow_consumer_does_not_delay_subscribers() -> None:
    async with make(limits=Limits(pipe_buffer=100)) as realtime, realtime.open_run("report") as run:
        consumer = aiter(realtime.pipe(Source(100)))
        assert await anext(consumer) == 0
        reader = realtime.read(run)
        with anyio.fail_after(GUARD_S):
            assert [await anext(reader) for _ in range(100)] == list(range(100))
        assert [item async for item in consumer] == list(range(1, 100))


async def test_a_full_buffer_with_a_reader_pauses_the_source() -> None:
    source = Source(50)
    async with make(limits=Limits(pipe_buffer=4)) as realtime, realtime.open_run("report") as run:
        consumer = aiter(realtime.pipe(source))
        await until(lambda: source.read >= 5)
        await steps(50)
        assert source.read == 5, "four in the buffer, and one that the pipe has read"
        assert await stored(realtime, run.id) == [0, 1, 2, 3, 4], "and all of them are with the subscribers"
        assert [item async for item in consumer] == list(range(50))


async def test_an_unread_pipe_loses_only_its_local_copy() -> None:
    async with make(limits=Limits(pipe_buffer=4)) as realtime, realtime.open_run("report") as run:
        pipe = realtime.pipe(Source(50))
        await over_pipe(pipe)
        assert await stored(realtime, run.id) == list(range(50))
        with pytest.raises(LocalCopyLost, match="subscribers lost nothing"):
            async for _ in pipe:
                raise AssertionError("nothing is there")
        assert (await pipe.wait_until_complete()).chunks == 50


async def test_chunks_within_the_buffer_can_be_read_later() -> None:
    async with make(limits=Limits(pipe_buffer=50)) as realtime, realtime.open_run("report"):
        pipe = realtime.pipe(Source(50))
        await pipe.wait_until_complete()
        assert [item async for item in pipe] == list(range(50))


async def test_wait_until_complete_works_after_an_early_break() -> None:
    async with make(limits=Limits(pipe_buffer=4)) as realtime, realtime.open_run("report") as run:
        pipe = realtime.pipe(Source(50))
        async for item in pipe:
            if item == 2:
                break
        with anyio.fail_after(GUARD_S):
            assert await pipe.wait_until_complete() == PipeResult(50, 90, 49)
        assert await stored(realtime, run.id) == list(range(50))


@pytest.mark.parametrize("leaving", ["break", "exception", "cancellation"])
async def test_a_consumer_that_left_its_loop_delays_nothing(leaving: str) -> None:
    async with make(limits=Limits(pipe_buffer=4)) as realtime, realtime.open_run("report") as run:
        pipe = realtime.pipe(Source(50))

        async def consume(scope: anyio.CancelScope) -> None:
            async for item in pipe:
                if item == 3 and leaving == "break":
                    break
                if item == 3 and leaving == "exception":
                    raise KeyError(item)
                if item == 3:
                    scope.cancel()
                    await anyio.lowlevel.checkpoint()

        with anyio.CancelScope() as scope:
            try:
                await consume(scope)
            except KeyError:
                pass
        await until(lambda: repr(pipe).endswith("ended>"))
        assert await stored(realtime, run.id) == list(range(50))


async def test_waiting_for_the_end_drops_the_local_copy() -> None:
    async with make(limits=Limits(pipe_buffer=4)) as realtime, realtime.open_run("report") as run:
        pipe = realtime.pipe(Source(50))
        consumer = aiter(pipe)
        assert await anext(consumer) == 0
        with anyio.fail_after(GUARD_S):
            assert (await pipe.wait_until_complete()).chunks == 50
        with pytest.raises(LocalCopyLost):
            await anext(consumer)
        assert await stored(realtime, run.id) == list(range(50))


async def test_waiting_while_reading_loses_nothing_within_the_buffer() -> None:
    async with make() as realtime, realtime.open_run("report"):
        pipe = realtime.pipe(Source(50))
        got: list[int] = []

        async def consume() -> None:
            got.extend([item async for item in pipe])

        async with anyio.create_task_group() as group:
            group.start_soon(consume)
            await pipe.wait_until_complete()
        assert got == list(range(50))


async def test_the_pipe_itself_can_be_advanced_and_then_iterated() -> None:
    async with make() as realtime, realtime.open_run("report"):
        pipe = realtime.pipe(numbers(4))
        assert await anext(pipe) == 0
        assert [item async for item in pipe] == [1, 2, 3]
        with pytest.raises(StopAsyncIteration):
            await anext(pipe)


async def test_a_single_anext_delays_nothing() -> None:
    """One `anext(pipe)` used to count as a reader forever, so the source paused and the run never ended."""
    async with make(limits=Limits(pipe_buffer=4)) as realtime:
        pipe = realtime.pipe(Source(50))
        run_id = pipe.run_id
        assert await anext(pipe) == 0
        del pipe
        assert await over(realtime, run_id) is Status.COMPLETED
        assert await stored(realtime, run_id) == list(range(50))


async def test_dropping_the_pipe_does_not_stop_forwarding() -> None:
    source = Source(50)
    async with make(limits=Limits(pipe_buffer=4)) as realtime, realtime.open_run("report") as run:
        pipe = realtime.pipe(source)
        async for _ in pipe:
            break
        del pipe
        gc.collect()
        await until(lambda: source.closed_wholly == 1)
        assert await stored(realtime, run.id) == list(range(50))


async def test_aclose_stops_forwarding_and_closes_the_source() -> None:
    source = Source(50, gated=True)
    async with make() as realtime, realtime.open_run("report") as run:
        pipe = realtime.pipe(source)
        source.let(3)
        await until(lambda: source.read == 3)
        await steps(5)
        with anyio.fail_after(GUARD_S):
            await pipe.aclose()
            await pipe.aclose()
        assert source.closed_wholly == 1
        source.let(10)
        await steps(10)
        assert await stored(realtime, run.id) == [0, 1, 2]
        assert [item async for item in pipe] == [0, 1, 2]
        assert await pipe.wait_until_complete() == PipeResult(3, 3, 2)
        await realtime.append("more")
        assert await stored(realtime, run.id) == [0, 1, 2, "more"]
    assert await over(realtime, run.id) is Status.COMPLETED


async def test_aclose_keeps_the_chunks_in_a_full_buffer() -> None:
    source = Source(50)
    async with make(limits=Limits(pipe_buffer=4)) as realtime, realtime.open_run("report") as run:
        pipe = realtime.pipe(source)
        consumer = aiter(pipe)
        await until(lambda: source.read == 5)
        await steps(5)
        await pipe.aclose()
        assert [item async for item in consumer] == await stored(realtime, run.id) == [0, 1, 2, 3, 4]


async def test_an_immediate_aclose_reads_nothing() -> None:
    source = Source(50, steps=0)
    async with make() as realtime, realtime.open_run("report") as run:
        await realtime.pipe(source).aclose()
        assert source.read == 0
        assert source.closed_wholly == 1
        assert await stored(realtime, run.id) == []


async def test_the_repr_of_a_pipe() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        pipe = realtime.pipe(numbers(2), "ai")
        assert repr(pipe) == f"<Pipe run={run.id} stream='ai' chunks=0 open>"
        await pipe.wait_until_complete()
        assert repr(pipe) == f"<Pipe run={run.id} stream='ai' chunks=2 ended>"
        assert pipe.result == PipeResult(chunks=2, bytes=2, last_index=1)


async def test_an_empty_source_completes_without_an_index() -> None:
    async with make() as realtime, realtime.open_run("report"):
        pipe = realtime.pipe(numbers(0))
        assert await pipe.wait_until_complete() == PipeResult(0, 0, None)
        assert [item async for item in pipe] == []


# Streams and runs


async def test_the_end_of_a_source_does_not_end_the_stream() -> None:
    async with make() as realtime:
        async with realtime.open_run("report") as run:
            first = await realtime.pipe(numbers(2)).wait_until_complete()
            second = await realtime.pipe(numbers(2)).wait_until_complete()
            assert (first.last_index, second.last_index) == (1, 3)
            assert (second.chunks, second.bytes) == (2, 2)
        assert [chunk async for chunk in realtime.read(run)] == [0, 1, 0, 1]


async def test_concurrent_pipes_into_one_stream_keep_their_order() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        pipes = [realtime.pipe([f"{name}{number}" for number in range(200)]) for name in "abc"]
        for pipe in pipes:
            await pipe.wait_until_complete()
        chunks = await stored(realtime, run.id)
        for name in "abc":
            assert [chunk for chunk in chunks if chunk[0] == name] == [f"{name}{number}" for number in range(200)]
        assert len(chunks) == 600


async def test_streams_of_one_run_are_separate() -> None:
    async with make() as realtime:
        async with realtime.open_run("report") as run:
            realtime.pipe(numbers(2), "a")
            realtime.pipe(numbers(3), "b")
        assert await stored(realtime, run.id, "a") == [0, 1]
        assert await stored(realtime, run.id, "b") == [0, 1, 2]
        assert set((await realtime.get_run(run)).streams) == {"a", "b"}


@pytest.mark.parametrize("remote", [False, True])
async def test_a_run_waits_for_its_open_pipes(remote: bool) -> None:
    source = Source(300)
    async with make(**({"broker": RemoteBroker()} if remote else {})) as realtime:
        async with realtime.open_run("report") as run:
            realtime.pipe(source)
        assert source.closed_wholly == 1
        assert await status_of(realtime, run.id) is Status.COMPLETED
        assert await stored(realtime, run.id) == list(range(300))


async def test_a_task_that_does_not_wait_for_its_pipe_loses_nothing() -> None:
    async with make() as realtime:

        @realtime.task("chat")
        async def chat(payload: int) -> str:
            realtime.pipe(Source(payload))
            return "done"

        handle = await realtime.trigger(chat, 100)
        with anyio.fail_after(GUARD_S):
            assert await handle.result() == "done"
        assert await stored(realtime, handle.id) == list(range(100))


async def test_the_run_of_another_task_can_be_passed_in_any_form() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        handle = realtime.pipe(numbers(1), run=run.id).handle
        await realtime.pipe(numbers(1), run=handle).wait_until_complete()
        await realtime.pipe(numbers(1), run=run).wait_until_complete()
        await realtime.pipe(numbers(1), run=await realtime.get_run(run)).wait_until_complete()
        assert await stored(realtime, run.id) == [0, 0, 0, 0]


async def test_tags_are_only_for_a_run_that_the_pipe_creates() -> None:
    async with make() as realtime, realtime.open_run("report"):
        with pytest.raises(UsageError, match="use run.tags"):
            realtime.pipe(numbers(1), tags=["user:1"])


async def test_a_pipe_into_an_unknown_run_fails_and_closes_its_source(caplog: pytest.LogCaptureFixture) -> None:
    """The source used to stay open, because the stream was opened first."""
    source = Source(3)
    async with make() as realtime:
        pipe = realtime.pipe(source, run="run_unknown")
        with pytest.raises(RunNotFound):
            await pipe.wait_until_complete()
        assert source.closed_wholly == 1
        assert source.read == 0


async def test_a_pipe_into_a_run_that_is_over_fails_and_closes_its_source() -> None:
    source = Source(3)
    async with make() as realtime:
        async with realtime.open_run("report") as run:
            await realtime.append("one")
        pipe = realtime.pipe(source, run=run)
        with pytest.raises(StreamClosed, match="nothing can be appended"):
            await pipe.wait_until_complete()
        assert source.closed_wholly == 1
        assert await stored(realtime, run.id) == ["one"]


async def test_a_failure_of_a_pipe_into_another_run_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with make() as realtime:
        pipe = realtime.pipe(Source(3), run="run_unknown")
        with caplog.at_level(logging.WARNING, "asgi_realtime"):
            await until(lambda: "run_unknown failed" in caplog.text)
        assert pipe.unseen_error is not None


async def test_too_many_streams_in_a_run_are_rejected() -> None:
    async with make(limits=Limits(streams_per_run=1)) as realtime, realtime.open_run("report"):
        await realtime.append(1, "a")
        with pytest.raises(LimitExceeded, match="2 streams, limit 1"):
            await realtime.pipe(numbers(1), "b").wait_until_complete()


# Without a run


async def test_outside_a_run_the_pipe_creates_one_that_lives_as_long_as_its_source() -> None:
    async with make() as realtime:
        source = Source(3, gated=True)
        pipe = realtime.pipe(source, tags=["user:1"], metadata={"a": 1})
        assert pipe.handle is pipe.handle
        assert pipe.handle.id == pipe.run_id
        record = await realtime.get_run(pipe.handle)
        assert (record.status, record.task, record.tags, record.metadata) == (
            Status.EXECUTING,
            "pipe",
            ("user:1",),
            {"a": 1},
        )
        source.let(4)
        with anyio.fail_after(GUARD_S):
            assert [chunk async for chunk in realtime.read(pipe.handle)] == [0, 1, 2]
            assert await pipe.handle.result() is None
        assert await status_of(realtime, pipe.run_id) is Status.COMPLETED


async def test_the_created_run_has_the_requested_name() -> None:
    async with make() as realtime:
        pipe = realtime.pipe(numbers(1), task="chat")
        assert (await realtime.get_run(pipe.run_id)).task == "chat"


async def test_the_created_run_is_current_in_the_source() -> None:
    seen: list[str] = []

    async def source() -> AsyncIterator[int]:
        current_run().metadata.set("half", True)
        seen.append(current_run().id)
        yield 1

    async with make() as realtime:
        pipe = realtime.pipe(source())
        assert await over(realtime, pipe.run_id) is Status.COMPLETED
        assert seen == [pipe.run_id]
        assert (await realtime.get_run(pipe.run_id)).metadata == {"half": True}


@pytest.mark.parametrize("seen", [False, True])
async def test_the_created_run_fails_with_its_source(seen: bool) -> None:
    async with make() as realtime:
        pipe = realtime.pipe(Source(2, error=ConnectionError("to the model")))
        if seen:
            with pytest.raises(ConnectionError):
                await pipe.wait_until_complete()
        with pytest.raises(RunFailed, match="task failed"):
            await pipe.handle.result(timeout=GUARD_S)
        assert await stored(realtime, pipe.run_id) == [0, 1]


async def test_canceling_the_created_run_stops_the_pipe() -> None:
    source = Source(5, gated=True)
    async with make() as realtime:
        pipe = realtime.pipe(source)
        source.let(2)
        await until(lambda: source.read == 2)
        await realtime.cancel(pipe.handle)
        with pytest.raises(RunCanceled):
            await pipe.wait_until_complete()
        assert await over(realtime, pipe.run_id) is Status.CANCELED
        assert source.closed_wholly == 1


async def test_aclose_completes_the_created_run() -> None:
    source = Source(5, gated=True)
    async with make() as realtime:
        pipe = realtime.pipe(source)
        await pipe.aclose()
        assert await over(realtime, pipe.run_id) is Status.COMPLETED


async def test_the_created_run_can_be_read_and_followed_before_it_exists() -> None:
    async with make(broker=RemoteBroker()) as realtime:
        pipe = realtime.pipe(numbers(3))
        with anyio.fail_after(GUARD_S):
            assert [chunk async for chunk in realtime.read(pipe.run_id)] == [0, 1, 2]
        pipe = realtime.pipe(numbers(3))
        with anyio.fail_after(GUARD_S):
            assert (await anext(realtime.subscribe_to_run(pipe.run_id))).id == pipe.run_id


# Errors of the source


async def test_an_error_of_the_source_is_raised_unchanged_to_the_consumer_and_the_waiter() -> None:
    error = ConnectionError("to the model")
    async with make() as realtime:
        async with realtime.open_run("report") as run:
            pipe = realtime.pipe(Source(3, error=error))
            got: list[int] = []
            with pytest.raises(ConnectionError) as caught:
                await take(pipe, got)
            assert caught.value is error
            assert got == [0, 1, 2] == await stored(realtime, run.id)
            with pytest.raises(ConnectionError) as caught:
                await pipe.wait_until_complete()
            assert caught.value is error
        assert await status_of(realtime, run.id) is Status.COMPLETED, "the error was raised once"


@pytest.mark.parametrize("observer", ["consumer", "waiter"])
async def test_an_error_that_was_raised_once_does_not_fail_the_run(observer: str) -> None:
    async with make() as realtime:
        async with realtime.open_run("report") as run:
            pipe = realtime.pipe(Source(3, error=ConnectionError("to the model")))
            with pytest.raises(ConnectionError):
                if observer == "waiter":
                    await pipe.wait_until_complete()
                else:
                    assert [item async for item in pipe] == []
        assert await status_of(realtime, run.id) is Status.COMPLETED


@pytest.mark.parametrize("consumed", ["not at all", "in part", "lost"])
async def test_an_error_that_was_never_raised_fails_the_run(consumed: str) -> None:
    async with make(limits=Limits(pipe_buffer=2 if consumed == "lost" else 10)) as realtime:
        async with realtime.open_run("report") as run:
            pipe = realtime.pipe(Source(3, error=ConnectionError("to the model")))
            if consumed == "in part":
                assert await anext(pipe) == 0
        record = await realtime.get_run(run)
        assert record.status is Status.FAILED
        assert record.error is not None and record.error.name == "ConnectionError"
        assert await stored(realtime, run.id) == [0, 1, 2]


async def test_an_error_of_a_pipe_fails_its_task() -> None:
    async with make() as realtime:

        @realtime.task("chat")
        async def chat() -> str:
            realtime.pipe(Source(2, error=ConnectionError("to the model")))
            return "done"

        with pytest.raises(RunFailed):
            await (await realtime.trigger(chat)).result(timeout=GUARD_S)


@pytest.mark.parametrize(
    ("error", "name"),
    [(SystemExit(3), "SystemExit"), (BaseExceptionGroup("of a task group", [SystemExit(3)]), "BaseExceptionGroup")],
)
async def test_an_exit_in_the_source_is_an_error_of_the_source(error: BaseException, name: str) -> None:
    async def source() -> AsyncIterator[int]:
        yield 0
        raise error

    async with make() as realtime:
        pipe = realtime.pipe(source())
        with pytest.raises(RuntimeError, match=f"the source raised {name}"):
            await pipe.wait_until_complete()
        assert await over(realtime, pipe.run_id) is Status.FAILED


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_source_that_awaits_a_cancelled_task_fails_alone(anyio_backend: str) -> None:
    """Its `CancelledError` was mistaken for the shutdown, and ended all other pipes too."""

    async def source() -> AsyncIterator[int]:
        yield 0
        cancelled = asyncio.get_running_loop().create_future()
        cancelled.cancel()
        await cancelled

    other = Source(3, gated=True)
    async with make() as realtime:
        waiting = realtime.pipe(other)
        pipe = realtime.pipe(source())
        with pytest.raises(RuntimeError, match="the source raised CancelledError") as caught:
            await pipe.wait_until_complete()
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)
        assert await over(realtime, pipe.run_id) is Status.FAILED
        other.let(4)
        assert (await waiting.wait_until_complete()).chunks == 3


# Chunks


class Mood(enum.Enum):
    GOOD = "good"


@dataclass
class Point:
    x: int


class Struct(msgspec.Struct):
    y: int


class Model(pydantic.BaseModel):
    long_name: int = pydantic.Field(serialization_alias="longName")


async def test_all_kinds_of_chunks_arrive_as_json() -> None:
    openai = pytest.importorskip("openai.types.chat.chat_completion_chunk")
    delta = openai.ChoiceDelta(content="hello")
    chunks: list[tuple[Any, Any]] = [
        ("text\nof two lines", "text\nof two lines"),
        (1, 1),
        (1.5, 1.5),
        (True, True),
        (None, None),
        ({"a": [1]}, {"a": [1]}),
        ([1, 2], [1, 2]),
        (Point(1), {"x": 1}),
        (Struct(2), {"y": 2}),
        (Model(long_name=3), {"longName": 3}),
        (delta, {"content": "hello"}),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00Z"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.10"), "1.10"),
        (Mood.GOOD, "good"),
        (float("nan"), None),
        ("half a pair \ud83d", "half a pair \ud83d"),
    ]
    async with make() as realtime, realtime.open_run("report") as run:
        got = [item async for item in realtime.pipe([chunk for chunk, _ in chunks])]
        assert [id(item) for item in got] == [id(chunk) for chunk, _ in chunks]
        assert await stored(realtime, run.id) == [expected for _, expected in chunks]


@pytest.mark.parametrize("bad", [object(), b"bytes", {1, object()}, "x" * 50], ids=["object", "bytes", "set", "large"])
async def test_an_item_that_cannot_be_published_is_skipped(bad: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It used to end the host's own loop and to close the source."""
    read: list[object] = []

    async def source() -> AsyncIterator[object]:
        for item in ("zero", "one", bad, bad, "two"):
            read.append(item)
            yield item

    async with make(limits=Limits(chunk_bytes=40)) as realtime:
        async with realtime.open_run("report") as run:
            pipe = realtime.pipe(source())
            assert [item async for item in pipe] == ["zero", "one", bad, bad, "two"] == read
            error = (EncodingError, LimitExceeded)
            with pytest.raises(error, match=r"^chunk 2 of stream 'default' of run 'run_\w+': ") as caught:
                await pipe.wait_until_complete()
            assert caught.value.__traceback__ is not None
            assert pipe.result.chunks == 3
            await realtime.append("more")
        assert [chunk async for chunk in realtime.read(run)] == ["zero", "one", "two", "more"]
        assert await status_of(realtime, run.id) is Status.COMPLETED, "the host saw the error"
    logged = [record.getMessage() for record in caplog.records if "skips" in record.getMessage()]
    assert len(logged) == 1
    assert logged[0].startswith(f"a pipe skips item 2 ({type(bad).__name__}) of stream 'default' of run {run.id}")


async def test_a_skipped_item_fails_the_run_if_nothing_awaits_the_pipe() -> None:
    async with make() as realtime:
        async with realtime.open_run("report") as run:
            bad = object()
            assert [item async for item in realtime.pipe([1, bad, 2])] == [1, bad, 2]
        record = await realtime.get_run(run)
        assert record.status is Status.FAILED
        assert record.error is not None and record.error.name == "EncodingError"
        assert await stored(realtime, run.id) == [1, 2]
        pipe = realtime.pipe([1, bad, 2])
        assert [item async for item in pipe] == [1, bad, 2]
        assert await over(realtime, pipe.run_id) is Status.FAILED


async def test_an_error_of_the_source_comes_before_that_of_a_skipped_item() -> None:
    async def source() -> AsyncIterator[object]:
        yield object()
        raise ConnectionError("to the model")

    async with make() as realtime, realtime.open_run("report"):
        pipe = realtime.pipe(source())
        with pytest.raises(ConnectionError):
            await take(pipe, [])
        with pytest.raises(ConnectionError):
            await pipe.wait_until_complete()


# `encode=`


async def test_encode_decides_what_is_published() -> None:
    """The local iteration gets the original objects."""
    points = [Point(1), Point(2), Point(3)]
    async with make() as realtime, realtime.open_run("report") as run:
        pipe = realtime.pipe(points, encode=lambda point: None if point.x == 2 else f"x{point.x}")
        assert [id(item) async for item in pipe] == [id(point) for point in points]
        assert (await pipe.wait_until_complete()).chunks == 2
        assert await stored(realtime, run.id) == ["x1", "x3"]


async def test_an_error_of_encode_skips_the_item(caplog: pytest.LogCaptureFixture) -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        pipe = realtime.pipe([1, 0, 2, 0], encode=lambda number: 2 // number)
        assert [item async for item in pipe] == [1, 0, 2, 0]
        with pytest.raises(ZeroDivisionError) as caught:
            await pipe.wait_until_complete()
        assert caught.value.__notes__ == [f"raised by encode= for chunk 1 of stream 'default' of run {run.id!r}"]
        assert await stored(realtime, run.id) == [2, 1]
    assert "a pipe skips item 1 (int)" in caplog.text


async def test_encode_must_be_a_function() -> None:
    async def encode(item: int) -> int:
        return item

    async with make() as realtime, realtime.open_run("report"):
        for wrong in (encode, "json"):
            with pytest.raises(UsageError, match=r"encode is .*; allowed are functions \(not async\)"):
                realtime.pipe([1], encode=wrong)  # type: ignore[arg-type]
            with pytest.raises(UsageError, match="encode is"):
                realtime.writer(encode=wrong)  # type: ignore[arg-type]


async def test_bytes_are_rejected_with_an_alternative() -> None:
    async with make() as realtime, realtime.open_run("report"):
        with pytest.raises(EncodingError, match=r"bytes has no JSON form; pass text \(`data.decode\(\)`\)"):
            await realtime.pipe([b"text"]).wait_until_complete()


async def test_a_chunk_at_the_limit_passes_and_one_above_is_named() -> None:
    async with make(limits=Limits(chunk_bytes=10)) as realtime, realtime.open_run("report") as run:
        assert (await realtime.pipe(["12345678"]).wait_until_complete()).bytes == 10
        with pytest.raises(LimitExceeded, match=r"chunk 1 of stream .* a chunk is 11 bytes, limit 10") as caught:
            await realtime.pipe(["1", "123456789"]).wait_until_complete()
        assert caught.value.status == 413
        await realtime.append("more")
        assert await stored(realtime, run.id) == ["12345678", "1", "more"]


# Cancellation


async def test_canceling_the_run_stops_its_pipes_and_keeps_their_chunks() -> None:
    broker = RemoteBroker()
    source = Source(50, gated=True)
    async with make(broker=broker) as realtime:
        with pytest.raises(RunCanceled):
            async with realtime.open_run("report") as run:
                pipe = realtime.pipe(source)
                broker.hold = anyio.Event()
                source.let(7)
                await until(lambda: source.read == 7)
                await steps(10)
                assert await stored(realtime, run.id) == []
                await realtime.cancel(run)
                broker.hold.set()
                await anyio.sleep_forever()
        assert await stored(realtime, run.id) == list(range(7))
        assert await status_of(realtime, run.id) is Status.CANCELED
        assert source.closed_wholly == 1
        assert [await anext(pipe) for _ in range(7)] == list(range(7))
        with pytest.raises(RunCanceled):
            await anext(pipe)
        with pytest.raises(RunCanceled):
            await pipe.wait_until_complete()


async def test_a_run_that_fails_stops_its_pipes() -> None:
    source = Source(50, gated=True)
    async with make() as realtime:
        with pytest.raises(KeyError):
            async with realtime.open_run("report") as run:
                realtime.pipe(source)
                source.let(2)
                await until(lambda: source.read == 2)
                await steps(3)
                raise KeyError
        assert source.closed_wholly == 1
        assert await stored(realtime, run.id) == [0, 1]
        assert await status_of(realtime, run.id) is Status.FAILED


@pytest.mark.parametrize("waits", ["iteration", "wait_until_complete", "aclose elsewhere"])
async def test_cancelling_the_waiter_of_a_pipe_does_not_stop_it(waits: str) -> None:
    source = Source(5, gated=True)
    async with make() as realtime, realtime.open_run("report") as run:
        pipe = realtime.pipe(source)

        async def wait() -> None:
            if waits == "iteration":
                async for _ in pipe:
                    pass
            else:
                await pipe.wait_until_complete()

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            source.let(2)
            await until(lambda: source.read == 2)
            group.cancel_scope.cancel()
        assert source.closed == 0
        source.let(4)
        with anyio.fail_after(GUARD_S):
            assert (await pipe.wait_until_complete()).chunks == 5
        assert await stored(realtime, run.id) == [0, 1, 2, 3, 4]


async def test_the_end_of_the_request_that_called_pipe_does_not_stop_it() -> None:
    source = Source(5, gated=True)
    async with make() as realtime:
        pipes: list[Pipe[int]] = []

        async def request() -> None:
            pipes.append(realtime.pipe(source))
            await anyio.sleep_forever()

        async with anyio.create_task_group() as group:
            group.start_soon(request)
            await until(lambda: bool(pipes))
            group.cancel_scope.cancel()
        source.let(6)
        assert await over(realtime, pipes[0].run_id) is Status.COMPLETED


Act = Callable[[Realtime, Pipe[int]], Awaitable[Any]]


async def _cancel(realtime: Realtime, pipe: Pipe[int]) -> None:
    await realtime.cancel(pipe.run_id)


async def _aclose(realtime: Realtime, pipe: Pipe[int]) -> None:
    await pipe.aclose()


async def _stop(realtime: Realtime, pipe: Pipe[int]) -> None:
    await realtime.stop()


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True], ids=["memory", "remote"])
@pytest.mark.parametrize("manager", [False, True], ids=["source", "manager"])
@pytest.mark.parametrize("act", [_cancel, _aclose, _stop])
@pytest.mark.parametrize("consumed", [False, True])
async def test_stopped_at_any_step_nothing_is_lost_duplicated_or_left_over(
    remote: bool, manager: bool, act: Act, consumed: bool
) -> None:
    """Stop the pipe after n loop iterations, for every n until it ends on its own."""
    before = others()
    for turns in range(1000):
        source = Source(6)
        piped = Manager(source) if manager else source
        broker = {"broker": RemoteBroker()} if remote else {}
        realtime = make(**broker, timeouts=Timeouts(drain=0.001), limits=Limits(pipe_buffer=2, pending_bytes=2))
        async with realtime:
            pipe: Pipe[int] = realtime.pipe(piped)
            got: list[int] = []

            async def consume(pipe: Pipe[int] = pipe, got: list[int] = got) -> None:
                try:
                    await take(pipe, got)
                except (RunCanceled, ServerShutdown):
                    pass

            with anyio.fail_after(GUARD_S):
                async with anyio.create_task_group() as group:
                    if consumed:
                        group.start_soon(consume)
                    await steps(turns)
                    ended = repr(pipe).endswith("ended>")
                    await act(realtime, pipe)
                await pipe.settled()
                await realtime.stop()
            held = await stored(realtime, pipe.run_id) if await _exists(realtime, pipe.run_id) else []
            assert held == list(range(source.read))[: len(held)], turns
            assert pipe.result.chunks == len(held), turns
            if not (remote and act is _stop):
                assert len(held) == source.read, turns
            if consumed:
                assert got == list(range(source.read))[: len(got)]
                assert len(got) == source.read
            assert source.closed == source.closed_wholly <= 1
            assert source.closed == 1 or manager or source.read == 0
            if isinstance(piped, Manager):
                assert piped.left == piped.entered
        assert others() <= before, turns
        if ended:
            assert turns > 6
            return
    raise AssertionError("the pipe never ended by itself")


async def _exists(realtime: Realtime, run_id: str) -> bool:
    broker = realtime.broker.inner if isinstance(realtime.broker, RemoteBroker) else realtime.broker
    return (await broker.load([run_id]))[0] is not None


class Manager:
    """Like anthropic's `messages.stream()`: not iterable, but returns an iterable when entered."""

    def __init__(self, iterable: Any, *, hang: bool = False) -> None:
        self.iterable = iterable
        self.hang = hang
        self.entered = 0
        self.left = 0
        self.left_with: BaseException | None = None

    async def __aenter__(self) -> Any:
        await steps(2)
        self.entered += 1
        return self.iterable

    async def __aexit__(self, exc_type: object, exc: BaseException | None, tb: object) -> None:
        self.left_with = exc
        await steps(2)
        if self.hang:
            await anyio.sleep_forever()
        self.left += 1


@pytest.mark.parametrize("observer", ["consumer", "waiter"])
async def test_a_cancelled_wait_can_be_repeated_at_any_step(observer: str) -> None:
    for turns in range(1000):
        async with make() as realtime, realtime.open_run("report") as run:
            pipe = realtime.pipe(Source(4))
            got: list[int] = []
            with anyio.fail_after(GUARD_S):
                async with anyio.create_task_group() as group:

                    async def wait(pipe: Pipe[int] = pipe, got: list[int] = got) -> None:
                        if observer == "waiter":
                            await pipe.wait_until_complete()
                        await take(pipe, got)

                    group.start_soon(wait)
                    await steps(turns)
                    ended = repr(pipe).endswith("ended>")
                    group.cancel_scope.cancel()
                assert (await pipe.wait_until_complete()).chunks == 4
                got.extend([item async for item in pipe])
            assert got == [0, 1, 2, 3]
            assert await stored(realtime, run.id) == [0, 1, 2, 3]
        if ended:
            return


async def test_a_shutdown_ends_all_waiters() -> None:
    source = Source(50, gated=True)
    caught: list[BaseException] = []
    async with make(timeouts=Timeouts(drain=0.001)) as realtime, anyio.create_task_group() as group:
        pipe = realtime.pipe(source)

        async def wait(call: Callable[[], Awaitable[Any]]) -> None:
            try:
                await call()
            except ServerShutdown as exc:
                caught.append(exc)

        group.start_soon(wait, pipe.wait_until_complete)
        group.start_soon(wait, partial(anext, pipe))
        source.let(0)
        await steps(10)
        with anyio.fail_after(GUARD_S):
            await realtime.stop()
    assert len(caught) == 2
    assert source.closed_wholly == 1


# A broker that is away


async def test_a_short_outage_of_the_broker_loses_no_chunk() -> None:
    broker = RemoteBroker()
    async with make(broker=broker) as realtime, realtime.open_run("report") as run:
        broker.away = {"append", "load"}
        pipe = realtime.pipe(Source(20))
        got = [item async for item in pipe]
        assert got == list(range(20)), "the local iteration does not wait for the broker"
        await until(lambda: broker.failed >= 1)
        broker.away = set()
        broker.lose_answers = 1
        with anyio.fail_after(GUARD_S):
            assert await pipe.wait_until_complete() == PipeResult(20, 30, 19)
        assert await stored(realtime, run.id) == list(range(20))


async def test_a_long_outage_raises_to_the_waiter_and_the_local_iteration_continues() -> None:
    """A consumer that was slow enough used to get the error of the broker too."""
    broker = RemoteBroker()
    async with make(broker=broker, timeouts=Timeouts(append=0.01)) as realtime:
        async with realtime.open_run("report") as run:
            broker.away = {"append"}
            source = Source(20)
            pipe = realtime.pipe(source)
            await until(lambda: source.closed_wholly == 1)
            with anyio.fail_after(GUARD_S), pytest.raises(BrokerUnavailable, match="is unavailable"):
                await pipe.wait_until_complete()
            assert [item async for item in pipe] == list(range(20))
            assert pipe.result == PipeResult(0, 0, None)
            broker.away = set()
            await realtime.append("later")
        assert await stored(realtime, run.id) == ["later"]


async def test_unpublished_chunks_fail_the_run_if_nothing_awaits_the_pipe() -> None:
    broker = RemoteBroker()
    async with make(broker=broker, timeouts=Timeouts(append=0.01)) as realtime:
        async with realtime.open_run("report") as run:
            broker.away = {"append"}
            assert [item async for item in realtime.pipe(numbers(20))] == list(range(20))
        assert await status_of(realtime, run.id) is Status.FAILED


async def test_a_source_pauses_while_too_much_waits_for_the_broker() -> None:
    broker = RemoteBroker()
    source = Source(50)
    async with make(broker=broker, limits=Limits(pending_bytes=4)) as realtime, realtime.open_run("report") as run:
        broker.hold = anyio.Event()
        pipe = realtime.pipe(source)
        await until(lambda: source.read >= 5)
        await steps(50)
        assert source.read == 5
        broker.hold.set()
        with anyio.fail_after(GUARD_S):
            assert (await pipe.wait_until_complete()).chunks == 50
        assert await stored(realtime, run.id) == list(range(50))


@pytest.mark.parametrize("within", [False, True])
async def test_a_pipe_that_cannot_start_raises_and_closes_its_source(within: bool) -> None:
    """`wait_until_complete` used to wait forever, and the source stayed open."""

    class Broken(RemoteBroker):
        async def __aenter__(self) -> RemoteBroker:
            raise BrokerUnavailable("refused")

    source = Source(3)
    realtime = make(broker=Broken())
    pipe = realtime.pipe(source, run="run_of_another_process" if within else None)
    with anyio.fail_after(GUARD_S):
        with pytest.raises(BrokerUnavailable, match="refused"):
            await pipe.wait_until_complete()
        with pytest.raises(BrokerUnavailable, match="refused"):
            await anext(pipe)
    assert source.closed_wholly == 1
    await realtime.stop()


async def test_a_pipe_that_is_stopped_before_it_started_ends() -> None:
    class Slow(RemoteBroker):
        async def __aenter__(self) -> RemoteBroker:
            await anyio.sleep_forever()
            raise AssertionError

    source = Source(3)
    realtime = make(broker=Slow())
    pipe = realtime.pipe(source)
    await steps(5)
    with anyio.fail_after(GUARD_S):
        await realtime.stop()
        with pytest.raises(ServerShutdown):
            await pipe.wait_until_complete()
    assert source.closed_wholly == 1


# A source that never suspends


@pytest.mark.parametrize("skipped", [range(0), range(1), range(0, 10_000, 2), range(10_000)])
async def test_a_source_that_never_suspends_does_not_starve_the_loop(skipped: range) -> None:
    source = Source(10 * YIELD_EVERY, steps=0)
    async with make() as realtime, realtime.open_run("report"):
        pipe = realtime.pipe(source, encode=lambda number: None if number in skipped else number)
        turns = 0
        while not repr(pipe).endswith("ended>"):
            await anyio.lowlevel.checkpoint()
            turns += 1
        assert turns >= 10


async def test_an_endless_source_that_never_suspends_can_be_stopped() -> None:
    source = Source(10**9, steps=0)
    async with make(limits=Limits(pipe_buffer=10)) as realtime:
        pipe = realtime.pipe(source)
        await steps(20)
        with anyio.fail_after(GUARD_S):
            await pipe.aclose()
        assert source.closed_wholly == 1


# Refusals


async def _create() -> AsyncIterator[int]:
    return numbers(3)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("text", "a str is not a source: use append"),
        (b"text", "a bytes is not a source: use append"),
        (bytearray(b"text"), "a bytearray is not a source"),
        ({"a": 1}, "a dict is not a source: use append.* pipe its .items"),
        (3, "a int is not a source; allowed are async iterables"),
        (None, "a NoneType is not a source"),
        (Model(long_name=1), r"a Model is not a source: .*stream=True"),
        (numbers, "the function numbers is not a source: call it;"),
        (partial(numbers, 3), "a partial is not a source: call it;"),
        (_create, "the function _create is not a source: call it and await the result"),
        (Source, "the class Source is not a source: pass an instance"),
        (httpx.Response(200), r"a Response is not a source: pipe its \.aiter_lines\(\)"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
async def test_an_invalid_source_is_rejected_by_the_call(source: Any, hint: str) -> None:
    async with make() as realtime:
        with pytest.raises(InvalidSource, match=hint):
            realtime.pipe(source)
        assert not realtime.engine.executions


async def test_an_awaitable_is_rejected_with_a_hint() -> None:
    forgotten = _create()
    async with make() as realtime:
        with pytest.raises(InvalidSource, match="a coroutine is not a source: await it first"):
            realtime.pipe(forgotten)  # type: ignore[arg-type]
    forgotten.close()


@pytest.mark.parametrize("name", ["", "$mine", "a/b", "x" * 129])
async def test_an_invalid_stream_key_is_rejected_by_the_call(name: str) -> None:
    async with make() as realtime:
        with pytest.raises(UsageError, match="stream key"):
            realtime.pipe(numbers(1), name)


async def test_a_pipe_requires_an_event_loop() -> None:
    realtime = make()

    def elsewhere() -> None:
        realtime.pipe([1])

    with pytest.raises(RuntimeError, match=r"realtime\.sync"):
        await anyio.to_thread.run_sync(elsewhere)


# Anything at random


Plan = tuple[int, int, int, int, str, int]
plans = st.tuples(
    st.integers(0, 40),  # items
    st.integers(1, 12),  # the buffer
    st.integers(0, 3),  # how often the source suspends
    st.integers(0, 4),  # how often the consumer suspends
    st.sampled_from(["reads all", "leaves", "never reads", "waits"]),
    st.integers(0, 40),  # where the consumer leaves
)


@pytest.mark.slow
@given(plan=plans, remote=st.booleans(), fails=st.booleans())
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_stream_is_complete_whatever_the_consumer_does(backend: str, plan: Plan, remote: bool, fails: bool) -> None:
    count, buffer, source_steps, consumer_steps, behaviour, leaves_at = plan

    async def drive() -> None:
        error = ConnectionError("to the model") if fails else None
        source = Source(count, steps=source_steps, error=error)
        broker: dict[str, Any] = {"broker": RemoteBroker()} if remote else {}
        async with make(**broker, limits=Limits(pipe_buffer=buffer)) as realtime:
            with anyio.fail_after(GUARD_S):
                async with realtime.open_run("report") as run:
                    pipe = realtime.pipe(source)
                    got: list[int] = []
                    seen = False
                    try:
                        if behaviour == "waits":
                            await pipe.wait_until_complete()
                        if behaviour in ("reads all", "leaves"):
                            async for item in pipe:
                                if behaviour == "leaves" and item == leaves_at:
                                    break
                                got.append(item)
                                await steps(consumer_steps)
                    except ConnectionError:
                        seen = True
            assert await stored(realtime, run.id) == list(range(count))
            assert got == list(range(len(got)))
            if behaviour == "reads all":
                assert len(got) == count
            failed = await status_of(realtime, run.id) is Status.FAILED
            assert failed == (fails and not seen)
            assert source.closed_wholly == 1

    anyio.run(drive, backend=backend)
