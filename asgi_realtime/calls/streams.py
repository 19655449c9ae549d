"""The calls that write streams and read them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar, Unpack

from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.calls.parts import Parts
from asgi_realtime.calls.typed import StreamWriterContext, TypedStream
from asgi_realtime.core.chunks import decode
from asgi_realtime.core.config import Span, parse_span
from asgi_realtime.core.errors import UsageError
from asgi_realtime.core.names import input_stream, stream_name
from asgi_realtime.engine.on_end import check_on_end
from asgi_realtime.engine.run import current_run_of, no_current_run
from asgi_realtime.streams.pipe import Pipe, Source
from asgi_realtime.streams.readers import ChunkReader, StreamReader
from asgi_realtime.streams.sources import check_source
from asgi_realtime.streams.writer import check_encode, encode_within, name_chunk
from asgi_realtime.tasks.options import PipeRunOptions, RunLike, check_names, check_writes_into_a_run, run_id_of

T = TypeVar("T")


class StreamCalls(Parts):
    """Streams and inputs."""

    def pipe(
        self,
        source: Source[T],
        stream: str = "default",
        *,
        run: RunLike | None = None,
        encode: Callable[[T], Any] | None = None,
        **options: Unpack[PipeRunOptions],
    ) -> Pipe[T]:
        """Forward a source into a stream, starting now, and return an iterable of the same objects.

        `encode(item)` returns what to publish of an item, and None skips it. An item that cannot be published is
        skipped too, and `wait_until_complete` raises the first such error.

        Inside a run (or with `run`) the stream belongs to that run. Elsewhere this creates a run that ends with the
        source. Its options are `task` (its name; default: `"pipe"`) and `tags`, `metadata`, `run_id`, `thread` and
        `on_conflict`, as in `trigger`. If another run has the id, or is active in the thread, the pipe ends with
        `RunExists` or `ThreadBusy`, which `wait_until_started` raises. `on_end`, `on_unwatched` and `unwatched_grace`
        are those of `open_run`. `owner` is the owner of the token in `pipe.handle`. See `Pipe`. Raises `InvalidSource`,
        `UsageError`.
        """
        check_source(source)
        check_encode(encode)
        name = stream_name(stream, self.limits)
        check_names(options, PipeRunOptions)
        owner = self._handle_owner(options.get("owner"))
        if run is None and current_run_of(self.runs) is None:
            record, _, replaces = self.tasks.records.new_open_run(options.pop("task", "pipe"), options)
            on_end = check_on_end(options.get("on_end"))
            return self._producers.pipe_alone(
                source, record, name, encode=encode, owner=owner, on_end=on_end, replaces=replaces
            )
        check_writes_into_a_run(options)
        return self._producers.pipe_into(source, StreamKey(self._run_id(run), name), encode=encode, owner=owner)

    async def append(self, chunk: Any, stream: str = "default", *, run: RunLike | None = None) -> None:
        """Append one chunk. It is in the log when this returns.

        Raises `EncodingError`, `LimitExceeded`, `RunNotFound`, `StreamClosed`, `BrokerUnavailable`, `NoCurrentRun`.
        """
        run_id = run if type(run) is str and run else self._run_id(run)
        try:
            data = encode_within(chunk, self.limits.chunk_bytes)
        except UsageError as exc:
            name_chunk(exc, StreamKey(run_id, stream))
            raise
        writer = self._producers.known(run_id, stream)
        if writer is None:
            writer = await self._producers.shared(StreamKey(run_id, stream_name(stream, self.limits)))
        if writer.write(data):
            await writer.settled()

    async def send_input(self, run: RunLike, input_id: str, data: Any) -> None:
        """Send data to a run, which receives it with `run.input(input_id)`. Raises what `append` raises."""
        key = StreamKey(run_id_of(run), input_stream(input_id, self.limits))
        encoded = encode_within(data, self.limits.input_bytes, name=f"the data for input {input_id!r}")
        await self.ensure_started()
        await self.runs.get(key.run)
        writer = await self._producers.shared(key)
        writer.write(encoded)
        await writer.settled()

    def writer(
        self, stream: str = "default", *, run: RunLike | None = None, encode: Callable[[Any], Any] | None = None
    ) -> StreamWriterContext[Any]:
        """An async context manager that writes many chunks: `await writer.write(chunk)`, `writer.merge(source)`.

        `encode(chunk)` returns what to publish of a chunk, and None skips it.
        """
        check_encode(encode)
        key = StreamKey(self._run_id(run), stream_name(stream, self.limits))
        writer = self._producers.writer(key)
        return StreamWriterContext(self, writer, chunk_bytes=self.limits.chunk_bytes, encode=encode)

    def define_stream(self, key: str, chunk_type: type[T]) -> TypedStream[T]:
        """A stream with a fixed key and a type for its chunks. It has `pipe`, `append`, `writer` and `read`."""
        return TypedStream(self, stream_name(key, self.limits), chunk_type)

    def read(
        self, run: RunLike, stream: str = "default", *, start_index: int = 0, timeout: Span | None = None
    ) -> AsyncIterator[Any]:
        """The decoded chunks of a stream, from `start_index` on, as they arrive.

        Ends when the run completes. If the run ends otherwise, raises `RunFailed` or `RunCanceled` after the last
        chunk. Raises `StreamGap` if chunks have expired, `TimeoutError` if none arrives for `timeout`, `RunNotFound`,
        and `StreamNotFound` if the run completed with other streams only.
        """
        return self.read_as(run, stream, decode, start_index=start_index, timeout=timeout)

    def read_as(
        self,
        run: RunLike,
        stream: str,
        decode_chunk: Callable[[bytes], T],
        *,
        start_index: int = 0,
        timeout: Span | None = None,
    ) -> AsyncIterator[T]:
        """As `read`, with `decode_chunk` for the JSON of each chunk."""
        if isinstance(start_index, bool) or not isinstance(start_index, int) or start_index < 0:
            raise UsageError(f"start_index is {start_index!r}; allowed are whole numbers from 0")
        key = StreamKey(run_id_of(run), stream_name(stream, self.limits))
        seconds = None if timeout is None else parse_span(timeout, name="timeout")
        self.engine.begin()
        reader = StreamReader(
            self.runs,
            key,
            after=start_index - 1,
            timeout_s=seconds,
            start=self.ensure_started,
            shutdown=self._reader_shutdown(),
        )
        return ChunkReader(reader, decode_chunk)

    def _run_id(self, run: RunLike | None) -> str:
        if type(run) is str and run:
            return run
        if run is not None:
            return run_id_of(run)
        found = current_run_of(self.runs)
        if found is None:
            raise no_current_run()
        return found.id
