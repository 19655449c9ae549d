"""`Run`: what the code that runs inside a run can do with it.

Changes of metadata and tags are taken at once, in memory, and stored together within 50 ms; the end of the run stores
what is left in the same version as its result. Everything here may be used from a thread as well.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anyio

from asgi_realtime.brokers.base import Broker, StreamKey
from asgi_realtime.core.chunks import decode, encode_value
from asgi_realtime.core.config import Limits, Span, parse_span
from asgi_realtime.core.errors import BrokerUnavailable, LimitExceeded, NoCurrentRun, RunNotFound
from asgi_realtime.core.metadata import (
    Append,
    Delete,
    Increment,
    Operation,
    Remove,
    Replace,
    Set,
    apply_operations,
    check_size,
    normalize_value,
)
from asgi_realtime.core.names import check_tags, input_stream
from asgi_realtime.core.run_errors import RunEnded, end_error
from asgi_realtime.core.runs import MetadataChanged, RunChange, RunRecord, TagsAdded
from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.runs.store import RunStore
from asgi_realtime.streams.readers import StreamReader

if TYPE_CHECKING:
    from asgi_realtime.streams.pipe import Pipe

logger = logging.getLogger("asgi_realtime")

COALESCE_S = 0.05
"""How long a change of metadata or tags may wait for others."""

_NOTHING: Any = object()


class ChangeBuffer:
    """Changes of one run that are not stored yet."""

    def __init__(self, run_id: str, *, runs: RunStore, supervisor: Supervisor) -> None:
        self.run_id = run_id
        self.lock = threading.RLock()
        self.storing = anyio.Lock(fast_acquire=True)
        """Changes are stored one after another, so that they keep their order and none comes after the run's end."""
        self.on_stored: Callable[[RunRecord], None] | None = None
        self._runs = runs
        self._supervisor = supervisor
        self._pending: list[RunChange] = []
        self._scheduled = False

    def add(self, change: RunChange) -> None:
        """Take a change; it is stored within `COALESCE_S`."""
        with self.lock:
            self._pending.append(change)
            if self._scheduled:
                return
            self._scheduled = True
        self._supervisor.post_or_call(lambda: self._supervisor.spawn_detached(self._store_soon))

    def pending(self) -> list[RunChange]:
        with self.lock:
            return list(self._pending)

    def take(self) -> list[RunChange]:
        """Take all changes out, to be stored with something else."""
        with self.lock:
            taken, self._pending = self._pending, []
            return taken

    async def _store_soon(self) -> None:
        while True:
            await anyio.sleep(COALESCE_S)
            with self.lock:
                self._scheduled = False
            try:
                await self._store()
                return
            except RunNotFound as exc:
                logger.warning("metadata of run %s is lost: %s", self.run_id, exc)
                return
            except LimitExceeded as exc:
                logger.warning("a change of run %s was refused: %s", self.run_id, exc)
                return
            except BrokerUnavailable as exc:
                logger.warning("metadata of run %s waits: %s", self.run_id, exc)

    async def flush(self) -> None:
        """Store everything now. If that fails the changes stay, to be stored later, and the error is raised.

        Cancelling the caller does not cancel the storing: half-way it could not be said whether it has happened.
        """
        await self._supervisor.shielded(self._store)

    async def _store(self) -> None:
        async with self.storing:
            changes = self.take()
            if not changes:
                return
            try:
                record, refusal = await self._runs.try_change(self.run_id, *changes)
            except BaseException:
                with self.lock:
                    self._pending[:0] = changes
                raise
            if self.on_stored is not None:
                self.on_stored(record)
            if refusal is not None:
                raise refusal


class Metadata:
    """Small JSON data of a run that its subscribers see. Values are what JSON makes of them.

    All operations are sync and take effect in order; increments and appends of several processes add up. Raises
    `UsageError` for a bad key or value and `LimitExceeded` for more than `limits.metadata_bytes`, before any effect.
    """

    def __init__(self, record: RunRecord, buffer: ChangeBuffer, *, limit_bytes: int) -> None:
        self._view = dict(record.metadata)
        self._buffer = buffer
        self._limit_bytes = limit_bytes
        buffer.on_stored = self._stored

    def __repr__(self) -> str:
        return f"<Metadata {self._view!r}>"

    def current(self) -> dict[str, Any]:
        """All metadata, as a copy: what is stored as far as known here, and what waits to be."""
        copied: dict[str, Any] = decode(encode_value(self._view))
        return copied

    def get(self, key: str, default: Any = None) -> Any:
        """The value of one key."""
        return normalize_value(self._view[key]) if key in self._view else default

    def set(self, key: str, value: Any) -> None:
        """Set a key."""
        self._change(Set(key, normalize_value(value)))

    def delete(self, key: str) -> None:
        """Remove a key, if it is there."""
        self._change(Delete(key))

    def append(self, key: str, value: Any) -> None:
        """Add to the end of a list; a missing key becomes a list."""
        self._change(Append(key, normalize_value(value)))

    def remove(self, key: str, value: Any) -> None:
        """Take all equal elements out of a list."""
        self._change(Remove(key, normalize_value(value)))

    def increment(self, key: str, by: float = 1) -> None:
        """Add to a number; a missing key counts from 0."""
        self._change(Increment(key, by))

    def decrement(self, key: str, by: float = 1) -> None:
        """Subtract from a number; a missing key counts from 0."""
        self._change(Increment(key, -by))

    def replace(self, value: dict[str, Any]) -> None:
        """Put other metadata in the place of all that there is."""
        self._change(Replace(normalize_value(value)))

    async def flush(self) -> None:
        """Store everything now. Raises `RunNotFound`, `BrokerUnavailable`; nothing is lost then."""
        await self._buffer.flush()

    def _change(self, operation: Operation) -> None:
        with self._buffer.lock:
            view = apply_operations(self._view, [operation], strict=True)
            check_size(view, self._limit_bytes)
            self._view = view
            self._buffer.add(MetadataChanged((operation,)))

    def _stored(self, record: RunRecord) -> None:
        """Look at the metadata as others left it, with what still waits on top."""
        with self._buffer.lock:
            waiting = [
                op
                for change in self._buffer.pending()
                if isinstance(change, MetadataChanged)
                for op in change.operations
            ]
            self._view = apply_operations(record.metadata, waiting, strict=False)


class Tags:
    """The tags of a run: labels that lists of runs are found by."""

    def __init__(self, record: RunRecord, buffer: ChangeBuffer, *, limits: Limits) -> None:
        self._tags = record.tags
        self._buffer = buffer
        self._limits = limits

    def __repr__(self) -> str:
        return f"<Tags {', '.join(self._tags)}>"

    def __iter__(self) -> Any:
        return iter(self._tags)

    def __contains__(self, tag: object) -> bool:
        return tag in self._tags

    def __len__(self) -> int:
        return len(self._tags)

    def add(self, *tags: str) -> None:
        """Add tags. Raises `UsageError` for a bad one, `LimitExceeded` for too many; sync, stored within 50 ms."""
        with self._buffer.lock:
            merged = check_tags((*self._tags, *tags), self._limits)
            self._tags = merged
            self._buffer.add(TagsAdded(check_tags(tags, self._limits)))


class RelatedRun:
    """A run as seen from another one: the parent or the root of the current run."""

    def __init__(self, record: RunRecord, *, runs: RunStore, supervisor: Supervisor, limits: Limits) -> None:
        self.id = record.id
        self.task = record.task
        self.buffer = ChangeBuffer(record.id, runs=runs, supervisor=supervisor)
        self.metadata = Metadata(record, self.buffer, limit_bytes=limits.metadata_bytes)
        self.tags = Tags(record, self.buffer, limits=limits)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} task={self.task!r}>"


class Run(RelatedRun):
    """The run that the current code executes. `current_run()` gives it anywhere inside."""

    def __init__(
        self,
        record: RunRecord,
        *,
        runs: RunStore,
        supervisor: Supervisor,
        limits: Limits,
        broker: Broker,
        parent: RelatedRun | None = None,
        root: RelatedRun | None = None,
    ) -> None:
        super().__init__(record, runs=runs, supervisor=supervisor, limits=limits)
        self.record = record
        """The run as it was when this process began to execute it."""
        self.parent = parent
        """The run that triggered this one, if any."""
        self.root: RelatedRun = root or self
        """The first run of the chain: this one, if nothing triggered it."""
        self.pipes: set[Pipe[Any]] = set()
        self.canceled = False
        """Somebody asked to cancel this run. Code in a thread may look at it."""
        self.output_json: bytes | None = None
        self._broker = broker
        self._runs = runs
        self._limits = limits
        self._inputs: dict[str, Input] = {}

    def belongs_to(self, runs: RunStore) -> bool:
        """Whether this is a run of that store, and so of that `Realtime`."""
        return self._runs is runs

    @property
    def payload(self) -> Any:
        """The payload, decoded."""
        return self.record.payload

    def set_output(self, output: Any) -> None:
        """Set what the run will end with. Raises `EncodingError`, `LimitExceeded`."""
        self.output_json = encode_output(output, self._limits.output_bytes)

    def input(self, input_id: str) -> Input:
        """Data that the host or a browser sends into this run under this id."""
        found = self._inputs.get(input_id)
        if found is None:
            key = StreamKey(self.id, input_stream(input_id, self._limits))
            found = self._inputs[input_id] = Input(StreamReader(self._broker, self._runs, key))
        return found


class Input:
    """Data sent into a run, in the order of sending; each `get` takes the next."""

    def __init__(self, entries: StreamReader) -> None:
        self._entries = entries
        self._turn = anyio.Lock(fast_acquire=True)

    async def get(self, *, timeout: Span | None = None) -> Any:
        """The next data; waits for it. Raises `TimeoutError`, and `RunEnded` (how it ended) once the run is over."""
        seconds = None if timeout is None else parse_span(timeout, name="timeout")
        try:
            with anyio.fail_after(seconds):
                return await self.__anext__()
        except StopAsyncIteration:
            end = self._entries.end
            assert end is not None
            raise RunEnded("the run is over") if end.reason == "complete" else end_error(end) from None

    def __aiter__(self) -> Input:
        return self

    async def __anext__(self) -> Any:
        async with self._turn:
            return decode((await self._entries.__anext__()).data)


def encode_output(output: Any, limit_bytes: int) -> bytes:
    """An output as JSON. Raises `EncodingError`, `LimitExceeded`."""
    data = encode_value(output)
    if len(data) > limit_bytes:
        raise LimitExceeded(f"the output is {len(data)} bytes, limit {limit_bytes}", status=413)
    return data


current: contextvars.ContextVar[Run] = contextvars.ContextVar("asgi_realtime_run")


def current_run() -> Run:
    """The run that the calling code executes. Raises `NoCurrentRun` outside of one."""
    run = current.get(None)
    if run is None:
        raise NoCurrentRun("there is no current run here: call this inside a task or `open_run`, or pass run=")
    return run
