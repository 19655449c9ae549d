"""`Run`: what the code inside a run can do with it, and `current_run()`.

Everything here can be used from a thread as well, except what is async.
"""

from __future__ import annotations

import contextvars
from typing import Any

import anyio

from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.chunks import decode, encode_value
from asgi_realtime.core.config import Span, parse_span
from asgi_realtime.core.errors import LimitExceeded, NoCurrentRun
from asgi_realtime.core.names import input_stream
from asgi_realtime.core.run_errors import RunEnded, end_error
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.engine.changes import ChangeBuffer
from asgi_realtime.engine.metadata import Metadata, Tags
from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.runs.store import RunStore
from asgi_realtime.streams.pipe import Pipe
from asgi_realtime.streams.readers import StreamReader


class Input:
    """Data sent into a run under one id, in the order in which it was sent. Each item goes to one `get`.

    An async iterator as well, which ends with the run.
    """

    def __init__(self, entries: StreamReader) -> None:
        self._entries = entries
        self._reading = anyio.Lock(fast_acquire=True)

    async def get(self, *, timeout: Span | None = None) -> Any:
        """Wait for the next item and return it.

        Raises `TimeoutError`, after which nothing is lost, and once the run has ended `RunEnded`, or the subclass that
        says how it ended.
        """
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
        async with self._reading:
            return decode((await self._entries.__anext__()).data)


class RelatedRun:
    """A run as seen from another one: the parent or the root of the current run."""

    def __init__(self, record: RunRecord, *, runs: RunStore, supervisor: Supervisor) -> None:
        self.id = record.id
        self.task = record.task
        self.buffer = ChangeBuffer(record.id, runs=runs, supervisor=supervisor)
        self.metadata = Metadata(record, self.buffer, limit_bytes=runs.limits.metadata_bytes)
        self.tags = Tags(record, self.buffer, limits=runs.limits)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} task={self.task!r}>"


class Run(RelatedRun):
    """The run that the current code executes. `current_run()` returns it anywhere inside."""

    def __init__(
        self,
        record: RunRecord,
        *,
        runs: RunStore,
        supervisor: Supervisor,
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
        self.pipes: set[Pipe[Any]] = set()
        self.canceled = False
        """Whether the run is to be canceled. Code in a thread can check it; other code is interrupted."""
        self.output_json: bytes | None = None
        self._runs = runs
        self._inputs: dict[str, Input] = {}

    @property
    def payload(self) -> Any:
        """The payload, decoded."""
        return self.record.payload

    def set_output(self, output: Any) -> None:
        """Set the output with which the run will complete. Raises `EncodingError`, `LimitExceeded`."""
        data, limit = encode_value(output), self._runs.limits.output_bytes
        if len(data) > limit:
            raise LimitExceeded(f"the output is {len(data)} bytes, limit {limit}", status=413)
        self.output_json = data

    def input(self, input_id: str) -> Input:
        """The data that the host or a browser sends into this run under this id."""
        found = self._inputs.get(input_id)
        if found is None:
            key = StreamKey(self.id, input_stream(input_id, self._runs.limits))
            found = self._inputs[input_id] = Input(StreamReader(self._runs, key))
        return found


current: contextvars.ContextVar[Run] = contextvars.ContextVar("asgi_realtime_run")


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
