from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import anyio
import pytest

from asgi_realtime import BrokerUnavailable, Realtime, Retention, Status, Timeouts
from asgi_realtime.brokers.base import ThreadRenewal
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.engine.leases import LeaseThread
from tests.inprocess import GUARD_S, FakeClock, make_realtime, until

SHORT = Timeouts(tick=0.01, drain=0.02, lease=0.03)
NAME = "asgi_realtime leases"


class Threaded(MemoryBroker):
    """Its leases are renewed from a thread. Records the renewals; `error` makes them fail."""

    def __init__(self) -> None:
        super().__init__()
        self.renewed: list[list[str]] = []
        self.owners: set[str] = set()
        self.threads: set[str] = set()
        self.error: Exception | None = None
        self.calls = 0

    def renew_from_thread(self, run_ids: Sequence[str], *, owner: str) -> None:
        self.calls += 1
        self.threads.add(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        self.owners.add(owner)
        self.renewed.append(list(run_ids))
        for run_id in run_ids:
            for kind in ("lease", "enqueue"):
                if run_id in self._due[kind]:
                    self._due[kind].set(run_id, self._lease_end())

    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        raise AssertionError("only the thread renews")


def lease_threads() -> int:
    return sum(thread.name == NAME for thread in threading.enumerate())


def wait_in_thread(fact: Callable[[], object]) -> None:
    """Block the thread until a condition holds."""
    deadline = time.monotonic() + GUARD_S
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def make(broker: Threaded) -> Realtime:
    return make_realtime(broker=broker, timeouts=SHORT)


def test_a_broker_can_support_renewal_from_a_thread() -> None:
    assert isinstance(Threaded(), ThreadRenewal)
    assert not isinstance(MemoryBroker(), ThreadRenewal)


@pytest.mark.anyio
async def test_a_blocked_loop_does_not_crash_its_runs() -> None:
    """A run whose task computed for longer than its lease was CRASHED."""
    broker = Threaded()
    async with make(broker) as realtime, realtime.open_run("r") as run:
        renewed = len(broker.renewed)
        wait_in_thread(lambda: len(broker.renewed) > renewed + 10)  # more than three leases, on the loop's thread
        await realtime.engine.make_ticker().once()
        assert (await realtime.get_run(run)).status is Status.EXECUTING
    assert broker.threads == {NAME}
    assert broker.owners == {realtime.runs.owner}
    assert [run.id] in broker.renewed


@pytest.mark.anyio
async def test_a_run_that_the_thread_renews_is_restored_however_long_it_executes() -> None:
    """Renewals from the thread were not noted, so a run older than `after_end` was given up after a data loss."""

    class Lossy(Threaded):
        shared = True

    broker = Lossy()
    clock = FakeClock()
    realtime = make_realtime(broker=broker, timeouts=SHORT, clock=clock, retention=Retention(after_end=60))
    async with realtime:
        async with realtime.open_run("r") as run:
            clock.seconds += 61
            renewed = len(broker.renewed)
            await until(lambda: len(broker.renewed) > renewed + 1)
            await broker.remove(run.id)
            run.metadata.set("n", 1)
            await run.metadata.flush()
        assert (await realtime.get_run(run)).status is Status.COMPLETED


@pytest.mark.anyio
async def test_waiting_runs_are_renewed_too() -> None:
    broker = Threaded()
    realtime = make(broker)
    go = anyio.Event()

    @realtime.task("t", concurrency_limit=1)
    async def task() -> None:
        await go.wait()

    async with realtime:
        handles = [await realtime.trigger(task) for _ in range(3)]
        ids = sorted(handle.id for handle in handles)
        await until(lambda: any(sorted(renewed) == ids for renewed in broker.renewed))
        go.set()
        for handle in handles:
            await handle.result(timeout=GUARD_S)


@pytest.mark.anyio
async def test_the_thread_exists_while_runs_are_held() -> None:
    broker = Threaded()
    await until(lambda: not lease_threads())  # one of an earlier test can still be ending
    async with make(broker) as realtime:
        for _ in range(3):
            async with realtime.open_run("r"):
                assert lease_threads() == 1
            await until(lambda: not lease_threads())
        async with realtime.open_run("r"), realtime.open_run("s"):
            assert lease_threads() == 1
    await until(lambda: not lease_threads())


@pytest.mark.anyio
async def test_an_unavailable_broker_is_logged_once_and_retried(caplog: pytest.LogCaptureFixture) -> None:
    broker = Threaded()
    async with make(broker) as realtime, realtime.open_run("r"):
        for error in (BrokerUnavailable("no answer"), ValueError("nonsense")):
            broker.error = error
            calls = broker.calls
            await until(lambda: broker.calls > calls + 3)  # noqa: B023
            broker.error = None
            renewed = len(broker.renewed)
            await until(lambda: len(broker.renewed) > renewed)  # noqa: B023
    known, unknown = [record for record in caplog.records if "leases" in record.message]
    assert (known.message, known.exc_info) == ("leases cannot be renewed: no answer", None)
    assert (unknown.message, bool(unknown.exc_info)) == ("leases cannot be renewed: nonsense", True)


def test_a_run_that_arrives_while_the_thread_is_ending_is_renewed() -> None:
    """Stress: runs come and go as fast as the thread checks."""
    broker = Threaded()
    held: list[str] = []
    wait_in_thread(lambda: not lease_threads())
    leases = LeaseThread(broker, lambda: list(held), owner="us", lease_s=0.0003, on_renewed=lambda: None)
    for number in range(300):
        run_id = f"run_{number}"
        held.append(run_id)
        leases.keep()
        wait_in_thread(lambda: [run_id] in broker.renewed[-3:])  # noqa: B023
        held.clear()
        if number % 3:
            time.sleep(0)
    leases.stop()
    wait_in_thread(lambda: not lease_threads())
    leases.keep()
    assert lease_threads() == 0  # stopped
