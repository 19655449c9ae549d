"""The same calls for code that is not on the event loop: a thread, a sync view, a worker process.

Where the `Realtime` runs in this process, the calls go to its loop. Where it does not (a worker process of a queue),
they go to a loop of their own in a thread, which is of use only with a broker that other processes see.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar, overload

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
    from asgi_realtime.tasks.task import Task
    from asgi_realtime.tasks.trigger import BatchItem

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
        self._portal: anyio.from_thread.BlockingPortal | None = None
        self._stack = ExitStack()

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
        """As `Realtime.execute`: returns when the run is over."""
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
        with self._lock:
            portal, self._portal = self._portal, None
            if portal is not None:
                portal.call(self._realtime.stop)
                self._stack.close()

    def _call(self, function: Callable[[], Awaitable[T]]) -> T:
        if _loop_runs_here():
            raise RuntimeError("realtime.sync was called on an event loop's thread: await the async call there")
        supervisor = self._realtime.engine.supervisor
        if supervisor is not None:
            return supervisor.run_from_thread(function)
        return self._own_portal().call(function)

    def _own_portal(self) -> anyio.from_thread.BlockingPortal:
        if not self._realtime.broker.shared:
            raise RuntimeError(
                "this Realtime does not run in this process and its broker is in memory, so nobody would see this:"
                " start it with the app first, or use a broker that processes share"
            )
        with self._lock:
            if self._portal is None:
                self._portal = self._stack.enter_context(anyio.from_thread.start_blocking_portal())
            return self._portal


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
