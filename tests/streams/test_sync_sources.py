"""Sync sources: collections are read inline, other iterables by a thread each."""

from __future__ import annotations

import contextvars
import enum
import gc
import subprocess
import sys
import textwrap
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from asgi_realtime.core.config import Limits, Timeouts
from asgi_realtime.core.errors import EncodingError, LimitExceeded, ServerShutdown
from asgi_realtime.streams.thread_iterator import THREAD_AHEAD
from tests.faults import make, steps, stored, until
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "source", [[1, 2, 3], (1, 2, 3), range(1, 4), deque([1, 2, 3]), {1, 2, 3}, {1: 0, 2: 0, 3: 0}.keys()]
)
async def test_plain_collections_are_read_inline(source: Any) -> None:
    async with make(limits=Limits(source_threads=1)) as realtime, realtime.open_run("report") as run:
        realtime.engine.threads.acquire()
        await realtime.pipe(source).wait_until_complete()
        assert await stored(realtime, run.id) == [1, 2, 3]


async def test_an_abandoned_list_leaves_no_generator_behind() -> None:
    """On trio, the dropped generator caused a ResourceWarning."""
    async with make(limits=Limits(pipe_buffer=3)) as realtime:
        pipe = realtime.pipe(range(10**9))
        await steps(5)
        await pipe.aclose()
    del pipe, realtime
    gc.collect()


class Threaded:
    """A sync iterable that records the threads that use it."""

    def __init__(self, count: int, error: BaseException | None = None) -> None:
        self.count = count
        self.error = error
        self.threads: list[threading.Thread] = []
        self.closed: list[str] = []

    def __iter__(self) -> Iterator[int]:
        self.threads.append(threading.current_thread())
        try:
            for number in range(self.count):
                self.threads.append(threading.current_thread())
                yield number
            if self.error is not None:
                raise self.error
        finally:
            self.threads.append(threading.current_thread())
            self.closed.append("generator")

    def close(self) -> None:
        self.threads.append(threading.current_thread())
        self.closed.append("source")


async def test_another_sync_iterable_has_one_daemon_thread() -> None:
    source = Threaded(3 * THREAD_AHEAD)
    async with make() as realtime, realtime.open_run("report") as run:
        assert [item async for item in realtime.pipe(source)] == list(range(3 * THREAD_AHEAD))
        assert await stored(realtime, run.id) == list(range(3 * THREAD_AHEAD))
        await until(lambda: realtime.engine.threads.used == 0)
    (thread,) = set(source.threads)
    assert thread is not threading.current_thread()
    assert thread.daemon
    assert source.closed == ["generator", "source"]
    thread.join(GUARD_S)
    assert not thread.is_alive()


async def test_the_thread_is_not_from_the_hosts_pool() -> None:
    limiter = anyio.to_thread.current_default_thread_limiter()
    source = Threaded(5)
    seen: list[float] = []

    def watching() -> Iterator[int]:
        for item in source:
            seen.append(limiter.borrowed_tokens)
            yield item

    async with make() as realtime:
        await realtime.pipe(watching()).wait_until_complete()
    assert seen == [0, 0, 0, 0, 0]


async def test_the_thread_has_the_callers_context() -> None:
    colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")

    def source() -> Iterator[str]:
        yield colour.get()

    async with make() as realtime, realtime.open_run("report") as run:
        colour.set("of the caller")
        await realtime.pipe(source()).wait_until_complete()
        assert await stored(realtime, run.id) == ["of the caller"]


async def test_an_error_in_the_thread_is_raised_unchanged() -> None:
    error = ConnectionError("to the model")
    source = Threaded(2, error)
    async with make() as realtime, realtime.open_run("report") as run:
        pipe = realtime.pipe(source)
        with pytest.raises(ConnectionError) as caught:
            await pipe.wait_until_complete()
        assert caught.value is error
        assert await stored(realtime, run.id) == [0, 1]
    assert source.closed == ["generator", "source"]


async def test_an_exit_in_the_thread_does_not_end_the_loop() -> None:
    async with make() as realtime, realtime.open_run("report"):
        with pytest.raises(RuntimeError, match="the source raised SystemExit"):
            await realtime.pipe(Threaded(1, SystemExit(3))).wait_until_complete()


async def test_an_iterable_without_an_iterator_fails_in_the_thread() -> None:
    class Bad:
        def __iter__(self) -> Any:
            return 3

    async with make() as realtime, realtime.open_run("report"):
        with pytest.raises(TypeError, match="non-iterator"):
            await realtime.pipe(Bad()).wait_until_complete()


class Color(enum.Enum):
    RED = "red"


async def test_the_class_of_an_enum_is_a_source() -> None:
    async with make() as realtime, realtime.open_run("report"):
        assert (await realtime.pipe(Color).wait_until_complete()).chunks == 1


async def test_an_error_while_closing_in_the_thread_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Bad(Threaded):
        def close(self) -> None:
            raise OSError("gone")

    async with make() as realtime, realtime.open_run("report"):
        assert (await realtime.pipe(Bad(1)).wait_until_complete()).chunks == 1
        await until(lambda: "closing a piped Bad failed" in caplog.text)


async def test_the_thread_reads_ahead_up_to_a_limit() -> None:
    source = Threaded(10 * THREAD_AHEAD)
    async with make(limits=Limits(pipe_buffer=1)) as realtime:
        pipe = realtime.pipe(source)
        consumer = aiter(pipe)
        assert await anext(consumer) == 0
        await until(lambda: len(source.threads) >= THREAD_AHEAD)
        await steps(100)
        assert len(source.threads) <= THREAD_AHEAD + 10
        await pipe.aclose()
        await until(lambda: bool(source.closed))
    assert source.closed == ["generator", "source"]
    assert len(set(source.threads)) == 1


async def test_the_number_of_threads_is_limited() -> None:
    go = threading.Event()

    def blocking() -> Iterator[int]:
        go.wait(GUARD_S)
        yield 1

    source = Threaded(3)
    async with make(limits=Limits(source_threads=2)) as realtime, realtime.open_run("report"):
        first = [realtime.pipe(blocking()), realtime.pipe(blocking())]
        await until(lambda: realtime.engine.threads.used == 2)
        with pytest.raises(LimitExceeded, match="2 sync sources are being read by threads, limit 2") as caught:
            await realtime.pipe(source).wait_until_complete()
        assert caught.value.status == 429
        await until(lambda: source.closed == ["source"])
        assert source.threads and source.threads[0] is not threading.current_thread()
        go.set()
        for pipe in first:
            assert (await pipe.wait_until_complete()).chunks == 1
        await until(lambda: realtime.engine.threads.used == 0)
        assert (await realtime.pipe(Threaded(3)).wait_until_complete()).chunks == 3


async def test_a_thread_that_cannot_start_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with make() as realtime, realtime.open_run("report"):
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await realtime.pipe(iter([1])).wait_until_complete()
        assert realtime.engine.threads.used == 0


async def test_a_blocked_sync_source_delays_nothing() -> None:
    go = threading.Event()
    closed: list[str] = []

    def blocking() -> Iterator[int]:
        try:
            yield 0
            go.wait(GUARD_S)
            yield 1
        finally:
            closed.append(threading.current_thread().name)

    async with make(timeouts=Timeouts(drain=0.001)) as realtime:
        pipe = realtime.pipe(blocking())
        assert await anext(pipe) == 0
        with anyio.fail_after(1):
            await realtime.stop()
        with pytest.raises(ServerShutdown):
            await pipe.wait_until_complete()
        assert closed == []
        go.set()
        await until(lambda: bool(closed))
        assert closed == ["asgi_realtime source"], "closed in its own thread, as soon as it can be"


_BLOCKED = """
    import time, sys
    import anyio
    from asgi_realtime import Realtime
    from asgi_realtime.core.config import Timeouts

    def blocking():
        yield 1
        time.sleep(600)

    async def main():
        async with Realtime(secret_key="x" * 32, timeouts=Timeouts(drain=0.01)) as realtime:
            pipe = realtime.pipe(blocking())
            await anext(pipe)
        if "lazy" in sys.argv:
            await anext(realtime.pipe(blocking()))

    anyio.run(main, backend=sys.argv[1])
    print("left")
"""


@pytest.mark.slow
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("library", ["asyncio", "trio"])
@pytest.mark.parametrize("stopped", ["stopped", "lazy"])
async def test_the_interpreter_exits_with_a_blocked_sync_source(library: str, stopped: str) -> None:
    code = textwrap.dedent(_BLOCKED)
    done = await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-c", code, library, stopped], capture_output=True, text=True, check=False
        )
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


async def test_a_source_that_outlives_its_loop_ends_silently(anyio_backend: str) -> None:
    go = threading.Event()
    closed = threading.Event()

    def blocking() -> Iterator[int]:
        try:
            yield 0
            go.wait(GUARD_S)
            yield 1
        finally:
            closed.set()

    async def main() -> None:
        async with make(timeouts=Timeouts(drain=0.001)) as realtime:
            await anext(realtime.pipe(blocking()))

    await anyio.to_thread.run_sync(lambda: anyio.run(main, backend=anyio_backend))
    go.set()
    assert await anyio.to_thread.run_sync(closed.wait, 5)


async def test_an_encoding_error_closes_a_sync_source_too() -> None:
    closed: list[str] = []

    def source() -> Iterator[object]:
        try:
            yield from (object(), object())
        finally:
            closed.append("closed")

    async with make() as realtime, realtime.open_run("report"):
        with pytest.raises(EncodingError, match="object has no JSON form"):
            await realtime.pipe(source()).wait_until_complete()
        await until(lambda: closed == ["closed"])
