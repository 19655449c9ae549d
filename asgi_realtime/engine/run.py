"""`Run`: what the code inside a run can do with it, and `current_run()`.

Everything here can be used from a thread as well, except what is async.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic

import anyio

from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.chunks import decode, encode_named
from asgi_realtime.core.config import Span, parse_span
from asgi_realtime.core.errors import LimitExceeded, NoCurrentRun, UsageError
from asgi_realtime.core.names import input_stream
from asgi_realtime.core.nesting import check_depth
from asgi_realtime.core.run_errors import RunEnded, end_error
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.engine.changes import ChangeBuffer
from asgi_realtime.engine.metadata import Metadata, Tags
from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.loop.waiting import at_most
from asgi_realtime.runs.handles import MakeHandle, RunHandle
from asgi_realtime.runs.store import RunStore
from asgi_realtime.runs.tracing import RunSpan
from asgi_realtime.streams.pipe import Pipe
from asgi_realtime.streams.readers import StreamReader

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # type checkers have it; `typing` has `default` from Python 3.13 on

    PayloadT = TypeVar("PayloadT", covariant=True, default=object)
else:
    from typing import TypeVar

    PayloadT = TypeVar("PayloadT", covariant=True)


class Input:
    """Data sent into a run under one id, in the order in which it was sent. Each item goes to one `get`.

    An async iterator as well, which ends with the run.
    """

    def __init__(self, input_id: str, entries: StreamReader) -> None:
        self._input_id = input_id
        self._entries = entries
        self._reading = anyio.Lock(fast_acquire=True)

    def __repr__(self) -> str:
        return f"input {self._input_id!r} of run {self._entries.key.run!r}"

    async def get(self, *, timeout: Span | None = None) -> Any:
        """Wait for the next item and return it.

        Raises `TimeoutError`, after which nothing is lost, and once the run has ended `RunEnded`, or the subclass that
        says how it ended.
        """
        seconds = None if timeout is None else parse_span(timeout, name="timeout")
        try:
            with at_most(seconds, lambda: f"no data was sent to {self} within {seconds:g} s"):
                return await self.__anext__()
        except StopAsyncIteration:
            end = self._entries.end
            assert end is not None
            raise RunEnded("the run is over") if end.reason == "complete" else end_error(end) from None

    def __aiter__(self) -> Input:
        return self

    async def __anext__(self) -> Any:
        async with self._reading:
            return decode((await self._entries.__anext__()).data)


_CHANGED_BY = {
    "metadata": "use run.metadata.set(key, value), or run.metadata.replace({…}) for all of it",
    "tags": "use run.tags.add(tag)",
    "output": "use run.set_output(value), or return it from the task",
}
_CHANGED_HERE = ("_handle", "_payload", "canceled", "output_json")

_NOT_DECODED: Any = object()


class RelatedRun:
    """A run as seen from another one: the parent or the root of the current run."""

    __slots__ = ("buffer", "id", "metadata", "tags", "task")

    def __init__(self, record: StoredRecord, *, runs: RunStore, supervisor: Supervisor) -> None:
        self.id = record.id
        self.task = record.task
        self.buffer = ChangeBuffer(record.id, runs=runs, supervisor=supervisor)
        self.metadata = Metadata(record, self.buffer, limit_bytes=runs.limits.metadata_bytes)
        self.tags = Tags(record, self.buffer, limits=runs.limits)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} task={self.task!r}>"

    if not TYPE_CHECKING:  # a type checker would then accept any assignment

        def __setattr__(self, name: str, value: object) -> None:
            """Raise `AttributeError`, with what to call, for what would be lost, such as `run.metadata = {…}`."""
            is_set = hasattr(self, name)
            try:
                if is_set and name not in _CHANGED_HERE:
                    raise AttributeError
                super().__setattr__(name, value)
            except AttributeError:
                hint = "it is read-only" if is_set else f"use run.metadata.set({name!r}, value), which subscribers see"
                raise AttributeError(f"run.{name} cannot be assigned; {_CHANGED_BY.get(name, hint)}") from None


class Run(RelatedRun, Generic[PayloadT]):
    """The run that the current code executes. `current_run()` returns it anywhere inside.

    A task that declares `run: Run[Report]` gets a payload that is decoded into a `Report`.
    """

    __slots__ = (
        "_handle",
        "_inputs",
        "_make_handle",
        "_payload",
        "_runs",
        "canceled",
        "handle_owner",
        "output_json",
        "parent",
        "pipes",
        "record",
        "root",
        "span",
    )

    def __init__(
        self,
        record: StoredRecord,
        *,
        runs: RunStore,
        supervisor: Supervisor,
        handle: MakeHandle,
        handle_owner: str | None = None,
        parent: RelatedRun | None = None,
        root: RelatedRun | None = None,
    ) -> None:
        super().__init__(record, runs=runs, supervisor=supervisor)
        self.record = record
        """The run as it was when this process started to execute it."""
        self.parent = parent
        """The run that triggered this one, if any."""
        self.root: RelatedRun = root or self
        """The first run of the chain: this one, if no run triggered it."""
        self.handle_owner = handle_owner or record.token_owner
        """The owner of the tokens of the handles that this run creates; None if each token is its own owner."""
        self.pipes: set[Pipe[Any]] = set()
        self.canceled = False
        """Whether the run is to be canceled. Code in a thread can check it; other code is interrupted."""
        self.output_json: bytes | None = None
        self.span = RunSpan(record)
        self._runs = runs
        self._make_handle = handle
        self._handle: RunHandle[Any] | None = None
        self._payload: Any = _NOT_DECODED
        self._inputs: dict[str, Input] = {}

    @property
    def handle(self) -> RunHandle[Any]:
        """The handle of this run, for a browser: it has a token that reads the run and sends inputs to it."""
        if self._handle is None:
            self._handle = self._make_handle(self.id, self.handle_owner)
        return self._handle

    @property
    def payload(self) -> PayloadT:
        """The payload, decoded into the type that the task declares for it, or else plain JSON; None without one."""
        payload: PayloadT = self.record.payload if self._payload is _NOT_DECODED else self._payload
        return payload

    def use_payload(self, payload: Any) -> None:
        """Make this the `payload`: the task's decoded one."""
        self._payload = payload

    def set_output(self, output: Any) -> None:
        """Set the output with which the run will complete. Raises `EncodingError`, `LimitExceeded`, `RunEnded`."""
        self.buffer.check_open("its output")
        self.output_json = self.encode_output(output)

    def encode_output(self, output: Any) -> bytes:
        """The JSON of an output. Raises `EncodingError`, `LimitExceeded`."""
        name, limit = f"the output of run {self.id!r}", self._runs.limits.output_bytes
        data = encode_named(output, name)
        if len(data) > limit:
            raise LimitExceeded(f"{name} is {len(data)} bytes, limit {limit}", status=413)
        check_depth(data, what=name)
        return data

    async def watchers(self) -> int:
        """How many readers the streams of the run have now, in all processes, as of their last tick.

        Raises `UsageError` unless the run was created with `on_unwatched`.
        """
        if not self.record.counts_watchers:
            raise UsageError(
                f'the readers of run {self.id!r} are not counted; create it with on_unwatched="cancel" or "continue"'
            )
        return await self._runs.broker.watchers(self.id)

    def input(self, input_id: str) -> Input:
        """The data that the host or a browser sends into this run under this id."""
        found = self._inputs.get(input_id)
        if found is None:
            key = StreamKey(self.id, input_stream(input_id, self._runs.limits))
            found = self._inputs[input_id] = Input(input_id, StreamReader(self._runs, key))
        return found


current: contextvars.ContextVar[Run] = contextvars.ContextVar("asgi_realtime_run")


def enter(run: Run) -> Callable[[], None]:
    """Make a run, and its span, the current one of this context. Returns what undoes that, which raises `ValueError` in
    another context."""
    token, detach = current.set(run), run.span.attach()

    def leave() -> None:
        current.reset(token)
        detach()

    return leave


def current_run() -> Run:
    """The run that the calling code executes. Raises `NoCurrentRun` outside of one."""
    run = current.get(None)
    if run is None:
        raise no_current_run()
    return run


def current_run_of(runs: RunStore) -> Run | None:
    """The run that the calling code executes, if it belongs to the `Realtime` of this store."""
    run = current.get(None)
    return run if run is not None and run._runs is runs else None


def no_current_run() -> NoCurrentRun:
    return NoCurrentRun("there is no current run here: call this inside a task or `open_run`, or pass run=")
