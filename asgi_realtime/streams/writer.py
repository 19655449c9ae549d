"""Writes chunks to one stream, in order, each exactly once.

On a broker that appends in memory, a chunk is in the log when `write` returns. On any other broker it goes through the
`Outbox` of its stream.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel

from asgi_realtime.brokers.base import AppenderBroker, ChunkAppender, ImmediateBroker, StreamKey
from asgi_realtime.core.chunks import encode_named, encode_value
from asgi_realtime.core.errors import (
    EncodingError,
    LimitExceeded,
    RealtimeError,
    UsageError,
    shown,
)
from asgi_realtime.core.nesting import MAX_DEPTH, check_depth
from asgi_realtime.loop.waiting import WaitList
from asgi_realtime.runs.store import RunStore
from asgi_realtime.streams.outbox import Outbox

YIELD_EVERY = 64
"""Chunks after which a producer that never suspends yields to the event loop."""

Encode = Callable[[Any], Any]
"""`encode=`: returns what to publish of an item, or None for nothing."""


def encode_within(value: Any, limit_bytes: int, *, name: str = "") -> bytes:
    """Encode a chunk, or the value with this name. Raises `EncodingError`, `LimitExceeded`."""
    data = encode_named(value, name) if name else encode_value(value)
    if len(data) > limit_bytes:
        raise LimitExceeded(f"{name or 'a chunk'} is {len(data)} bytes, limit {limit_bytes}", status=413)
    if len(data) > 2 * MAX_DEPTH:
        check_depth(data, what=name or "a chunk")
    return data


def name_chunk(exc: Exception, key: StreamKey, index: int | None = None) -> None:
    """Let an error name the chunk of the pipe or writer, or the stream."""
    what = "a chunk" if index is None else f"chunk {index}"
    name = f"{what} of stream {key.name!r} of run {key.run!r}"
    if isinstance(exc, EncodingError | LimitExceeded):
        exc.args = (f"{name}: {exc}",)
    else:
        exc.add_note(f"raised by encode= for {name}")


def check_encode(encode: object) -> None:
    """Raise `UsageError` for an `encode=` that cannot be called for its result."""
    if encode is not None and (not callable(encode) or inspect.iscoroutinefunction(encode)):
        raise UsageError(f"encode is {shown(encode)}; allowed are functions (not async) that return what to publish")


class StreamWriter:
    """Writes to one stream. `chunks`, `bytes` and `last_index` count what the broker has acknowledged.

    `find_outbox` returns the outbox that all writers of a stream share.
    """

    def __init__(self, key: StreamKey, *, runs: RunStore, find_outbox: Callable[[StreamKey], Outbox]) -> None:
        self.key = key
        self.chunks = 0
        self.bytes = 0
        self.last_index: int | None = None
        self.failure: RealtimeError | None = None
        """Why nothing can be written any more."""
        self._runs = runs
        self._find_outbox = find_outbox
        broker = runs.broker
        self._append_nowait = broker.append_nowait if isinstance(broker, ImmediateBroker) else None
        self._make_appender = broker.appender if isinstance(broker, AppenderBroker) and not key.hidden else None
        self._appender: ChunkAppender | None = None
        self._outbox: Outbox | None = None
        self._pending_bytes = 0
        self._pending_limit = runs.limits.pending_bytes
        self._written = 0
        self._progress = WaitList()
        runs.reporter.writer_opened(self)

    def __del__(self) -> None:
        self._runs.reporter.writer_closed(self.chunks, self.bytes)

    async def open(self) -> None:
        """Call before the first `write`. Raises `RunNotFound`, `LimitExceeded` on a broker in memory.

        On any other broker the first append does, so that writing can start while the broker is unavailable.
        """
        if self._append_nowait is not None:
            await self._runs.add_stream(self.key)

    def write(self, data: bytes) -> bool:
        """Accept one encoded chunk, without suspending. Returns whether the caller has to await `settled` now.

        Raises why the stream cannot be written, such as `StreamClosed`.
        """
        if self._appender is not None:
            seq = self._appender.append(data)
            if seq is not None:
                self.chunks = chunks = self.chunks + 1
                self.bytes += len(data)
                self.last_index = seq
                return chunks % YIELD_EVERY == 0
        return self._write(data)

    def _write(self, data: bytes) -> bool:
        if self.failure is not None:
            raise self.failure
        if self._append_nowait is not None:
            appender, self._appender = self._appender, None
            seq = self._append_nowait(self.key, (data,)).last
            if seq == 0:
                self._runs.reporter.stream_began(self.key)
            if self._make_appender is not None:
                self._appender = appender or self._make_appender(self.key)
            return self._stored(len(data), seq)
        if self._outbox is None or self._outbox.failure is not None:
            self._outbox = self._find_outbox(self.key)
        self._written += 1
        self._pending_bytes += len(data)
        self._outbox.put(data, self)
        return True

    def _stored(self, size: int, seq: int) -> bool:
        """Count a stored chunk. Returns whether it is time to yield to the event loop."""
        self.chunks += 1
        self.bytes += size
        self.last_index = seq
        return self.chunks % YIELD_EVERY == 0

    @property
    def full(self) -> bool:
        """Whether more than `Limits.pending_bytes` wait for the broker, so that the source should pause."""
        return self._pending_bytes > self._pending_limit

    async def room(self) -> None:
        """Wait until the writer is no longer full, or has failed. Yields to the event loop now and then."""
        while self.full and self.failure is None:
            await self._progress.wait()
        await self._yield()

    async def settled(self) -> None:
        """Wait until all chunks are acknowledged; a broker in memory has done so already. Raises as `drain`."""
        if self._append_nowait is None:
            await self.drain()
        await self._yield()

    async def _yield(self) -> None:
        """A loop of writes that never suspend would starve the subscribers."""
        if self.chunks % YIELD_EVERY == 0:
            await anyio.lowlevel.checkpoint()

    async def drain(self) -> None:
        """Wait until the broker has acknowledged all chunks written before. Raises the failure if it did not."""
        written = self._written
        while self.chunks < written and self.failure is None:
            await self._progress.wait()
        if self.failure is not None:
            raise self.failure

    # The outbox's side

    def acknowledge(self, size: int, seq: int) -> None:
        """The broker has stored the oldest pending chunk, of this many bytes."""
        self._pending_bytes -= size
        self._stored(size, seq)

    def fail(self, failure: RealtimeError, *, lost: bool = False) -> None:
        """Pending chunks will not be stored, or acknowledged ones are `lost`."""
        self.failure = failure
        self._pending_bytes = 0
        if lost:
            self.last_index = None
        self.wake()

    def wake(self) -> None:
        """Call after `acknowledge`: once for many chunks."""
        self._progress.wake()
