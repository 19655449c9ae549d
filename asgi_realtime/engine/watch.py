"""What other processes do to a run that executes here: they ask to cancel it, or end it.

The topic of the run tells of each version. Those that this process has stored itself are known, so only what others
did is looked at, and nothing is asked while nothing happens.
"""

from __future__ import annotations

import logging

import anyio

from asgi_realtime.brokers.base import Broker
from asgi_realtime.brokers.following import Follower, following
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.runs import RunRecord, Status, run_topic
from asgi_realtime.engine.execution import Execution
from asgi_realtime.runs.store import RunStore

logger = logging.getLogger("asgi_realtime")

_PAUSE_S = 0.5
"""Between two tries to follow, while the broker is away."""


class RunWatch:
    """Stops an execution once another process has canceled or ended its run, or removed it."""

    def __init__(self, execution: Execution, *, broker: Broker, runs: RunStore) -> None:
        self._execution = execution
        self._broker = broker
        self._runs = runs
        self._run_id = execution.run.id
        self._seen = execution.run.record.version
        self._scope = anyio.CancelScope()
        execution.run.buffer.on_stored.append(self._check)  # the stored record has the changes of others as well

    def end(self) -> None:
        """The execution is over. Idempotent."""
        self._scope.cancel()

    async def run(self) -> None:
        """The job: until the execution is stopped, or `end`."""
        with self._scope:
            while True:
                try:
                    async with following(self._broker, run_topic(self._run_id)) as follower:
                        await self._follow(follower)
                    return
                except BrokerUnavailable:
                    pass  # the ticker says so
                except Exception:
                    logger.exception("run %s cannot be followed", self._run_id)
                await anyio.sleep(_PAUSE_S)

    async def _follow(self, follower: Follower) -> None:
        cursor = None
        while True:
            changes = await follower.changes(cursor)
            cursor = changes.cursor
            newest = max((change.version for change in changes.items), default=None)
            if newest is None and changes.snapshot:
                newest = self._seen + 1  # the topic is gone, and with it the run
            if newest is not None and await self._is_stopped_by(newest):
                return
            await follower.wait()

    async def _is_stopped_by(self, version: int) -> bool:
        if version != self._seen:
            async with self._execution.run.buffer.storing:
                pass  # the news of a change of our own may come before its answer
        if version != self._seen and not self._execution.is_ending:
            self._check(await self._runs.restorer.restore_run(self._run_id))
        return self._execution.stopped_by is not None

    def _check(self, record: RunRecord | None) -> None:
        if record is not None:
            self._seen = record.version  # which is lower than before if the broker has lost something
            asked = record.is_completed or record.cancel_requested_at_ms is not None
            if not asked and not self._runs.owned.is_taken_over(record):
                return
        execution = self._execution
        if execution.is_ending or execution.stopped_by is not None:
            return
        if record is None or record.status is Status.CRASHED:
            logger.warning("run %s was given up while it ran here: its lease was over", self._run_id)
        elif self._runs.owned.is_taken_over(record):
            logger.warning("run %s is executed elsewhere now: the broker had lost that it ran here", self._run_id)
        execution.cancel()
