"""`Realtime`: the object that users hold, and every call of the library.

It joins the parts and does little itself. `engine` starts and stops everything and executes runs, `tasks` triggers
them, `runs.store` changes them, `engine.producers` writes streams, and `streams.readers` and `streams.followers` read
them. Calls that only touch memory are sync; calls that can wait for the broker are async. All arguments after the first
two are keyword-only.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar, Unpack, cast, overload

from asgi_realtime.brokers import Broker, open_broker
from asgi_realtime.brokers.base import InOneProcess, StreamKey
from asgi_realtime.core.access import Authorize, AuthorizeInspector, check_function
from asgi_realtime.core.chunks import decode
from asgi_realtime.core.config import (
    Cors,
    Limits,
    Retention,
    Span,
    Timeouts,
    check_switch,
    parse_span,
    settings_or_default,
)
from asgi_realtime.core.errors import InvalidConfiguration, UsageError, shown
from asgi_realtime.core.names import check_key, check_tags, check_thread, input_stream, stream_name
from asgi_realtime.core.run_errors import end_error
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.core.scopes import flatten_scopes
from asgi_realtime.engine.engine import Engine
from asgi_realtime.engine.on_end import OnEnd, check_on_end
from asgi_realtime.engine.open_run import OpenRun
from asgi_realtime.engine.producers import Producers
from asgi_realtime.engine.run import Run, current_run_of, no_current_run
from asgi_realtime.engine.thread_bridge import ThreadBridge
from asgi_realtime.loop.waiting import at_most
from asgi_realtime.runs.handles import TOKEN_EXPIRES_IN, BatchHandle, RunHandle, batch_scopes, run_scopes
from asgi_realtime.runs.recent import RecentRuns
from asgi_realtime.streams.followers import BatchFollower, RunFollower, RunWithStreams, StreamChunk, TagFollower
from asgi_realtime.streams.pipe import Pipe, Source
from asgi_realtime.streams.readers import ChunkReader, ReaderShutdown, StreamReader
from asgi_realtime.streams.sources import check_source
from asgi_realtime.streams.writer import check_encode, encode_within, name_chunk
from asgi_realtime.sync import SyncRealtime
from asgi_realtime.tasks import AsyncTask, Executor, SyncTask, Task
from asgi_realtime.tasks.batches import BatchItem
from asgi_realtime.tasks.options import (
    OnUnwatched,
    OpenRunOptions,
    PipeRunOptions,
    RunLike,
    TriggerOptions,
    check_names,
    check_writes_into_a_run,
    run_id_of,
)
from asgi_realtime.tasks.registry import Tasks
from asgi_realtime.tasks.task import TaskLike, id_of
from asgi_realtime.tokens import PUBLIC_TOKEN_EXPIRES_IN, Claims, TokenAuthority, check_columns, check_owner
from asgi_realtime.typed import StreamWriterContext, TypedStream

if TYPE_CHECKING:
    from asgi_realtime.asgi.app import RealtimeApp
    from asgi_realtime.asgi.host_response import HostResponse
    from asgi_realtime.metrics import CollectorRegistry, Metrics

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
T1 = TypeVar("T1")

_TOKEN_EXPIRES_IN_S = parse_span(TOKEN_EXPIRES_IN, name="token_expires_in")

Asgi = Callable[[Any, Any, Any], Awaitable[None]]


class TaskDecorator(Protocol):
    """The decorator that `Realtime.task` returns. It turns a function into a `Task` with the same types.

    The overloads overlap, because a `def` function can return any object. The first one that matches counts.
    """

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncTask[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, Awaitable[R]], /) -> Task[P, R]: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, function: Callable[P, R], /) -> SyncTask[P, R]: ...


class Realtime:
    """Live run updates and token streams for one app. An ASGI app and an async context manager.

    Mount it (`app.mount("/realtime", realtime)`) and start it with the app: `lifespan=realtime.lifespan`,
    `async with realtime:`, or `RealtimeMiddleware`. Without any of these it starts on first use.

    `secret_key` signs tokens and needs at least 32 bytes; of several keys, the first signs and all verify. `cors` is
    "*", a list of origins, a `Cors`, or None if the host handles CORS. `authorize(request, resource)` lets a session of
    the host replace a token (docs/tokens.md). `api=False` responds 404 to all of `/api/`.
    `inspector=True` serves a page about all runs at `/inspect`, for the secret key or for what `authorize_inspector`
    allows (docs/inspector.md). `metrics=True` serves metrics for Prometheus; a `CollectorRegistry` adds them to yours.
    `signals=False` installs no signal handlers. `debug=True` shows subscribers the messages of all exceptions. `clock`
    returns unix seconds. Raises `InvalidConfiguration`.
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
        authorize: Authorize | None = None,
        api: bool = True,
        inspector: bool = False,
        authorize_inspector: AuthorizeInspector | None = None,
        signals: bool = True,
        debug: bool = False,
        metrics: bool | CollectorRegistry = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.limits = settings_or_default(limits, Limits)
        self.retention = settings_or_default(retention, Retention)
        self.timeouts = settings_or_default(timeouts, Timeouts)
        self.cors = cors if isinstance(cors, Cors) or cors is None else Cors(origins=cors)
        self.authorize = check_function(authorize, name="authorize")
        self.authorize_inspector = check_function(authorize_inspector, name="authorize_inspector")
        self.api = check_switch(api, name="api")
        self.debug = check_switch(debug, name="debug")
        if not callable(clock):
            raise InvalidConfiguration(f"clock is {shown(clock)}; allowed is a function that returns unix seconds")
        self.clock = clock
        self.metrics = None if metrics is False else _make_metrics(metrics)
        if isinstance(broker, str):
            broker = open_broker(
                broker, limits=self.limits, retention=self.retention, timeouts=self.timeouts, clock=clock
            )
        elif not hasattr(broker, "append"):
            raise InvalidConfiguration(
                f"broker is {shown(broker)}; allowed are a URL such as 'redis://…' and a Broker object"
            )
        self.broker = broker
        home = partial(getattr, broker, "home") if isinstance(broker, InOneProcess) else str
        self.tokens = TokenAuthority(secret_key or "", clock=clock, home=home, max_life_s=self.limits.token_life)
        self.engine = Engine(
            broker,
            limits=self.limits,
            timeouts=self.timeouts,
            clock=clock,
            signals=check_switch(signals, name="signals"),
            debug=debug,
            handle=self._handle,
            retention=self.retention,
            reporter=self.metrics,
        )
        if self.metrics is not None:
            self.metrics.attach(self.engine)
        self.inspector = check_switch(inspector, name="inspector") or authorize_inspector is not None
        if self.inspector:
            self.engine.list_runs()
        self.runs = self.engine.runs
        self.watchers = self.engine.watchers
        self._bridge = ThreadBridge(self.engine)
        self.tasks = Tasks(self.engine, executor, retention=self.retention)
        self._producers = Producers(self.engine)

    if not TYPE_CHECKING:  # a type checker would then accept any assignment

        def __setattr__(self, name: str, value: object) -> None:
            """Raise `AttributeError` for a setting, which the parts have read already."""
            if name in _SETTINGS and "_producers" in self.__dict__:
                raise AttributeError(f"realtime.{name} cannot be assigned; pass {name}= to Realtime(…)")
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<Realtime broker={type(self.broker).__name__}>"

    # Start and stop

    async def start(self) -> None:
        """Start, in the context of the caller. Idempotent. Can start again after `stop`, on any event loop."""
        async with self._bridge.host_start():
            await self.engine.ensure_started(lazy=False)

    async def ensure_started(self) -> None:
        """Start unless this runs already, outside of the context of the caller."""
        await self.engine.ensure_started()

    async def stop(self) -> None:
        """Give runs `timeouts.drain` from the beginning of the shutdown to finish, cancel the rest, end every
        subscription, and close the broker.

        Idempotent.
        """
        await self.engine.stop()

    def begin_shutdown(self) -> None:
        """Begin the shutdown, as SIGTERM does: reject new runs, end subscriptions so that their clients reconnect, and
        give runs `timeouts.drain` to finish. Thread-safe; idempotent."""
        self.engine.shutdown.begin()

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
    def running(self) -> bool:
        """Whether it was started on this event loop and its broker is available."""
        return self.engine.running

    @property
    def closing(self) -> bool:
        """Whether the shutdown has begun. A task without end can check this to finish in time."""
        return self.engine.shutdown.begun

    def drains(self, run_id: str, /) -> bool:
        """Whether the run executes in this process and a shutdown waits for it."""
        return self.engine.shutdown.waits_for(run_id)

    @property
    def recent(self) -> RecentRuns | None:
        """The runs that changed last, if the inspector is on."""
        return self.engine.recent

    @property
    def subscribers(self) -> set[Any]:
        """The streams, feeds and polls that are open in this process; `len(realtime.subscribers)` counts them."""
        return self.engine.subscribers.open

    @cached_property
    def respond(self) -> Callable[[Any, Any], Awaitable[Asgi]]:
        """`RealtimeMiddleware` calls this with scope and receive. Returns the response, as an ASGI app."""
        return self._app.respond

    @cached_property
    def _app(self) -> RealtimeApp:
        from asgi_realtime.asgi.app import RealtimeApp  # the only upward import: `Realtime` is an ASGI app too

        return RealtimeApp(self)

    @property
    def client_js(self) -> str:
        """The name of the browser module under the mount, such as `client-5f478a42c79c.js`. Browsers store it forever,
        because it changes with the module."""
        return self._app.client_js

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        response = await self.respond(scope, receive)
        await response(scope, receive, send)

    @cached_property
    def sync(self) -> SyncRealtime:
        """Blocking forms of these calls for code outside of the event loop: a thread, a sync view, a worker process."""
        return SyncRealtime(self, self._bridge)

    # Tasks and runs

    def task(
        self,
        id: str,
        *,
        max_duration: Span | None = None,
        concurrency_limit: int | None = None,
        on_end: OnEnd | None = None,
        on_unwatched: OnUnwatched | None = None,
        unwatched_grace: Span | None = None,
    ) -> TaskDecorator:
        """Register an `async def` function as a task, or a `def` function, which runs in a thread.

        The function takes `()`, `(payload)`, `(payload, run)` or `(run: Run)`. The payload is decoded into its
        annotation: a dataclass, msgspec struct, pydantic model, TypedDict or plain JSON. The return value is the run's
        output. The decorator returns a `Task`, which can still be called as the plain function. Raises
        `InvalidConfiguration`, also for an id that is taken; in a notebook the new task replaces the old one.

        `on_end` is called with a `RunEnd` when a run of the task is over, however it ended: at least once, in a process
        that has the task. An exception in it is logged. A `def` function runs in a thread and gets a `SyncRunEnd`.

        `on_unwatched="cancel"` cancels a run of the task once it has had a reader, and then none for `unwatched_grace`
        (default: 15 s), in any process. "continue" only counts the readers, for `run.watchers()`.
        """
        if callable(id):
            raise InvalidConfiguration(f'a task needs an id: @realtime.task("{getattr(id, "__name__", "report")}")')

        def register(function: Callable[..., Any], /) -> Task[..., Any]:
            return self.tasks.register(
                id,
                function,
                max_duration=max_duration,
                concurrency_limit=concurrency_limit,
                on_end=on_end,
                on_unwatched=on_unwatched,
                unwatched_grace=unwatched_grace,
            )

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
        """Create a run of a task and return its handle, which can be sent to a browser as JSON.

        * `tags`, `metadata`: what the run has from its creation on.
        * `idempotency_key`: the same key returns the same run, for `idempotency_key_ttl` (default: a day) and as long
          as the run is retained.
        * `run_id`: the id of the run, such as that of a row in your database; by default a random one. Not together
          with `idempotency_key`. Raises `RunExists` for the id of another run.
        * `ttl`: the run is EXPIRED if it has not started by then.
        * `delay`: when the run starts: after a span, or at a `datetime` with a time zone.
        * `max_duration`: shortens the `max_duration` of the task.
        * `thread`: the name of what has at most one active run, such as `"chat:1"`, across all tasks and processes. If
          a run of the thread is active, `on_conflict="reject"` (the default) raises `ThreadBusy`, which names it, and
          `"replace"` cancels it and creates the new run at once.
        * `on_unwatched`, `unwatched_grace`: replace those of the task.
        * `parent`: the run that triggers this one; by default the current run.
        * `token_expires_in`: how long the handle's token is valid (default: an hour).
        * `owner`: the owner of the handle's token, as in `create_public_token`; by default that of the current run. The
          run itself is not charged to it.

        If the executor does not accept the run now, it stays QUEUED until the executor does. Raises `UnknownTask`,
        `InvalidPayload`, `LimitExceeded` and `UsageError` before anything is stored, `ThreadBusy`, and
        `BrokerUnavailable`.
        """
        expires_in_s = self._life_s(options.pop("token_expires_in", TOKEN_EXPIRES_IN), name="token_expires_in")
        owner = self._handle_owner(options.pop("owner", None))
        parent = options.pop("parent", None)
        parent_id = None if parent is None else run_id_of(parent)
        run_id = options.pop("run_id", None)
        launched = await self.tasks.trigger(task, payload, options, parent_id=parent_id, run_id=run_id)
        return self._handle(launched.record.id, owner, is_cached=launched.is_cached, expires_in_s=expires_in_s)

    async def batch_trigger(
        self, items: Iterable[BatchItem], *, token_expires_in: Span = TOKEN_EXPIRES_IN, owner: str | None = None
    ) -> BatchHandle:
        """Create several runs: `(task, payload)` or `(task, payload, options)` each. Options are a dict of `tags`,
        `metadata`, `idempotency_key`, `idempotency_key_ttl`, `ttl`, `delay`, `max_duration`, as in `trigger`, and so
        are `token_expires_in` and `owner`, for the token of the handle.

        If the idempotency key of an item names an earlier run, the handle lists that run, but it does not become part
        of the batch. All items are checked before the first run is created. Raises what `trigger` raises, and
        `LimitExceeded` for too many items.
        """
        expires_in_s = self._life_s(token_expires_in, name="token_expires_in")
        owner = self._handle_owner(owner)
        batch = await self.tasks.batch_trigger(items)
        scopes = [*batch_scopes(batch.id), *(f"read:runs:{run_id}" for run_id in batch.earlier_run_ids)]
        token = self._mint(scopes, expires_in_s, owner=owner)
        return BatchHandle(batch.id, token, runs=batch.run_ids, result=self.result)

    async def execute(self, run_id: str) -> None:
        """Execute a triggered run in this process and wait until it is over. The worker of a job queue calls this.

        A run executes at most once: if it is no longer QUEUED, this returns. Raises `RunNotFound`, `UnknownTask`.
        Cancelling the caller cancels the run.
        """
        await self.tasks.execute(run_id)

    def open_run(self, name: str, **options: Unpack[OpenRunOptions]) -> AbstractAsyncContextManager[Run]:
        """A run around the host's own code, as an `async with`.

        Options are `tags`, `metadata`, `run_id`, `thread`, `on_conflict`, as in `trigger`, `on_unwatched` and
        `unwatched_grace`, as in `task`, and `owner`, for the token in `run.handle`. `on_end` is called when the run is
        over, as in `task`, by this process only: it is lost if the process dies. Entering raises `RunExists` and
        `ThreadBusy`.

        Leaving it completes the run with what `run.set_output` received. An exception fails the run and propagates; a
        cancellation by the host cancels it and propagates; `cancel(run)` cancels the body, and the `async with` raises
        `RunCanceled`. On asyncio it can be left in another task than it was entered in.
        """
        check_names(options, OpenRunOptions)
        record, _, replaces = self.tasks.records.new_open_run(name, options)
        owner, on_end = self._handle_owner(options.get("owner")), check_on_end(options.get("on_end"))
        return OpenRun(
            lambda: self.engine.open_run(record, handle_owner=owner, on_end=on_end, replaces=replaces),
            self.engine.executions.remove,
        )

    async def cancel(self, run: RunLike) -> RunRecord:
        """Cancel a run, from any process. A waiting run is CANCELED at once; an executing one is asked to stop.

        Its pipes still write the chunks they hold. A run that is over does not change. Raises `RunNotFound`.
        """
        await self.ensure_started()
        return await self.engine.executions.cancel(run_id_of(run))

    async def active_run(
        self, thread: str, *, owner: str | None = None, token_owner: str | None = None
    ) -> RunHandle[Any] | None:
        """The run of a thread that has not ended, or None: when a reader sees the end of a run, it is None already.

        `owner` is the owner of the handle's token, as in `trigger`. The threads of browsers that trigger runs with
        public tokens are apart from yours: `token_owner` looks among those of this owner.
        """
        await self.ensure_started()
        record = await self.engine.run_threads.active(check_thread(thread, self.limits), check_owner(token_owner))
        return None if record is None else self._handle(record.id, self._handle_owner(owner or token_owner))

    async def get_run(self, run: RunLike) -> RunRecord:
        """The newest record of a run. Raises `RunNotFound`."""
        await self.ensure_started()
        return await self.runs.get(run_id_of(run))

    @overload
    async def result(self, run: RunHandle[R], *, timeout: Span | None = None) -> R: ...

    @overload
    async def result(self, run: RunLike, *, timeout: Span | None = None) -> Any: ...

    async def result(self, run: RunLike, *, timeout: Span | None = None) -> Any:
        """Wait until a run is over and return its output.

        Raises `RunFailed`, `RunCanceled`, `RunNotFound`, and `TimeoutError` after `timeout`.
        """
        await self.ensure_started()
        run_id = run_id_of(run)
        seconds = None if timeout is None else parse_span(timeout, name="timeout")
        with at_most(seconds, lambda: f"run {shown(run_id)} has not ended within {seconds:g} s; it continues"):
            record = await self.runs.ended(run_id)
        if not record.is_success:
            assert record.end is not None
            raise end_error(record.end, record)
        return self.tasks.decode_output(record)

    # Streams

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

    def response(
        self,
        run: RunLike,
        stream: str = "default",
        *,
        protocol: Literal["sse", "ai-sdk", "ag-ui"] = "sse",
        request: Any = None,
        last_event_id: str | None = None,
        owner: str | None = None,
    ) -> HostResponse:
        """A stream as the response of your own route, which has authorized the request: it needs no token.

        `protocol` is what the frontend reads: `sse` (docs/protocol.md), `ai-sdk` (`useChat`) or `ag-ui`. The response
        resumes after `last_event_id`, by default the `Last-Event-ID` of `request`. It is a Starlette `Response`. A
        framework of another kind iterates it to get the body, as bytes.

        `owner`, such as `"user:1"`, is charged for the subscription, as in `create_public_token`; by default the host.

        Except with `sse`, its header `x-realtime-resume` has a URL of this stream, with a token that reads it for an
        hour and nothing else, for `resumingFetch` (docs/browser.md).

        It responds 404 if there is no such run, 400 and 410 if it cannot resume there, 429 for a limit and 503 during a
        shutdown; the iterator raises these errors instead. Raises `UsageError`.
        """
        key = StreamKey(run_id_of(run), stream_name(stream, self.limits))
        token = self._mint([f"read:streams:{key.run}:{key.name}"], _TOKEN_EXPIRES_IN_S, owner=owner)
        return self._app.host_response(
            key,
            protocol,
            spawn=self.engine.spawn_brief,
            token=token,
            request=request,
            last_event_id=last_event_id,
            owner=owner or "",
        )

    async def append(self, chunk: Any, stream: str = "default", *, run: RunLike | None = None) -> None:
        """Append one chunk. It is in the log when this returns.

        Raises `EncodingError`, `LimitExceeded`, `RunNotFound`, `StreamClosed`, `BrokerUnavailable`, `NoCurrentRun`.
        """
        run_id = self._run_id(run)
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

    def define_stream(self, key: str, chunk_type: type[T1]) -> TypedStream[T1]:
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

    # Follow runs

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
        """The records of a run: the current one, then one for each change. A slow reader skips to the newest.

        With streams, `StreamChunk`s come in between, and the terminal record after the last chunk. Raises
        `RunNotFound`.
        """
        run_id = run_id_of(run)
        self.engine.begin()
        return (RunWithStreams if with_streams else RunFollower)(
            self.runs,
            run_id,
            stop_on_completion=stop_on_completion,
            start=self.ensure_started,
            shutdown=self._reader_shutdown(),
        )

    def subscribe_to_runs_with_tag(
        self, tags: str | Iterable[str], *, created_within: Span = "24h"
    ) -> AsyncIterator[RunRecord]:
        """The runs that have all of these tags: first the existing ones, then each change. Never ends."""
        wanted = check_tags(tags, self.limits)
        if not wanted:
            raise UsageError("tags are empty; name at least one")
        oldest_ms = self.runs.now_ms() - round(parse_span(created_within, name="created_within") * 1000)
        self.engine.begin()
        return TagFollower(
            self.runs, wanted, oldest_ms=oldest_ms, start=self.ensure_started, shutdown=self._reader_shutdown()
        )

    def subscribe_to_batch(self, batch: str | BatchHandle) -> AsyncIterator[RunRecord]:
        """The runs of a batch: the current records, then each change. Ends when all of its runs are over. Raises
        `RunNotFound`."""
        batch_id = batch if isinstance(batch, str) else batch.id
        self.engine.begin()
        return BatchFollower(
            self.runs,
            batch_id,
            closed=lambda: self.tasks.batches.closed(batch_id),
            start=self.ensure_started,
            shutdown=self._reader_shutdown(),
        )

    def _reader_shutdown(self) -> ReaderShutdown | None:
        """What ends a reader that the calling code creates. Inside of a run nothing does: the run drains."""
        return None if current_run_of(self.runs) is not None else self.engine.shutdown

    # Tokens

    def create_public_token(
        self,
        *,
        scopes: Mapping[str, Any] | Sequence[str],
        expires_in: Span = PUBLIC_TOKEN_EXPIRES_IN,
        skip_columns: Iterable[str] = (),
        owner: str | None = None,
    ) -> str:
        """Create a token for a browser. `scopes` is like `{"read": {"runs": [run.id], "tags": ["user:1"]}}`, or a list
        of strings.

        `skip_columns`, such as `["payload", "metadata"]`, are omitted from every run that the token reads. The names
        are the columns of the run feed, such as `runTags`. `owner`, such as `"user:1"`, is charged for what arrives
        with the token: all tokens of one owner share its budgets (`Limits`, per owner). Without it, each token is an
        owner of its own. Raises `UsageError` for an unknown name, an empty list, or a scope that grants nothing.
        """
        seconds = self._life_s(expires_in, name="expires_in")
        return self._mint(flatten_scopes(scopes), seconds, skip_columns=check_columns(skip_columns), owner=owner)

    def create_trigger_public_token(
        self,
        tasks: TaskLike | Sequence[TaskLike],
        *,
        multiple_use: bool = False,
        expires_in: Span = PUBLIC_TOKEN_EXPIRES_IN,
        skip_columns: Iterable[str] = (),
        owner: str | None = None,
        tags: str | Iterable[str] | None = None,
    ) -> str:
        """Create a token with which a browser can trigger these tasks once; with `multiple_use`, any number of times.

        `skip_columns` and `owner` also apply to the token that the browser receives with the run; see
        `create_public_token`. With `tags`, the browser can give the run these tags and no others, so that it does not
        appear in the lists of other users; they are not added by themselves. Without `tags` it can choose any.
        """
        return self._mint_for_tasks("trigger", tasks, multiple_use, expires_in, skip_columns, owner, tags)

    def create_batch_trigger_public_token(
        self,
        tasks: TaskLike | Sequence[TaskLike],
        *,
        multiple_use: bool = False,
        expires_in: Span = PUBLIC_TOKEN_EXPIRES_IN,
        skip_columns: Iterable[str] = (),
        owner: str | None = None,
        tags: str | Iterable[str] | None = None,
    ) -> str:
        """As `create_trigger_public_token`, for a batch of these tasks."""
        return self._mint_for_tasks("batchTrigger", tasks, multiple_use, expires_in, skip_columns, owner, tags)

    def _mint_for_tasks(
        self,
        action: str,
        tasks: TaskLike | Sequence[TaskLike],
        multiple_use: bool,
        expires_in: Span,
        skip_columns: Iterable[str],
        owner: str | None,
        tags: str | Iterable[str] | None,
    ) -> str:
        listed = [tasks] if isinstance(tasks, str) or not isinstance(tasks, Iterable) else tasks
        ids = [check_key(id_of(task), self.limits, what="task id") for task in listed]
        scopes = flatten_scopes({action: {"tasks": ids}})
        seconds = self._life_s(expires_in, name="expires_in")
        return self._mint(
            scopes,
            seconds,
            one_time=not multiple_use,
            skip_columns=check_columns(skip_columns),
            owner=owner,
            tags=None if tags is None else check_tags(tags, self.limits),
        )

    def verify_token(self, token: str) -> Claims:
        """The claims of a token. Raises `InvalidToken`, `ExpiredToken`."""
        return self.tokens.verify(token)

    def _life_s(self, expires_in: Span, *, name: str) -> float:
        return self.tokens.check_life(parse_span(expires_in, name=name), name=name)

    def _mint(
        self,
        scopes: Sequence[str],
        expires_in_s: float,
        *,
        one_time: bool = False,
        skip_columns: Sequence[str] = (),
        owner: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> str:
        return self.tokens.mint(
            scopes,
            expires_in_s=expires_in_s,
            one_time=one_time,
            own_id=True,
            skip_columns=skip_columns,
            owner=check_owner(owner),
            tags=tags,
        )

    def _handle_owner(self, owner: str | None) -> str | None:
        """The owner of the token of a handle that the calling code creates."""
        run = current_run_of(self.runs) if owner is None else None
        return check_owner(owner) if run is None else run.handle_owner

    def _handle(
        self,
        run_id: str,
        owner: str | None,
        *,
        is_cached: bool = False,
        expires_in_s: float = _TOKEN_EXPIRES_IN_S,
    ) -> RunHandle[Any]:
        token = self._mint(run_scopes(run_id), expires_in_s, owner=owner)
        return RunHandle(run_id, token, is_cached=is_cached, result=self.result)

    def _run_id(self, run: RunLike | None) -> str:
        if type(run) is str and run:
            return run
        if run is not None:
            return run_id_of(run)
        found = current_run_of(self.runs)
        if found is None:
            raise no_current_run()
        return found.id


def _make_metrics(registry: Literal[True] | CollectorRegistry) -> Metrics:
    from asgi_realtime.metrics import make_metrics  # needs an extra

    return make_metrics(registry)


_SETTINGS = frozenset(inspect.signature(Realtime).parameters)
