"""The same calls for code that is not on the event loop: a thread, a sync view, a worker process.

Where the `Realtime` runs in this process, the calls go to its loop. Where it does not (a worker process of a queue),
they go to a loop of their own in a thread, which is of use only with a broker that other processes see. That thread
does not keep the process from ending, and a child of a fork makes one of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import anyio
import anyio.from_thread
import anyio.lowlevel

from asgi_realtime.config import Span
from asgi_realtime.waiting import on_asyncio

if TYPE_CHECKING:
    from asgi_realtime.core.runs import RunRecord
    from asgi_realtime.handles import BatchHandle, RunHandle
    from asgi_realtime.pipe import PipeResult
    from asgi_realtime.realtime import Realtime, RunLike
    from asgi_realtime.tasks.batches import BatchItem
    from asgi_realtime.tasks.task import Task

R = TypeVar("R")
T = TypeVar("T")


class SyncRealtime:
    """`Realtime`'s calls, blocking. Each raises what the async call raises.

    Raises `RuntimeError` on the thread of the loop itself, where blocking would be a dead-lock, and where no loop runs
    and the broker is in memory, where nobody would see what is written.
    """

    def __init__(self, realtime: Realtime) -> None:
        self._realtime = realtime
        self._lock = threading.Lock()
        self._own: _OwnLoop | None = None
        self._pid = os.getpid()

    @overload
    def trigger(self, task: Task[Any, R], payload: Any = None, **options: Any) -> RunHandle[R]: ...

    @overload
    def trigger(self, task: str, payload: Any = None, **options: Any) -> RunHandle[Any]: ...

    def trigger(self, task: Task[Any, Any] | str, payload: Any = None, **options: Any) -> RunHandle[Any]:
        """As `Realtime.trigger`."""
        return self._call(lambda: self._realtime.trigger(task, payload, **options))

    def batch_trigger(self, items: Iterable[BatchItem], *, token_expires_in: Span = "1h") -> BatchHandle:
        """As `Realtime.batch_trigger`."""
        return self._call(lambda: self._realtime.batch_trigger(items, token_expires_in=token_expires_in))

    def execute(self, run_id: str) -> None:
        """As `Realtime.execute`: returns when the run is over. An exception that interrupts it cancels the run: of a
        signal handler, as the soft time limits of queues are."""
        self._call(lambda: self._realtime.execute(run_id))

    def pipe(self, source: Any, stream: str = "default", *, run: RunLike | None = None, **options: Any) -> PipeResult:
        """Forward a whole source and wait until it is in the log. Raises the source's error."""

        async def forward() -> PipeResult:
            return await self._realtime.pipe(source, stream, run=run, **options).wait_until_complete()

        return self._call(forward)

    def append(self, chunk: Any, stream: str = "default", *, run: RunLike | None = None) -> None:
        """As `Realtime.append`."""
        self._call(lambda: self._realtime.append(chunk, stream, run=run))

    def send_input(self, run: RunLike, input_id: str, data: Any) -> None:
        """As `Realtime.send_input`."""
        self._call(lambda: self._realtime.send_input(run, input_id, data))

    def cancel(self, run: RunLike) -> RunRecord:
        """As `Realtime.cancel`."""
        return self._call(lambda: self._realtime.cancel(run))

    def get_run(self, run: RunLike) -> RunRecord:
        """As `Realtime.get_run`."""
        return self._call(lambda: self._realtime.get_run(run))

    def result(self, run: RunLike, *, timeout: Span | None = None) -> Any:
        """As `Realtime.result`."""
        return self._call(lambda: self._realtime.result(run, timeout=timeout))

    def read(
        self, run: RunLike, stream: str = "default", *, start_index: int = 0, timeout: Span | None = None
    ) -> Iterator[Any]:
        """As `Realtime.read`."""

        async def begin() -> Any:
            return self._realtime.read(run, stream, start_index=start_index, timeout=timeout)

        reader = self._call(begin)
        while True:
            try:
                chunk = self._call(lambda: _next(reader))
            except _End:
                return
            yield chunk

    def close(self) -> None:
        """Stop, if the `Realtime` runs on a loop that these calls made for themselves; that of the host is left alone.

        Idempotent; a later call begins again.
        """
        self._heed_fork()
        with self._lock:
            own, self._own = self._own, None
            if own is not None:
                own.portal.call(self._realtime.stop)
                own.close()

    def _call(self, function: Callable[[], Awaitable[T]]) -> T:
        if _loop_runs_here():
            raise RuntimeError("realtime.sync was called on an event loop's thread: await the async call there")
        supervisor = self._realtime.engine.supervisor
        portal = self._own_portal() if supervisor is None else None
        call = _Call(function)
        try:
            if supervisor is not None:
                return supervisor.run_from_thread(call.run)
            assert portal is not None
            return portal.call(call.run)
        except BaseException:
            if not call.over:  # so it is no error of the call: a signal handler raised here
                if supervisor is not None:
                    supervisor.post(call.give_up)
                elif portal is not None:
                    portal.start_task_soon(call.give_up)
            raise

    def _heed_fork(self) -> None:
        """The threads of a process do not come along into its children."""
        if self._pid != os.getpid():
            self._lock, self._own, self._pid = threading.Lock(), None, os.getpid()

    def _own_portal(self) -> anyio.from_thread.BlockingPortal:
        if not self._realtime.broker.shared:
            raise RuntimeError(
                "this Realtime does not run in this process and its broker is in memory, so nobody would see this:"
                " start it with the app first, or use a broker that processes share"
            )
        self._heed_fork()
        with self._lock:
            if self._own is None:
                self._own = _OwnLoop()
            return self._own.portal


class _OwnLoop:
    """A loop in a daemon thread. (That of anyio's `start_blocking_portal` is waited for at the exit of Python.)"""

    def __init__(self) -> None:
        self._ready: Future[anyio.from_thread.BlockingPortal] = Future()
        self._thread = threading.Thread(target=self._run, name="asgi_realtime sync", daemon=True)
        self._thread.start()
        self.portal = self._ready.result()

    def _run(self) -> None:
        try:
            anyio.run(self._serve)
        except BaseException as exc:
            if self._ready.done():
                raise
            self._ready.set_exception(exc)

    async def _serve(self) -> None:
        async with anyio.from_thread.BlockingPortal() as portal:
            self._ready.set_result(portal)
            await portal.sleep_until_stopped()

    def close(self) -> None:
        """Let the loop end, and wait for that."""
        self.portal.start_task_soon(self.portal.stop)
        self._thread.join()


class _Call(Generic[T]):
    """A call on the loop for which a thread waits."""

    def __init__(self, function: Callable[[], Awaitable[T]]) -> None:
        self._function = function
        self._scope: anyio.CancelScope | None = None
        self._given_up = False
        self.over = False

    async def run(self) -> T:
        with anyio.CancelScope() as scope:
            self._scope = scope
            if self._given_up:
                scope.cancel()
            try:
                return await self._function()
            finally:
                self.over = True
        raise RuntimeError("nobody waits for this call any more")

    def give_up(self) -> None:
        """Nobody waits any more. On the loop's thread."""
        self._given_up = True
        if self._scope is not None:
            self._scope.cancel()


class _End(Exception):
    """The end of an iteration, in a form that may leave a coroutine."""


async def _next(reader: Any) -> Any:
    try:
        return await reader.__anext__()
    except StopAsyncIteration:
        raise _End from None


def _loop_runs_here() -> bool:
    if on_asyncio():
        return True
    try:
        anyio.lowlevel.current_token()
    except anyio.NoEventLoopError:
        return False
    return True
