"""Threads: at most one active run, whatever happens to the runs and to the processes that create them.

Two processes are two `Realtime` objects on one storage. `test_run_threads_redis.py` and `tests/e2e/test_threads.py`
repeat the races on Redis.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest

from asgi_realtime import (
    LimitExceeded,
    Limits,
    Realtime,
    Retention,
    Run,
    RunCanceled,
    RunExists,
    RunHandle,
    Status,
    ThreadBusy,
    Timeouts,
    UsageError,
)
from asgi_realtime.brokers import MemoryBroker
from asgi_realtime.core.config import MAX_SPAN_S
from asgi_realtime.core.run_changes import Finished
from tests.faults import RemoteBroker, steps, stored
from tests.inprocess import GUARD_S, FakeClock, ended, make_realtime, until

pytestmark = pytest.mark.anyio

THREAD = "chat:1"
TIMEOUTS = Timeouts(tick=0.01, drain=0.02, cancel=1.0, find=0.05)
PATIENT = Timeouts(tick=0.01, drain=0.02, find=60.0)


def make(broker: Any = None, **options: Any) -> Realtime:
    """A `Realtime` with a task that ends on request."""
    realtime = make_realtime(**({"broker": broker or RemoteBroker(), "timeouts": TIMEOUTS} | options))

    @realtime.task("answer")
    async def answer(payload: Any, run: Run) -> Any:
        await realtime.append("a word")
        return await run.input("finish").get()

    @realtime.task("one by one", concurrency_limit=1)
    async def one_by_one(payload: Any, run: Run) -> Any:
        return await run.input("finish").get()

    return realtime


@asynccontextmanager
async def two_processes(**options: Any) -> AsyncIterator[tuple[Realtime, Realtime]]:
    inner = MemoryBroker()
    async with make(RemoteBroker(inner), **options) as ours, make(RemoteBroker(inner), **options) as theirs:
        yield ours, theirs


async def active_id(realtime: Realtime, thread: str = THREAD) -> str | None:
    handle = await realtime.active_run(thread)
    return None if handle is None else handle.id


async def started(realtime: Realtime, handle: RunHandle[Any]) -> None:
    async for record in realtime.subscribe_to_run(handle):
        if record.is_executing:
            return


# One at a time


async def test_a_busy_thread_rejects_a_run_until_the_active_one_ends() -> None:
    async with two_processes() as (ours, theirs):
        assert await ours.active_run(THREAD) is None
        first = await ours.trigger("answer", thread=THREAD)
        for process in (ours, theirs):
            assert await active_id(process) == first.id
            with pytest.raises(ThreadBusy, match=f"thread 'chat:1' has an active run, {first.id}; wait") as caught:
                await process.trigger("answer", thread=THREAD)
            assert (caught.value.run_id, caught.value.status) == (first.id, 409)
        await ours.trigger("answer", thread="chat:2")
        await ours.trigger("answer")
        await ours.send_input(first, "finish", 7)
        assert await first.result() == 7
        assert await active_id(theirs) is None
        second = await theirs.trigger("answer", thread=THREAD)
        assert await active_id(ours) == second.id
        assert (await theirs.get_run(second)).thread == THREAD


@pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELED, Status.CRASHED, Status.TIMED_OUT])
async def test_a_run_frees_its_thread_however_it_ends(status: Status) -> None:
    async with make() as realtime:
        first = await realtime.trigger("answer", thread=THREAD)
        await started(realtime, first)
        await realtime.runs.update(first.id, Finished(status))
        assert await realtime.active_run(THREAD) is None
        assert await active_id(realtime) != (await realtime.trigger("answer", thread=THREAD)).id != first.id


async def test_an_expired_run_frees_its_thread() -> None:
    clock = FakeClock()
    async with make(MemoryBroker(clock=clock), clock=clock) as realtime:
        waiting = await realtime.trigger("answer", thread=THREAD, delay="1h", ttl="1m")
        assert await active_id(realtime) == waiting.id
        clock.seconds += 3661
        assert (await ended(realtime, waiting)).status in (Status.EXPIRED, Status.CANCELED)
        assert await realtime.active_run(THREAD) is None


async def test_the_thread_is_free_when_a_reader_sees_the_end() -> None:
    async with make(MemoryBroker()) as realtime:
        for number in range(20):
            pipe = realtime.pipe(range(number), thread=THREAD)
            assert [chunk async for chunk in realtime.read(pipe.run_id)] == list(range(number))
            assert await realtime.active_run(THREAD) is None


async def test_the_thread_of_a_killed_process_is_free_once_its_lease_expires() -> None:
    clock = FakeClock()
    inner = MemoryBroker(clock=clock)
    async with make(RemoteBroker(inner), clock=clock) as realtime:
        record = realtime.tasks.records.new_open_run("r", {"thread": THREAD}).record
        record = msgspec.structs.replace(record, owner="a killed process")
        await realtime.engine.run_threads.create(record, replace=False)
        with pytest.raises(ThreadBusy):
            await realtime.trigger("answer", thread=THREAD)
        clock.seconds += TIMEOUTS.lease
        assert (await ended(realtime, record.id)).status is Status.CRASHED
        await realtime.trigger("answer", thread=THREAD)


async def test_a_removed_run_leaves_nothing_of_its_thread() -> None:
    broker = MemoryBroker()
    async with make(broker) as realtime:
        async with realtime.open_run("r", thread=THREAD) as run:
            pass
        assert broker._claims
        await broker.remove(run.id)
        assert not broker._claims and broker.size == 0


# Replace


async def test_replacing_cancels_the_run_of_another_process_and_starts_at_once() -> None:
    async with two_processes() as (ours, theirs):
        first = await ours.trigger("answer", thread=THREAD)
        await started(ours, first)
        second = await theirs.trigger("answer", thread=THREAD, on_conflict="replace")
        assert await active_id(ours) == second.id
        reader = ours.read(first)
        assert await anext(reader) == "a word"
        with pytest.raises(RunCanceled):
            await anext(reader)
        await theirs.send_input(second, "finish", 2)
        assert await second.result() == 2


async def test_a_replaced_run_that_waits_never_executes() -> None:
    async with make() as realtime:
        blocking = await realtime.trigger("one by one")
        await started(realtime, blocking)
        waiting = await realtime.trigger("one by one", thread=THREAD)
        successor = await realtime.trigger("one by one", thread=THREAD, on_conflict="replace")
        record = await ended(realtime, waiting)
        assert (record.status, record.started_at_ms) == (Status.CANCELED, None)
        await realtime.send_input(blocking, "finish", 1)
        await started(realtime, successor)
        assert await active_id(realtime) == successor.id


async def test_a_successor_waits_for_the_only_slot_of_its_task() -> None:
    """The concurrency limit counts the code that runs, and the canceled run can delay its end."""
    async with make() as realtime:
        leave = anyio.Event()

        @realtime.task("slow to cancel", concurrency_limit=1)
        async def slow_to_cancel() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await leave.wait()

        first = await realtime.trigger(slow_to_cancel, thread=THREAD)
        await started(realtime, first)
        second = await realtime.trigger(slow_to_cancel, thread=THREAD, on_conflict="replace")
        assert (await realtime.get_run(second)).status is Status.QUEUED
        assert await active_id(realtime) == second.id
        leave.set()
        await started(realtime, second)
        assert (await ended(realtime, first)).status is Status.CANCELED


async def test_replacing_works_for_pipes_and_open_runs() -> None:
    async with make() as realtime:

        async def endless() -> AsyncIterator[str]:
            yield "a word"
            await anyio.sleep_forever()

        async def replace_by_a_pipe() -> None:
            await opened.wait()
            await realtime.pipe(endless(), thread=THREAD, on_conflict="replace").wait_until_started()

        opened = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(replace_by_a_pipe)
            with pytest.raises(RunCanceled):
                async with realtime.open_run("r", thread=THREAD):
                    opened.set()
                    await anyio.sleep_forever()
        pipe = await realtime.active_run(THREAD)
        assert pipe is not None
        async with realtime.open_run("r", thread=THREAD, on_conflict="replace") as run:
            assert (await ended(realtime, pipe)).status is Status.CANCELED
            assert await active_id(realtime) == run.id


# Races


async def test_of_runs_that_start_at_once_one_is_accepted() -> None:
    async with two_processes() as processes:
        accepted: list[str] = []
        rejected: list[str] = []

        async def attempt(process: Realtime, number: int) -> None:
            await steps(number)
            try:
                accepted.append((await process.trigger("answer", thread=THREAD)).id)
            except ThreadBusy as busy:
                rejected.append(busy.run_id)

        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(attempt, processes[number % 2], number // 2)
        assert len(accepted) == 1
        assert rejected == accepted * 19
        assert await active_id(processes[0]) == accepted[0]


async def test_of_runs_that_replace_each_other_at_once_one_stays() -> None:
    async with two_processes() as processes:
        handles: list[RunHandle[Any]] = []

        async def attempt(process: Realtime, number: int) -> None:
            await steps(number)
            handles.append(await process.trigger("answer", thread=THREAD, on_conflict="replace"))

        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(attempt, processes[number % 2], number // 2)
        active = await active_id(processes[0])
        assert len({handle.id for handle in handles}) == 20
        statuses = [(await ended(processes[1], handle)).status for handle in handles if handle.id != active]
        assert statuses == [Status.CANCELED] * 19
        assert await active_id(processes[1]) == active


# Runs that hold a thread and are not there


def claim_for(thread: str = THREAD) -> str:
    return f"thread:{thread}"


async def test_the_thread_of_a_process_that_died_before_it_created_its_run_is_taken_over() -> None:
    async with make() as realtime:
        await realtime.broker.claim(claim_for(), "run_never_created", ttl_s=MAX_SPAN_S)
        assert await realtime.active_run(THREAD) is None
        handle = await realtime.trigger("answer", thread=THREAD)
        assert await active_id(realtime) == handle.id


@pytest.mark.parametrize("on_conflict", ["reject", "replace"])
async def test_a_run_whose_thread_was_taken_over_cannot_be_created_any_more(on_conflict: Any) -> None:
    """Its process was slower than `timeouts.find`."""
    async with two_processes() as (ours, theirs):
        assert isinstance(ours.broker, RemoteBroker)
        ours.broker.away = {"commit"}
        failed: list[ThreadBusy] = []

        async def slow() -> None:
            try:
                await ours.trigger("answer", thread=THREAD)
            except ThreadBusy as busy:
                failed.append(busy)

        async with anyio.create_task_group() as group:
            group.start_soon(slow)
            await until(lambda: isinstance(ours.broker, RemoteBroker) and ours.broker.failed)
            handle = await theirs.trigger("answer", thread=THREAD, on_conflict=on_conflict)
            ours.broker.away = set()
        assert [busy.run_id for busy in failed] == [handle.id]
        assert await active_id(ours) == handle.id


async def test_a_run_that_is_about_to_be_created_is_waited_for() -> None:
    async with two_processes(timeouts=PATIENT) as (ours, theirs):
        assert isinstance(ours.broker, RemoteBroker)
        ours.broker.away = {"commit"}
        rejected: list[str] = []

        async def trigger_ours() -> None:
            await ours.trigger("answer", thread=THREAD)

        async def attempt() -> None:
            with pytest.raises(ThreadBusy) as caught:
                await theirs.trigger("answer", thread=THREAD)
            rejected.append(caught.value.run_id)

        async with anyio.create_task_group() as group:
            group.start_soon(trigger_ours)
            await until(lambda: isinstance(ours.broker, RemoteBroker) and ours.broker.failed)
            group.start_soon(attempt)
            await steps(30)
            assert rejected == []
            ours.broker.away = set()
        assert rejected == [await active_id(ours)]


async def lose(realtime: Realtime, run_id: str, *claims: str) -> None:
    """Remove a run from the storage, as a failover does, with or without its claim."""
    assert isinstance(realtime.broker, RemoteBroker)
    inner = realtime.broker.inner
    kept = {key: value for key, value in inner._claims.items() if key not in claims}
    inner._remove(run_id)
    inner._claims = kept


@pytest.mark.parametrize("lost", [(), (claim_for(),)], ids=["run", "run and thread"])
async def test_a_run_that_the_broker_lost_returns_into_its_thread(lost: tuple[str, ...]) -> None:
    async with two_processes() as (ours, theirs), ours.open_run("r", thread=THREAD) as run:
        await lose(ours, run.id, *lost)
        await ours.append("restores the run", run=run)
        assert await active_id(theirs) == run.id
        with pytest.raises(ThreadBusy):
            await theirs.trigger("answer", thread=THREAD)


@pytest.mark.parametrize("lost", [(), (claim_for(),)], ids=["run", "run and thread"])
async def test_a_run_that_the_broker_lost_stops_if_another_has_its_thread(lost: tuple[str, ...]) -> None:
    async with two_processes() as (ours, theirs), anyio.create_task_group() as group:
        broker = ours.broker
        assert isinstance(broker, RemoteBroker)

        async def take_over() -> None:
            await theirs.trigger("answer", thread=THREAD)
            broker.away = set()

        with pytest.raises(RunCanceled), anyio.fail_after(GUARD_S):
            async with ours.open_run("r", thread=THREAD) as run:
                await ours.append("one", run=run)
                await anyio.wait_all_tasks_blocked()  # the process watches its run: what is lost now was not noticed
                broker.away = {"append", "commit", "claim"}  # or it would restore the run before it is replaced
                await lose(ours, run.id, *lost)
                group.start_soon(take_over)
                await anyio.sleep_forever()
        assert (await ours.get_run(run)).status is Status.CANCELED
        assert await stored(ours, run.id) == (["one"] if lost else []), "it was restored and then canceled"
        assert await active_id(ours) not in (run.id, None)


# With other options


async def test_an_idempotency_key_finds_its_run_in_a_busy_thread() -> None:
    async with make() as realtime:
        first = await realtime.trigger("answer", thread=THREAD, idempotency_key="one")
        for on_conflict in ("reject", "replace"):
            again = await realtime.trigger(
                "answer",
                thread=THREAD,
                idempotency_key="one",
                on_conflict=on_conflict,
            )
            assert (again.id, again.is_cached) == (first.id, True)
        with pytest.raises(ThreadBusy):
            await realtime.trigger("answer", thread=THREAD, idempotency_key="two")
        await realtime.send_input(first, "finish", 1)
        await first.result()
        second = await realtime.trigger("answer", thread=THREAD, idempotency_key="two")
        assert not second.is_cached


async def test_a_repeated_run_id_replaces_nothing() -> None:
    async with make() as realtime:
        await realtime.trigger("answer", thread=THREAD, run_id="msg-1")
        with pytest.raises(RunExists):
            await realtime.trigger("answer", thread=THREAD, run_id="msg-1", on_conflict="replace")
        await realtime.trigger("answer", thread=THREAD, run_id="msg-2", on_conflict="replace")
        for _ in range(2):
            with pytest.raises(RunExists):
                async with realtime.open_run("r", thread=THREAD, run_id="msg-1", on_conflict="replace"):
                    pass
        assert await active_id(realtime) == "msg-2"
        async with realtime.open_run("r", thread="chat:2", run_id="msg-3"):
            with pytest.raises(RunExists):
                await realtime.trigger("answer", thread="chat:3", run_id="msg-3")
            assert await active_id(realtime, "chat:3") is None, "that run is of another thread"
            await realtime.trigger("answer", thread="chat:3")


async def test_the_id_of_a_run_of_another_thread_claims_nothing() -> None:
    async with make() as realtime:
        await realtime.trigger("answer", run_id="mine", thread=THREAD)
        with pytest.raises(RunExists):
            await realtime.trigger("answer", run_id="mine", thread="chat:2")
        with pytest.raises(RunExists):
            async with realtime.open_run("answer", run_id="mine", thread="chat:2"):
                pass
        assert await realtime.broker.claimed("thread:chat:2") is None
        assert await active_id(realtime) == "mine"


async def test_a_run_without_room_frees_its_thread() -> None:
    retention = Retention(total_bytes=200_000)
    async with make(MemoryBroker(retention=retention), retention=retention, timeouts=PATIENT) as realtime:
        with pytest.raises(LimitExceeded):
            await realtime.trigger("answer", "x" * 200_000, thread=THREAD)
        handle = await realtime.trigger("answer", thread=THREAD)
        assert await active_id(realtime) == handle.id


async def test_a_pipe_reports_a_busy_thread_when_it_is_awaited(caplog: pytest.LogCaptureFixture) -> None:
    async with make() as realtime:
        first = await realtime.trigger("answer", thread=THREAD)
        pipe = realtime.pipe(["a"], thread=THREAD)
        for call in (pipe.wait_until_started, pipe.wait_until_complete):
            with pytest.raises(ThreadBusy) as caught:
                await call()
            assert caught.value.run_id == first.id
        with pytest.raises(ThreadBusy):
            async with realtime.open_run("r", thread=THREAD):
                raise AssertionError("not reached")
        assert [record.message for record in caplog.records] == [f"a pipe did not start: {caught.value}"]


async def test_a_pipe_into_a_run_has_no_thread() -> None:
    async with make() as realtime, realtime.open_run("r") as run:
        with pytest.raises(UsageError, match="thread= is for a run that pipe"):
            realtime.pipe(["a"], thread=THREAD)
        with pytest.raises(UsageError, match="thread= is for a run that pipe"):
            realtime.pipe(["a"], run=run, thread=THREAD)


async def test_a_batch_has_no_threads() -> None:
    async with make() as realtime:
        with pytest.raises(UsageError, match="item 1 of the batch has a thread"):
            await realtime.batch_trigger([("answer", 1), ("answer", 2, {"thread": THREAD})])
        assert await realtime.active_run(THREAD) is None


async def test_the_threads_of_browsers_are_apart() -> None:
    async with make() as realtime:
        ids = {}
        for owner in (None, "user:1", "user:2"):
            prepared = realtime.tasks.prepare("answer", None, {"thread": THREAD}).triggered_by(owner)
            ids[owner] = (await realtime.tasks.launcher.launch(prepared)).record.id
            with pytest.raises(ThreadBusy):
                await realtime.tasks.launcher.launch(prepared.renamed("run_another"))
        for owner, run_id in ids.items():
            handle = await realtime.active_run(THREAD, token_owner=owner)
            assert handle is not None and handle.id == run_id
            assert owner in (None, realtime.verify_token(handle.public_access_token).owner)
        handle = await realtime.active_run(THREAD, owner="user:3")
        assert handle is not None and handle.id == ids[None]
        assert realtime.verify_token(handle.public_access_token).owner == "user:3"


# Names


@pytest.mark.parametrize("thread", ["x" * 128, "größe 🧵", "{a}{b}", "a/b?c#d\\e", '"quoted", too', " padded ", "{"])
async def test_unusual_names_are_names(thread: str) -> None:
    async with make() as realtime, realtime.open_run("r", thread=thread) as run:
        assert await active_id(realtime, thread) == run.id
        assert await active_id(realtime, f"{thread}."[-128:]) is None


@pytest.mark.parametrize(
    ("thread", "error", "message"),
    [
        ("", UsageError, "a thread is empty"),
        ("  ", UsageError, "a thread is empty"),
        ("x" * 129, LimitExceeded, "thread is 129 characters, limit 128"),
        ("a\nb", UsageError, "control character"),
        ("a\0b", UsageError, "control character"),
        ("a\ud83d", UsageError, "lone surrogate"),
        (7, UsageError, "a thread is a int; allowed is a str"),
    ],
)
async def test_bad_names_are_rejected(thread: Any, error: type[Exception], message: str) -> None:
    async with make() as realtime:
        for attempt in (
            lambda: realtime.pipe(["a"], thread=thread),
            lambda: realtime.open_run("r", thread=thread),
        ):
            with pytest.raises(error, match=message):
                attempt()
        with pytest.raises(error, match=message):
            await realtime.trigger("answer", thread=thread)
        with pytest.raises(error, match=message):
            await realtime.active_run(thread)


async def test_bad_conflict_options_are_rejected() -> None:
    async with make(limits=Limits()) as realtime:
        with pytest.raises(UsageError, match="on_conflict is 'cancel'; allowed are 'reject' and 'replace'"):
            await realtime.trigger("answer", thread=THREAD, on_conflict="cancel")  # type: ignore[call-overload]
        with pytest.raises(UsageError, match="on_conflict is 'replace', but the run has no thread"):
            realtime.pipe(["a"], on_conflict="replace")
        with pytest.raises(UsageError, match="unknown option threads; allowed: "):
            realtime.open_run("r", threads="chat:1")  # type: ignore[call-arg]
        with pytest.raises(UsageError, match="unknown option threads; allowed: "):
            realtime.pipe(["a"], threads="chat:1")  # type: ignore[call-arg]
