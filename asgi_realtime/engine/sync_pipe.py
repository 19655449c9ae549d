"""`SyncPipe`: a pipe for code that runs on no event loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from asgi_realtime.core.config import Span
from asgi_realtime.engine.thread_bridge import ThreadBridge
from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.runs.handles import RunHandle
from asgi_realtime.streams.pipe import Pipe, PipeResult

T = TypeVar("T")


class SyncPipe(Generic[T]):
    """A source on its way into a stream, as `Pipe`. Created by `Realtime.sync.pipe`; forwarding has started.

    Iterate it to get the original objects, unchanged. Each call raises what the call of `Pipe` raises, and
    `ServerShutdown` after the `Realtime` has stopped. Calls are allowed from any thread without an event loop.
    """

    def __init__(self, pipe: Pipe[T], bridge: ThreadBridge, supervisor: Supervisor) -> None:
        self.run_id = pipe.run_id
        self.stream = pipe.stream
        self._pipe = pipe
        self._bridge = bridge
        self._supervisor = supervisor

    def __repr__(self) -> str:
        return f"<Sync{repr(self._pipe)[1:]}"

    @property
    def handle(self) -> RunHandle[Any]:
        """The handle of the pipe's run, with a token that reads it."""
        return self._pipe.handle

    def __iter__(self) -> Iterator[T]:
        return self._bridge.iterate(self._pipe.__aiter__, self._supervisor)

    def __next__(self) -> T:
        """The next original object, for code that calls `next()` on the pipe itself."""
        return next(iter(self))

    def wait_until_started(self) -> None:
        """As `Pipe.wait_until_started`. `Realtime.sync.pipe` has done this already."""
        self._bridge.call(self._pipe.wait_until_started, self._supervisor)

    def wait_until_complete(self, *, timeout: Span | None = None) -> PipeResult:
        """As `Pipe.wait_until_complete`. An exception that interrupts the thread does not stop the pipe."""
        return self._bridge.call(lambda: self._pipe.wait_until_complete(timeout=timeout), self._supervisor)

    def close(self) -> None:
        """As `Pipe.aclose`: stop forwarding and close the source. Idempotent."""
        self._bridge.call(self._pipe.aclose, self._supervisor)

    @property
    def done(self) -> bool:
        """Whether the pipe has ended, and the broker acknowledged its chunks."""
        return self._pipe.done

    @property
    def error(self) -> Exception | None:
        """What failed: the source, or the publishing of one of its chunks."""
        return self._pipe.error

    @property
    def result(self) -> PipeResult:
        """What the broker has acknowledged so far."""
        return self._pipe.result
