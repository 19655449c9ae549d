"""What continues during a shutdown, for how long, and what the log says about it."""

from __future__ import annotations

import contextvars
import logging
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import anyio
import pytest

from asgi_realtime import Run, Status, Timeouts
from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.engine import shutdown as shutdown_module
from asgi_realtime.testing import AsgiClient
from tests.inprocess import GUARD_S, SECRET, make_realtime, until

pytestmark = pytest.mark.anyio

LONG = Timeouts(tick=0.01, drain=60.0, cancel=1.0)


class Answer:
    """A source that continues when the test lets it."""

    def __init__(self) -> None:
        self.rest = anyio.Event()

    async def __aiter__(self) -> AsyncIterator[str]:
        yield "first"
        await self.rest.wait()
        yield "last"


HEADERS = {"authorization": f"Bearer {SECRET}"}


async def test_a_run_that_executes_here_continues_with_its_readers() -> None:
    """A deploy failed every answer in progress."""
    realtime, answer = make_realtime(timeouts=LONG), Answer()
    async with realtime, anyio.create_task_group() as tasks:
        pipe = realtime.pipe(answer)
        client = AsgiClient(realtime)
        stream = client.stream(f"/v1/streams/{pipe.run_id}/default", headers=HEADERS)
        feed = client.stream(f"/v1/runs/{pipe.run_id}", headers={**HEADERS, "accept": "text/event-stream"})
        other = client.stream("/v1/runs?tags=a", headers={**HEADERS, "accept": "text/event-stream"})
        async with stream as of_run, feed as of_feed, other as of_tag:
            await of_run.read_until("message")
            await of_feed.read_until("ready")
            await of_tag.read_until("ready")
            realtime.begin_shutdown()
            assert [event.event for event in await of_tag.read_all_events()] == ["reconnect"]
            async with client.stream(
                f"/v1/streams/{pipe.run_id}/default", headers=HEADERS
            ) as late:  # its client has lost the connection
                await late.read_until("message")
                tasks.start_soon(realtime.stop)
                await anyio.wait_all_tasks_blocked()
                answer.rest.set()
                for response in (of_run, late):
                    assert [event.event for event in await response.read_all_events()] == ["message", "end"]
            assert [event.event for event in await of_feed.read_all_events()][-1] == "end"
    async with realtime:
        assert (await realtime.get_run(pipe.run_id)).status is Status.COMPLETED


async def test_the_readers_of_a_run_that_is_cut_get_its_end(caplog: pytest.LogCaptureFixture) -> None:
    realtime, answer = make_realtime(), Answer()
    async with realtime:
        pipe = realtime.pipe(answer, task="chat")
        async with AsgiClient(realtime).stream(f"/v1/streams/{pipe.run_id}/default", headers=HEADERS) as response:
            await response.read_until("message")
            realtime.begin_shutdown()
            assert [event.event for event in await response.read_all_events()] == ["end"]
    assert (record := caplog.records[-1]).levelno == logging.WARNING
    assert re.fullmatch(r"shutdown: 0 runs finished, 1 cut after \d+\.\d s \(chat\)", record.getMessage())


async def test_the_log_names_what_finished_and_what_was_cut(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "asgi_realtime")
    monkeypatch.setattr("asgi_realtime.engine.shutdown.QUICK_DRAIN_S", 0)
    realtime = make_realtime(timeouts=LONG)

    @realtime.task("short")
    async def short() -> None:
        await until(lambda: realtime.closing)

    @realtime.task("endless", concurrency_limit=2)
    async def endless() -> None:
        await anyio.sleep_forever()

    async with realtime:
        for task in (short, endless, endless, endless):
            await realtime.trigger(task)
        await until(lambda: len(realtime.engine.executions) == 3)
        realtime.begin_shutdown()
        await until(lambda: len(realtime.engine.executions) == 2)
        realtime.engine.shutdown.announce(quick=True)
    assert "shutdown: 1 run finished, 2 cut after" in caplog.text
    assert "(endless × 2), 1 not started" in caplog.text
    caplog.clear()
    async with realtime:
        await realtime.trigger(short)
        await until(lambda: realtime.engine.executions)
    assert "shutdown: 1 run finished, 0 cut" in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_new_runs_are_rejected_except_those_of_runs_and_of_the_host() -> None:
    realtime, go = make_realtime(timeouts=LONG), anyio.Event()

    @realtime.task("child")
    async def child() -> str:
        return "done"

    @realtime.task("parent")
    async def parent(run: Run) -> object:
        await go.wait()
        run.metadata.set("n", 1)
        await realtime.append("chunk")
        async for _ in realtime.pipe(["chunk"]):
            pass
        return await (await realtime.trigger(child)).result()

    async with realtime:
        handle = await realtime.trigger(parent)
        await until(lambda: realtime.engine.executions)
        realtime.begin_shutdown()
        await until(lambda: realtime.closing)

        async def request(call: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(ServerShutdown, match="accepts no new run"):
                await call()

        async def pipe() -> None:
            realtime.pipe(["a"])

        async def open_run() -> None:
            async with realtime.open_run("r"):
                pass

        async with anyio.create_task_group() as tasks:
            for call in (
                pipe,
                open_run,
                partial(realtime.trigger, child),
                partial(realtime.batch_trigger, [(child, None)]),
            ):
                # As a request does: in a context that does not descend from the start.
                contextvars.Context().run(tasks.start_soon, request, call)
        response = await AsgiClient(realtime).post("/api/v1/tasks/child/trigger", json={}, headers=HEADERS)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        await realtime.pipe(["from the host's shutdown"]).wait_until_complete()
        go.set()
    async with realtime:
        assert (await realtime.get_run(handle)).output == "done"


async def test_readers_of_the_host_raise_unless_their_run_executes_here() -> None:
    """A StreamingResponse over `realtime.read` held the exit of the server up."""
    realtime, answer = make_realtime(timeouts=LONG), Answer()
    waiting = make_realtime().tasks.records.new_open_run("elsewhere", {}).record
    read: list[object] = []

    async def raises(items: AsyncIterator[object]) -> None:
        with pytest.raises(ServerShutdown):
            async for _ in items:
                pass

    async def reads(items: AsyncIterator[object]) -> None:
        read.extend([item async for item in items])

    async with realtime:
        await realtime.runs.create(waiting)  # of another process
        pipe = realtime.pipe(answer)
        async with anyio.create_task_group() as tasks:
            for items in (
                realtime.read(waiting.id),
                realtime.subscribe_to_run(waiting.id),
                realtime.subscribe_to_run(waiting.id, with_streams=True),
                realtime.subscribe_to_runs_with_tag("a"),
            ):
                tasks.start_soon(raises, items)
            tasks.start_soon(reads, realtime.read(pipe.run_id))
            tasks.start_soon(reads, realtime.subscribe_to_run(pipe.run_id))
            await anyio.wait_all_tasks_blocked()
            realtime.begin_shutdown()
            await until(lambda: realtime.closing)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(raises, realtime.read(waiting.id))
            answer.rest.set()
    assert [item for item in read if isinstance(item, str)] == ["first", "last"]
    assert read[-1] == "last" or read[-1].status is Status.COMPLETED  # type: ignore[attr-defined]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("signals", "left_s"),
    [
        pytest.param([(signal.SIGTERM, 0.0)], 10.0, id="SIGTERM"),
        pytest.param([(signal.SIGINT, 0.0)], 0.5, id="SIGINT"),
        pytest.param([(signal.SIGTERM, 0.5), (signal.SIGTERM, 0.0)], 9.5, id="repeated-by-the-main-process"),
        pytest.param([(signal.SIGTERM, 2.0), (signal.SIGTERM, 0.0)], 0.5, id="second"),
    ],
)
async def test_a_person_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, signals: list[tuple[signal.Signals, float]], left_s: float
) -> None:
    clock = Clock()
    monkeypatch.setattr(shutdown_module, "time", clock)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for watched in before:
            signal.signal(watched, lambda number, frame: None)
        async with make_realtime(signals=True, timeouts=Timeouts(tick=0.01)) as realtime:
            for number, pause_s in signals:
                signal.raise_signal(number)
                await until(lambda: realtime.closing)
                await anyio.wait_all_tasks_blocked()
                clock.now += pause_s
            assert realtime.engine.shutdown.left_s == pytest.approx(left_s)
    finally:
        for watched, handler in before.items():
            signal.signal(watched, handler)


async def test_a_second_signal_ends_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown_module, "QUICK_DRAIN_S", 0.01)
    realtime = make_realtime(timeouts=LONG)

    @realtime.task("t")
    async def task() -> None:
        await anyio.sleep_forever()

    async with realtime:
        handle = await realtime.trigger(task)
        await until(lambda: realtime.engine.executions)
        realtime.engine.shutdown.announce()
        await until(lambda: realtime.closing)
        await anyio.wait_all_tasks_blocked()
        realtime.engine.shutdown.announce(quick=True)
        with anyio.fail_after(GUARD_S):
            assert (await realtime.runs.ended(handle.id)).status is Status.FAILED  # before the stop


async def test_a_reloader_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_realtime(signals=True) as realtime:
        signals = realtime.engine.shutdown._signals
        assert signals is not None and not signals.server_reloads
        monkeypatch.setattr(sys, "argv", ["granian", "app:app", "--reload"])
        assert signals.server_reloads
