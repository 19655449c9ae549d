"""Handing QUEUED runs to the executor, and failing runs that will never start.

A run is stored before it is dispatched, and it stays due (`Broker.due("enqueue")`) until the broker knows that an
executor has it. So a crash or a refusal between the two steps only delays the run: the ticker of some process
dispatches it again. Dispatching a run twice is harmless, because executing begins with the change from QUEUED to
EXECUTING, which succeeds once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio

from asgi_realtime.core.config import Timeouts
from asgi_realtime.core.errors import BrokerUnavailable, InvalidTransition, LimitExceeded, RunNotFound, UsageError
from asgi_realtime.core.run_changes import Finished
from asgi_realtime.core.runs import RunError, Status, StoredRecord
from asgi_realtime.engine.executor import AttachedExecutor, Executor, InProcessExecutor
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.waiting import at_most
from asgi_realtime.runs.store import RunStore


class Dispatcher:
    """Dispatches runs to `executor`. `on_held` is called when this process holds one more run.

    `Tasks` sets `executor`, and `in_process`, which is the executor unless the host has passed another.
    """

    executor: Executor
    in_process: InProcessExecutor

    def __init__(self, runs: RunStore, *, timeouts: Timeouts, on_held: Callable[[], None]) -> None:
        self._runs = runs
        self._timeouts = timeouts
        self._on_held = on_held
        self._refused = False
        """The executor refused the newest run, and the log says so."""
        self._to_fail: deque[str] = deque()

    def accepts(self, task_id: str) -> bool:
        """Whether the executor can execute runs of this task. A queue's executor accepts every task."""
        return self.executor is not self.in_process or self.in_process.knows(task_id)

    async def dispatch(self, record: StoredRecord) -> bool:
        """Hand a QUEUED run to the executor; return False if the executor cannot accept it now.

        In that case the run stays QUEUED and due, and the ticker of any process retries. Raises `UsageError` if the
        executor will never accept the run, which is then FAILED. `LimitExceeded` counts as temporary.
        """
        try:
            await self._enqueue(record)
        except Exception as exc:  # an executor is foreign code: it can raise anything
            if isinstance(exc, UsageError) and not isinstance(exc, LimitExceeded):
                await self.fail_unstarted(record.id, RunError("NotQueued", "the executor does not accept the run"))
                raise
            if not self._refused:
                logger.warning("the executor does not accept runs; the ticker retries", exc_info=True)
            self._refused = True
            return False
        self._refused = False
        return True

    async def _enqueue(self, record: StoredRecord) -> None:
        if self.executor is self.in_process:
            await self.in_process.enqueue(record.id, record.task, owner=record.token_owner)
            self._on_held()
            return
        limit_s = self._timeouts.append
        with at_most(limit_s, lambda: f"the executor did not accept run {record.id} within {limit_s:g} s"):
            await self.executor.enqueue(record.id, record.task)
        try:
            await self._runs.broker.enqueued(record.id)
        except BrokerUnavailable as exc:
            logger.info("run %s is in the queue and will be enqueued again: %s", record.id, exc)

    async def fail_unstarted(self, run_id: str, error: RunError) -> None:
        """Fail a run, unless it has started in the meantime."""
        try:
            await self._runs.update(run_id, Finished(Status.FAILED, error=error))
        except (InvalidTransition, RunNotFound, BrokerUnavailable) as exc:
            logger.info("run %s could not be failed: %s", run_id, exc)

    async def fail_waiting(self) -> None:
        """Fail the runs that wait in this process, because the server is shutting down.

        If the call is cancelled, the next one continues.
        """
        self._to_fail.extend(self.in_process.take_waiting())
        while self._to_fail:
            await self.fail_unstarted(self._to_fail[0], RunError("ServerShutdown", "the server was shut down"))
            self._to_fail.popleft()

    # Life

    def restart(self) -> None:
        """A new start begins, possibly on another event loop: start the runs that wait in this process."""
        self._to_fail.clear()
        self.in_process.restart()

    def forget(self) -> None:
        """This is a forked child: every run belongs to the parent."""
        self._to_fail.clear()
        self.in_process.forget()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start and stop an executor that is attached to this `Realtime`. Raises what its `start` raises."""
        executor = self.executor
        if not isinstance(executor, AttachedExecutor):
            yield
            return
        await executor.start()
        try:
            yield
        finally:
            with anyio.move_on_after(self._timeouts.close, shield=True):
                try:
                    await executor.stop()
                except Exception:
                    logger.exception("the executor could not be stopped")
