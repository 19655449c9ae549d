"""Calls that a thread makes on the event loop of a `Realtime`, and an event loop in a thread for a process without one.

A call is a job of the supervisor and ends with it, so at a shutdown the waiting thread gets `ServerShutdown`. A loop
that is abandoned without a stop notifies no thread, so the thread also checks regularly whether the loop still exists.
"""

from __future__ import annotations

import asyncio
import contextvars
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar, cast

import anyio
import anyio.from_thread

from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.loop.failures import cancelled_itself, is_failure
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.loop.threads import without_loop

T = TypeVar("T")

CHECK_PERIOD_S = 0.5
"""How often a waiting thread checks whether the loop still exists."""


class Outcome(Generic[T]):
    """The result or the error of a call that a loop makes for a waiting thread. Only the first one counts.

    A signal handler can raise at any point of the waiting code. If that is inside a lock of Python's own code, as in
    `concurrent.futures`, the lock can stay held, and the loop would wait for it forever. This queue has none.
    """

    def __init__(self) -> None:
        self._first: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def set_result(self, result: T) -> None:
        self._first.put((result, None))

    def set_error(self, error: BaseException) -> None:
        self._first.put((None, error))

    def wait(self, timeout: float | None = None) -> T:
        """Wait in a thread. Raises the error, and `queue.Empty` after `timeout` seconds."""
        result, error = self._first.get(timeout=timeout)
        if error is None:
            return cast("T", result)
        try:
            raise error
        finally:
            del error, self  # breaks a cycle: the traceback holds this frame


class ThreadCall(Generic[T]):
    """One call of a coroutine function on the loop of a supervisor, in a copy of the thread's context."""

    def __init__(self, supervisor: Supervisor, function: Callable[[], Awaitable[T]]) -> None:
        self._supervisor = supervisor
        self._function = function
        self._outcome: Outcome[T] = Outcome()
        self._scope: anyio.CancelScope | None = None
        self._is_abandoned = False

    def make(self) -> T:
        """Make the call and wait for its result, on a thread that runs no loop.

        An exception that interrupts the thread, such as `KeyboardInterrupt`, cancels the call. Raises what the function
        raises, `ServerShutdown`, and `RuntimeError` if the loop belongs to this thread and is not running.
        """
        if self._supervisor.on_own_thread and not self._supervisor.loop_is_closed:
            raise RuntimeError(
                "this Realtime was started on an event loop of this thread that is not running; await the async call"
                " there, or run the loop in another thread"
            )
        context = without_loop(contextvars.copy_context())
        try:
            self._post(lambda: self._start(context))
            while True:
                with suppress(Empty):
                    return self._outcome.wait(CHECK_PERIOD_S)
                if self._supervisor.ended or self._supervisor.loop_is_closed:
                    self._outcome.set_error(ServerShutdown())
        except BaseException:  # of the call itself, or a signal handler raised: at any point, also in `_post`
            with suppress(ServerShutdown):
                self._post(self._abandon)
            raise

    def _post(self, call: Callable[[], object]) -> None:
        try:
            self._supervisor.post(call)
        except RuntimeError:  # the loop is closed or closing
            raise ServerShutdown() from None

    # On the loop's thread

    def _start(self, context: contextvars.Context) -> None:
        if self._supervisor.ended:
            self._outcome.set_error(ServerShutdown())
        else:
            self._supervisor.spawn_brief(self._run, context)

    async def _run(self) -> None:
        outcome = self._outcome
        try:
            with anyio.CancelScope() as scope:
                self._scope = scope
                if self._is_abandoned:
                    scope.cancel()
                outcome.set_result(await self._function())
        except anyio.get_cancelled_exc_class() as exc:
            if not cancelled_itself():
                outcome.set_error(ServerShutdown())
                raise
            outcome.set_error(exc)
        except BaseException as exc:
            if not is_failure(exc):  # it ends the loop
                outcome.set_error(ServerShutdown())
                raise
            outcome.set_error(exc)

    def _abandon(self) -> None:
        """Cancel the call, because the thread does not wait for it anymore."""
        self._is_abandoned = True
        if self._scope is not None:
            self._scope.cancel()


class ThreadLoop(asyncio.SelectorEventLoop):
    """A loop for a thread that still works while the interpreter exits. No executor accepts work then, so the loop
    resolves names itself, which blocks it for as long."""

    async def getaddrinfo(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().getaddrinfo(*args, **options)
        except RuntimeError:
            return socket.getaddrinfo(*args, **options)


class LoopThread:
    """A loop in a daemon thread. (Python waits at its exit for the thread of anyio's `start_blocking_portal`.)"""

    def __init__(self) -> None:
        self._is_closing = False
        self._ready: Future[anyio.from_thread.BlockingPortal] = Future()
        self._thread = threading.Thread(target=self._run, name="asgi_realtime sync", daemon=True)
        self._thread.start()
        self.portal = self._ready.result()

    def _run(self) -> None:
        try:
            anyio.run(self._serve, backend_options={"loop_factory": ThreadLoop})
        except BaseException as exc:
            if not self._ready.done():
                self._ready.set_exception(exc)
            elif not self._is_closing:
                raise
            else:
                logger.debug("the loop of a thread did not close cleanly", exc_info=True)

    async def _serve(self) -> None:
        async with anyio.from_thread.BlockingPortal() as portal:
            self._ready.set_result(portal)
            await portal.sleep_until_stopped()

    def close(self) -> None:
        """End the loop and wait for the thread."""
        self._is_closing = True
        self.portal.start_task_soon(self.portal.stop)
        self._thread.join()
