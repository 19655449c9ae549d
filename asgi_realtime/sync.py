"""The calls of `Realtime` for code that runs on no event loop: a thread, a sync view, the worker of a job queue.

Each call has the name and the arguments of the async one and blocks until that is done. `engine.thread_bridge` decides
which event loop executes it.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, Unpack, overload

from asgi_realtime.calls import Calls
from asgi_realtime.core.config import Span
from asgi_realtime.core.errors import RealtimeError
from asgi_realtime.core.run_record import RunRecord
from asgi_realtime.engine.run import Run, current_run, enter
from asgi_realtime.engine.sync_pipe import SyncPipe
from asgi_realtime.engine.thread_bridge import HeldRun, ThreadBridge
from asgi_realtime.runs.handles import RunHandle
from asgi_realtime.streams.followers import StreamChunk
from asgi_realtime.streams.pipe import Pipe, Source
from asgi_realtime.tasks.options import OpenRunOptions, PipeRunOptions, RunLike, TriggerOptions
from asgi_realtime.tasks.task import Task

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def _blocking(method: Callable[Concatenate[Any, P], Awaitable[T]]) -> Callable[Concatenate[SyncRealtime, P], T]:
    """The blocking form of a coroutine method of `Calls`."""
    name = method.__name__

    def call(self: SyncRealtime, /, *args: P.args, **kwargs: P.kwargs) -> T:
        bound: Callable[P, Awaitable[T]] = getattr(self._realtime, name)
        return self._bridge.call(lambda: bound(*args, **kwargs))

    _describe(call, method)
    return call


def _iterating(
    method: Callable[Concatenate[Any, P], AsyncIterator[T]],
) -> Callable[Concatenate[SyncRealtime, P], Iterator[T]]:
    """The blocking form of a method of `Calls` that returns an async iterator."""
    name = method.__name__

    def iterate(self: SyncRealtime, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        bound: Callable[P, AsyncIterator[T]] = getattr(self._realtime, name)
        return self._bridge.iterate(lambda: bound(*args, **kwargs))

    _describe(iterate, method)
    return iterate


def _describe(call: Callable[..., Any], method: Callable[..., Any]) -> None:
    """Give a blocking form the name and the signature of the async call."""
    functools.update_wrapper(call, method)
    call.__qualname__ = f"SyncRealtime.{method.__name__}"
    call.__doc__ = f"As `Realtime.{method.__name__}`."


class SyncRealtime:
    """The calls of `Realtime`, blocking. Each raises what the async call raises.

    Also raises `RuntimeError` on the thread of an event loop, where blocking would be a deadlock, and if no loop runs
    and the broker is in memory, where a call would have no effect. Raises `ServerShutdown` if the `Realtime` stops, or
    its loop ends, during a call.
    """

    def __init__(self, realtime: Calls, bridge: ThreadBridge) -> None:
        self._realtime = realtime
        self._bridge = bridge

    batch_trigger = _blocking(Calls.batch_trigger)
    append = _blocking(Calls.append)
    send_input = _blocking(Calls.send_input)
    cancel = _blocking(Calls.cancel)
    active_run = _blocking(Calls.active_run)
    get_run = _blocking(Calls.get_run)
    read = _iterating(Calls.read)
    subscribe_to_runs_with_tag = _iterating(Calls.subscribe_to_runs_with_tag)
    subscribe_to_batch = _iterating(Calls.subscribe_to_batch)

    execute = _blocking(Calls.execute)
    execute.__doc__ = """As `Realtime.execute`: returns when the run is over. An exception that interrupts the thread,
    such as the soft time limit of a job queue, cancels the run."""

    @overload
    def trigger(self, task: Task[Any, R], payload: Any = None, **options: Unpack[TriggerOptions]) -> RunHandle[R]: ...

    @overload
    def trigger(self, task: str, payload: Any = None, **options: Unpack[TriggerOptions]) -> RunHandle[Any]: ...

    def trigger(
        self, task: Task[Any, Any] | str, payload: Any = None, **options: Unpack[TriggerOptions]
    ) -> RunHandle[Any]:
        """As `Realtime.trigger`."""
        return self._bridge.call(lambda: self._realtime.trigger(task, payload, **options))

    @overload
    def result(self, run: RunHandle[R], *, timeout: Span | None = None) -> R: ...

    @overload
    def result(self, run: RunLike, *, timeout: Span | None = None) -> Any: ...

    def result(self, run: RunLike, *, timeout: Span | None = None) -> Any:
        """As `Realtime.result`."""
        return self._bridge.call(lambda: self._realtime.result(run, timeout=timeout))

    def pipe(
        self,
        source: Source[T],
        stream: str = "default",
        *,
        run: RunLike | None = None,
        encode: Callable[[T], Any] | None = None,
        **options: Unpack[PipeRunOptions],
    ) -> SyncPipe[T]:
        """As `Realtime.pipe`: forward a sync or async source, starting now, and return without waiting for its items.

        The source is read in the background, with the context variables of this call, and continues after the calling
        code has returned. The run of the pipe exists when this returns. Raises what `Realtime.pipe` raises,
        `RunExists`, `ThreadBusy`, `BrokerUnavailable`, and `ServerShutdown`.
        """

        async def start() -> Pipe[T]:
            pipe = self._realtime.pipe(source, stream, run=run, encode=encode, **options)
            try:
                await pipe.wait_until_started()
            except BaseException:
                pipe.stop(None)  # the caller never gets it
                raise
            return pipe

        supervisor = self._bridge.supervisor()
        return SyncPipe(self._bridge.call(start, supervisor), self._bridge, supervisor)

    def get_input(self, input_id: str, *, timeout: Span | None = None) -> Any:
        """The next data sent to the current run, as `current_run().input(input_id).get()`."""
        run = current_run()
        return self._bridge.call(lambda: run.input(input_id).get(timeout=timeout))

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
        return self._bridge.iterate(lambda: self._realtime.subscribe_to_run(run, **options))

    @contextmanager
    def open_run(self, name: str, **options: Unpack[OpenRunOptions]) -> Iterator[Run]:
        """As `Realtime.open_run`, in a `with`.

        The body runs in a thread, so `cancel(run)` does not interrupt it: the body can check `run.canceled`, its writes
        are rejected, and leaving raises `RunCanceled`. An exception that is not an `Exception`, such as
        `KeyboardInterrupt`, cancels the run and propagates.
        """
        supervisor = self._bridge.supervisor()
        opened = self._realtime.open_run(name, **options)
        held = HeldRun(supervisor, opened)
        try:
            run = self._bridge.call(held.enter, supervisor)
        except BaseException:
            with suppress(RuntimeError):  # the loop is closed
                supervisor.post(held.abandon)
            raise
        leave = enter(run)
        try:
            yield run
        except BaseException as exc:
            try:
                ended_with = self._bridge.call(lambda error=exc: held.leave(error), supervisor)  # type: ignore[misc]
            except RealtimeError as failure:
                ended_with = failure
            if isinstance(exc, Exception) and ended_with is not None and ended_with is not exc:
                raise ended_with from exc
            raise
        else:
            ended_with = self._bridge.call(lambda: held.leave(None), supervisor)
            if ended_with is not None:
                raise ended_with
        finally:
            leave()

    def close(self) -> None:
        """Stop the event loop that these calls started in a thread. The host's event loop keeps running.

        Idempotent; a later call starts the loop again.
        """
        self._bridge.close()
