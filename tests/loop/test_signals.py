from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import anyio
import pytest

from asgi_realtime.loop.signals import WATCHED, ShutdownSignals
from tests.inprocess import GUARD_S, make_realtime, until

Handler = Any


class Server:
    """A server with signal handlers."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.should_exit = False
        self.servers: list[asyncio.Server] = []

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.got.append(number)


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    before = {number: signal.getsignal(number) for number in WATCHED}
    for number in WATCHED:
        signal.signal(number, found.handle)
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


def installed() -> list[Handler]:
    return [signal.getsignal(number) for number in WATCHED]


@pytest.mark.anyio
async def test_a_signal_ends_subscriptions_and_then_reaches_the_server(server: Server) -> None:
    realtime = make_realtime(signals=True)
    async with realtime:
        assert installed() != [server.handle] * 2
        signal.raise_signal(signal.SIGTERM)
        assert server.got == [signal.SIGTERM]
        await until(lambda: realtime.closing)
        assert realtime.engine.supervisor is not None  # the host stops it
        signal.raise_signal(signal.SIGINT)
        assert server.got == [signal.SIGTERM, signal.SIGINT]
    assert installed() == [server.handle] * 2


@pytest.mark.anyio
async def test_after_a_signal_that_the_host_ignores_subscriptions_are_served_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The app rejected every subscription until it was restarted."""
    monkeypatch.setattr("asgi_realtime.engine.shutdown.ANNOUNCEMENT_COUNTS_S", 0.02)
    async with make_realtime(signals=True) as realtime:
        signal.raise_signal(signal.SIGTERM)
        await until(lambda: "subscriptions are served again" in caplog.text)
        assert not realtime.closing
        realtime.begin_shutdown()
        signal.raise_signal(signal.SIGTERM)
        await until(lambda: realtime.closing)
        await anyio.sleep(0.04)
        assert realtime.closing, "begin_shutdown is final"


@pytest.mark.anyio
async def test_the_worker_of_a_queue_decides_itself_how_long_its_runs_continue(server: Server) -> None:
    """A taskiq worker waits for its runs, and then stops the `Realtime`."""
    realtime = make_realtime(signals=True)
    await realtime.tasks.start()
    assert installed() == [server.handle] * 2
    await until(lambda: realtime.engine.running)
    realtime.engine.shutdown.check_server()
    assert installed() == [server.handle] * 2
    await realtime.tasks.stop()


@pytest.mark.anyio
async def test_many_signals_start_one_job(server: Server) -> None:
    """Each signal started another job that waited for 30 s."""
    async with make_realtime(signals=True) as realtime:
        supervisor = realtime.engine.supervisor
        assert supervisor is not None
        before = supervisor.jobs
        for _ in range(5):
            signal.raise_signal(signal.SIGTERM)
        await until(lambda: realtime.closing)
        await anyio.wait_all_tasks_blocked()
        assert supervisor.jobs == before + 1


@pytest.mark.anyio
async def test_a_server_that_stops_without_a_signal_ends_subscriptions_too(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """uvicorn waited for open streams forever, and accepted no new connection."""
    monkeypatch.setattr("asgi_realtime.engine.shutdown.ANNOUNCEMENT_COUNTS_S", 0.02)
    async with make_realtime(signals=True) as realtime:
        realtime.engine.shutdown.check_server()
        await anyio.wait_all_tasks_blocked()
        assert not realtime.closing
        server.should_exit = True
        await until(lambda: realtime.closing)  # the ticker has checked
        assert realtime.engine.supervisor is not None
        await anyio.sleep(0.04)
        assert realtime.closing and not caplog.records, "such a stop is final"


@pytest.mark.anyio
async def test_a_server_that_stops_is_not_checked_if_signals_are_left_alone(server: Server) -> None:
    server.should_exit = True
    async with make_realtime(signals=False) as realtime:
        realtime.engine.shutdown.check_server()
        await anyio.wait_all_tasks_blocked()
        assert not realtime.closing


@pytest.mark.anyio
async def test_after_a_start_on_first_use_a_signal_stops_it_too(server: Server) -> None:
    realtime = make_realtime(signals=True)
    async with realtime.open_run("r"):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: realtime.engine.supervisor is None)
    assert server.got == [signal.SIGTERM]
    assert installed() == [server.handle] * 2


@pytest.mark.anyio
async def test_a_host_that_starts_it_after_its_first_use_is_the_one_to_stop_it(server: Server) -> None:
    """The signal stopped it as if it had no host."""
    realtime = make_realtime(signals=True)
    async with realtime.open_run("r"):
        pass
    async with realtime:
        signal.raise_signal(signal.SIGTERM)
        await until(lambda: realtime.closing)
        await anyio.wait_all_tasks_blocked()
        assert realtime.engine.supervisor is not None


@pytest.mark.anyio
async def test_signals_can_be_left_alone(server: Server) -> None:
    async with make_realtime(signals=False):
        assert installed() == [server.handle] * 2


@pytest.mark.parametrize("action", [signal.SIG_DFL, signal.SIG_IGN])
@pytest.mark.anyio
async def test_the_default_action_and_ignore_are_left_in_place(server: Server, action: signal.Handlers) -> None:
    for number in WATCHED:
        signal.signal(number, action)
    async with make_realtime(signals=True):
        assert installed() == [action] * 2
    assert installed() == [action] * 2


@pytest.mark.anyio
async def test_a_handler_that_was_installed_over_ours_is_left_in_place(server: Server) -> None:
    later = Server()
    async with make_realtime(signals=True):
        signal.signal(signal.SIGTERM, later.handle)
    assert installed() == [later.handle, server.handle]


@pytest.mark.anyio
async def test_several_are_chained_and_removed_in_any_order(server: Server) -> None:
    first, second = make_realtime(signals=True), make_realtime(signals=True)
    await first.start()
    await second.start()
    signal.raise_signal(signal.SIGTERM)
    await until(lambda: first.closing and second.closing)
    assert server.got == [signal.SIGTERM]
    await second.stop()
    await first.stop()
    assert installed() == [server.handle] * 2


@pytest.mark.anyio
async def test_the_first_to_stop_leaves_nothing_in_the_chain(server: Server) -> None:
    first, second = make_realtime(signals=True), make_realtime(signals=True)
    await first.start()
    await second.start()
    await first.stop()
    assert [handler.previous for handler in installed()] == [server.handle] * 2
    await second.stop()
    assert installed() == [server.handle] * 2


@pytest.mark.anyio
async def test_handlers_that_a_server_installs_late_are_chained(server: Server) -> None:
    """The signal reached only the server, which waited for the open streams until it was killed."""
    late = Server()
    async with make_realtime(signals=True) as realtime:
        signal.signal(signal.SIGTERM, late.handle)
        await until(lambda: signal.getsignal(signal.SIGTERM) != late.handle)
        signal.raise_signal(signal.SIGTERM)
        await until(lambda: realtime.closing)
        assert late.got == [signal.SIGTERM]
    assert installed() == [late.handle, server.handle]


@pytest.mark.anyio
async def test_two_that_check_their_handlers_do_not_add_more(server: Server) -> None:
    first, second = make_realtime(signals=True), make_realtime(signals=True)
    await first.start()
    await second.start()
    chained = installed()
    for _ in range(5):
        first.engine.shutdown.check_server()
        second.engine.shutdown.check_server()
    assert installed() == chained
    await first.stop()
    await second.stop()


def test_a_handler_that_calls_ours_causes_no_second_notification(server: Server) -> None:
    calls: list[str] = []
    signals = ShutdownSignals(lambda number: calls.append("call"), in_background=lambda: False)
    signals.install()
    ours = signal.getsignal(signal.SIGTERM)
    assert callable(ours)
    signal.signal(signal.SIGTERM, lambda number, frame: ours(number, frame))
    signals.install()
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)
    assert calls == ["call"] * 2
    assert server.got == [signal.SIGTERM] * 2


@pytest.mark.anyio
async def test_starting_many_times_does_not_add_handlers(server: Server) -> None:
    realtime = make_realtime(signals=True)
    for _ in range(3):
        async with realtime:
            pass
        assert installed() == [server.handle] * 2


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_loop_that_ends_without_a_stop_removes_its_handlers(server: Server, backend: str) -> None:
    realtime = make_realtime(signals=True)

    async def main() -> None:
        async with realtime.open_run("r"):
            pass

    anyio.run(main, backend=backend)
    assert installed() == [server.handle] * 2


def test_installing_twice_does_not_chain_a_handler_to_itself(server: Server) -> None:
    calls: list[str] = []
    signals = ShutdownSignals(lambda number: calls.append("call"), in_background=lambda: False)
    signals.install()
    signals.install()
    signal.raise_signal(signal.SIGTERM)
    assert calls == ["call"]
    assert server.got == [signal.SIGTERM]
    signals.restore()
    signals.restore()
    assert installed() == [server.handle] * 2


def test_the_signal_reaches_the_server_even_if_we_fail(server: Server) -> None:
    def fails(number: int) -> None:
        raise RuntimeError("the loop is closed")

    signals = ShutdownSignals(fails, in_background=lambda: False)
    signals.install()
    with pytest.raises(RuntimeError):
        signal.raise_signal(signal.SIGTERM)
    assert server.got == [signal.SIGTERM]
    signals.restore()


def test_threads_other_than_the_main_one_leave_signals_alone(server: Server) -> None:
    def elsewhere() -> None:
        signals = ShutdownSignals(lambda number: None, in_background=lambda: False)
        signals.install()
        signals.restore()

        async def main() -> None:
            async with make_realtime(signals=True):
                seen.append(installed())

        anyio.run(main)

    seen: list[list[Handler]] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [[server.handle] * 2]


def test_a_signal_before_the_start_and_after_the_stop_reaches_the_server_only(server: Server) -> None:
    realtime = make_realtime(signals=True)
    realtime.engine.shutdown.announce()
    assert not realtime.closing


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_ctrl_c_ends_a_program_as_it_would_without_us(backend: str) -> None:
    program = f"""
import anyio
from asgi_realtime import Realtime

async def main():
    async with Realtime(secret_key="s" * 32):
        print("ready", flush=True)
        await anyio.sleep(60)

anyio.run(main, backend={backend!r})
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=GUARD_S)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize("signals", [True, False])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_ctrl_c_in_a_background_task_interrupts_the_main_one(backend: str, nested: bool, signals: bool) -> None:
    """Trio raises in the code that the signal interrupts; in a task of ours that became an internal error of trio."""
    program = f"""
import signal
import anyio
from asgi_realtime import Realtime

realtime = Realtime(secret_key="s" * 32, signals={signals})

async def press():
    signal.raise_signal(signal.SIGINT)

@realtime.task("report")
async def report():
    if {nested}:
        async with anyio.create_task_group() as group:
            group.start_soon(press)
    else:
        await press()
    await anyio.sleep(0)
    print("continued", flush=True)

async def main():
    try:
        async with realtime:
            await realtime.trigger(report)
            await anyio.sleep(60)
    finally:
        print("main left", flush=True)

anyio.run(main, backend={backend!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert done.returncode == -signal.SIGINT
    assert done.stdout.splitlines() == (["continued"] if signals or backend == "asyncio" else []) + ["main left"]
