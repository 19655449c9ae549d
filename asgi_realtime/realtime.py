"""`Realtime`: the one object of the library, and all that the host calls.

It holds the parts together and does little itself: the engine runs things, runs are changed in `runstore`, triggered in
`tasks.trigger`, streams written by `producers` and read in `reading`. What touches only memory is sync, what
may wait for the broker is async. After the first two arguments all are keyword-only.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cached_property
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, Unpack, cast, overload

import anyio

from asgi_realtime.brokers import Broker, open_broker
from asgi_realtime.brokers.base import InOneProcess, StreamKey
from asgi_realtime.core.chunks import decode
from asgi_realtime.core.config import Cors, Limits, Retention, Span, Timeouts, parse_span
from asgi_realtime.core.errors import InvalidConfiguration, NoCurrentRun, UsageError
from asgi_realtime.core.names import check_key, check_tags, input_stream, stream_name
from asgi_realtime.core.run_errors import end_error
from asgi_realtime.core.runs import CancelRequested, RunRecord
from asgi_realtime.core.scopes import flatten_scopes
from asgi_realtime.engine.engine import Engine
from asgi_realtime.engine.execution import Execution
from asgi_realtime.engine.open_run import OpenRun
from asgi_realtime.engine.producers import Producers
from asgi_realtime.engine.run import Run, current
from asgi_realtime.engine.thread_bridge import ThreadBridge
from asgi_realtime.runs.handles import TOKEN_EXPIRES_IN, BatchHandle, RunHandle, batch_scopes, run_scopes
from asgi_realtime.streams.followers import BatchFollower, RunFollower, RunWithStreams, StreamChunk, TagFollower
from asgi_realtime.streams.pipe import Pipe, Source
from asgi_realtime.streams.readers import ChunkReader, StreamReader
from asgi_realtime.streams.sources import check_source
from asgi_realtime.streams.writer import encode_within
from asgi_realtime.sync import SyncRealtime
from asgi_realtime.tasks import Executor, Task
from asgi_realtime.tasks.batches import BatchItem
from asgi_realtime.tasks.options import RunLike, TriggerOptions, run_id_of
from asgi_realtime.tasks.registry import Tasks
from asgi_realtime.tasks.task import TaskLike, id_of
from asgi_realtime.tokens import PUBLIC_TOKEN_EXPIRES_IN, Claims, TokenAuthority, check_columns
from asgi_realtime.typed import StreamWriterContext, TypedStream

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
T1 = TypeVar("T1")

_TOKEN_EXPIRES_IN_S = parse_span(TOKEN_EXPIRES_IN, name="token_expires_in")

Asgi = Callable[[Any, Any, Any], Awaitable[None]]


class TaskDecorator(Protocol):
    """What `Realtime.task` gives: it makes a `Task` of a function and keeps its types."""

    @overload
    def __call__(self, function: Callable[P, Awaitable[R]], /) -> Task[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


class Realtime:
    """Live run updates and token streams for one app. An ASGI app and an async context manager.

    Mount it (`app.mount("/realtime", realtime)`) and start it with the app: `lifespan=realtime.lifespan`, or
    `async with realtime:`, or `RealtimeMiddleware`; without any of these it starts on first use.

    `secret_key` signs tokens: 32 bytes or more. With several the first signs and all verify. `cors` is "*", a list of
    origins, a `Cors`, or None to leave it to the host. `api=False` answers 404 on all of `/api/`. `signals=False`
    leaves signal handlers alone. `debug=True` shows subscribers the messages of all exceptions. `clock` gives unix
    seconds. Raises `InvalidConfiguration`.
    """

    def __init__(
        self,
        *,
        secret_key: str | Sequence[str] | None = None,
        broker: str | Broker = "memory://",
        executor: Executor | None = None,
        limits: Limits | None = None,
        retention: Retention | None = None,
        timeouts: Timeouts | None = None,
        cors: Cors | str | Sequence[str] | None = "*",
        api: bool = True,
        signals: bool = True,
        debug: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.limits = limits or Limits()
        self.retention = retention or Retention()
        self.timeouts = timeouts or Timeouts()
        self.cors = cors if isinstance(cors, Cors) or cors is None else Cors(origins=cors)
        self.api = api
        self.debug = debug
        self.clock = clock
        self.tokens = TokenAuthority(secret_key or "", clock=clock, home=self._home)
        if isinstance(broker, str):
            broker = open_broker(
                broker, limits=self.limits, retention=self.retention, timeouts=self.timeouts, clock=clock
            )
        self.broker = broker
        self.engine = Engine(
            broker,
            limits=self.limits,
            timeouts=self.timeouts,
            clock=clock,
            signals=signals,
            debug=debug,
            retention=self.retention,
        )
        self.runs = self.engine.runs
        self._bridge = ThreadBridge(self.engine)
        self._tasks = Tasks(self.engine, executor, retention=self.retention)
        self._producers = Producers(self.engine, handle=self._handle)

    def __repr__(self) -> str:
        return f"<Realtime broker={type(self.broker).__name__}>"

    def _home(self) -> str:
        return self.broker.home if isinstance(self.broker, InOneProcess) else ""

    # Life

    async def start(self) -> None:
        """Start, in the context of the caller. Idempotent; after `stop` it may be started again, on any loop."""
        async with self._bridge.host_start():
            await self.engine.ensure_started(lazy=False)

    async def ensure_started(self) -> None:
        """Start on first use, outside of the context of the caller."""
        await self.engine.ensure_started()

    async def stop(self) -> None:
        """End every subscription, let tasks run for `timeouts.drain`, cancel them, and leave the broker. Idempotent."""
        await self.engine.stop()

    def begin_shutdown(self) -> None:
        """End every subscription cleanly; their clients come back later. From any thread; idempotent."""
        self.engine.subscribers.begin_shutdown()

    async def __aenter__(self) -> Realtime:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """A lifespan for Starlette, FastAPI and Litestar: `FastAPI(lifespan=realtime.lifespan)`."""
        async with self:
            yield

    @property
    def closing(self) -> bool:
        """The shutdown has begun."""
        return self.engine.subscribers.closing

    @property
    def subscribers(self) -> set[Any]:
        """The open subscriptions of this process."""
        return self.engine.subscribers.open

    @cached_property
    def _app(self) -> Asgi:
        from asgi_realtime.asgi.app import RealtimeApp  # the one import upward: an object that is both API and app

        app: Asgi = RealtimeApp(self)
        return app

    @property
    def tasks(self) -> Tasks:
        """The registered tasks."""
        return self._tasks

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)

    @cached_property
    def sync(self) -> SyncRealtime:
        """The same calls for code that is not on the event loop: a thread, a sync view, a worker process."""
        return SyncRealtime(self, self._bridge)

    # Tasks and runs

    def task(self, id: str, *, max_duration: Span | None = None, concurrency_limit: int | None = None) -> TaskDecorator:
        """Register a function as a task: `async def`, or `def`, which runs in a thread.

        It takes `()`, `(payload)`, `(payload, run)` or `(run: Run)`. The annotation of the payload decodes it: a
        dataclass, msgspec struct, pydantic model, TypedDict or plain JSON. What it returns is the run's output. The
        result is a `Task`, which can still be called as the plain function. Raises `InvalidConfiguration`.
        """
        if callable(id):
            raise InvalidConfiguration(f'a task needs an id: @realtime.task("{getattr(id, "__name__", "report")}")')

        def register(function: Callable[..., Any], /) -> Task[..., Any]:
            return self._tasks.register(id, function, max_duration=max_duration, concurrency_limit=concurrency_limit)

        return cast(TaskDecorator, register)

    @overload
    async def trigger(
        self, task: Task[P, R], payload: Any = None, **options: Unpack[TriggerOptions]
    ) -> RunHandle[R]: ...

    @overload
    async def trigger(self, task: str, payload: Any = None, **options: Unpack[TriggerOptions]) -> RunHandle[Any]: ...

    async def trigger(
        self, task: Task[P, R] | str, payload: Any = None, **options: Unpack[TriggerOptions]
    ) -> RunHandle[R] | RunHandle[Any]:
        """Start a run of a task and return its handle, ready to be sent to a browser as JSON.

        `idempotency_key`: the same key gives the same run, for a day or `idempotency_key_ttl`, and as long as the run
        is kept. `ttl`: EXPIRED if it has not begun by then. `delay`: begins later, after a span or at a `datetime` with
        a time zone. `max_duration`: less than its task may take. `parent`: the run that triggers it, by default the
        current one. A run that the executor does not take now stays QUEUED until it does. Raises `UnknownTask`,
        `InvalidPayload`, `LimitExceeded`, `UsageError`; nothing has happened then. `BrokerUnavailable`.
        """
        expires_in_s = parse_span(options.pop("token_expires_in", TOKEN_EXPIRES_IN), name="token_expires_in")
        parent = options.pop("parent", None)
        parent_id = None if parent is None else run_id_of(parent)
        launched = await self._tasks.trigger(task, payload, options, parent_id=parent_id)
        return self._handle(launched.record.id, is_cached=launched.is_cached, expires_in_s=expires_in_s)

    async def batch_trigger(
        self, items: Iterable[BatchItem], *, token_expires_in: Span = TOKEN_EXPIRES_IN
    ) -> BatchHandle:
        """Start several runs: `(task, payload)` or `(task, payload, options)` each. Options are a dict of `tags`,
        `metadata`, `idempotency_key`, `idempotency_key_ttl`, `ttl`, `delay`, `max_duration`, as in `trigger`.

        An item whose idempotency key stands for an earlier run gives that run, which does not become one of the batch.
        All are checked before the first is started. Raises as `trigger`, and `LimitExceeded` for too many.
        """
        expires_in_s = parse_span(token_expires_in, name="token_expires_in")
        batch = await self._tasks.batch_trigger(items)
        scopes = [*batch_scopes(batch.id), *(f"read:runs:{run_id}" for run_id in batch.earlier_run_ids)]
        return BatchHandle(batch.id, self._mint(scopes, expires_in_s), runs=batch.run_ids, result=self.result)

    async def execute(self, run_id: str) -> None:
        """Run a triggered task here and now; what a queue's worker calls.

        A run is executed at most once: if it is not QUEUED any more, this returns. Raises `RunNotFound`,
        `UnknownTask`. Cancelling the caller cancels the run.
        """
        await self._tasks.execute(run_id)

    def open_run(
        self, name: str, *, tags: str | Iterable[str] | None = None, metadata: Mapping[str, Any] | None = None
    ) -> AbstractAsyncContextManager[Run]:
        """A run of the host's own code, in an `async with`.

        Leaving completes it with what `run.set_output` was given. An exception fails it and goes on; the host's
        cancellation cancels it and goes on; `cancel(run)` cancels the body and raises `RunCanceled` from the
        `async with`. On asyncio it may be left in another task than it was entered in.
        """
        record = self._tasks.records.new_open_run(name, tags=tags, metadata=metadata)

        async def begin() -> Execution:
            await self.ensure_started()
            await self.runs.create(record)
            return await self.engine.executions.start(record)

        return OpenRun(begin, self.engine.executions.remove)

    async def cancel(self, run: RunLike) -> RunRecord:
        """Cancel a run, from any process. A waiting run is CANCELED at once; a running one is asked to stop.

        What its pipes hold is still written. A run that is over stays as it is. Raises `RunNotFound`.
        """
        await self.ensure_started()
        record = await self.runs.update(run_id_of(run), CancelRequested())
        execution = self.engine.executions.get(record.id)
        if execution is not None and not record.is_completed:
            execution.cancel()
        return record

    async def get_run(self, run: RunLike) -> RunRecord:
        """The newest state of a run. Raises `RunNotFound`."""
        await self.ensure_started()
        return await self.runs.get(run_id_of(run))

    async def result(self, run: RunLike, *, timeout: Span | None = None) -> Any:
        """Wait until a run is over and return its output. Raises `RunFailed`, `RunCanceled`, `TimeoutError`."""
        await self.ensure_started()
        seconds = None if timeout is None else parse_span(timeout, name="timeout")
        with anyio.fail_after(seconds):
            record = await self.runs.ended(run_id_of(run))
        if not record.is_success:
            assert record.end is not None
            raise end_error(record.end, record)
        return self._tasks.decode_output(record)

    # Streams

    def pipe(
        self,
        source: Source[T],
        stream: str = "default",
        *,
        run: RunLike | None = None,
        task: str = "pipe",
        tags: str | Iterable[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Pipe[T]:
        """Forward a source into a stream, and get the same objects to iterate. Forwarding begins at once.

        Inside a run (or with `run`) the stream is the run's. Elsewhere a run is opened, named by `task`, with `tags`
        and `metadata`, that lives as long as the source. See `Pipe`. Raises `InvalidSource`, `UsageError`.
        """
        check_source(source)
        name = stream_name(stream, self.limits)
        if run is None and self._current() is None:
            record = self._tasks.records.new_open_run(task, tags=tags, metadata=metadata)
            return self._producers.pipe_alone(source, record, name)
        if tags is not None or metadata is not None:
            raise UsageError("tags= and metadata= are for a run that pipe() opens; this one is there: use run.tags.add")
        return self._producers.pipe_into(source, StreamKey(self._run_id(run), name))

    async def append(self, chunk: Any, stream: str = "default", *, run: RunLike | None = None) -> None:
        """Append one chunk; it is in the log when this returns.

        Raises `EncodingError`, `LimitExceeded`, `RunNotFound`, `StreamClosed`, `BrokerUnavailable`, `NoCurrentRun`.
        """
        run_id = self._run_id(run)
        data = encode_within(chunk, self.limits.chunk_bytes)
        writer = self._producers.known(run_id, stream)
        if writer is None:
            writer = await self._producers.shared(StreamKey(run_id, stream_name(stream, self.limits)))
        writer.write(data)
        await writer.settled()

    async def send_input(self, run: RunLike, input_id: str, data: Any) -> None:
        """Send data into a run; `run.input(input_id)` gets it there. Raises as `append`."""
        key = StreamKey(run_id_of(run), input_stream(input_id, self.limits))
        encoded = encode_within(data, self.limits.input_bytes)
        await self.ensure_started()
        await self.runs.get(key.run)
        writer = await self._producers.shared(key)
        writer.write(encoded)
        await writer.settled()

    def writer(self, stream: str = "default", *, run: RunLike | None = None) -> StreamWriterContext[Any]:
        """An async context manager to write many chunks: `await writer.write(chunk)`, `writer.merge(source)`."""
        key = StreamKey(self._run_id(run), stream_name(stream, self.limits))
        return StreamWriterContext(self, self._producers.writer(key), chunk_bytes=self.limits.chunk_bytes)

    def define_stream(self, key: str, chunk_type: type[T1]) -> TypedStream[T1]:
        """A stream under a fixed key whose chunks have a type, with `pipe`, `append`, `writer` and `read`."""
        return TypedStream(self, stream_name(key, self.limits), chunk_type)

    def read(
        self, run: RunLike, stream: str = "default", *, start_index: int = 0, timeout: Span | None = None
    ) -> AsyncIterator[Any]:
        """The decoded chunks of a stream from `start_index` on, present and to come.

        Ends when the run completes; raises `RunFailed` or `RunCanceled` after the last chunk if it ended otherwise.
        Raises `StreamGap` if chunks are past their retention, `TimeoutError` after `timeout` of silence, `RunNotFound`.
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
        """As `read`, with another way to decode the JSON of a chunk."""
        if isinstance(start_index, bool) or not isinstance(start_index, int) or start_index < 0:
            raise UsageError(f"start_index is {start_index!r}; allowed are whole numbers from 0")
        key = StreamKey(run_id_of(run), stream_name(stream, self.limits))
        seconds = None if timeout is None else parse_span(timeout, name="timeout")
        self.engine.begin()
        reader = StreamReader(
            self.broker, self.runs, key, after=start_index - 1, timeout_s=seconds, start=self.ensure_started
        )
        return ChunkReader(reader, decode_chunk)

    # Following runs

    @overload
    def subscribe_to_run(
        self, run: RunLike, *, stop_on_completion: bool = True, with_streams: Literal[False] = False
    ) -> AsyncIterator[RunRecord]: ...

    @overload
    def subscribe_to_run(
        self, run: RunLike, *, stop_on_completion: bool = True, with_streams: Literal[True]
    ) -> AsyncIterator[RunRecord | StreamChunk]: ...

    def subscribe_to_run(
        self, run: RunLike, *, stop_on_completion: bool = True, with_streams: bool = False
    ) -> AsyncIterator[RunRecord] | AsyncIterator[RunRecord | StreamChunk]:
        """The states of a run, the present one first; a reader who is behind gets the newest.

        With streams, `StreamChunk`s come in between, and the terminal state after the last chunk. Raises `RunNotFound`.
        """
        run_id = run_id_of(run)
        self.engine.begin()
        if with_streams:
            return RunWithStreams(
                self.broker, self.runs, run_id, stop_on_completion=stop_on_completion, start=self.ensure_started
            )
        return RunFollower(
            self.broker, self.runs, run_id, stop_on_completion=stop_on_completion, start=self.ensure_started
        )

    def subscribe_to_runs_with_tag(
        self, tags: str | Iterable[str], *, created_within: Span = "24h"
    ) -> AsyncIterator[RunRecord]:
        """The runs that have all of these tags, the present ones first, then each change. Never ends."""
        wanted = check_tags(tags, self.limits)
        if not wanted:
            raise UsageError("tags are empty; name at least one")
        oldest_ms = self.runs.now_ms() - round(parse_span(created_within, name="created_within") * 1000)
        self.engine.begin()
        return TagFollower(
            self.broker,
            self.runs,
            wanted,
            oldest_ms=oldest_ms,
            first=self.limits.feed_runs,
            limit=self.limits.topic_runs,
            start=self.ensure_started,
        )

    def subscribe_to_batch(self, batch: str | BatchHandle) -> AsyncIterator[RunRecord]:
        """The runs of a batch, the present state first. Ends when all that are there are over. Raises
        `RunNotFound` if there is none."""
        batch_id = batch if isinstance(batch, str) else batch.id
        self.engine.begin()
        return BatchFollower(
            self.broker,
            self.runs,
            batch_id,
            closed=lambda: self.tasks.batches.closed(batch_id),
            limit=self.limits.topic_runs,
            start=self.ensure_started,
        )

    # Tokens

    def create_public_token(
        self,
        *,
        scopes: Mapping[str, Any] | Sequence[str],
        expires_in: Span = PUBLIC_TOKEN_EXPIRES_IN,
        skip_columns: Iterable[str] = (),
    ) -> str:
        """A token for a browser: `{"read": {"runs": [run.id], "tags": ["user:1"]}}`, or scopes as a list of strings.

        `skip_columns` are left out of every run that is read with it: `["payload", "metadata"]`, whatever the client
        asks for. They have the names of the run feed's columns, such as `runTags` for the tags. Raises `UsageError` for
        an unknown word, an empty list, or a scope that admits nothing.
        """
        seconds = parse_span(expires_in, name="expires_in")
        return self._mint(flatten_scopes(scopes), seconds, skip_columns=check_columns(skip_columns))

    def create_trigger_public_token(
        self,
        tasks: TaskLike | Sequence[TaskLike],
        *,
        multiple_use: bool = False,
        expires_in: Span = PUBLIC_TOKEN_EXPIRES_IN,
        skip_columns: Iterable[str] = (),
    ) -> str:
        """A token with which a browser may trigger these tasks: once, or as often as it likes until it expires.

        `skip_columns`, as in `create_public_token`, hold for the token that it gets with the run.
        """
        return self._mint_for_tasks("trigger", tasks, multiple_use, expires_in, skip_columns)

    def create_batch_trigger_public_token(
        self,
        tasks: TaskLike | Sequence[TaskLike],
        *,
        multiple_use: bool = False,
        expires_in: Span = PUBLIC_TOKEN_EXPIRES_IN,
        skip_columns: Iterable[str] = (),
    ) -> str:
        """A token with which a browser may trigger a batch of these tasks, as `create_trigger_public_token`."""
        return self._mint_for_tasks("batchTrigger", tasks, multiple_use, expires_in, skip_columns)

    def _mint_for_tasks(
        self,
        action: str,
        tasks: TaskLike | Sequence[TaskLike],
        multiple_use: bool,
        expires_in: Span,
        skip_columns: Iterable[str],
    ) -> str:
        given = [tasks] if isinstance(tasks, str) or not isinstance(tasks, Iterable) else tasks
        ids = [check_key(id_of(task), self.limits, what="task id") for task in given]
        scopes = flatten_scopes({action: {"tasks": ids}})
        seconds = parse_span(expires_in, name="expires_in")
        return self._mint(scopes, seconds, one_time=not multiple_use, skip_columns=check_columns(skip_columns))

    def verify_token(self, token: str) -> Claims:
        """The claims of a token. Raises `InvalidToken`, `ExpiredToken`."""
        return self.tokens.verify(token)

    def _mint(
        self, scopes: Sequence[str], expires_in_s: float, *, one_time: bool = False, skip_columns: Sequence[str] = ()
    ) -> str:
        return self.tokens.mint(
            scopes, expires_in_s=expires_in_s, one_time=one_time, own_id=True, skip_columns=skip_columns
        )

    def _handle(
        self, run_id: str, *, is_cached: bool = False, expires_in_s: float = _TOKEN_EXPIRES_IN_S
    ) -> RunHandle[Any]:
        token = self._mint(run_scopes(run_id), expires_in_s)
        return RunHandle(run_id, token, is_cached=is_cached, result=self.result)

    # The current run

    def _current(self) -> Run | None:
        """The current run, if it is one of ours."""
        run = current.get(None)
        return run if run is not None and run.belongs_to(self.runs) else None

    def _run_id(self, run: RunLike | None) -> str:
        if run is not None:
            return run_id_of(run)
        found = self._current()
        if found is None:
            raise NoCurrentRun("there is no current run here: call this inside a task or `open_run`, or pass run=")
        return found.id
