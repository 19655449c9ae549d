"""Blocking calls that an exception in their thread interrupts, as the time limit of a job queue does."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

from asgi_realtime import Status, Timeouts
from asgi_realtime.core.runs import StoredRecord, run_topic
from asgi_realtime.loop import thread_calls
from asgi_realtime.loop.thread_calls import ThreadCall
from tests.blocking import GUARD_S, Shared, run_program, wait_for, with_tasks

pytestmark = pytest.mark.anyio


@pytest.mark.slow
def test_an_exception_that_interrupts_an_execution_cancels_its_run() -> None:
    """The time limit of a queue ended the call, but the run continued on the loop's thread."""
    printed = run_program("""
        class TimeLimit(Exception): ...

        def on_alarm(number, frame):
            raise TimeLimit

        signal.signal(signal.SIGALRM, on_alarm)
        for used in (False, True):
            handle = realtime.sync.trigger("wait")
            if not used:
                realtime.sync.close()

            def alarm_once_it_runs():
                while realtime.engine.executions.get(handle.id) is None:
                    time.sleep(0.001)
                signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

            threading.Thread(target=alarm_once_it_runs).start()
            try:
                realtime.sync.execute(handle.id)
            except TimeLimit:
                try:
                    realtime.sync.result(handle)
                except RunCanceled:
                    print(realtime.sync.get_run(handle).status)
    """)
    assert printed == "CANCELED\nCANCELED\n"


class TimeLimit(Exception):
    """Raised by a signal handler, as job queues do."""


@contextmanager
def interrupted_at(line: int) -> Iterator[None]:
    """Raise `TimeLimit` when this thread is about to execute the n-th line of the functions that the body calls."""
    seen = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal seen
        seen += event == "line"
        if seen == line:
            raise TimeLimit
        return trace

    before = sys.gettrace()
    with pytest.raises(TimeLimit):
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)


@pytest.mark.slow
def test_a_call_that_is_interrupted_at_any_line_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it had been posted and before the wait began, the call continued. While the wait held a lock that the loop
    needs, the loop would have waited for it forever."""
    monkeypatch.setattr(thread_calls, "CHECK_PERIOD_S", 0.001)  # so that the waiting thread executes lines
    realtime = with_tasks(broker=Shared(), timeouts=Timeouts(tick=0.01, drain=0.02))
    begun = ended = 0

    async def wait() -> None:
        nonlocal begun, ended
        begun += 1
        try:
            await anyio.sleep_forever()
        finally:
            ended += 1

    def interrupt_at_each_line() -> None:
        bridge = realtime.sync._bridge
        supervisor = bridge.supervisor()
        for line in range(1, 120):
            with interrupted_at(line):
                ThreadCall(supervisor, wait).make()
            bridge.call(anyio.lowlevel.checkpoint)  # after this the interrupted call has begun, if it ever does
            wait_for(lambda: ended == begun)

    try:
        # In a thread of its own, which keeps the exception that is being handled at the interrupted line.
        with ThreadPoolExecutor() as pool:
            pool.submit(interrupt_at_each_line).result(GUARD_S)
        assert ended > 50
    finally:
        realtime.sync.close()


def test_an_interrupted_call_leaves_no_waiter() -> None:
    realtime = with_tasks(broker=Shared(), timeouts=Timeouts(tick=0.01, drain=0.02))

    @realtime.task("wait")
    async def wait() -> None:
        await anyio.sleep_forever()

    def on_signal(number: int, frame: object) -> None:
        raise TimeLimit

    def interrupted(fact: Callable[[], object]) -> None:
        """Wait for a result in this thread until a signal interrupts it, once the fact is true."""

        def interrupt() -> None:
            while not fact():
                time.sleep(0.001)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with pytest.raises(TimeLimit):
                realtime.sync.result(handle)
        finally:
            thread.join()

    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        handle = realtime.sync.trigger("wait")
        waiting = realtime.broker._topics[run_topic(handle.id)].waiting  # type: ignore[attr-defined]
        wait_for(lambda: len(waiting) == 1)  # the process that executes the run follows it
        for _ in range(3):
            interrupted(lambda: len(waiting) > 1)
            wait_for(lambda: len(waiting) == 1)
    finally:
        realtime.sync.close()
        signal.signal(signal.SIGUSR1, before)


def test_a_run_whose_opening_is_interrupted_does_not_stay_open() -> None:
    """An interrupted `open_run` left the run EXECUTING until the server stopped."""
    broker = Shared()
    realtime = with_tasks(broker=broker)
    commit, stored = broker.commit, threading.Event()

    async def interrupted_commit(record: StoredRecord, **options: Any) -> int:
        version = await commit(record, **options)
        if record.status is Status.EXECUTING:
            stored.set()
            with suppress(anyio.get_cancelled_exc_class()):
                await anyio.sleep_forever()  # until the signal cancels the call
        return version

    def on_signal(number: int, frame: object) -> None:
        raise TimeLimit

    def interrupt() -> None:
        assert stored.wait(GUARD_S)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, on_signal)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        realtime.sync.trigger("double", 1)
        broker.commit = interrupted_commit  # type: ignore[method-assign]
        with pytest.raises(TimeLimit):
            with realtime.sync.open_run("r"):
                raise AssertionError("it was interrupted before")
        (run,) = [run for run in broker._runs.values() if run.record.task == "r"]
        wait_for(lambda: run.record.status is Status.CANCELED)
    finally:
        thread.join()
        realtime.sync.close()
        signal.signal(signal.SIGUSR1, before)
