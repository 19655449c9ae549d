"""The life of a `Realtime` between start and stop.

One supervisor task owns the task group in which everything of ours runs, in the context of the start and never of a
request, so no cancel scope ever belongs to a request or to the host's lifespan task. It can be started again after
stop, on another loop as well.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel

from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.loop.waiting import WaitList, on_asyncio

logger = logging.getLogger("asgi_realtime")

Job = Callable[[], Awaitable[None]]


def cancelled_by_nobody() -> bool:
    """Whether the cancellation that is being handled is of the code's own making.

    On asyncio whoever awaits a cancelled task or future gets a `CancelledError` that nobody has asked for.
    """
    task = asyncio.current_task() if on_asyncio() else None
    return task is not None and not task.cancelling()


def is_failure(exc: BaseException) -> bool:
    """Whether code has failed by itself: an exception, `SystemExit`, or a group of such, as task groups raise them.

    What exits in a job ends that job and not the server. What is left is cancellation and `KeyboardInterrupt`.
    """
    if isinstance(exc, BaseExceptionGroup):
        return all(map(is_failure, exc.exceptions))
    return isinstance(exc, (Exception, SystemExit))


def _is_interrupt(exc: BaseException) -> bool:
    """Whether this is a `KeyboardInterrupt`, or a group with one in it."""
    if isinstance(exc, BaseExceptionGroup):
        return any(map(_is_interrupt, exc.exceptions))
    return isinstance(exc, KeyboardInterrupt)


def _in_task() -> bool:
    """Whether the calling code may start a task: on asyncio a callback of the loop is in no task, and anyio needs one.

    On trio callbacks run in a task of the loop's own.
    """
    return not on_asyncio() or asyncio.current_task() is not None


class Supervisor:
    """Runs jobs in one task group until it is stopped. Belongs to the loop it was made on."""

    def __init__(self, *, context: contextvars.Context, drain: Job) -> None:
        self.context = context
        self._drain = drain
        self.stopping = False
        self._group: anyio.abc.TaskGroup | None = None
        self._in_group = 0
        self.ending = False
        """All jobs were cancelled, and whoever comes now has come too late."""
        self._queue: list[tuple[contextvars.Context, Job]] = []
        self._work = WaitList()
        self._brief: set[asyncio.Task[None]] = set()
        self._drained = False
        self._ended = WaitList()
        self.ended = False
        self._thread = threading.get_ident()
        self._loop = asyncio.get_running_loop() if on_asyncio() else None
        self._token = anyio.lowlevel.current_token()
        self._task: Any = None

    def start(self) -> None:
        """Start the supervisor task. Does not wait for it."""
        if self._loop is not None:
            self._task = self._loop.create_task(self._run(), name="asgi_realtime", context=self.context)
        else:
            import trio

            self._task = trio.lowlevel.spawn_system_task(self._run, name="asgi_realtime", context=self.context)

    @property
    def usable(self) -> bool:
        """Whether jobs can run here: not ended, and called on its own living loop."""
        if self.ended:
            return False
        if self._loop is not None:
            return on_asyncio() and asyncio.get_running_loop() is self._loop
        try:
            return not on_asyncio() and anyio.lowlevel.current_token() == self._token
        except anyio.NoEventLoopError:
            return False

    @property
    def dead(self) -> bool:
        """Whether its loop was closed without a stop."""
        return self._loop is not None and self._loop.is_closed()

    @property
    def on_own_thread(self) -> bool:
        return threading.get_ident() == self._thread

    @property
    def has_the_loop(self) -> bool:
        """Whether one of the jobs, or a task that one has started, is what trio runs now. On asyncio never."""
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

    async def _run(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                try:
                    self._start_queued(group)
                    while not self._drained:
                        await self._work.wait()
                        self._start_queued(group)
                finally:
                    group.cancel_scope.cancel()
                    await self._all_is_done(group)
                    self._group = None
                    self.ended = True  # with no turn of the loop since then, in which a job could come and be lost
        except Exception:  # nothing may leave: on trio it would end the whole program
            logger.exception("the supervisor failed")
        except BaseException as exc:
            if self._loop is not None or not _is_interrupt(exc):
                raise
            signal.raise_signal(signal.SIGINT)  # now that nothing of ours runs, it reaches the main task
        finally:
            self._group = None
            self.ended = True
            self._ended.wake()

    def _start_queued(self, group: anyio.abc.TaskGroup) -> None:
        queue, self._queue = self._queue, []
        for context, job in queue:
            self._start_in(group, context, job)

    def _start_in(self, group: anyio.abc.TaskGroup, context: contextvars.Context, job: Job) -> None:
        context.run(group.start_soon, self._guarded_in_group, job)
        self._in_group += 1

    async def _all_is_done(self, group: anyio.abc.TaskGroup) -> None:
        """Wait for the end of all jobs, of those too that come meanwhile.

        A group is closed some turns of the loop before whoever left it goes on. What comes in between is an error on
        trio, and on asyncio it waits for a cancellation that nobody delivers any more. So the group is left empty.
        """
        self.ending = True
        with anyio.CancelScope(shield=True):
            while self._in_group or self._queue or self._brief:
                self._start_queued(group)  # what comes late sees its cancellation
                if self._in_group:
                    await self._work.wait()
                else:
                    for task in self._brief:
                        task.cancel()
                    await asyncio.wait(self._brief)

    async def _guarded_in_group(self, job: Job) -> None:
        try:
            await self._guarded(job)
        finally:
            self._in_group -= 1
            if self.ending:
                self._work.wake()

    async def _drain_and_end(self) -> None:
        try:
            await self._drain()
        finally:
            self._drained = True
            self._work.wake()

    async def _guarded(self, job: Job) -> None:
        try:
            await job()
        except BaseException as exc:
            cancelled = anyio.get_cancelled_exc_class()
            if is_failure(exc):
                logger.exception("a background job failed: %r", job)
            elif isinstance(exc, cancelled) and cancelled_by_nobody():
                logger.exception("a background job cancelled itself: %r", job)  # raised, it would cancel all others too
            elif isinstance(exc, BaseExceptionGroup) and (rest := exc.split(cancelled)[1]) and is_failure(rest):
                logger.error("a background job failed as it was cancelled: %r", job, exc_info=rest)
            else:
                raise

    def spawn(self, job: Job) -> None:
        """Run a job beside everything else, in a copy of the caller's context. Its errors are logged."""
        self._spawn(contextvars.copy_context(), job)

    def spawn_detached(self, job: Job) -> None:
        """Run a job in a copy of the context of the start, so that nothing of a request leaks into it."""
        self._spawn(self.context.copy(), job)

    def spawn_brief(self, job: Job, context: contextvars.Context | None = None) -> None:
        """As `spawn_detached`, for jobs that are short and many: on asyncio a bare task, an eighth of the cost.

        With a context it runs in that one, which is the job's from then on.
        """
        if context is None:
            context = self.context.copy()
        if self._loop is None or self._group is None:
            self._spawn(context, job)
            return
        task = self._loop.create_task(self._guarded(job), context=context)
        self._brief.add(task)
        task.add_done_callback(self._brief.discard)

    def _spawn(self, context: contextvars.Context, job: Job) -> None:
        if self._group is None or not _in_task():
            self._queue.append((context, job))
            self._work.wake()
        else:
            self._start_in(self._group, context, job)

    def post(self, call: Callable[[], object]) -> None:
        """Make a call on the loop's thread, from any thread or signal handler. Raises RuntimeError if it is gone."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(call)
        else:
            native: Any = self._token.native_token
            native.run_sync_soon(call)

    def post_or_call(self, call: Callable[[], object]) -> None:
        """Make a call now if this is the loop's thread, else post it."""
        if self.on_own_thread:
            call()
        else:
            self.post(call)

    async def shielded(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run a coroutine function here and wait for it. Cancelling the caller does not cancel it."""
        if self.ended or (self._group is not None and self._group.cancel_scope.cancel_called):
            await function()
            return
        done = WaitList()
        outcome: list[Exception | None] = []

        async def job() -> None:
            try:
                await function()
            except Exception as exc:
                outcome.append(exc)
            else:
                outcome.append(None)
            finally:
                outcome.append(ServerShutdown("the server was shut down"))  # counts if there is nothing before it
                done.wake()

        self.spawn(job)
        while not outcome:
            await done.wait()
        if outcome[0] is not None:
            raise outcome[0]

    async def wait_ended(self) -> None:
        while not self.ended:
            await self._ended.wait()

    def request_stop(self) -> None:
        """Begin to stop: drain, then cancel what still runs. On the loop's thread; idempotent."""
        if not self.stopping:
            self.stopping = True
            self.spawn_detached(self._drain_and_end)
