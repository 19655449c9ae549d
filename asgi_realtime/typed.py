"""Ways to write and read a stream besides `pipe`: a writer for the host's own chunks, and streams with a type."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio

from asgi_realtime.core.config import Span
from asgi_realtime.core.errors import RealtimeError
from asgi_realtime.streams.pipe import Pipe, Source
from asgi_realtime.streams.writer import StreamWriter, encode_numbered
from asgi_realtime.tasks.task import decode_as

if TYPE_CHECKING:
    from asgi_realtime.realtime import Realtime, RunLike

logger = logging.getLogger("asgi_realtime")

T = TypeVar("T")


class StreamWriterContext(Generic[T]):
    """Writes chunks and merges sources into one stream. An async context manager made by `Realtime.writer`.

    Leaving waits until everything is acknowledged, merged sources included, and raises what went wrong; an exception
    in the body stops the merged sources and goes on, after what was written. It does not end the stream: its run does.
    """

    def __init__(self, realtime: Realtime, writer: StreamWriter, *, chunk_bytes: int) -> None:
        self._realtime = realtime
        self._writer = writer
        self._chunk_bytes = chunk_bytes
        self._merged: list[Pipe[T]] = []
        self._index = 0

    async def __aenter__(self) -> StreamWriterContext[T]:
        await self._realtime.ensure_started()
        await self._writer.open()
        return self

    async def write(self, chunk: T) -> None:
        """Append one chunk. Raises `EncodingError`, `LimitExceeded`, `StreamClosed`, `BrokerUnavailable`."""
        data = encode_numbered(chunk, self._chunk_bytes, key=self._writer.key, index=self._index)
        self._writer.write(data)
        self._index += 1
        await self._writer.room()

    def merge(self, source: Source[T]) -> Pipe[T]:
        """Forward a source into the same stream, beside what is written. Chunks interleave as they come."""
        pipe = self._realtime.pipe(source, self._writer.key.name, run=self._writer.key.run)
        self._merged.append(pipe)
        return pipe

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc is not None:
            with anyio.CancelScope(shield=True):
                await self._stop()
            return
        for pipe in self._merged:
            await pipe.settled()
        await self._writer.drain()
        for pipe in self._merged:
            await pipe.wait_until_complete()

    async def _stop(self) -> None:
        for pipe in self._merged:
            pipe.stop(None)
        for pipe in self._merged:
            await pipe.aclose()
        try:
            await self._writer.drain()
        except RealtimeError as error:
            logger.warning("what was written to stream %r is not stored: %s", self._writer.key.name, error)


class TypedStream(Generic[T]):
    """A stream under a fixed key whose chunks have a type. Made by `Realtime.define_stream`."""

    def __init__(self, realtime: Realtime, key: str, chunk_type: type[T]) -> None:
        self.key = key
        self.chunk_type = chunk_type
        self._realtime = realtime

    def __repr__(self) -> str:
        return f"<TypedStream {self.key!r} of {getattr(self.chunk_type, '__name__', self.chunk_type)}>"

    def pipe(self, source: Source[T], *, run: RunLike | None = None, **options: Any) -> Pipe[T]:
        """As `Realtime.pipe`."""
        return self._realtime.pipe(source, self.key, run=run, **options)

    async def append(self, chunk: T, *, run: RunLike | None = None) -> None:
        """As `Realtime.append`."""
        await self._realtime.append(chunk, self.key, run=run)

    def writer(self, *, run: RunLike | None = None) -> StreamWriterContext[T]:
        """As `Realtime.writer`."""
        return self._realtime.writer(self.key, run=run)

    def read(self, run: RunLike, *, start_index: int = 0, timeout: Span | None = None) -> AsyncIterator[T]:
        """As `Realtime.read`, with chunks of the type. Raises `UsageError` at a chunk that does not fit it."""
        return self._realtime.read_as(
            run, self.key, lambda data: decode_as(data, self.chunk_type), start_index=start_index, timeout=timeout
        )
