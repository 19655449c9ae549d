"""Typed streams, and the writer for the host's own chunks and merged sources."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypedDict

import anyio
import msgspec
import pydantic
import pytest

from asgi_realtime.core.config import Limits, Timeouts
from asgi_realtime.core.errors import (
    BrokerUnavailable,
    EncodingError,
    LimitExceeded,
    NoCurrentRun,
    RunNotFound,
    StreamClosed,
    UsageError,
)
from asgi_realtime.core.runs import Status
from tests.faults import RemoteBroker, make, steps, stored, until
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio


class Mood(enum.StrEnum):
    GOOD = "good"


@dataclass
class Token:
    text: str
    mood: Mood = Mood.GOOD


class Struct(msgspec.Struct):
    at: datetime


class Model(pydantic.BaseModel):
    text: str


class Row(TypedDict):
    n: int


async def numbers(count: int, error: Exception | None = None) -> AsyncIterator[int]:
    for number in range(count):
        yield number
        await steps(1)
    if error is not None:
        raise error


async def endless(closed: list[str], name: str) -> AsyncIterator[str]:
    try:
        yield name
        await anyio.sleep_forever()
    finally:
        closed.append(name)


# Typed streams


@pytest.mark.parametrize(
    ("chunk_type", "chunk"),
    [
        (Token, Token("hello")),
        (Struct, Struct(datetime(2026, 1, 2, tzinfo=UTC))),
        (Model, Model(text="hello")),
        (Row, {"n": 1}),
        (int, 3),
        (str, "text"),
        (Mood, Mood.GOOD),
        (Any, {"any": ["thing"]}),
    ],
)
async def test_a_typed_stream_returns_chunks_as_they_were_written(chunk_type: Any, chunk: Any) -> None:
    async with make() as realtime:
        stream = realtime.define_stream("ai", chunk_type)
        async with realtime.open_run("chat") as run:
            await stream.append(chunk)
            await stream.pipe([chunk]).wait_until_complete()
            async with stream.writer() as writer:
                await writer.write(chunk)
        got = [item async for item in stream.read(run)]
        assert got == [chunk] * 3
        assert type(got[0]) is type(chunk)
        assert [item async for item in stream.read(run, start_index=2)] == [chunk]


async def test_a_typed_stream_of_another_run_takes_the_run() -> None:
    async with make() as realtime, realtime.open_run("chat") as run:
        stream = realtime.define_stream("ai", int)
        await stream.append(1, run=run.id)
        await stream.pipe([2], run=run).wait_until_complete()
        async with stream.writer(run=run) as writer:
            await writer.write(3)
        assert await stored(realtime, run.id, "ai") == [1, 2, 3]


async def test_a_typed_pipe_creates_a_run_too() -> None:
    async with make() as realtime:
        stream = realtime.define_stream("ai", int)
        pipe = stream.pipe([1, 2], tags=["user:1"], task="chat")
        with anyio.fail_after(GUARD_S):
            assert [item async for item in stream.read(pipe.handle)] == [1, 2]
        record = await realtime.get_run(pipe.run_id)
        assert (record.task, record.tags) == ("chat", ("user:1",))


async def test_a_chunk_that_does_not_match_raises_and_reading_can_continue() -> None:
    async with make() as realtime:
        stream = realtime.define_stream("ai", int)
        async with realtime.open_run("chat") as run:
            await realtime.append("no number", "ai")
            await realtime.append(2, "ai")
        reader = stream.read(run)
        with pytest.raises(UsageError, match="Expected `int`, got `str`"):
            await anext(reader)
        assert await anext(reader) == 2


async def test_a_typed_stream_times_out() -> None:
    async with make() as realtime, realtime.open_run("chat") as run:
        with pytest.raises(TimeoutError):
            await anext(realtime.define_stream("ai", int).read(run, timeout=0.01))


async def test_the_repr_of_a_typed_stream_shows_key_and_type() -> None:
    realtime = make()
    assert repr(realtime.define_stream("ai", Token)) == "<TypedStream 'ai' of Token>"
    with pytest.raises(UsageError, match="stream key"):
        realtime.define_stream("a/b", int)


# The writer


@pytest.mark.parametrize("remote", [False, True])
async def test_leaving_the_writer_waits_until_chunks_are_stored(remote: bool) -> None:
    async with make(**({"broker": RemoteBroker()} if remote else {})) as realtime, realtime.open_run("report") as run:
        async with realtime.writer("progress") as writer:
            for number in range(1000):
                await writer.write({"n": number})
        assert await stored(realtime, run.id, "progress") == [{"n": number} for number in range(1000)]


async def test_a_writer_starts_the_realtime_on_first_use() -> None:
    """The writer used a broker that was not open yet."""
    broker = RemoteBroker()
    async with make(broker=broker) as first, first.open_run("report") as run:
        broker.entered = False
        realtime = make(broker=broker)
        async with realtime.writer(run=run.id) as writer:
            await writer.write(1)
        await realtime.stop()
        broker.entered = True
        assert await stored(first, run.id) == [1]


async def test_a_writer_needs_a_run() -> None:
    async with make() as realtime:
        with pytest.raises(NoCurrentRun):
            realtime.writer()
        with pytest.raises(RunNotFound):
            async with realtime.writer(run="run_unknown"):
                raise AssertionError


async def test_leaving_a_writer_does_not_end_the_stream() -> None:
    async with make() as realtime:
        async with realtime.open_run("report") as run:
            for number in range(2):
                async with realtime.writer() as writer:
                    await writer.write(number)
            await realtime.append(2)
        assert [chunk async for chunk in realtime.read(run)] == [0, 1, 2]
        with pytest.raises(StreamClosed):
            async with realtime.writer(run=run) as writer:
                await writer.write(3)


async def test_merged_sources_interleave_with_writes() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        async with realtime.writer() as writer:
            first = writer.merge(numbers(50))
            await writer.write("mine")
            second = writer.merge([f"s{number}" for number in range(50)])
            assert [item async for item in first] == list(range(50))
        chunks = await stored(realtime, run.id)
        assert [chunk for chunk in chunks if isinstance(chunk, int)] == list(range(50))
        assert [chunk for chunk in chunks if str(chunk).startswith("s")] == [f"s{number}" for number in range(50)]
        assert chunks.count("mine") == 1
        assert (first.result.chunks, second.result.chunks) == (50, 50)


async def test_a_chunk_that_cannot_be_written_is_named_and_the_writer_continues() -> None:
    async with make(limits=Limits(chunk_bytes=10)) as realtime, realtime.open_run("report") as run:
        async with realtime.writer("ai") as writer:
            await writer.write("zero")
            with pytest.raises(EncodingError, match="chunk 1 of stream 'ai' of run 'run_.*': object has no JSON form"):
                await writer.write(object())
            with pytest.raises(LimitExceeded, match="chunk 1 of stream 'ai'.*: a chunk is 11 bytes, limit 10"):
                await writer.write("123456789")
            await writer.write("one")
        assert await stored(realtime, run.id, "ai") == ["zero", "one"]


async def test_a_writer_with_encode_publishes_what_it_returns() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        async with realtime.writer(encode=lambda number: None if number == 2 else {"n": number}) as writer:
            for number in range(4):
                await writer.write(number)
            writer.merge([2, 5])
            writer.merge([6], encode=str)
            with pytest.raises(EncodingError, match="chunk 4 of stream"):
                await writer.write({"a": object()})
        chunks = await stored(realtime, run.id)
        assert chunks[:3] == [{"n": 0}, {"n": 1}, {"n": 3}]
        assert {str(chunk) for chunk in chunks[3:]} == {"{'n': 5}", "6"}


async def test_a_typed_stream_with_encode_takes_other_objects() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        stream = realtime.define_stream("tokens", Token)
        pipe = stream.pipe([1, 2], encode=lambda number: Token(str(number)))
        assert [item async for item in pipe] == [1, 2]
        await pipe.wait_until_complete()

        def encode(text: str) -> Token | None:
            return Token(text) if text else None

        async with stream.writer(encode=encode) as writer:
            await writer.write("three")
            await writer.write("")
    assert [token.text async for token in stream.read(run)] == ["1", "2", "three"]


async def test_an_error_of_a_merged_source_is_raised_after_everything_is_stored() -> None:
    """The error was raised while other sources were still running."""
    broker = RemoteBroker()
    async with make(broker=broker) as realtime:
        async with realtime.open_run("report") as run:
            with pytest.raises(ConnectionError):
                async with realtime.writer() as writer:
                    writer.merge(numbers(1, ConnectionError("to the model")))
                    writer.merge(numbers(200))
                    await writer.write("mine")
            assert len(await stored(realtime, run.id)) == 202
        assert (await realtime.get_run(run)).status is Status.COMPLETED, "the host saw the error"


async def test_an_exception_in_the_body_stops_merged_sources_and_stores_writes() -> None:
    """Chunks written just before were rejected because the run failed before they were sent."""
    closed: list[str] = []
    broker = RemoteBroker()

    async def let_go(hold: anyio.Event) -> None:
        await steps(50)
        hold.set()

    async with make(broker=broker) as realtime, anyio.create_task_group() as group:
        with pytest.raises(KeyError):
            async with realtime.open_run("report") as run:
                async with realtime.writer() as writer:
                    writer.merge(endless(closed, "a"))
                    writer.merge(endless(closed, "b"))
                    await steps(20)
                    broker.hold = anyio.Event()
                    group.start_soon(let_go, broker.hold)
                    await writer.write("mine")
                    raise KeyError
        assert sorted(closed) == ["a", "b"]
        assert sorted(await stored(realtime, run.id)) == ["a", "b", "mine"]


async def test_cancelling_the_body_stops_every_merged_source() -> None:
    """Only the first merged source was stopped, because the wait for it was cancelled too."""
    closed: list[str] = []
    async with make() as realtime, realtime.open_run("report") as run:
        pipes = []
        with anyio.CancelScope() as scope:
            async with realtime.writer() as writer:
                pipes = [writer.merge(endless(closed, name)) for name in "abc"]
                await until(lambda: all(pipe.result.chunks for pipe in pipes))
                scope.cancel()
                await anyio.sleep_forever()
        assert sorted(closed) == ["a", "b", "c"]
        assert all(repr(pipe).endswith("ended>") for pipe in pipes)
        assert sorted(await stored(realtime, run.id)) == ["a", "b", "c"]


async def test_leaving_raises_if_the_broker_stays_unavailable() -> None:
    broker = RemoteBroker()
    async with make(broker=broker, timeouts=Timeouts(append=0.01)) as realtime, realtime.open_run("report"):
        with anyio.fail_after(GUARD_S), pytest.raises(BrokerUnavailable):
            async with realtime.writer() as writer:
                broker.away = {"append"}
                await writer.write(1)
        broker.away = set()


async def test_an_unavailable_broker_does_not_hide_the_exception_of_the_body(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = RemoteBroker()
    async with make(broker=broker, timeouts=Timeouts(append=0.01)) as realtime, realtime.open_run("report"):
        with anyio.fail_after(GUARD_S), pytest.raises(KeyError):
            async with realtime.writer() as writer:
                broker.away = {"append"}
                await writer.write(1)
                raise KeyError
        broker.away = set()
    assert "chunks written to stream 'default' are not stored" in caplog.text


async def test_write_waits_while_too_many_bytes_are_pending() -> None:
    broker = RemoteBroker()
    async with make(broker=broker, limits=Limits(pending_bytes=3)) as realtime, realtime.open_run("report") as run:
        async with realtime.writer() as writer:
            broker.hold = anyio.Event()
            for number in range(3):
                await writer.write(number)
            with anyio.move_on_after(0) as scope:
                await writer.write(3)
            assert scope.cancelled_caught
            broker.hold.set()
        assert await stored(realtime, run.id) == [0, 1, 2, 3], "the cancelled write was stored once"


async def test_an_input_cannot_be_written_as_a_stream() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        await realtime.send_input(run, "a", 1)
        with pytest.raises(UsageError, match="starts with \\$"):
            await realtime.append(2, "$trigger.input:a")
