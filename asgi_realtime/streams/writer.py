"""Writes chunks to one stream, in order, each exactly once.

On a broker that appends in memory, a chunk is in the log when `write` returns. On any other broker the writer collects
chunks while an append is in flight and sends them together after it: one round trip of latency under low load, many
chunks per call under high load. The broker recognizes a repeated call by the producer's count, so the writer retries
while the broker is unavailable.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel

from asgi_realtime.brokers.base import ImmediateBroker, StreamKey
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.errors import (
    BrokerUnavailable,
    EncodingError,
    LimitExceeded,
    RealtimeError,
    UsageError,
    shown,
)
from asgi_realtime.loop.waiting import WaitList
from asgi_realtime.runs.restoring import RestorableProducer
from asgi_realtime.runs.store import RunStore

CALL_BYTES = 256 * 1024
CALL_ITEMS = 500
"""Chunks of one append."""

YIELD_EVERY = 64
"""Chunks after which a producer that never suspends yields to the event loop."""

Spawn = Callable[[Callable[[], Awaitable[None]]], None]

Encode = Callable[[Any], Any]
"""`encode=`: returns what to publish of an item, or None for nothing."""


def encode_within(value: Any, limit_bytes: int) -> bytes:
    """Encode a chunk. Raises `EncodingError`, `LimitExceeded`."""
    data = encode_value(value)
    if len(data) > limit_bytes:
        raise LimitExceeded(f"a chunk is {len(data)} bytes, limit {limit_bytes}", status=413)
    return data


def name_chunk(exc: Exception, key: StreamKey, index: int) -> None:
    """Let an error name the chunk of the pipe or writer."""
    name = f"chunk {index} of stream {key.name!r} of run {key.run!r}"
    if isinstance(exc, EncodingError | LimitExceeded):
        exc.args = (f"{name}: {exc}",)
    else:
        exc.add_note(f"raised by encode= for {name}")


def check_encode(encode: object) -> None:
    """Raise `UsageError` for an `encode=` that cannot be called for its result."""
    if encode is not None and (not callable(encode) or inspect.iscoroutinefunction(encode)):
        raise UsageError(f"encode is {shown(encode)}; allowed are functions (not async) that return what to publish")


class StreamWriter:
    """One producer of one stream. `chunks`, `bytes` and `last_index` count what the broker has acknowledged."""

    def __init__(self, key: StreamKey, *, runs: RunStore, spawn: Spawn) -> None:
        self.key = key
        self.chunks = 0
        self.bytes = 0
        self.last_index: int | None = None
        self.failure: RealtimeError | None = None
        """Why nothing can be written any more."""
        self._runs = runs
        self._spawn = spawn
        self._append_nowait = runs.broker.append_nowait if isinstance(runs.broker, ImmediateBroker) else None
        self._producer: RestorableProducer | None = None
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._pending_limit = runs.limits.pending_bytes
        self._written = 0
        self._flushing = False
        self._progress = WaitList()

    async def open(self) -> None:
        """Call before the first `write`. Raises `RunNotFound`, `LimitExceeded` on a broker in memory.

        On any other broker the first append does, so that writing can start while the broker is unavailable.
        """
        if self._append_nowait is not None:
            await self._runs.add_stream(self.key)

    def write(self, data: bytes) -> None:
        """Accept one encoded chunk. Never suspends. Raises why the stream cannot be written, such as `StreamClosed`."""
        if self.failure is not None:
            raise self.failure
        if self._append_nowait is not None:
            self._acknowledge(1, len(data), self._append_nowait(self.key, (data,)).last)
            return
        self._written += 1
        self._pending.append(data)
        self._pending_bytes += len(data)
        if not self._flushing:
            self._flushing = True
            self._spawn(self._flush)

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

    def _acknowledge(self, chunks: int, size: int, last: int) -> None:
        self.chunks += chunks
        self.bytes += size
        self.last_index = last

    # A broker elsewhere

    async def _flush(self) -> None:
        try:
            await self._runs.add_stream(self.key)
            producer = self._producer = self._producer or RestorableProducer(
                self.key, self._runs.restorer, on_lost=self._lose
            )
            while self._pending:
                await self._append(producer, self._next_call())
                self._progress.wake()
        except RealtimeError as exc:
            self._fail(exc)
        except BaseException as exc:
            self._fail(
                BrokerUnavailable(f"{type(exc).__name__} stopped the writer before its chunks were acknowledged")
            )
            raise
        finally:
            self._flushing = False
            self._progress.wake()

    def _next_call(self) -> list[bytes]:
        """The chunks of the next append. They stay pending until they are acknowledged."""
        items: list[bytes] = []
        size = 0
        for data in self._pending:
            if items and (size + len(data) > CALL_BYTES or len(items) == CALL_ITEMS):
                break
            items.append(data)
            size += len(data)
        return items

    async def _append(self, producer: RestorableProducer, items: list[bytes]) -> None:
        position = await producer.append(items)
        for _ in items:
            self._pending_bytes -= len(self._pending.popleft())
        self._acknowledge(len(items), sum(map(len, items)), position.last)

    def _lose(self, failure: RealtimeError) -> None:
        """Acknowledged chunks are lost."""
        self.last_index = None
        self._fail(failure)
        self._progress.wake()

    def _fail(self, failure: RealtimeError) -> None:
        self.failure = failure
        self._pending.clear()
        self._pending_bytes = 0
