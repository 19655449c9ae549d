"""Access to the event loop of a `Realtime` for threads that run no loop.

If the `Realtime` runs in this process, calls go to its loop. If it does not (in the worker of a job queue), they go to
an event loop in a daemon thread that this module starts; that needs a broker which other processes share. The thread
does not keep the process from exiting: the loop then stops like a host, with `timeouts.drain` for its runs. A forked
child starts a thread of its own.

Two starts can race: the host's, and the one that a thread requests. The lock `_starting` permits one at a time. A host
that starts explicitly first closes the daemon thread's loop. A host that starts on first use takes no lock, so a thread
can lose that race; its own loop is then idle, and closing it must not stop the host's.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread

from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.engine.engine import Engine
from asgi_realtime.engine.run import Run
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.loop.thread_calls import LoopThread, ThreadCall
from asgi_realtime.loop.waiting import WaitList, on_asyncio

T = TypeVar("T")

_POLL_S = 0.01
"""How often a starting host checks whether the start of a thread is over."""


class ThreadBridge:
    """Runs coroutine functions and async iterators on the loop of an engine, and blocks the calling thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._own: LoopThread | None = None
        self._pid = os.getpid()

    def call(self, function: Callable[[], Awaitable[T]], supervisor: Supervisor | None = None) -> T:
        """Call a coroutine function on the loop of a supervisor, by default the current one.

        Raises what the function raises, `ServerShutdown`, and `RuntimeError` on the thread of an event loop.
        """
        _check_no_loop()
        return ThreadCall(supervisor or self.supervisor(), function).make()

    def iterate(self, start: Callable[[], AsyncIterator[T]], supervisor: Supervisor | None = None) -> Iterator[T]:
        """Iterate over an async iterator that `start` creates on the loop. The loop drops it too, because that can wake
        others."""
        supervisor = supervisor or self.supervisor()
        held: list[AsyncIterator[T]] = []

        async def following() -> T:
            if not held:
                held.append(start())
            return await _next(held[0])

        try:
            while True:
                try:
                    item = self.call(following, supervisor)
                except _End:
                    return
                yield item
        finally:
            with suppress(RuntimeError):  # the loop is closed
                supervisor.post(held.clear)

    def supervisor(self) -> Supervisor:
        """The running supervisor; starts one if necessary. Raises `RuntimeError`, `ServerShutdown`."""
        _check_no_loop()
        engine = self._engine
        if (supervisor := engine.supervisor) is None:
            self._reset_in_child()
            with self._starting:
                if engine.supervisor is None:
                    self._start()
            supervisor = engine.supervisor
        if supervisor is None:
            raise ServerShutdown()
        return supervisor

    def _start(self) -> None:
        if not self._engine.broker.shared:
            raise RuntimeError(
                "this Realtime does not run in this process and its broker is in memory, so the call would have no"
                " effect: start it with the app first, or use a broker that processes share"
            )
        with self._lock:
            if self._own is None:
                self._own = LoopThread()
                atexit.register(self._close_at_exit)
            portal = self._own.portal
        try:
            portal.call(self._engine.ensure_started)
        except RuntimeError:
            if self._engine.supervisor is None:
                raise  # otherwise the host has started on first use in the meantime

    def close(self) -> None:
        """Stop if the `Realtime` runs on the daemon thread's loop. Idempotent; a later call starts again."""
        self._reset_in_child()
        with self._lock:
            own, self._own = self._own, None
            atexit.unregister(self._close_at_exit)
            if own is not None:
                try:
                    own.portal.call(self._stop_if_on_this_loop)
                finally:
                    own.close()

    def _close_at_exit(self) -> None:
        """End the runs of this process, so that their subscribers need not wait for a lease. Best effort: some versions
        of Python start no thread at exit, so nothing can be resolved or shut down in one."""
        try:
            self.close()
        except Exception:
            logger.debug("the event loop of realtime.sync did not stop cleanly", exc_info=True)

    async def _stop_if_on_this_loop(self) -> None:
        supervisor = self._engine.supervisor
        if supervisor is not None and supervisor.usable:
            await self._engine.stop()

    @asynccontextmanager
    async def host_start(self) -> AsyncIterator[None]:
        """Surrounds the host's start: closes the daemon thread's loop, and makes threads wait for the host's."""
        if not self._engine.broker.shared:  # so that loop never exists
            yield
            return
        self._reset_in_child()
        starting = self._starting
        # Polled, because a worker thread that waits for the lock would still take it after a cancellation.
        while not starting.acquire(blocking=False):  # noqa: ASYNC110
            await anyio.sleep(_POLL_S)
        try:
            with anyio.CancelScope(shield=True):
                # A limiter of its own: the threads of the default one can all be waiting for this start.
                await anyio.to_thread.run_sync(self.close, limiter=anyio.CapacityLimiter(1))
            yield
        finally:
            starting.release()

    def _reset_in_child(self) -> None:
        """Threads do not survive a fork, and a lock that one of them held is never released in the child."""
        if self._pid != os.getpid():
            self._lock, self._starting = threading.Lock(), threading.Lock()
            self._own, self._pid = None, os.getpid()


class _End(Exception):
    """The end of an iteration. A coroutine cannot raise `StopIteration`."""


async def _next(items: AsyncIterator[T]) -> T:
    try:
        return await items.__anext__()
    except StopAsyncIteration:
        raise _End from None


def _check_no_loop() -> None:
    """Raises `RuntimeError` on the thread of an event loop, where blocking would be a deadlock."""
    if _runs_event_loop():
        raise RuntimeError("realtime.sync was called on an event loop's thread: await the async call there")


def _runs_event_loop() -> bool:
    """Whether the current thread runs an event loop."""
    if on_asyncio():
        return True
    try:
        anyio.lowlevel.current_token()
    except anyio.NoEventLoopError:
        return False
    return True


class HeldRun:
    """An open run whose body is in a thread. `enter` and `leave` are coroutine functions for `ThreadCall`.

    One job on the loop enters and leaves the context manager, because a cancel scope must be left in the task that
    entered it, and each `ThreadCall` is another task.
    """

    def __init__(self, supervisor: Supervisor, opened: AbstractAsyncContextManager[Run]) -> None:
        self._supervisor = supervisor
        self._opened = opened
        self._run: Run | None = None
        self._error: BaseException | None = None
        self._scope: anyio.CancelScope | None = None
        self._is_abandoned = False
        self._is_left = False
        self._is_over = False
        self._changed = WaitList()

    async def enter(self) -> Run:
        """Open the run. Raises what `open_run` raises."""
        self._supervisor.spawn(self._hold)
        while self._run is None and not self._is_over:
            await self._changed.wait()
        if self._run is None:
            raise self._error or ServerShutdown()  # the job was cancelled before the run was open
        return self._run

    async def leave(self, error: BaseException | None) -> BaseException | None:
        """Leave the run with the exception of its body, if any, and return the exception that the run ended with."""
        self._is_left = True
        if self._is_over:  # the run was canceled, or the server was shut down
            return self._error
        if isinstance(error, Exception):
            self._error = error
        elif error is not None:
            self.abandon()
        self._changed.wake()
        while not self._is_over:
            await self._changed.wait()
        return self._error

    def abandon(self) -> None:
        """Cancel the run: the thread was interrupted. While it opens the run, this is the only way to leave it."""
        self._is_abandoned = True
        if self._scope is not None:
            self._scope.cancel()

    async def _hold(self) -> None:
        try:
            with anyio.CancelScope() as self._scope:
                if self._is_abandoned:
                    self._scope.cancel()
                async with self._opened as run:
                    self._run = run
                    self._changed.wake()
                    while not self._is_left:
                        await self._changed.wait()
                    if self._error is not None:
                        raise self._error
        except Exception as exc:
            self._error = exc
        finally:
            self._is_over = True
            self._changed.wake()
