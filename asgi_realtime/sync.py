"""The same calls for code that is not on the event loop: a thread, a sync view, a worker process.

Where the `Realtime` runs in this process, the calls go to its loop. Where it does not (a worker process of a queue),
they go to a loop of their own in a thread, which is of use only with a broker that other processes see. That thread
does not keep the process from ending, and a child of a fork makes one of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread

from asgi_realtime.core.config import Span
from asgi_realtime.core.errors import RealtimeError, ServerShutdown
from asgi_realtime.engine.held_run import HeldRun
from asgi_realtime.engine.run import Run, current, current_run
from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.loop.thread_calls import OwnLoop, ThreadCall
from asgi_realtime.loop.waiting import on_asyncio

if TYPE_CHECKING:
    from asgi_realtime.core.runs import RunRecord
    from asgi_realtime.realtime import Realtime, RunLike
    from asgi_realtime.runs.handles import BatchHandle, RunHandle
    from asgi_realtime.streams.followers import StreamChunk
    from asgi_realtime.streams.pipe import PipeResult
    from asgi_realtime.tasks.batches import BatchItem
    from asgi_realtime.tasks.task import Task

R = TypeVar("R")
T = TypeVar("T")


class SyncRealtime:
    """`Realtime`'s calls, blocking. Each raises what the async call raises.

    Raises `RuntimeError` on the thread of a loop, where blocking would be a dead-lock, and where no loop runs
    and the broker is in memory, where nobody would see what is written. Raises `ServerShutdown` where the `Realtime` is
    stopped, or its loop ends, while a call waits.
    """

    def __init__(self, realtime: Realtime) -> None:
        self._realtime = realtime
        self._lock = threading.Lock()
        self._starting = threading.Lock()  # of the host's start and of one for ourselves, whichever comes first
        self._own: OwnLoop | None = None
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

    def get_input(self, input_id: str, *, timeout: Span | None = None) -> Any:
        """The next data sent into the current run, as `current_run().input(input_id).get()`."""
        run = current_run()
        return self._call(lambda: run.input(input_id).get(timeout=timeout))

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

        return self._iterate(lambda: self._realtime.read(run, stream, start_index=start_index, timeout=timeout))

    @overload
    def subscribe_to_run(
        self, run: RunLike, *, stop_on_completion: bool = True, with_streams: Literal[False] = False
    ) -> Iterator[RunRecord]: ...

    @overload
    def subscribe_to_run(
        self, run: RunLike, *, stop_on_completion: bool = True, with_streams: Literal[True]
    ) -> Iterator[RunRecord | StreamChunk]: ...

    def subscribe_to_run(
        self, run: RunLike, *, stop_on_completion: bool = True, with_streams: bool = False
    ) -> Iterator[Any]:
        """As `Realtime.subscribe_to_run`."""
        options: dict[str, Any] = {"stop_on_completion": stop_on_completion, "with_streams": with_streams}
        return self._iterate(lambda: self._realtime.subscribe_to_run(run, **options))

    def subscribe_to_runs_with_tag(
        self, tags: str | Iterable[str], *, created_within: Span = "24h"
    ) -> Iterator[RunRecord]:
        """As `Realtime.subscribe_to_runs_with_tag`."""
        return self._iterate(lambda: self._realtime.subscribe_to_runs_with_tag(tags, created_within=created_within))

    def subscribe_to_batch(self, batch: str | BatchHandle) -> Iterator[RunRecord]:
        """As `Realtime.subscribe_to_batch`."""
        return self._iterate(lambda: self._realtime.subscribe_to_batch(batch))

    @contextmanager
    def open_run(
        self, name: str, *, tags: str | Iterable[str] | None = None, metadata: Mapping[str, Any] | None = None
    ) -> Iterator[Run]:
        """As `Realtime.open_run`, in a `with`. The body is a thread's, so `cancel(run)` does not interrupt it: it may
        look at `run.canceled`, what it writes is refused, and leaving raises `RunCanceled`. What is no `Exception`,
        such as `KeyboardInterrupt`, cancels the run and goes on."""
        supervisor = self._supervisor()
        held = HeldRun(supervisor, self._realtime.open_run(name, tags=tags, metadata=metadata))
        run = self._call(held.enter, supervisor)
        token = current.set(run)
        try:
            yield run
        except BaseException as exc:
            try:
                ended_with = self._call(lambda error=exc: held.leave(error), supervisor)  # type: ignore[misc]
            except RealtimeError as failure:
                ended_with = failure
            if isinstance(exc, Exception) and ended_with is not None and ended_with is not exc:
                raise ended_with from exc
            raise
        else:
            ended_with = self._call(lambda: held.leave(None), supervisor)
            if ended_with is not None:
                raise ended_with
        finally:
            current.reset(token)

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

    @asynccontextmanager
    async def giving_way(self) -> AsyncIterator[None]:
        """The host's start is in here: the loop that earlier calls made for themselves is closed, and threads that need
        one wait for the host's."""
        if not self._realtime.broker.shared:  # so there is none
            yield
            return
        self._heed_fork()
        starting = self._starting

        def begin() -> None:
            starting.acquire()
            self.close()

        with anyio.CancelScope(shield=True):  # not among the threads that others may have taken all of, to wait for us
            await anyio.to_thread.run_sync(begin, limiter=anyio.CapacityLimiter(1))
        try:
            yield
        finally:
            starting.release()

    def _call(self, function: Callable[[], Awaitable[T]], supervisor: Supervisor | None = None) -> T:
        """Make a call on the loop of a supervisor, by default of the one that runs now."""
        return ThreadCall(supervisor or self._supervisor(), function).make()

    def _iterate(self, begin: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
        supervisor = self._supervisor()

        async def begun() -> AsyncIterator[T]:
            return begin()

        items = self._call(begun, supervisor)
        while True:
            try:
                item = self._call(lambda: _next(items), supervisor)
            except _End:
                return
            yield item

    def _supervisor(self) -> Supervisor:
        if _loop_runs_here():
            raise RuntimeError("realtime.sync was called on an event loop's thread: await the async call there")
        engine = self._realtime.engine
        if (supervisor := engine.supervisor) is None:
            self._heed_fork()
            with self._starting:
                if engine.supervisor is None:
                    self._start_for_us()
            supervisor = engine.supervisor
        if supervisor is None:
            raise ServerShutdown("the server was shut down")
        return supervisor

    def _start_for_us(self) -> None:
        try:
            self._own_portal().call(self._realtime.ensure_started)
        except RuntimeError:
            if self._realtime.engine.supervisor is None:
                raise
            # The host has begun meanwhile, by using it.

    def _heed_fork(self) -> None:
        """The threads of a process do not come along into its children."""
        if self._pid != os.getpid():
            self._lock, self._starting = threading.Lock(), threading.Lock()
            self._own, self._pid = None, os.getpid()

    def _own_portal(self) -> anyio.from_thread.BlockingPortal:
        if not self._realtime.broker.shared:
            raise RuntimeError(
                "this Realtime does not run in this process and its broker is in memory, so nobody would see this:"
                " start it with the app first, or use a broker that processes share"
            )
        with self._lock:
            if self._own is None:
                self._own = OwnLoop()
            return self._own.portal


class _End(Exception):
    """The end of an iteration, in a form that may leave a coroutine."""


async def _next(items: AsyncIterator[T]) -> T:
    try:
        return await items.__anext__()
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
