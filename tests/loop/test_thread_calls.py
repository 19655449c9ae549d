"""Threads that wait for the loop of a `Realtime` while that loop ends, does not run, or is closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from asgi_realtime import Realtime, Run, ServerShutdown, Timeouts
from asgi_realtime.engine.thread_bridge import HeldRun
from asgi_realtime.loop import thread_calls
from asgi_realtime.loop.thread_calls import ThreadCall
from tests.inprocess import GUARD_S, make_realtime, run_without_anyio, until

pytestmark = pytest.mark.anyio

BACKENDS = ["asyncio", "trio"]


class Waiting:
    """A thread in a call, and its outcome."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.outcome: Any = None
        self.thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self.thread.start()

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            self.outcome = function()
        except BaseException as exc:
            self.outcome = exc

    def join(self) -> Any:
        self.thread.join(GUARD_S)
        assert not self.thread.is_alive(), "the thread waits forever"
        return self.outcome


def with_a_task() -> Realtime:
    realtime = make_realtime(timeouts=Timeouts(tick=0.01, drain=0.01))

    @realtime.task("later")
    async def later() -> None: ...

    return realtime


class Threads:
    """Threads that wait for a run which does not end, and threads that make one call after another."""

    def __init__(self, realtime: Realtime, run_id: str) -> None:
        self._calls = 0

        def repeatedly() -> None:
            while True:
                realtime.sync.get_run(run_id)
                self._calls += 1

        self._waiting = [
            Waiting(lambda: realtime.sync.result(run_id)),
            Waiting(lambda: list(realtime.sync.read(run_id))),
            Waiting(lambda: list(realtime.sync.subscribe_to_runs_with_tag("a"))),
            *(Waiting(repeatedly) for _ in range(4)),
        ]

    @property
    def are_busy(self) -> bool:
        return self._calls > 50

    def outcomes(self) -> list[Any]:
        return [waiting.join() for waiting in self._waiting]


async def in_threads(realtime: Realtime) -> Threads:
    handle = await realtime.trigger("later", delay="1h", tags="a")
    threads = Threads(realtime, handle.id)
    await until(lambda: threads.are_busy)
    return threads


def assert_all_ended(threads: Threads) -> None:
    """Waiting calls raise `ServerShutdown`; calls that start later can also raise that the `Realtime` does not run."""
    outcomes = threads.outcomes()
    assert [type(outcome) for outcome in outcomes[:3]] == [ServerShutdown] * 3
    assert {type(outcome) for outcome in outcomes[3:]} <= {ServerShutdown, RuntimeError}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stop_ends_the_calls_of_threads(backend: str) -> None:
    """They raised the cancellation of the job, which is not an error and concerns only the loop."""
    threads: list[Threads] = []

    async def main() -> None:
        realtime = with_a_task()
        async with realtime:
            threads.append(await in_threads(realtime))

    run_without_anyio(main, backend)
    assert_all_ended(threads[0])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loop_that_ends_without_a_stop_leaves_no_thread_waiting(backend: str) -> None:
    """On asyncio a call made between the cancellation of all tasks and the closing of the loop waited forever."""
    threads: list[Threads] = []

    async def main() -> None:
        threads.append(await in_threads(with_a_task()))

    run_without_anyio(main, backend)
    assert_all_ended(threads[0])


def test_a_loop_of_this_thread_that_is_not_running_is_an_error() -> None:
    loop = asyncio.new_event_loop()
    realtime = make_realtime()
    loop.run_until_complete(realtime.start())
    with pytest.raises(RuntimeError, match="on an event loop of this thread that is not running"):
        realtime.sync.get_run("run_x")
    with pytest.raises(RuntimeError, match="is not running"):
        next(realtime.sync.read("run_x"))
    loop.run_until_complete(realtime.stop())
    loop.close()


def test_a_closed_loop_leaves_no_thread_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_calls, "CHECK_PERIOD_S", 0.01)
    loop = asyncio.new_event_loop()
    realtime = make_realtime()
    loop.run_until_complete(realtime.start())
    supervisor = realtime.engine.supervisor
    assert supervisor is not None

    async def nothing() -> None: ...

    waiting = Waiting(lambda: ThreadCall(supervisor, nothing).make())
    while waiting.thread.is_alive():  # it posts its call at any time
        loop.run_until_complete(asyncio.sleep(0))
    assert waiting.join() is None
    late = Waiting(lambda: ThreadCall(supervisor, nothing).make())  # posted to a loop that never runs again
    while not loop._ready:  # type: ignore[attr-defined]
        pass
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.close()
    assert isinstance(late.join(), ServerShutdown)
    assert isinstance(Waiting(lambda: ThreadCall(supervisor, nothing).make()).join(), ServerShutdown)


async def test_a_call_on_an_ended_supervisor_raises() -> None:
    async with make_realtime() as realtime:
        supervisor = realtime.engine.supervisor
    assert supervisor is not None

    async def nothing() -> None: ...

    waiting = Waiting(lambda: ThreadCall(supervisor, nothing).make())
    await until(lambda: not waiting.thread.is_alive())
    assert isinstance(waiting.outcome, ServerShutdown)


async def test_a_call_raises_what_the_function_raises() -> None:
    realtime = make_realtime()

    async def fails() -> None:
        raise ValueError("on the loop")

    async def exits() -> None:
        raise SystemExit(3)

    async def returns_its_thread() -> int:
        await anyio.lowlevel.checkpoint()
        return threading.get_ident()

    async with realtime:
        supervisor = realtime.engine.supervisor
        assert supervisor is not None
        threads = [Waiting(ThreadCall[Any](supervisor, call).make) for call in (fails, exits, returns_its_thread)]
        await until(lambda: not any(waiting.thread.is_alive() for waiting in threads))
        error, exit, ident = [waiting.outcome for waiting in threads]
        assert (str(error), exit.code, ident) == ("on the loop", 3, threading.get_ident())
        assert realtime.engine.supervisor is supervisor


async def test_an_iterator_ends_with_a_restart() -> None:
    realtime = make_realtime()
    async with realtime:
        async with realtime.open_run("r") as run:
            await realtime.append("a")
        reader = realtime.sync.read(run)
        first = Waiting(lambda: next(reader))
        await until(lambda: not first.thread.is_alive())
        assert first.outcome == "a"
    async with realtime:
        second = Waiting(lambda: next(reader))
        await until(lambda: not second.thread.is_alive())
        assert isinstance(second.outcome, ServerShutdown)


async def test_a_run_that_is_being_opened_during_a_stop_raises() -> None:
    """It raised a bare `AssertionError`."""
    realtime = make_realtime()
    async with realtime:
        supervisor = realtime.engine.supervisor
        assert supervisor is not None

        @asynccontextmanager
        async def opened() -> AsyncIterator[Run]:
            supervisor.request_stop()
            await anyio.sleep_forever()
            yield NotImplemented

        waiting = Waiting(ThreadCall(supervisor, HeldRun(supervisor, opened()).enter).make)
        await until(lambda: not waiting.thread.is_alive())
        assert isinstance(waiting.outcome, ServerShutdown)
