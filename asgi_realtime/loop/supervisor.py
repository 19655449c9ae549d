"""The task group in which everything of a `Realtime` runs, from its start to its stop.

One supervisor task owns the group. It runs in the context of the start and never of a request, so no cancel scope of a
request or of the host's lifespan reaches a job, and no context variable leaks into one. After a stop another supervisor
can start, on another event loop as well.

**States.** `RUNNING` starts each job at once, or as soon as the group is open. `request_stop` leads to `DRAINING`, in
which the drain runs as one more job; new jobs start as before, because runs that finish need writers and commits. The
end of the drain, or a cancellation of the supervisor task from outside (`asyncio.run` cancels all tasks when its main
one ends, and trio its system tasks), leads to `ENDING`: the group is cancelled. `ENDED` follows once no job is left.

A closed event loop is no state. A host can abandon its loop without a stop, and then nothing runs that could change the
state; ask `loop_is_closed`.

**A late job must see its cancellation.** Something waits for the end of most jobs: the reader of a pipe, the caller of
`shielded`, a thread. A job that is dropped in `ENDING` would leave them waiting forever. So it starts in the cancelled
group, is cancelled at its first wait, and notifies them from its `finally`.

**The group must be left empty.** Between the moment in which a task group has seen its last task end and the moment
in which the code after the `async with` runs, the loop makes several iterations. A job that starts in between is an
error on trio, which ends the whole program if a callback caused it; on asyncio the job waits for a cancellation that
the closed scope does not deliver anymore, and the group waits for the job. So the supervisor waits for all jobs
*inside* the group, and sets `ENDED` without another loop iteration after the last one.

**Nothing may leave the supervisor task on trio.** An exception that leaves a system task ends the program with
`TrioInternalError`. Failures are logged. `KeyboardInterrupt` is raised in whatever code runs when the user presses
Ctrl-C, so possibly in a job, but it is meant for the program: after all jobs have ended the signal is raised again,
and trio delivers it to the main task. On asyncio a `KeyboardInterrupt` leaves the loop directly.

**Brief jobs** (`spawn_brief`) are bare asyncio tasks outside of the group, at an eighth of the cost. They are cancelled
one by one in `ENDING`.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from enum import Enum
from threading import get_ident
from typing import Any, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel

from asgi_realtime.core.errors import BrokerUnavailable, ServerShutdown
from asgi_realtime.loop.failures import cancelled_itself, is_failure, is_interrupt
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.waiting import WaitList, on_asyncio

T = TypeVar("T")

Job = Callable[[], Awaitable[None]]


class State(Enum):
    RUNNING = "running"
    DRAINING = "draining"
    ENDING = "ending"
    ENDED = "ended"


_NEXT: dict[State, frozenset[State]] = {
    State.RUNNING: frozenset({State.DRAINING, State.ENDING}),
    State.DRAINING: frozenset({State.ENDING}),
    State.ENDING: frozenset({State.ENDED}),
    State.ENDED: frozenset(),
}

_TOO_LATE = (State.ENDING, State.ENDED)

_forks = 0
"""How often this process is the child of a fork. In a child, the loop that ran in the parent seems to run still."""


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_count_fork)


class Supervisor:
    """Runs jobs in one task group until it is stopped. Belongs to the loop on which it was created."""

    def __init__(self, *, context: contextvars.Context, drain: Job) -> None:
        self.context = context
        self.turn = anyio.Lock()
        """Held during work that takes milliseconds, so that each iteration of the loop does one piece of it."""
        self._drain = drain
        self._state = State.RUNNING
        self._group: anyio.abc.TaskGroup | None = None
        self._jobs_in_group = 0
        self._unstarted: dict[object, Coroutine[Any, Any, None]] = {}  # of these, before their first step
        self._queue: list[tuple[contextvars.Context, Job]] = []
        self._brief: set[asyncio.Task[None]] = set()
        self._work = WaitList()
        self._ended = WaitList()
        self._thread = get_ident()
        self._forks = _forks
        self._loop = asyncio.get_running_loop() if on_asyncio() else None
        self._token = anyio.lowlevel.current_token()
        self._task: Any = None

    # State

    def _enter(self, state: State) -> bool:
        """Move to a state if the table allows it; return whether it does."""
        allowed = state in _NEXT[self._state]
        if allowed:
            self._state = state
        return allowed

    @property
    def stopping(self) -> bool:
        """Whether a stop has begun."""
        return self._state is not State.RUNNING

    @property
    def ending(self) -> bool:
        """Whether all jobs have been cancelled: it is too late for new ones."""
        return self._state in _TOO_LATE

    @property
    def ended(self) -> bool:
        """Whether no job is left and none can start."""
        return self._state is State.ENDED

    @property
    def loop_is_closed(self) -> bool:
        """Whether the event loop was closed without a stop."""
        return self._loop is not None and self._loop.is_closed()

    @property
    def usable(self) -> bool:
        """Whether the calling code runs on this supervisor's loop, and it has not ended."""
        return not self.ended and self._is_current()

    @property
    def accepts_jobs(self) -> bool:
        """Whether a job that the calling code spawns can do its work.

        For the hot path, so it does not ask which loop runs here: before Python 3.12 that costs a system call.
        """
        if self._state in _TOO_LATE or self._forks != _forks:
            return False
        loop = self._loop
        return self._is_current() if loop is None else loop.is_running() and get_ident() == self._thread

    def _is_current(self) -> bool:
        try:
            if self._loop is not None:
                return asyncio.get_running_loop() is self._loop
            return not on_asyncio() and anyio.lowlevel.current_token() == self._token
        except RuntimeError:  # no loop runs in this thread
            return False

    @property
    def jobs(self) -> int:
        """The number of jobs that have not ended."""
        return self._jobs_in_group + len(self._queue) + len(self._brief)

    @property
    def on_own_thread(self) -> bool:
        return get_ident() == self._thread

    @property
    def has_the_loop(self) -> bool:
        """On trio: whether the current task is one of the jobs or was started by one. Always False on asyncio."""
        if self._loop is not None:
            return False
        import trio

        try:
            task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        except RuntimeError:
            return False
        while task is not None and task is not self._task:
            task = None if task.parent_nursery is None else task.parent_nursery.parent_task
        return task is not None

    # Life

    def start(self) -> None:
        """Start the supervisor task, without waiting for it."""
        if self._loop is not None:
            self._task = self._loop.create_task(self._run(), name="asgi_realtime", context=self.context)
        else:
            import trio

            self._task = trio.lowlevel.spawn_system_task(self._run, name="asgi_realtime", context=self.context)

    def request_stop(self) -> None:
        """Begin to stop: drain, then cancel the jobs that still run. On the loop's thread; idempotent."""
        if self._enter(State.DRAINING):
            self.spawn_detached(self._drain_and_end)

    async def wait_ended(self) -> None:
        while not self.ended:
            await self._ended.wait()

    async def _run(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                try:
                    self._start_queued(group)
                    while not self.ending:
                        await self._work.wait()
                        self._start_queued(group)
                finally:
                    self._enter(State.ENDING)  # if cancelled from outside
                    group.cancel_scope.cancel()
                    await self._wait_until_empty(group)
                    self._enter(State.ENDED)
                    self._group = None
        except Exception:
            logger.exception("the supervisor failed")
        except BaseException as exc:
            if self._loop is not None or not is_interrupt(exc):
                raise
            signal.raise_signal(signal.SIGINT)
        finally:
            self._group = None
            self._enter(State.ENDED)  # if the wait for the jobs failed: asyncio's own cancellation ignores shields
            self._ended.wake()

    async def _drain_and_end(self) -> None:
        try:
            await self._drain()
        finally:
            self._enter(State.ENDING)
            self._work.wake()

    async def _wait_until_empty(self, group: anyio.abc.TaskGroup) -> None:
        """Wait until all jobs have ended, including those that still arrive."""
        with anyio.CancelScope(shield=True):
            await self._forget_unstarted()
            while self.jobs:
                self._start_queued(group)
                if self._jobs_in_group:
                    await self._work.wait()
                else:
                    brief = list(self._brief)
                    await anyio.lowlevel.checkpoint()  # a job that is cancelled before it begins cannot tell anyone
                    for task in brief:
                        task.cancel()
                    await asyncio.wait(brief)

    async def _forget_unstarted(self) -> None:
        """Stop counting the jobs that never begin. When a program ends, asyncio cancels all tasks, and one that it
        cancels before the first step executes nothing of its job, not even the end. On trio every job begins."""
        if self._loop is None:
            return
        unstarted = list(self._unstarted)
        await anyio.lowlevel.checkpoint()
        for mark in unstarted:
            if counted := self._unstarted.pop(mark, None):
                counted.close()
                self._jobs_in_group -= 1

    # Jobs

    def spawn(self, job: Job) -> None:
        """Run a background job in a copy of the caller's context. Its errors are logged."""
        self._spawn(contextvars.copy_context(), job)

    def spawn_detached(self, job: Job) -> None:
        """Run a background job in a copy of the start's context, so nothing of a request leaks into it."""
        self._spawn(self.context.copy(), job)

    def spawn_brief(self, job: Job, context: contextvars.Context | None = None) -> None:
        """As `spawn_detached`, for many short jobs. A `context` is used as the job's own, without a copy."""
        if context is None:
            context = self.context.copy()
        if self._loop is None or self._group is None:
            self._spawn(context, job)
            return
        task = self._loop.create_task(self._guarded(job), context=context)
        self._brief.add(task)
        task.add_done_callback(self._brief.discard)

    def _spawn(self, context: contextvars.Context, job: Job) -> None:
        if self._group is None or not self._in_task():
            self._queue.append((context, job))
            self._work.wake()
        else:
            self._start(self._group, context, job)

    def _in_task(self) -> bool:
        """Whether the calling code can start a task: anyio cannot in a callback of asyncio's loop, which is in no task.

        Trio runs callbacks in a task of its own.
        """
        return self._loop is None or asyncio.current_task(self._loop) is not None

    def _start_queued(self, group: anyio.abc.TaskGroup) -> None:
        queue, self._queue = self._queue, []
        for context, job in queue:
            self._start(group, context, job)

    def _start(self, group: anyio.abc.TaskGroup, context: contextvars.Context, job: Job) -> None:
        if self.ending and self._loop is not None:  # on asyncio a cancelled group without tasks cancels no later ones
            self.spawn_brief(job, context)
            return
        mark = object()
        counted = self._unstarted[mark] = self._counted(job, mark)
        self._jobs_in_group += 1
        context.run(group.start_soon, lambda: counted)

    async def _counted(self, job: Job, mark: object) -> None:
        del self._unstarted[mark]
        try:
            await self._guarded(job)
        finally:
            self._jobs_in_group -= 1
            if self.ending:
                self._work.wake()

    async def _guarded(self, job: Job) -> None:
        """Run a job so that its failure ends no other: raised, it would cancel the whole group."""
        try:
            await job()
        except BaseException as exc:
            cancelled = anyio.get_cancelled_exc_class()
            if isinstance(exc, (BrokerUnavailable, ServerShutdown)):  # the environment's: a traceback adds nothing
                logger.warning("a background job could not finish: %s (%r)", exc, job)
            elif is_failure(exc):
                logger.exception("a background job failed: %r", job)
            elif isinstance(exc, cancelled) and cancelled_itself():
                logger.exception("a background job cancelled itself: %r", job)
            elif isinstance(exc, BaseExceptionGroup) and (rest := exc.split(cancelled)[1]) and is_failure(rest):
                logger.error("a background job failed while being cancelled: %r", job, exc_info=rest)
            else:
                raise

    async def shielded(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine function as a job and return its result. Cancelling the caller does not cancel the job.

        Raises what the function raises, and `ServerShutdown` if the job was cancelled.
        """
        if self.ending:
            return await function()
        result: Future[T] = Future()
        done = anyio.Event()

        async def job() -> None:
            try:
                result.set_result(await function())
            except Exception as exc:
                result.set_exception(exc)
            finally:
                done.set()

        self.spawn(job)
        await done.wait()
        if not result.done():
            raise ServerShutdown()
        return result.result()

    # Other threads

    def post(self, call: Callable[[], object]) -> None:
        """Make a call on the loop's thread, from any thread or signal handler. Raises RuntimeError if the loop is
        closed."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(call)
        else:
            native: Any = self._token.native_token
            native.run_sync_soon(call)

    def post_or_call(self, call: Callable[[], object]) -> None:
        """Make a call directly on the loop's thread, and post it from any other."""
        if self.on_own_thread:
            call()
        else:
            self.post(call)
