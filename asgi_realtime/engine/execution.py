"""The execution of one run in this process, and how it ends.

An execution is created when its run is EXECUTING and owned by this process. It moves through four phases:

* RUNNING: the code of the run executes, and its pipes forward their sources;
* STOPPING: `cancel` or `shut_down` was called. `stopped_by` is the reason, the pipes are stopped with it, and the code
  is interrupted. Code can delay this (a thread, a shielded block), but its result no longer counts;
* ENDING: the result is fixed. The pipes write the chunks they hold, then the last commit is on its way;
* ENDED: the last commit is stored.

The `finish_*` methods end the run; which one applies depends on how its code ended. They first wait for the pipes (if
the code returned) or stop them (if it did not), so every chunk is in the log before the run is over. The last commit
then carries the result, the metadata and tags that were not stored yet, and the status, in one version.

A run ends once. Ending it again is harmless: that happens if the commit failed or was interrupted, or if a shutdown
ends a run while its own code does. The first stored result wins, because nothing follows a terminal status.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import anyio

from asgi_realtime.core.errors import EncodingError, LimitExceeded, RealtimeError, ServerShutdown, StreamLost, TaskError
from asgi_realtime.core.run_changes import Finished
from asgi_realtime.core.run_errors import RunCanceled, RunFailed
from asgi_realtime.core.runs import RunError, Status, StoredRecord
from asgi_realtime.engine.run import Run
from asgi_realtime.loop.logger import logger
from asgi_realtime.runs.store import RunStore
from asgi_realtime.streams.pipe import Pipe

_HIDDEN_MESSAGE = "task failed"
_SHOWN = (TaskError, EncodingError, LimitExceeded, StreamLost)
"""Errors written for subscribers, and errors about the task's own data. Messages of others can reveal internals."""


class Phase(Enum):
    """Where an execution is."""

    RUNNING = "running"
    STOPPING = "stopping"
    ENDING = "ending"
    ENDED = "ended"


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.RUNNING: frozenset({Phase.STOPPING, Phase.ENDING}),
    Phase.STOPPING: frozenset({Phase.ENDING}),
    Phase.ENDING: frozenset({Phase.ENDED}),
    Phase.ENDED: frozenset(),
}


class Execution:
    """Stops and ends a run. `debug` shows subscribers the messages of all exceptions."""

    def __init__(self, run: Run, *, runs: RunStore, debug: bool) -> None:
        self.run = run
        self.phase = Phase.RUNNING
        self.interrupt: Callable[[], None] | None = None
        """Cancels the code of the run; None before it starts and after it has ended."""
        self.reachable: Callable[[], bool] = lambda: True
        """Whether `interrupt` has an effect: not if the task that opened the run ended without leaving it."""
        self.stopped_by: RunCanceled | ServerShutdown | None = None
        self.ended: StoredRecord | None = None
        """The last record, once it is stored."""
        self.on_ended: Callable[[StoredRecord], None] | None = None
        """Called once with the terminal record, whichever process stored it."""
        self._runs = runs
        self._debug = debug

    @property
    def is_ending(self) -> bool:
        """The result of the run is fixed, though possibly not stored."""
        return self.phase in (Phase.ENDING, Phase.ENDED)

    def _enter(self, phase: Phase) -> bool:
        """Move to a phase if the table allows it; return whether it does."""
        allowed = phase in TRANSITIONS[self.phase]
        if allowed:
            self.phase = phase
        return allowed

    # Stop

    def cancel(self) -> None:
        """Stop the run because a client or the host canceled it. Idempotent."""
        self._stop(RunCanceled("the run was canceled"))

    def shut_down(self) -> None:
        """Stop the run because the server shuts down. Idempotent."""
        self._stop(ServerShutdown())

    def _stop(self, reason: RunCanceled | ServerShutdown) -> None:
        if not self._enter(Phase.STOPPING):
            return
        self.stopped_by = reason
        self.run.canceled = True
        self._stop_pipes(reason)
        if self.interrupt is not None:
            self.interrupt()

    def _stop_pipes(self, reason: RealtimeError) -> None:
        for pipe in tuple(self.run.pipes):
            pipe.stop(reason)

    # End

    async def finish_returned(self) -> StoredRecord:
        """End a run after its code returned, once its pipes are done."""
        await self._pipes_settled()
        if self.stopped_by is not None:
            return await self.finish_stopped()
        for pipe in self.run.pipes:
            if (error := pipe.unseen_error) is not None:
                return await self._end(self._failure(error))
        return await self._end(Finished(Status.COMPLETED, output_json=self.run.output_json))

    async def finish_as_pipe(self, pipe: Pipe[Any]) -> StoredRecord:
        """End a run that consists of this pipe, the way the pipe ended."""
        if self.stopped_by is None and pipe.error is not None:
            return await self.finish_failed(pipe.error)
        return await self.finish_returned()

    async def finish_failed(self, error: BaseException) -> StoredRecord:
        """End a run after its code raised an error."""
        return await self._end(self._failure(error))

    async def finish_stopped(self) -> StoredRecord:
        """End a run after its code was stopped: by `cancel`, `shut_down`, or a cancellation by the host."""
        if isinstance(self.stopped_by, ServerShutdown):
            return await self._end(Finished(Status.FAILED, error=RunError("ServerShutdown", str(self.stopped_by))))
        return await self._end(Finished(Status.CANCELED))

    async def finish_timed_out(self, max_duration_s: float) -> StoredRecord:
        """End a run after its code exceeded its `max_duration`."""
        message = f"the task took longer than its max_duration of {max_duration_s:g} s"
        return await self._end(Finished(Status.TIMED_OUT, error=RunError("TimedOut", message)))

    def _failure(self, error: BaseException) -> Finished:
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        self._runs.reporter.run_raised(self.run.id, self.run.task, error)
        self.run.span.record_error(error)
        message = str(error) if self._debug or isinstance(error, _SHOWN) else _HIDDEN_MESSAGE
        return Finished(Status.FAILED, error=RunError(type(error).__name__, message))

    async def _end(self, result: Finished) -> StoredRecord:
        """Write what the pipes hold, then store the result. Cancelling the caller does not interrupt this: the run
        must not stay open after its code has ended."""
        self._enter(Phase.ENDING)
        with anyio.CancelScope(shield=True):
            if result.status is not Status.COMPLETED:
                self._stop_pipes(self.stopped_by or _pipe_error(result))
            try:
                await self._pipes_settled()
                await self._flush_relatives()
            finally:  # asyncio's native cancellation, by a host that exits, ignores the shield
                self.ended = record = await self._store(result)
                self._enter(Phase.ENDED)
                on_ended, self.on_ended = self.on_ended, None
                if on_ended is not None:
                    on_ended(record)
        return record

    async def _store(self, result: Finished) -> StoredRecord:
        # Not based on the record that this process stored last, although that would save a load: after a data loss
        # of the broker another process can execute the run, and its record can have the same version.
        async with self.run.buffer.storing:
            changes = self.run.buffer.close()
            try:
                return await self._runs.update(self.run.id, *changes, result)
            except StreamLost as exc:  # a stream lacks acknowledged chunks that cannot be restored
                return await self._runs.update(self.run.id, *changes, self._failure(exc))

    async def _pipes_settled(self) -> None:
        while open_pipes := [pipe for pipe in self.run.pipes if not pipe.done]:  # a source can open another pipe
            for pipe in open_pipes:
                await pipe.settled()

    async def _flush_relatives(self) -> None:
        """Store what the run changed of its parent's and its root's metadata."""
        relatives = {relative.id: relative for relative in (self.run.parent, self.run.root) if relative is not None}
        for relative in relatives.values():
            if relative is not self.run:
                try:
                    await relative.buffer.flush()
                except RealtimeError as exc:
                    logger.warning("metadata of run %s is lost: %s", relative.id, exc)


def _pipe_error(result: Finished) -> RealtimeError:
    """The error that consumers of a pipe see if its run ends before its source."""
    if result.status is Status.CANCELED:
        return RunCanceled("the run was canceled")
    return RunFailed(f"the run ended {result.status.lower()}")
