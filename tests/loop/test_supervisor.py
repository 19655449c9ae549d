from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.loop.failures import cancelled_itself
from asgi_realtime.loop.supervisor import Supervisor
from tests.inprocess import GUARD_S, run_without_anyio, until

pytestmark = pytest.mark.anyio


async def nothing() -> None: ...


@asynccontextmanager
async def supervising(drain: list[str] | None = None) -> AsyncIterator[Supervisor]:
    async def note() -> None:
        if drain is not None:
            drain.append("drained")

    supervisor = Supervisor(context=contextvars.copy_context(), drain=note)
    supervisor.start()
    try:
        yield supervisor
    finally:
        supervisor.request_stop()
        await supervisor.wait_ended()


async def test_a_stop_drains_and_then_cancels_the_jobs() -> None:
    events: list[str] = []

    async def job() -> None:
        events.append("started")
        try:
            await anyio.sleep(60)
        finally:
            events.append("cancelled")

    async with supervising(events) as supervisor:
        supervisor.spawn(job)
        await until(lambda: events)
    assert events == ["started", "drained", "cancelled"]
    assert supervisor.ended
    assert not supervisor.usable
    supervisor.request_stop()
    await supervisor.wait_ended()


def test_a_job_that_never_begins_does_not_delay_the_end_of_a_program() -> None:
    """asyncio cancels all tasks when a program ends. One that had not made its first step was waited for forever."""

    async def main() -> None:
        supervisor = Supervisor(context=contextvars.copy_context(), drain=nothing)
        supervisor.start()

        async def spawn_in_each_iteration() -> None:
            while True:
                supervisor.spawn(nothing)
                await asyncio.sleep(0)

        spawning = asyncio.create_task(spawn_in_each_iteration())
        await until(lambda: supervisor.jobs)
        assert not spawning.done()

    anyio.run(main, backend="asyncio")


async def test_a_job_that_is_spawned_before_the_start_runs() -> None:
    done: list[int] = []

    async def job() -> None:
        done.append(1)

    supervisor = Supervisor(context=contextvars.copy_context(), drain=nothing)
    supervisor.spawn(job)
    supervisor.start()
    await until(lambda: done)
    supervisor.request_stop()
    await supervisor.wait_ended()


@pytest.mark.parametrize(
    "error", [ValueError("job"), SystemExit(3), BaseExceptionGroup("of a task group", [SystemExit(3), ValueError()])]
)
async def test_a_job_that_fails_is_logged_and_ends_no_other(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[int] = []

    async def fails() -> None:
        raise error

    async def continues() -> None:
        await until(lambda: "a background job failed" in caplog.text)
        done.append(1)

    async with supervising() as supervisor:
        supervisor.spawn(continues)
        supervisor.spawn(fails)
        await until(lambda: done)


@pytest.mark.parametrize("anyio_backend", ["trio"])  # asyncio ends the loop if a task exits
async def test_a_job_that_fails_while_being_cancelled_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The cancellation and the failure are raised in one group, and that ended the program."""

    async def exits() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise SystemExit(3)

    async def job() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(exits)
            await anyio.sleep_forever()

    async with supervising() as supervisor:
        supervisor.spawn(job)
        await anyio.wait_all_tasks_blocked()
    assert "a background job failed" in caplog.text


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_job_that_cancels_itself_ends_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """The task group mistook it for its own cancellation and ended everything."""
    done: list[int] = []

    async def cancels_itself() -> None:
        raise asyncio.CancelledError

    async def continues() -> None:
        await until(lambda: "a background job cancelled itself" in caplog.text)
        done.append(1)

    async with supervising() as supervisor:
        supervisor.spawn(continues)
        supervisor.spawn(cancels_itself)
        await until(lambda: done)
        assert supervisor.usable


async def test_a_drain_that_fails_does_not_prevent_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise ValueError("drain")

    supervisor = Supervisor(context=contextvars.copy_context(), drain=fails)
    supervisor.start()
    supervisor.request_stop()
    with anyio.fail_after(GUARD_S):
        await supervisor.wait_ended()
    assert "a background job failed" in caplog.text


async def test_spawn_copies_the_context_of_the_caller_and_spawn_detached_that_of_the_start() -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    seen: list[str] = []

    async def job() -> None:
        seen.append(name.get())
        name.set("changed by a job")

    name.set("start")
    async with supervising() as supervisor:
        name.set("caller")
        supervisor.spawn(job)
        await until(lambda: len(seen) == 1)
        supervisor.spawn_detached(job)
        await until(lambda: len(seen) == 2)
        supervisor.spawn_detached(job)
        await until(lambda: len(seen) == 3)
    assert seen == ["caller", "start", "start"]
    assert name.get() == "caller"


async def test_posted_calls_are_made_on_the_thread_of_the_loop() -> None:
    made: list[int] = []
    async with supervising() as supervisor:
        supervisor.post_or_call(lambda: made.append(threading.get_ident()))
        assert made == [threading.get_ident()]

        def elsewhere() -> None:
            assert not supervisor.on_own_thread
            supervisor.post_or_call(lambda: made.append(threading.get_ident()))
            supervisor.post(lambda: made.append(threading.get_ident()))
            assert not supervisor.usable

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await until(lambda: len(made) == 3)
        thread.join()
        supervisor.post(lambda: made.append(0))
        await until(lambda: len(made) == 4)
    assert made == [threading.get_ident()] * 3 + [0]


def accepts_jobs_in_a_child(supervisor: Supervisor) -> bool:
    child = os.fork()
    if not child:
        os._exit(supervisor.accepts_jobs)
    return os.waitpid(child, 0)[1] != 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
async def test_only_code_on_the_loop_of_the_supervisor_can_spawn_jobs() -> None:
    async with supervising() as supervisor:
        assert supervisor.accepts_jobs
        assert not accepts_jobs_in_a_child(supervisor)  # its copy of the loop seems to run
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(supervisor.accepts_jobs))
        thread.start()
        thread.join()
        assert found == [False]
        assert supervisor.accepts_jobs
    assert not supervisor.accepts_jobs


def test_a_supervisor_whose_loop_was_closed_accepts_no_jobs() -> None:
    made: list[Supervisor] = []

    async def abandon() -> None:
        made.append(Supervisor(context=contextvars.copy_context(), drain=nothing))

    async def ask() -> bool:
        return made[0].accepts_jobs

    asyncio.run(abandon())
    assert not made[0].accepts_jobs
    assert not asyncio.run(ask())


async def test_jobs_spawned_by_callbacks_of_the_loop_keep_their_context() -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    seen: list[str] = []

    async def job() -> None:
        seen.append(name.get())

    name.set("start")
    async with supervising() as supervisor:
        context = contextvars.copy_context()
        context.run(name.set, "callback")
        supervisor.post(lambda: context.run(supervisor.spawn, job))
        await until(lambda: len(seen) == 1)
        supervisor.post(lambda: context.run(supervisor.spawn_detached, job))
        await until(lambda: len(seen) == 2)
    assert seen == ["callback", "start"]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_threads_and_signal_handlers_can_spawn_jobs_at_any_time(backend: str) -> None:
    """In a callback of the loop anyio cannot start a task, unless a variable of its runner is set: the job was lost.

    So this test runs like a server, without that variable.
    """
    events: list[str] = []

    async def note() -> None:
        events.append("spawned")

    async def drain() -> None:
        supervisor = made[0]
        supervisor.post(lambda: supervisor.spawn(note))
        await until(lambda: len(events) == 2)

    async def main() -> None:
        supervisor = Supervisor(context=contextvars.copy_context(), drain=drain)
        made.append(supervisor)
        supervisor.post(lambda: supervisor.spawn(note))
        supervisor.start()
        await until(lambda: events)
        supervisor.post(supervisor.request_stop)
        await supervisor.wait_ended()

    made: list[Supervisor] = []
    run_without_anyio(main, backend)
    assert events == ["spawned"] * 2


async def test_a_job_that_is_spawned_right_before_the_end_sees_its_cancellation() -> None:
    """Code that waits for the job must be notified of its end, so the job must not be dropped from the queue."""
    events: list[str] = []

    async def job() -> None:
        events.append("started")
        try:
            await anyio.sleep(60)
        finally:
            events.append("cancelled")

    async def drain() -> None:
        supervisor.post(lambda: supervisor.spawn(job))
        await until(lambda: events)

    supervisor = Supervisor(context=contextvars.copy_context(), drain=drain)
    supervisor.start()
    supervisor.request_stop()
    await supervisor.wait_ended()
    assert events == ["started", "cancelled"]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_jobs_that_are_spawned_as_the_program_ends_are_harmless(backend: str) -> None:
    """A program whose threads called at its end never ended on asyncio, and one of ten raised `TrioInternalError`."""

    async def wait() -> None:
        await anyio.sleep_forever()

    async def main() -> None:
        supervisor = Supervisor(context=contextvars.copy_context(), drain=nothing)
        supervisor.start()
        for _ in range(3):
            await anyio.lowlevel.checkpoint()

        def spawn() -> None:
            supervisor.spawn(wait)
            supervisor.post(lambda: supervisor.spawn(wait))

        for _ in range(4):
            supervisor.post(spawn)

    for _ in range(50):
        if backend == "asyncio":
            asyncio.run(main())  # `wait_for` would let the jobs start before the end
        else:
            run_without_anyio(main, backend)


async def test_a_job_that_is_spawned_while_the_last_one_ends_is_harmless() -> None:
    """On trio it started between the end of the last job and that of the supervisor, and ended the whole program."""

    async def job() -> None:
        try:
            await anyio.sleep(60)
        finally:
            supervisor.post(lambda: supervisor.spawn(nothing))

    for _ in range(50):
        supervisor = Supervisor(context=contextvars.copy_context(), drain=nothing)
        supervisor.start()
        supervisor.spawn(job)
        await anyio.lowlevel.checkpoint()
        supervisor.request_stop()
        await supervisor.wait_ended()
        await anyio.wait_all_tasks_blocked()


async def test_shielded_continues_when_its_caller_is_cancelled() -> None:
    go = anyio.Event()
    done: list[str] = []

    async def work() -> None:
        await go.wait()
        done.append("done")

    async with supervising() as supervisor:
        with anyio.move_on_after(0.01) as scope:
            await supervisor.shielded(work)
        assert scope.cancelled_caught
        go.set()
        await until(lambda: done)
        await supervisor.shielded(work)
        assert done == ["done"] * 2


async def test_shielded_raises_what_the_function_raises() -> None:
    async def fails() -> None:
        raise ValueError("inside")

    async with supervising() as supervisor:
        with pytest.raises(ValueError, match="inside"):
            await supervisor.shielded(fails)
    with pytest.raises(ValueError, match="inside"):  # no job can run anymore, so the caller makes the call
        await supervisor.shielded(fails)


async def test_shielded_does_not_outlive_the_supervisor() -> None:
    raised: list[BaseException] = []

    async def work() -> None:
        await anyio.sleep(60)

    async with anyio.create_task_group() as group, supervising() as supervisor:

        async def caller() -> None:
            try:
                await supervisor.shielded(work)
            except ServerShutdown as exc:
                raised.append(exc)

        group.start_soon(caller)
        await anyio.wait_all_tasks_blocked()
        supervisor.request_stop()
        await until(lambda: raised)


async def test_a_requested_cancellation_is_not_a_failure() -> None:
    seen: list[bool] = []

    async def waits() -> None:
        try:
            await anyio.sleep(60)
        finally:
            seen.append(cancelled_itself())

    async with anyio.create_task_group() as group:
        group.start_soon(waits)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert seen == [False]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_supervisor_notices_that_its_loop_was_closed() -> None:
    made: list[Supervisor] = []

    async def make() -> None:
        made.append(Supervisor(context=contextvars.copy_context(), drain=nothing))

    def other_loop() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(make())
        assert not made[0].loop_is_closed
        loop.close()

    thread = threading.Thread(target=other_loop)
    thread.start()
    thread.join()
    assert made[0].loop_is_closed
    assert not made[0].usable
    with pytest.raises(RuntimeError):
        made[0].post(lambda: None)
