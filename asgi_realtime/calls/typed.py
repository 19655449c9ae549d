"""Objects that write and read one stream: a writer for the host's own chunks, and a stream with a chunk type."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar, Unpack, overload

import anyio

from asgi_realtime.core.config import Span
from asgi_realtime.core.errors import RealtimeError
from asgi_realtime.loop.logger import logger
from asgi_realtime.streams.pipe import Pipe, Source
from asgi_realtime.streams.writer import Encode, StreamWriter, encode_within, name_chunk
from asgi_realtime.tasks.decoding import decoder_of
from asgi_realtime.tasks.options import PipeOptions, PipeRunOptions, RunLike

S = TypeVar("S")
T = TypeVar("T")


class StreamHost(Protocol):
    """The calls of `Realtime` that write and read a stream by its key."""

    async def ensure_started(self) -> None: ...

    def pipe(
        self, source: Source[T], stream: str, *, run: RunLike | None = None, **options: Unpack[PipeOptions]
    ) -> Pipe[T]: ...

    async def append(self, chunk: Any, stream: str, *, run: RunLike | None = None) -> None: ...

    def writer(
        self, stream: str, *, run: RunLike | None = None, encode: Encode | None = None
    ) -> StreamWriterContext[Any]: ...

    def read_as(
        self,
        run: RunLike,
        stream: str,
        decode_chunk: Callable[[bytes], T],
        *,
        start_index: int = 0,
        timeout: Span | None = None,
    ) -> AsyncIterator[T]: ...


class StreamWriterContext(Generic[T]):
    """Writes chunks and merges sources into one stream. An async context manager, created by `Realtime.writer`.

    Leaving it waits until the broker has acknowledged every chunk, including those of merged sources, and raises the
    first error. An exception in the body stops the merged sources and propagates once written chunks are stored. The
    stream stays open: it ends with its run.
    """

    def __init__(
        self, realtime: StreamHost, writer: StreamWriter, *, chunk_bytes: int, encode: Encode | None = None
    ) -> None:
        self._realtime = realtime
        self._writer = writer
        self._chunk_bytes = chunk_bytes
        self._encode = encode
        self._merged: list[Pipe[T]] = []
        self._index = 0

    async def __aenter__(self) -> StreamWriterContext[T]:
        await self._realtime.ensure_started()
        await self._writer.open()
        return self

    async def write(self, chunk: T) -> None:
        """Append one chunk.

        Raises `EncodingError`, `LimitExceeded`, `StreamClosed`, `BrokerUnavailable`, and what `encode` raises.
        """
        try:
            published = chunk if self._encode is None else self._encode(chunk)
            skipped = published is None and self._encode is not None
            data = None if skipped else encode_within(published, self._chunk_bytes)
        except Exception as exc:
            name_chunk(exc, self._writer.key, self._index)
            raise
        if data is not None:
            self._writer.write(data)
        self._index += 1
        await self._writer.room()

    def merge(self, source: Source[T], *, encode: Encode | None = None) -> Pipe[T]:
        """Forward a source into the same stream, concurrently with `write`. Chunks interleave as they arrive.

        `encode` replaces that of the writer for this source.
        """
        key = self._writer.key
        pipe = self._realtime.pipe(source, key.name, run=key.run, encode=encode or self._encode)
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
            logger.warning("chunks written to stream %r are not stored: %s", self._writer.key.name, error)


class TypedStream(Generic[T]):
    """A stream with a fixed key and a type for its chunks. Created by `Realtime.define_stream`."""

    def __init__(self, realtime: StreamHost, key: str, chunk_type: type[T]) -> None:
        self.key = key
        self.chunk_type = chunk_type
        self._realtime = realtime

    def __repr__(self) -> str:
        return f"<TypedStream {self.key!r} of {getattr(self.chunk_type, '__name__', self.chunk_type)}>"

    @overload
    def pipe(
        self,
        source: Source[S],
        *,
        encode: Callable[[S], T | None],
        run: RunLike | None = None,
        **options: Unpack[PipeRunOptions],
    ) -> Pipe[S]: ...

    @overload
    def pipe(
        self, source: Source[T], *, encode: None = None, run: RunLike | None = None, **options: Unpack[PipeRunOptions]
    ) -> Pipe[T]: ...

    def pipe(
        self,
        source: Source[Any],
        *,
        encode: Encode | None = None,
        run: RunLike | None = None,
        **options: Unpack[PipeRunOptions],
    ) -> Pipe[Any]:
        """As `Realtime.pipe`. With `encode`, the source can yield anything that `encode` turns into chunks."""
        return self._realtime.pipe(source, self.key, run=run, encode=encode, **options)

    async def append(self, chunk: T, *, run: RunLike | None = None) -> None:
        """As `Realtime.append`."""
        await self._realtime.append(chunk, self.key, run=run)

    @overload
    def writer(self, *, run: RunLike | None = None, encode: None = None) -> StreamWriterContext[T]: ...

    @overload
    def writer(self, *, run: RunLike | None = None, encode: Callable[[S], T | None]) -> StreamWriterContext[S]: ...

    def writer(self, *, run: RunLike | None = None, encode: Encode | None = None) -> StreamWriterContext[Any]:
        """As `Realtime.writer`. With `encode`, it takes what `encode` turns into chunks of the stream's type."""
        return self._realtime.writer(self.key, run=run, encode=encode)

    def read(self, run: RunLike, *, start_index: int = 0, timeout: Span | None = None) -> AsyncIterator[T]:
        """As `Realtime.read`, decoding chunks into the type. Raises `UsageError` for a chunk that does not match it."""
        return self._realtime.read_as(
            run, self.key, decoder_of(self.chunk_type), start_index=start_index, timeout=timeout
        )
