"""Ways to write and read a stream besides `pipe`: a writer for the host's own chunks, and streams with a type."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from asgi_realtime.config import Span
from asgi_realtime.pipe import Pipe, Source
from asgi_realtime.tasks.task import decode_as
from asgi_realtime.writer import StreamWriter, encode_within

if TYPE_CHECKING:
    from asgi_realtime.realtime import Realtime, RunLike

T = TypeVar("T")


class StreamScope(Generic[T]):
    """Writes chunks and merges sources into one stream. An async context manager made by `Realtime.writer`.

    Leaving waits until everything is acknowledged, merged sources included, and raises what went wrong; an exception
    in the body stops the merged sources. It does not end the stream: its run does.
    """

    def __init__(self, realtime: Realtime, writer: StreamWriter, *, chunk_bytes: int) -> None:
        self._realtime = realtime
        self._writer = writer
        self._chunk_bytes = chunk_bytes
        self._merged: list[Pipe[T]] = []

    async def __aenter__(self) -> StreamScope[T]:
        await self._writer.open()
        return self

    async def write(self, chunk: T) -> None:
        """Append one chunk. Raises `EncodingError`, `LimitExceeded`, `StreamClosed`, `BrokerUnavailable`."""
        self._writer.write(encode_within(chunk, self._chunk_bytes))
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
            for pipe in self._merged:
                await pipe.aclose()
            return
        for pipe in self._merged:
            await pipe.wait_until_complete()
        await self._writer.drain()


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

    def writer(self, *, run: RunLike | None = None) -> StreamScope[T]:
        """As `Realtime.writer`."""
        return self._realtime.writer(self.key, run=run)

    def read(self, run: RunLike, *, start_index: int = 0, timeout: Span | None = None) -> AsyncIterator[T]:
        """As `Realtime.read`, with chunks of the type. Raises `UsageError` at a chunk that does not fit it."""
        return self._realtime.read_as(
            run, self.key, lambda data: decode_as(data, self.chunk_type), start_index=start_index, timeout=timeout
        )
