"""The execution of one run in this process, from its claim to its last commit.

Whatever way the code of the run ends, its pipes are ended first (waited for if it returned, stopped if it did not), so
every chunk that they hold is in the log before the run is over. The last commit carries the result, the changes of
metadata that still waited, and the status.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anyio

from asgi_realtime.core.errors import EncodingError, LimitExceeded, RealtimeError, ServerShutdown, StreamLost, TaskError
from asgi_realtime.core.run_errors import RunCanceled, RunFailed
from asgi_realtime.core.runs import Finished, RunError, RunRecord, Status
from asgi_realtime.engine.run import Run
from asgi_realtime.runs.store import RunStore

if TYPE_CHECKING:
    from asgi_realtime.streams.pipe import Pipe

logger = logging.getLogger("asgi_realtime")

_HIDDEN_MESSAGE = "task failed"
_SHOWN = (TaskError, EncodingError, LimitExceeded, StreamLost)
"""What was written for subscribers, and what is wrong with what the task gave; all else may tell of the inside."""


class Execution:
    """Ends a run, once. Made when the run is EXECUTING and owned by this process."""

    def __init__(self, run: Run, *, runs: RunStore, debug: bool) -> None:
        self.run = run
        self.interrupt: Callable[[], None] | None = None
        """Cancels the code of the run."""
        self.reachable: Callable[[], bool] = lambda: True
        """Whether there is code to cancel; a run may have been left open by a task that is gone."""
        self.stopped_by: RunCanceled | ServerShutdown | None = None
        """Who stopped the run before its end."""
        self._runs = runs
        self._debug = debug
        self.ending = False
        """What comes of the run is settled, though not stored yet."""

    def cancel(self) -> None:
        """Somebody asked to cancel the run. Idempotent."""
        self._stop(RunCanceled("the run was canceled"))

    def shut_down(self) -> None:
        """The server stops. Idempotent."""
        self._stop(ServerShutdown("the server was shut down"))

    def _stop(self, reason: RunCanceled | ServerShutdown) -> None:
        if self.stopped_by is not None or self.ending:
            return
        self.stopped_by = reason
        self.run.canceled = True
        self._stop_pipes(reason)
        if self.interrupt is not None:
            self.interrupt()

    def _stop_pipes(self, reason: RealtimeError) -> None:
        for pipe in tuple(self.run.pipes):
            pipe.stop(reason)

    async def finish_returned(self) -> RunRecord:
        """The code of the run is through: wait for its pipes, then end the run."""
        await self._pipes_settled()
        if self.stopped_by is not None:
            return await self.finish_stopped()
        for pipe in self.run.pipes:
            if (error := pipe.unseen_error) is not None:
                return await self._end(self._failure(error))
        return await self._end(Finished(Status.COMPLETED, output_json=self.run.output_json))

    async def finish_as_pipe(self, pipe: Pipe[Any]) -> RunRecord:
        """The run lives as long as this pipe, which has ended: end it the same way."""
        if self.stopped_by is None and pipe.error is not None:
            return await self.finish_failed(pipe.error)
        return await self.finish_returned()

    async def finish_failed(self, error: BaseException) -> RunRecord:
        """The code of the run failed."""
        return await self._end(self._failure(error))

    async def finish_stopped(self) -> RunRecord:
        """The code of the run was stopped: by `cancel`, by `shut_down`, or by its host."""
        if isinstance(self.stopped_by, ServerShutdown):
            return await self._end(Finished(Status.FAILED, error=RunError("ServerShutdown", str(self.stopped_by))))
        return await self._end(Finished(Status.CANCELED))

    async def finish_timed_out(self, max_duration_s: float) -> RunRecord:
        """The code of the run took longer than it may."""
        message = f"the task took longer than its max_duration of {max_duration_s:g} s"
        return await self._end(Finished(Status.TIMED_OUT, error=RunError("TimedOut", message)))

    def _failure(self, error: BaseException) -> Finished:
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        logger.error("run %s of task %r failed", self.run.id, self.run.task, exc_info=error)
        shown = self._debug or isinstance(error, _SHOWN)
        message = str(error) if shown else _HIDDEN_MESSAGE
        return Finished(Status.FAILED, error=RunError(type(error).__name__, message))

    async def _end(self, result: Finished) -> RunRecord:
        """The last commit. Shielded: a run whose code has ended does not stay open."""
        self.ending = True
        with anyio.CancelScope(shield=True):
            if result.status is not Status.COMPLETED:
                self._stop_pipes(self.stopped_by or _ended_as(result))
            try:
                await self._pipes_settled()
                await self._flush_relatives()
            finally:  # asyncio's own cancellation, of a host that goes away, knows no shield
                record = await self._store(result)
        return record

    async def _store(self, result: Finished) -> RunRecord:
        async with self.run.buffer.storing:
            changes = self.run.buffer.take()
            try:
                return await self._runs.update(self.run.id, *changes, result)
            except StreamLost as exc:  # a stream lacks what was acknowledged, and it cannot be restored
                return await self._runs.update(self.run.id, *changes, self._failure(exc))

    async def _pipes_settled(self) -> None:
        while open_pipes := [pipe for pipe in self.run.pipes if not pipe.done]:  # a source may open another
            for pipe in open_pipes:
                await pipe.settled()

    async def _flush_relatives(self) -> None:
        relatives = {relative.id: relative for relative in (self.run.parent, self.run.root) if relative is not None}
        for relative in relatives.values():
            if relative is not self.run:
                try:
                    await relative.buffer.flush()
                except RealtimeError as exc:
                    logger.warning("metadata of run %s is lost: %s", relative.id, exc)


def _ended_as(result: Finished) -> RealtimeError:
    """What the consumers of a run's pipes are told when the run ends before its sources."""
    if result.status is Status.CANCELED:
        return RunCanceled("the run was canceled")
    return RunFailed(f"the run ended {result.status.lower()}")
