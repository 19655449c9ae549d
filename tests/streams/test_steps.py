"""Sources that block the event loop."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncIterator, Generator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime.streams import steps
from asgi_realtime.streams.steps import WatchedSteps
from tests.faults import make

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("asgi_realtime.streams.steps", "asgi_realtime.streams.pipe"):
        monkeypatch.setattr(f"{module}.LONG_STEP_S", 0.03)
    monkeypatch.setattr(steps, "_NOTICEABLE_S", 0.005)


def block() -> None:
    time.sleep(0.04)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("first", [0, 3], ids=["first step", "later step"])
async def test_a_source_that_blocks_the_event_loop_gets_one_warning(
    first: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def words() -> AsyncIterator[int]:
        for number in range(first + 4):
            if number >= first:
                block()
            yield number

    async with make() as realtime, realtime.open_run("report") as run:
        pipe = realtime.pipe(words())
        assert [item async for item in pipe] == list(range(first + 4))
        await pipe.wait_until_complete()
    [warning] = warnings(caplog)
    assert "words of stream 'default' of run " + run.id in warning
    assert re.search(r"blocked the event loop for \d+\.\d\d s: use an async client", warning)


async def test_a_source_that_waits_gets_none(caplog: pytest.LogCaptureFixture) -> None:
    async def words() -> AsyncIterator[int]:
        for number in range(4):
            await anyio.sleep(0.04)
            yield number

    async with make() as realtime, realtime.open_run("report"):
        assert (await realtime.pipe(words()).wait_until_complete()).chunks == 4
    assert warnings(caplog) == []


async def test_readers_get_a_chunk_before_the_next_step_blocks() -> None:
    seen: list[int] = []

    async def words() -> AsyncIterator[int]:
        for number in range(6):
            block()
            lag.append(number - len(seen))
            yield number

    lag: list[int] = []
    async with make() as realtime:
        pipe = realtime.pipe(words())
        async for chunk in realtime.read(pipe.run_id):
            seen.append(chunk)  # noqa: PERF401
    assert seen == list(range(6))
    assert max(lag) <= 1, "the chunk before was read"


# The awaitable that is driven by hand


async def suspending(count: int) -> AsyncIterator[int]:
    for number in range(count):
        await anyio.lowlevel.checkpoint()
        yield number


class Returned:
    """An awaitable whose iterator is no generator."""

    def __await__(self) -> Generator[Any, Any, int]:
        return iter(())  # type: ignore[return-value]


async def watch(iterator: Any) -> list[int]:
    got: list[int] = []
    watched: WatchedSteps[int] = WatchedSteps(iterator, where="stream 'a'")
    while not watched.ended:
        got.extend([item async for item in watched])
    return got


async def test_watched_steps_return_what_the_source_does() -> None:
    assert await watch(suspending(3)) == [0, 1, 2]
    assert await watch(suspending(0)) == []


async def test_watched_steps_raise_what_the_source_does() -> None:
    async def source() -> AsyncIterator[int]:
        yield 1
        await anyio.lowlevel.checkpoint()
        raise ConnectionError("to the model")

    with pytest.raises(ConnectionError):
        await watch(source())


async def test_a_cancellation_reaches_the_source() -> None:
    cleaned: list[bool] = []

    async def source() -> AsyncIterator[int]:
        try:
            await anyio.sleep_forever()
            yield 1
        finally:
            cleaned.append(True)

    with anyio.move_on_after(0.01) as scope:
        await watch(source())
    assert scope.cancelled_caught
    assert cleaned == [True]


async def test_an_awaitable_need_not_be_a_generator() -> None:
    class Source:
        left = 2

        def __aiter__(self) -> Source:
            return self

        def __anext__(self) -> Any:
            self.left -= 1
            if self.left < 0:
                raise StopAsyncIteration
            return Returned()

    assert await watch(Source()) == [None, None]
