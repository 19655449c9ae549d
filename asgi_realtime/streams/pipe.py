"""`Pipe`: forwards a source to a stream and hands the same objects to the host's own code.

One job creates, reads and closes the source's iterator. The job lives as long as the source, not as long as the
consumer: leaving the loop over a pipe, or dropping the pipe, does not stop it. Canceling the run or `aclose()` does.

The states of a pipe:

* FORWARDING: the job reads the source, or has not started yet.
* STOPPING: `stop` was called, by `aclose` or because the run ends. The job is being cancelled. It closes the source and
  writes the chunks that it has already taken.
* ENDED: the source is closed and the broker has acknowledged every chunk, or the writer has failed. A source
  that ends normally skips STOPPING.

The local copy finishes before the pipe ends, so that the host's loop does not wait for the broker.

What subscribers cannot get never disturbs the host's own loop. An item that has no JSON form or is too large, or for
which `encode` raises, is skipped. The first such error is kept like the failure of a broker, and raised at the end.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from enum import Enum
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import anyio
import anyio.lowlevel

from asgi_realtime.core.config import Limits, Span, Timeouts, parse_span
from asgi_realtime.core.errors import BrokerUnavailable, RealtimeError, ServerShutdown
from asgi_realtime.loop.failures import cancelled_itself, is_failure
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.waiting import WaitList, at_most
from asgi_realtime.streams.local_copy import LocalCopy, Reader
from asgi_realtime.streams.sources import discard, open_source
from asgi_realtime.streams.steps import LONG_STEP_S, WatchedSteps
from asgi_realtime.streams.thread_iterator import ThreadBudget
from asgi_realtime.streams.writer import YIELD_EVERY, Encode, StreamWriter, encode_within, name_chunk

if TYPE_CHECKING:
    from asgi_realtime.runs.handles import RunHandle


T = TypeVar("T")

Source = AsyncIterable[T] | Iterable[T] | AbstractAsyncContextManager[AsyncIterable[T]]


class PipeResult(NamedTuple):
    """What the broker has acknowledged of a pipe: chunks, their bytes, and the index of the last one (None if none)."""

    chunks: int
    bytes: int
    last_index: int | None


class PipeState(Enum):
    FORWARDING = "forwarding"
    STOPPING = "stopping"
    ENDED = "ended"


class Pipe(Generic[T]):
    """A source on its way into a stream. Created by `Realtime.pipe`; forwarding has started.

    Iterate it to get the original objects, unchanged.
    """

    def __init__(
        self,
        source: Source[T],
        writer: StreamWriter,
        *,
        encode: Encode | None,
        handle: Callable[[], RunHandle[Any]],
        limits: Limits,
        timeouts: Timeouts,
        threads: ThreadBudget,
        post: Callable[[Callable[[], object]], None],
    ) -> None:
        self.run_id = writer.key.run
        self.stream = writer.key.name
        self._make_handle = handle
        self._source = source
        self._writer = writer
        self._encode = encode
        self._chunk_bytes = limits.chunk_bytes
        self._timeouts = timeouts
        self._threads = threads
        self._post = post
        self._copy: LocalCopy[T] = LocalCopy(limits.pipe_buffer)
        self._index = 0
        self._state = PipeState.FORWARDING
        self._scope: anyio.CancelScope | None = None
        self._stop_reason: RealtimeError | None = None
        self.error: Exception | None = None
        """What failed: the source, or the publishing of one of its chunks."""
        self._skipped: Exception | None = None
        """Why the first skipped item could not be published."""
        self._error_seen = False
        self._has_started = False
        self._changed = WaitList()
        """The pipe has started, or has ended."""

    def __repr__(self) -> str:
        state = "ended" if self.done else "open"
        return f"<Pipe run={self.run_id} stream={self.stream!r} chunks={self._writer.chunks} {state}>"

    @cached_property
    def handle(self) -> RunHandle[Any]:
        """The handle of the pipe's run, with a token that reads it."""
        return self._make_handle()

    # The host's side

    def __aiter__(self) -> AsyncIterator[T]:
        return Reader(self._copy)

    async def __anext__(self) -> T:
        """The next original object, for code that calls `anext()` on the pipe itself.

        Between two calls no reader counts as iterating. If your code can fall behind by `Limits.pipe_buffer` chunks,
        keep the iterator: `reader = aiter(pipe)`.
        """
        return await Reader(self._copy).__anext__()

    async def wait_until_started(self) -> None:
        """Wait until the run of the pipe exists. `Realtime.pipe` itself waits for nothing.

        Raises what prevents the start: `RunExists`, `ThreadBusy`, `BrokerUnavailable` or `ServerShutdown`.
        """
        while not (self._has_started or self.done):
            await self._changed.wait()
        if not self._has_started:
            self._raise_outcome()

    async def wait_until_complete(self, *, timeout: Span | None = None) -> PipeResult:
        """Wait until the source has ended and the broker has acknowledged every chunk.

        Raises `TimeoutError` after `timeout`, and the pipe continues; the source's own error; `EncodingError`,
        `LimitExceeded` or an error of `encode` for the first item that could not be published; `BrokerUnavailable` if
        the broker was unavailable for longer than `Timeouts.append`; and `RunCanceled`, `RunFailed` or `ServerShutdown`
        if the run ended before the source. Cancelling the caller does not stop the pipe.
        """
        seconds = None if timeout is None else parse_span(timeout, name="timeout")
        with at_most(seconds, lambda: f"{self!r} has not ended within {seconds:g} s, and continues"):
            await self.settled()
        self._raise_outcome()
        return self.result

    def _raise_outcome(self) -> None:
        if self.error is not None:
            self._error_seen = True
            raise self.error
        if self._stop_reason is not None:
            raise self._stop_reason

    async def aclose(self) -> None:
        """Stop forwarding and close the source. The stream keeps the chunks so far. Idempotent."""
        self.stop(None)
        await self.settled()

    @property
    def result(self) -> PipeResult:
        """What the broker has acknowledged so far."""
        return PipeResult(self._writer.chunks, self._writer.bytes, self._writer.last_index)

    # The run's side

    @property
    def done(self) -> bool:
        """Whether the pipe has ended, and the broker acknowledged its chunks."""
        return self._state is PipeState.ENDED

    @property
    def unseen_error(self) -> Exception | None:
        """An error that was not raised to the host's code yet. It fails the run."""
        if self._error_seen or self._copy.error_seen:
            return None
        return self.error

    async def settled(self) -> None:
        """Wait until the pipe has ended, however it did."""
        with self._copy.draining():
            while not self.done:
                await self._changed.wait()

    def stop(self, reason: RealtimeError | None) -> None:
        """Cancel the job. The consumer gets `reason`, or a clean end. Idempotent; the first reason wins."""
        if self._state is PipeState.FORWARDING:
            self._state = PipeState.STOPPING
            self._stop_reason = reason
            if self._scope is not None:
                self._scope.cancel()

    # The job

    async def run(self) -> None:
        """The job."""
        self._has_started = True
        self._changed.wake()
        try:
            with anyio.CancelScope() as self._scope:
                if self._state is PipeState.STOPPING:
                    self._scope.cancel()
                async with open_source(
                    self._source, threads=self._threads, post=self._post, close_s=self._timeouts.close
                ) as iterator:
                    await anyio.lowlevel.checkpoint_if_cancelled()
                    await self._writer.open()
                    watched = WatchedSteps(iterator, where=f"stream {self.stream!r} of run {self.run_id}")
                    await self._forward(watched)
                    while not watched.ended and await self._forward(iterator):
                        await self._forward(watched)
        except BaseException as exc:
            self._note(exc)
            if self.error is None:
                raise
        finally:
            with anyio.CancelScope(shield=True):
                await self._end(self._drain)

    async def fail(self, cause: BaseException) -> None:
        """End the pipe in place of its job, which cannot start."""
        self._note(cause)
        with anyio.CancelScope(shield=True):
            await self._end(lambda: discard(self._source, close_s=self._timeouts.close))

    def _note(self, cause: BaseException) -> None:
        if isinstance(cause, Exception):
            self.error = cause
        elif is_failure(cause) or _is_foreign(cause):
            self.error = RuntimeError(f"the source raised {type(cause).__name__}")
            self.error.__cause__ = cause
        else:
            self._stop_reason = ServerShutdown()

    async def _end(self, last: Callable[[], Awaitable[None]]) -> None:
        """Finish the local iteration now, and the pipe after its last action."""
        self._copy.finish(self.error or self._stop_reason)
        try:
            await last()
        finally:
            self._state = PipeState.ENDED
            self._changed.wake()

    async def _forward(self, items: AsyncIterator[T]) -> bool:
        """Forward items until they end, or, if this returns True, until one took long."""
        writer, copy, encode, limit = self._writer, self._copy, self._encode, self._chunk_bytes
        last = monotonic()
        async for item in items:
            self._index = index = self._index + 1
            data = None
            try:
                published = item if encode is None else encode(item)
                if published is not None or encode is None:
                    data = encode_within(published, limit)
            except Exception as exc:
                self._skip(item, exc)
            is_pending = False
            if data is not None:
                try:
                    is_pending = writer.write(data)
                except BrokerUnavailable:
                    pass  # the writer keeps this failure, and `_drain` raises it
            if copy.put(item) or is_pending or index % YIELD_EVERY == 0:
                await self._pause()
            now = monotonic()
            if now - last > LONG_STEP_S and not isinstance(items, WatchedSteps):
                return True
            last = now
        return False

    async def _pause(self) -> None:
        """Wait until there is room for the next item, or at least yield to the event loop now and then."""
        if self._writer.full:
            await self._writer.room()
        if self._copy.full:
            await self._copy.room()
        if self._index % YIELD_EVERY == 0:
            await anyio.lowlevel.checkpoint()

    def _skip(self, item: T, exc: Exception) -> None:
        if self._skipped is None:
            index, kind = self._index - 1, type(item).__name__
            name_chunk(exc, self._writer.key, index)
            self._skipped = exc
            where = f"stream {self.stream!r} of run {self.run_id}"
            logger.warning("a pipe skips item %d (%s) of %s; later ones are not logged: %r", index, kind, where, exc)

    async def _drain(self) -> None:
        self.error = self.error or self._skipped
        try:
            await self._writer.drain()
        except RealtimeError as exc:
            self.error = self.error or exc


def _is_foreign(exc: BaseException) -> bool:
    """Whether this is a cancellation from inside the source, which was not meant for its pipe."""
    return isinstance(exc, anyio.get_cancelled_exc_class()) and cancelled_itself()
