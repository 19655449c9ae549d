"""Which event loop executes the blocking calls: that of the host, or one in a thread, which starts and ends."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

from asgi_realtime import ServerShutdown, Status
from asgi_realtime.engine import thread_bridge
from asgi_realtime.loop.thread_calls import LoopThread
from tests.blocking import GUARD_S, Shared, in_thread, run_program, with_tasks
from tests.inprocess import make_realtime

pytestmark = pytest.mark.anyio


def test_a_worker_process_starts_its_own_loop() -> None:
    class Nobody:
        async def enqueue(self, run_id: str, task_id: str) -> None: ...

    realtime = with_tasks(broker=Shared(), executor=Nobody())
    handle = realtime.sync.trigger("double", 21)
    assert realtime.sync.get_run(handle).status is Status.QUEUED
    realtime.sync.execute(handle.id)
    assert realtime.sync.result(handle, timeout=GUARD_S) == 42

    results: list[Any] = []

    def also() -> None:
        results.append(realtime.sync.get_run(handle).output)

    thread = threading.Thread(target=also)
    thread.start()
    thread.join()
    assert results == [42]
    realtime.sync.close()
    realtime.sync.close()
    assert realtime.engine.supervisor is None
    assert realtime.sync.get_run(handle).output == 42  # starts again
    realtime.sync.close()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_app_starts_after_its_module_made_calls(backend: str) -> None:
    """The calls of the module had started a loop in a thread, and the start on the server's loop failed."""
    realtime = with_tasks(broker=Shared())
    handle = realtime.sync.trigger("double", 21)
    assert realtime.sync.result(handle, timeout=GUARD_S) == 42

    async def serve() -> None:
        async with realtime:
            assert (await realtime.get_run(handle)).output == 42
            assert (
                await in_thread(lambda: realtime.sync.result(realtime.sync.trigger("double", 1), timeout=GUARD_S)) == 2
            )

    anyio.run(serve, backend=backend)
    assert realtime.sync.get_run(handle).output == 42
    realtime.sync.close()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_host_starts_and_stops_while_threads_make_calls(backend: str) -> None:
    """Some starts failed because a thread was starting its own loop at that moment."""
    realtime = with_tasks(broker=Shared())
    over = threading.Event()
    seen: list[str] = []

    def use() -> None:
        while not over.is_set():
            try:
                with realtime.sync.open_run("r"):
                    pass
            except ServerShutdown:
                pass
            except BaseException as exc:
                seen.append(repr(exc))

    async def host() -> None:
        for _ in range(30):
            async with realtime:
                await anyio.sleep(0.005)
            await anyio.sleep(0.005)

    threads = [threading.Thread(target=use, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        anyio.run(host, backend=backend)
    finally:
        over.set()
        for thread in threads:
            thread.join(GUARD_S)
        realtime.sync.close()
    assert not any(thread.is_alive() for thread in threads)
    assert seen == []


async def test_the_host_starts_after_a_thread_lost_the_race_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """`start` raised, because closing the thread's idle loop tried to stop the host's, and a lock stayed held."""
    realtime = with_tasks(broker=Shared())

    def lose_the_race() -> LoopThread:
        anyio.from_thread.run(realtime.ensure_started)  # the first use on the host's loop
        return LoopThread()

    monkeypatch.setattr(thread_bridge, "LoopThread", lose_the_race)
    with anyio.fail_after(GUARD_S):
        assert await in_thread(lambda: realtime.sync.result(realtime.sync.trigger("double", 1), timeout=GUARD_S)) == 2
        for _ in range(2):
            await realtime.start()
        await realtime.stop()
        async with realtime:
            pass


def test_a_start_that_fails_releases_its_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later call that had to start waited forever."""
    realtime = with_tasks(broker=Shared())
    realtime.sync.trigger("double", 1)
    close = LoopThread.close

    def fail(self: LoopThread) -> None:
        close(self)
        raise OSError("no thread")

    async def host() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(LoopThread, "close", fail)
            with pytest.raises(OSError, match="no thread"):
                await realtime.start()
        with anyio.fail_after(GUARD_S):
            async with realtime:
                pass

    anyio.run(host)


def test_a_start_that_is_cancelled_while_a_thread_starts_leaves_the_lock_free() -> None:
    """A worker thread took the lock for the cancelled start, and nothing released it."""
    realtime = with_tasks(broker=Shared())
    starting = realtime._bridge._starting

    async def host() -> None:
        starting.acquire()  # as a thread that starts
        start = asyncio.create_task(realtime.start())
        await anyio.sleep(0.02)
        start.cancel()
        await asyncio.wait([start])
        starting.release()
        await anyio.sleep(0.02)
        with anyio.fail_after(GUARD_S):
            async with realtime:
                pass

    anyio.run(host)


def test_several_threads_can_start_at_once() -> None:
    realtime = with_tasks(broker=Shared())
    results: list[Any] = []
    gate = threading.Barrier(4)

    def work() -> None:
        gate.wait(GUARD_S)
        results.append(realtime.sync.result(realtime.sync.trigger("double", 1), timeout=GUARD_S))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [2, 2, 2, 2]
    realtime.sync.close()


async def test_close_does_not_stop_the_loop_of_the_host() -> None:
    async with make_realtime() as realtime:
        await in_thread(realtime.sync.close)
        assert realtime.engine.supervisor is not None


@pytest.mark.slow
def test_a_program_that_closes_nothing_still_exits() -> None:
    """Once its work was done, it waited forever for its loop."""
    printed = run_program("""
        handle = realtime.sync.trigger("double", 21)
        realtime.sync.execute(handle.id)
        print(realtime.sync.result(handle))
    """)
    assert printed == "42\n"


@pytest.mark.slow
def test_a_loop_in_a_thread_installs_no_signal_handlers() -> None:
    printed = run_program("""
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        realtime.sync.trigger("double", 21)
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
        realtime.sync.close()
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
        print("as before")
    """)
    assert printed == "as before\n"


@pytest.mark.slow
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_forked_child_has_its_own_loop_and_owner_name(used: bool) -> None:
    """The child waited for the thread of its parent, and used its parent's owner name."""
    printed = run_program(f"""
        if {used}:
            first = realtime.sync.trigger("double", 1)
            realtime.sync.execute(first.id)
        owner = realtime.runs.owner

        def work(name):
            handle = realtime.sync.trigger("double", 21)
            realtime.sync.execute(handle.id)
            record = realtime.sync.get_run(handle)
            executed_by = record._stored.owner
            print(name, record.output, executed_by == owner, executed_by == realtime.runs.owner, flush=True)

        child = os.fork()
        if not child:
            work("child")
            sys.exit()
        assert os.waitpid(child, 0)[1] == 0
        work("parent")
    """)
    assert printed == "child 42 False True\nparent 42 True True\n"
