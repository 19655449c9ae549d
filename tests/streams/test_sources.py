"""Sources: how they are opened, read and closed."""

from __future__ import annotations

import contextvars
import enum
import gc
import subprocess
import sys
import textwrap
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from asgi_realtime.core.config import Limits, Timeouts
from asgi_realtime.core.errors import EncodingError, InvalidSource, LimitExceeded, ServerShutdown
from asgi_realtime.core.run_errors import RunCanceled
from asgi_realtime.core.runs import Status
from asgi_realtime.streams.thread_iterator import THREAD_AHEAD
from tests.faults import make, others, steps, stored, until
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio

Closed = list[str]
Make = Callable[[Closed, Callable[[], Any]], Any]

# Both protocols


class Proxy:
    """As the proxy of an instrumentation: it has both protocols, whatever it wraps."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        self.closed = 0

    def __iter__(self) -> Any:
        return iter(self.wrapped)

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        return await self.wrapped.__anext__()

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("broken", ["__anext__", "__aiter__", "async for"])
async def test_a_source_with_a_broken_async_protocol_is_read_by_a_thread(broken: str) -> None:
    class Broken(Proxy):
        def __aiter__(self) -> Any:
            if broken == "__aiter__":
                raise AttributeError("'list' object has no attribute '__aiter__'")
            return self._items() if broken == "async for" else self

        async def _items(self) -> AsyncIterator[Any]:
            async for item in self.wrapped:
                yield item

    source = Broken([1, 2, 3])
    async with make() as realtime, realtime.open_run("report") as run:
        pipe: Any = realtime.pipe(source)
        assert [item async for item in pipe] == [1, 2, 3]
        assert (await pipe.wait_until_complete()).chunks == 3
        assert await stored(realtime, run.id) == [1, 2, 3]
    assert source.closed == 1


async def test_a_source_with_both_protocols_is_read_by_the_async_one() -> None:
    async def items() -> AsyncIterator[int]:
        yield 1
        yield 2

    source = Proxy(items())
    async with make() as realtime, realtime.open_run("report"):
        pipe: Any = realtime.pipe(source)
        assert [item async for item in pipe] == [1, 2]
        await pipe.wait_until_complete()
    assert source.closed == 1


async def test_another_error_of_the_async_protocol_is_an_error_of_the_source() -> None:
    async def items() -> AsyncIterator[int]:
        raise AttributeError("'NoneType' object has no attribute 'choices'")
        yield 1

    async with make() as realtime, realtime.open_run("report"):
        with pytest.raises(AttributeError, match="choices"):
            await realtime.pipe(Proxy(items())).wait_until_complete()


# Closing. Each of these gives a, b, then asks `third` what to do, then gives c.


def _generator(closed: Closed, third: Callable[[], Any]) -> Any:
    async def source() -> AsyncIterator[Any]:
        try:
            yield "a"
            yield "b"
            yield await third()
            yield "c"
        finally:
            with anyio.CancelScope(shield=True):  # the cancellation is raised here
                await steps(2)
            closed.append("generator")

    return source()


class _Iterator:
    def __init__(self, closed: Closed, third: Callable[[], Any]) -> None:
        self.closed = closed
        self.inner = _generator([], third)

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        return await self.inner.__anext__()


class _AcloseWins(_Iterator):
    async def aclose(self) -> None:
        await steps(2)
        await self.inner.aclose()
        self.closed.append("aclose")

    def close(self) -> None:
        self.closed.append("close")


class _AwaitableClose(_Iterator):
    async def close(self) -> None:
        await steps(2)
        await self.inner.aclose()
        self.closed.append("awaited close")


class _SyncClose(_Iterator):
    def close(self) -> None:
        self.closed.append("sync close")


class _Response:
    """Iterates through a generator and has its own close, like the streams of openai and anthropic."""

    def __init__(self, closed: Closed, third: Callable[[], Any]) -> None:
        self.closed = closed
        self.third = third

    def __aiter__(self) -> AsyncIterator[Any]:
        return _generator(self.closed, self.third)  # type: ignore[no-any-return]

    async def close(self) -> None:
        await steps(1)
        self.closed.append("response")


def _manager(closed: Closed, third: Callable[[], Any]) -> Any:
    @asynccontextmanager
    async def manager() -> AsyncIterator[Any]:
        async with anyio.create_task_group():
            try:
                yield _Response(closed, third)
            finally:
                await steps(2)
                closed.append("manager")

    return manager()


SOURCES: list[tuple[str, Make, Closed]] = [
    ("generator", _generator, ["generator"]),
    ("aclose", _AcloseWins, ["aclose"]),
    ("awaitable close", _AwaitableClose, ["awaited close"]),
    ("iterator and source", _Response, ["generator", "response"]),
    ("manager", _manager, ["generator", "response", "manager"]),
]


@pytest.mark.parametrize("ending", ["exhausted", "raises", "unencodable", "aclose", "canceled", "shutdown", "lost"])
@pytest.mark.parametrize(("make_source", "expected"), [pytest.param(m, e, id=name) for name, m, e in SOURCES])
async def test_a_source_is_closed_in_every_case(make_source: Make, expected: Closed, ending: str) -> None:
    closed: Closed = []
    reached = anyio.Event()

    async def third() -> Any:
        reached.set()
        if ending == "exhausted":
            return "third"
        if ending == "raises":
            raise ConnectionError("to the model")
        if ending == "unencodable":
            return object()
        await anyio.sleep_forever()

    before = others()
    async with make(timeouts=Timeouts(drain=0.001)) as realtime:
        pipe = realtime.pipe(make_source(closed, third), run="run_unknown" if ending == "lost" else None)
        with anyio.fail_after(GUARD_S):
            if ending != "lost":
                await reached.wait()
            if ending == "aclose":
                await pipe.aclose()
            if ending == "canceled":
                await realtime.cancel(pipe.run_id)
            if ending == "shutdown":
                await realtime.stop()
            await pipe.settled()
        if ending == "lost":  # a generator that was not started runs no cleanup
            assert closed == [part for part in expected if part != "generator"]
        else:
            assert closed == expected
            assert (await stored(realtime, pipe.run_id))[:2] == ["a", "b"]
        if ending == "raises":
            assert isinstance(pipe.error, (ConnectionError, BaseExceptionGroup))
    assert others() <= before
    gc.collect()


async def test_close_can_be_sync() -> None:
    closed: Closed = []

    async def third() -> str:
        return "third"

    async with make() as realtime:
        await realtime.pipe(_SyncClose(closed, third)).wait_until_complete()
    assert closed == ["sync close"]


async def test_a_source_needs_no_close() -> None:
    async def third() -> str:
        return "third"

    async with make() as realtime:
        assert (await realtime.pipe(_Iterator([], third)).wait_until_complete()).chunks == 4


class _Resisting:
    """Yields one item; closing it fails or hangs."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.yielded = False
        self.closed = False

    def __aiter__(self) -> AsyncIterator[int]:
        return self if self.how != "hangs in the iterator" else _Resisting("hangs")

    async def __anext__(self) -> int:
        if self.yielded:
            raise StopAsyncIteration
        self.yielded = True
        return 1

    async def aclose(self) -> None:
        self.closed = True
        if self.how == "fails":
            raise OSError("the connection is lost")
        if self.how == "hangs":
            await anyio.sleep_forever()


async def test_an_error_while_closing_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with make() as realtime, realtime.open_run("report"):
        assert (await realtime.pipe(_Resisting("fails")).wait_until_complete()).chunks == 1
    assert "closing a piped _Resisting failed" in caplog.text


async def test_closing_has_a_time_limit(caplog: pytest.LogCaptureFixture) -> None:
    async with make(timeouts=Timeouts(close=0.01)) as realtime, realtime.open_run("report"):
        with anyio.fail_after(GUARD_S):
            assert (await realtime.pipe(_Resisting("hangs")).wait_until_complete()).chunks == 1
    assert "closing a piped _Resisting took longer than 0.01 s" in caplog.text


async def test_an_iterator_that_hangs_does_not_keep_its_source_from_being_closed() -> None:
    """Both used to share one time limit, so a stuck iterator kept its connection open."""
    source = _Resisting("hangs in the iterator")
    async with make(timeouts=Timeouts(close=0.01)) as realtime, realtime.open_run("report"):
        with anyio.fail_after(GUARD_S):
            await realtime.pipe(source).wait_until_complete()
    assert source.closed


# Managers


class _Manager:
    def __init__(self, result: Any, *, leaving: Callable[[], Any] | None = None, suppress: bool = False) -> None:
        self.result = result
        self.leaving = leaving
        self.suppress = suppress
        self.task: set[int] = set()
        self.left_with: list[BaseException | None] = []

    async def __aenter__(self) -> Any:
        self.task.add(anyio.get_current_task().id)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    async def __aexit__(self, exc_type: object, exc: BaseException | None, tb: object) -> bool:
        self.task.add(anyio.get_current_task().id)
        self.left_with.append(exc)
        if self.leaving is not None:
            await self.leaving()
        return self.suppress


async def _numbers(count: int, error: Exception | None = None) -> AsyncIterator[int]:
    for number in range(count):
        yield number
    if error is not None:
        raise error


async def test_a_manager_is_entered_and_exited_by_the_job() -> None:
    manager = _Manager(_numbers(3))
    async with make() as realtime, realtime.open_run("report"):
        assert [item async for item in realtime.pipe(manager)] == [0, 1, 2]
    assert len(manager.task) == 1
    assert anyio.get_current_task().id not in manager.task
    assert manager.left_with == [None]


@pytest.mark.parametrize("kind", [list, iter])
async def test_a_manager_can_return_a_sync_iterable(kind: Callable[[list[int]], Any]) -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        await realtime.pipe(_Manager(kind([1, 2]))).wait_until_complete()
        assert await stored(realtime, run.id) == [1, 2]


async def test_a_manager_that_cannot_be_entered_fails_the_pipe() -> None:
    async with make() as realtime:
        pipe = realtime.pipe(_Manager(ConnectionError("to the model")))
        with pytest.raises(ConnectionError):
            await pipe.wait_until_complete()


async def test_a_manager_that_returns_no_source_is_exited() -> None:
    manager = _Manager("text")
    async with make() as realtime:
        with pytest.raises(InvalidSource, match="a str is not a source"):
            await realtime.pipe(manager).wait_until_complete()
    assert len(manager.left_with) == 1


async def test_a_manager_sees_the_error_of_its_iterable() -> None:
    error = ConnectionError("to the model")
    manager = _Manager(_numbers(1, error))
    async with make() as realtime:
        with pytest.raises(ConnectionError):
            await realtime.pipe(manager).wait_until_complete()
    assert manager.left_with == [error]


async def test_a_manager_can_suppress_an_error() -> None:
    manager = _Manager(_numbers(1, ConnectionError("to the model")), suppress=True)
    async with make() as realtime:
        pipe = realtime.pipe(manager)
        assert (await pipe.wait_until_complete()).chunks == 1
        assert (await realtime.runs.ended(pipe.run_id)).status is Status.COMPLETED


async def test_the_exit_of_a_manager_is_shielded_from_the_cancellation_of_its_run() -> None:
    """The cancellation of a run used to interrupt the manager's cleanup at its first `await`."""
    left: list[bool] = []

    async def leave() -> None:
        await steps(5)
        left.append(True)

    async def endless() -> AsyncIterator[int]:
        yield 0
        await anyio.sleep_forever()

    async with make() as realtime:
        pipe = realtime.pipe(_Manager(endless(), leaving=leave))
        assert await anext(pipe) == 0
        await realtime.cancel(pipe.run_id)
        with pytest.raises(RunCanceled):
            await pipe.wait_until_complete()
    assert left == [True]


@pytest.mark.parametrize("fails", [False, True])
async def test_the_exit_of_a_manager_has_a_time_limit(fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    error = ConnectionError("to the model") if fails else None
    manager = _Manager(_numbers(1, error), leaving=anyio.sleep_forever)
    async with make(timeouts=Timeouts(close=0.01)) as realtime:
        pipe = realtime.pipe(manager)
        with anyio.fail_after(GUARD_S):
            if fails:
                with pytest.raises(ConnectionError):
                    await pipe.wait_until_complete()
            else:
                assert (await pipe.wait_until_complete()).chunks == 1
    assert "closing a piped _Manager took longer than 0.01 s" in caplog.text


async def test_a_source_inside_async_with_must_be_awaited_inside() -> None:
    async with make() as realtime, realtime.open_run("report") as run:
        async with anyio.create_task_group():
            send, receive = anyio.create_memory_object_stream[int](10)
            async with send, receive:
                for number in range(3):
                    send.send_nowait(number)
                send.close()
                await realtime.pipe(receive).wait_until_complete()
        assert await stored(realtime, run.id) == [0, 1, 2]


# Sync sources


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


# The real clients


def _body(events: list[str]) -> bytes:
    return "".join(f"data: {event}\n\n" for event in events).encode()


_OPENAI = _body(
    [
        '{"id":"c","object":"chat.completion.chunk","created":1,"model":"m",'
        f'"choices":[{{"index":0,"delta":{{"content":"{word}"}},"finish_reason":null}}]}}'
        for word in ("one", "two", "three")
    ]
    + ["[DONE]"]
)


def _http(client: Any) -> Any:
    """The HTTP library of a client package: httpx, or its successor."""
    name = client.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]
    return sys.modules[name]


def _watched(http: Any, data: bytes, closed: list[bool]) -> Any:
    """A response body that records its close."""

    class Body(http.AsyncByteStream):  # type: ignore[misc]
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for line in data.splitlines(keepends=True):
                await anyio.lowlevel.checkpoint()
                yield line

        async def aclose(self) -> None:
            closed.append(True)

    return Body()


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_stream_of_the_openai_client_is_piped_and_closed(stopped: bool, anyio_backend: str) -> None:
    import openai

    closed: list[bool] = []
    library = _http(openai)
    body = _watched(library, _OPENAI, closed)
    answer = {"headers": {"content-type": "text/event-stream"}, "stream": body}
    transport = library.MockTransport(lambda request: library.Response(200, **answer))
    async with (
        library.AsyncClient(transport=transport) as http,
        make() as realtime,
        realtime.open_run("chat") as run,
    ):
        client = openai.AsyncOpenAI(api_key="none", base_url="http://model", http_client=http)
        completion = await client.chat.completions.create(model="m", messages=[], stream=True)
        pipe = realtime.pipe(completion)
        text = []
        async for chunk in pipe:
            text.append(chunk.choices[0].delta.content)
            if stopped:
                await pipe.aclose()
                break
        await pipe.wait_until_complete()
        assert closed
        chunks = await stored(realtime, run.id)
        if not stopped:
            assert text == ["one", "two", "three"]
            assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"content": word} for word in text]
            assert set(chunks[0]) == {"id", "object", "created", "model", "choices"}, "as the API sent it"


def _anthropic_body() -> bytes:
    events = [
        '{"type":"message_start","message":{"id":"m","type":"message","role":"assistant","content":[],"model":"m",'
        '"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":1,"output_tokens":1}}}',
        '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"one"}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"two"}}',
        '{"type":"content_block_stop","index":0}',
        '{"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"output_tokens":2}}',
        '{"type":"message_stop"}',
    ]
    kinds = [event.split('"')[3] for event in events]
    return "".join(f"event: {kind}\ndata: {event}\n\n" for kind, event in zip(kinds, events, strict=True)).encode()


def _anthropic(body: bytes) -> Any:
    anthropic = pytest.importorskip("anthropic")
    library = _http(anthropic)
    answer = {"headers": {"content-type": "text/event-stream"}, "content": body}
    transport = library.MockTransport(lambda request: library.Response(200, **answer))
    return anthropic.AsyncAnthropic(
        api_key="none", base_url="http://model", http_client=library.AsyncClient(transport=transport)
    )


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_manager_of_the_anthropic_client_is_piped_and_closed(stopped: bool, anyio_backend: str) -> None:
    async with _anthropic(_anthropic_body()) as client, make() as realtime, realtime.open_run("chat") as run:
        stream = client.messages.stream(model="m", max_tokens=10, messages=[{"role": "user", "content": "hi"}])
        pipe = realtime.pipe(stream)
        text = ""
        async for event in pipe:
            if event.type == "text":
                text += event.text
                if stopped:
                    await pipe.aclose()
                    break
        await pipe.wait_until_complete()
        assert text == ("one" if stopped else "onetwo")
        kinds = [chunk["type"] for chunk in await stored(realtime, run.id)]
        assert "text" in kinds
        if not stopped:
            assert kinds[-1] == "message_stop"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_raw_stream_of_the_anthropic_client_is_piped_and_closed(anyio_backend: str) -> None:
    async with _anthropic(_anthropic_body()) as client, make() as realtime, realtime.open_run("chat") as run:
        stream = await client.messages.create(
            model="m", max_tokens=10, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        await realtime.pipe(stream).wait_until_complete()
        chunks = await stored(realtime, run.id)
        assert chunks[2] == {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "one"}}
        assert len(chunks) == 7


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_stream_of_the_sync_openai_client_is_piped_and_closed(anyio_backend: str) -> None:
    import openai

    library = _http(openai)
    answer = {"headers": {"content-type": "text/event-stream"}, "content": _OPENAI}
    transport = library.MockTransport(lambda request: library.Response(200, **answer))
    with library.Client(transport=transport) as http:
        client = openai.OpenAI(api_key="none", base_url="http://model", http_client=http)
        completion = client.chat.completions.create(model="m", messages=[], stream=True)
        async with make() as realtime, realtime.open_run("chat"):
            assert (await realtime.pipe(completion).wait_until_complete()).chunks == 3


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_completion_that_is_not_a_stream_is_rejected(anyio_backend: str) -> None:
    """Without `stream=True` the client returns a model, and iterating that yields its fields."""
    import openai.types.chat

    completion = openai.types.chat.ChatCompletion(id="c", choices=[], created=1, model="m", object="chat.completion")
    async with make() as realtime:
        with pytest.raises(InvalidSource, match=r"a ChatCompletion is not a source: .*stream=True"):
            realtime.pipe(completion)


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


async def test_a_generator_with_a_task_group_is_closed_while_the_pipe_waits(caplog: pytest.LogCaptureFixture) -> None:
    """Its task group was exited in a scope that was entered later, which ended the whole `Realtime`."""

    async def words() -> AsyncIterator[str]:
        async with anyio.create_task_group():
            for word in "ab" * 50:
                yield word

    async with make(limits=Limits(pipe_buffer=4)) as realtime:
        pipe = realtime.pipe(words())
        reader = aiter(pipe)
        await anext(reader)
        await steps(20)
        await pipe.aclose()
        assert [word async for word in realtime.pipe(["still", "running"])] == ["still", "running"]
    assert caplog.messages == []
