"""`on_end` functions, which the host passes to be called when a run is over.

That of a task belongs to all processes that have the task. The process whose commit ends the run calls it. The broker
knows that it has to be called (`Broker.due("on_end")`), and the process renews that like a lease. So if it dies before
the function has returned, the ticker of another process takes the run over and calls the function: at least once, and
a second time only after a crash. That of a pipe or of `open_run` exists in the process of its execution only, and is
lost with it.

A process calls `Limits.on_end_calls` functions at a time. The runs that wait for a turn are renewed, too.

A function that raises has been called; trying it again is up to its own code, which knows what is safe to repeat. A
shutdown waits for the calls like for runs. What it has to cancel remains due, for another process.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import anyio

from asgi_realtime.ai.message import assemble, message_id_of
from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.chunks import decode
from asgi_realtime.core.errors import InvalidConfiguration, ServerShutdown
from asgi_realtime.core.names import stream_name
from asgi_realtime.core.run_record import RunRecord
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.loop.failures import cancelled_itself, is_failure
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.loop.thread_calls import ThreadCall
from asgi_realtime.loop.threads import TaskThreads
from asgi_realtime.runs.store import RunStore
from asgi_realtime.streams.readers import StreamReader

ABANDONED_S = 86_400
"""How long the `on_end` of a task that no process has anymore stays due."""


class RunEnd:
    """The end of a run, for an `on_end` function."""

    def __init__(self, run: StoredRecord, *, runs: RunStore) -> None:
        self.run = RunRecord(run)
        """The run, with its final status, output and error."""
        self._runs = runs

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.run.id} {self.run.status}>"

    async def chunks(self, stream: str = "default") -> list[Any]:
        """The decoded chunks of a stream, also of a run that did not complete.

        Raises `StreamGap` if the first ones were trimmed, and `StreamNotFound` if the run completed with other streams
        only.
        """
        key = StreamKey(self.run.id, stream_name(stream, self._runs.limits))
        return [decode(entry.data) async for entry in StreamReader(self._runs, key)]

    async def message(self, stream: str = "default") -> dict[str, Any]:
        """The UI message that the chunks of a stream form: `{"id", "role": "assistant", "parts": [...]}`, as the AI
        SDK's client assembles it.

        If the run did not complete, it is partial, and its unfinished tool calls have the state `output-error`, so that
        it can be part of a history. Raises what `chunks` raises.
        """
        was_cut = not self.run.is_success
        chunks = await self.chunks(stream)
        return assemble(chunks, message_id=message_id_of(self.run.id), is_over=True, was_cut=was_cut)


class SyncRunEnd:
    """As `RunEnd`, for an `on_end` that is a `def` function: its methods block."""

    def __init__(self, end: RunEnd, supervisor: Supervisor) -> None:
        self.run = end.run
        """The run, with its final status, output and error."""
        self._end = end
        self._supervisor = supervisor

    def __repr__(self) -> str:
        return repr(self._end)

    def chunks(self, stream: str = "default") -> list[Any]:
        """As `RunEnd.chunks`."""
        return ThreadCall(self._supervisor, lambda: self._end.chunks(stream)).make()

    def message(self, stream: str = "default") -> dict[str, Any]:
        """As `RunEnd.message`."""
        return ThreadCall(self._supervisor, lambda: self._end.message(stream)).make()


OnEnd = Callable[[Any], object]
"""`async def on_end(end: RunEnd)`, or `def on_end(end: SyncRunEnd)`, which runs in a thread."""


def check_on_end(on_end: OnEnd | None) -> OnEnd | None:
    """Raises `InvalidConfiguration` unless this can be called with one argument."""
    if on_end is None:
        return None
    try:
        inspect.signature(on_end).bind(None)
    except TypeError as exc:
        raise InvalidConfiguration(
            f"on_end is {on_end!r}; allowed is a function that takes one argument, a RunEnd"
        ) from exc
    return on_end


class OnEnds:
    """Calls the `on_end` functions of runs. `supervisor` returns the one that runs, starting it if needed; `on_held` is
    called when this process holds one more run, and `on_called` after each call. `Tasks` sets `of_task`."""

    of_task: Callable[[str], OnEnd | None]
    """The function of a task, if this process has one."""

    def __init__(
        self,
        runs: RunStore,
        *,
        supervisor: Callable[[], Supervisor],
        on_held: Callable[[], None],
        on_called: Callable[[], None],
    ) -> None:
        self._runs = runs
        self._supervisor = supervisor
        self._on_held = on_held
        self._on_called = on_called
        self._threads: TaskThreads | None = None
        self._turns: anyio.Semaphore
        self._calls: dict[str, None] = {}
        self.of_task = lambda task_id: None
        runs.on_ended = self.ended

    @property
    def ids(self) -> list[str]:
        """The runs whose functions are being called. Thread-safe."""
        return list(self._calls)

    def clear(self) -> None:
        """Forget all calls: those of a loop that was abandoned, or of the parent of a forked process."""
        self._calls = {}

    def ended(self, record: StoredRecord) -> None:
        """This process has stored the end of a run: call the `on_end` of its task."""
        on_end = self.of_task(record.task) if record.has_on_end else None
        if on_end is not None:  # otherwise another process will find it due
            self._start(record, on_end, is_due=True)

    def call(self, record: StoredRecord, on_end: OnEnd) -> None:
        """Call a function that only this process has."""
        self._start(record, on_end, is_due=False)

    async def take_over(self, run_id: str) -> None:
        """Call the function of a run that is due: the process that has ended it died, or does not have the task."""
        (record,) = await self._runs.load([run_id])
        if record is None or run_id in self._calls:
            return
        on_end = self.of_task(record.task)
        if on_end is None:
            await self._abandon_if_old(record)
        elif await self._runs.broker.take_on_end(run_id):
            self._start(record, on_end, is_due=True)

    async def _abandon_if_old(self, record: StoredRecord) -> None:
        if self._runs.now_ms() - (record.completed_at_ms or 0) > ABANDONED_S * 1000:
            logger.warning("the on_end of run %s was not called: no process has its task %r", record.id, record.task)
            await self._runs.broker.on_end_called(record.id)

    def _start(self, record: StoredRecord, on_end: OnEnd, *, is_due: bool) -> None:
        try:
            supervisor = self._supervisor()
        except (RuntimeError, ServerShutdown) as exc:
            logger.warning("the on_end of run %s is not called in this process: %s", record.id, exc)
            return
        calls = self._calls
        calls[record.id] = None
        self._on_held()

        async def job() -> None:
            try:
                await self._call(record, on_end, supervisor)
                if is_due:
                    await self._runs.retry(self._runs.broker.on_end_called, record.id)
            finally:
                del calls[record.id]
                self._on_called()

        supervisor.spawn_detached(job)

    async def _call(self, record: StoredRecord, on_end: OnEnd, supervisor: Supervisor) -> None:
        end = RunEnd(record, runs=self._runs)
        try:
            threads, turns = self._prepare(supervisor)
            async with turns:
                if _is_async(on_end):
                    result = on_end(end)
                else:
                    result = await threads.run(lambda: on_end(SyncRunEnd(end, supervisor)))
                if inspect.isawaitable(result):
                    await result
        except BaseException as exc:
            is_cancelled = isinstance(exc, anyio.get_cancelled_exc_class())
            if is_failure(exc) or (is_cancelled and cancelled_itself()):
                self._runs.reporter.on_end_failed(record.id, record.task, exc)
                return
            if is_cancelled:
                self._runs.reporter.on_end_cut(record.id, record.task)
            raise

    def _prepare(self, supervisor: Supervisor) -> tuple[TaskThreads, anyio.Semaphore]:
        """Threads apart from those of tasks, which a shutdown can leave occupied; and the turns of all calls."""
        if self._threads is None or self._threads.supervisor is not supervisor:
            limit = self._runs.limits.on_end_calls
            self._threads, self._turns = TaskThreads(limit, supervisor), anyio.Semaphore(limit)
        return self._threads, self._turns


def _is_async(on_end: OnEnd) -> bool:
    return any(map(inspect.iscoroutinefunction, (on_end, type(on_end).__call__)))
