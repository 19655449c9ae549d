"""Changes that other processes make to a run that executes here: they request its cancellation, or end it.

The topic of the run announces each version. The watch knows the versions that this process has stored, so it loads the
record only after a change by another process. While nothing changes it sends no request.
"""

from __future__ import annotations

import logging

import anyio

from asgi_realtime.brokers.following import Follower, following
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.runs import RunRecord, Status, run_topic
from asgi_realtime.engine.execution import Execution
from asgi_realtime.runs.store import RunStore

logger = logging.getLogger("asgi_realtime")

_PAUSE_S = 0.5
"""Pause between attempts to follow the topic while the broker is unavailable."""


class RunWatch:
    """Stops an execution once another process has canceled or ended its run, or removed it."""

    def __init__(self, execution: Execution, *, runs: RunStore) -> None:
        self._execution = execution
        self._runs = runs
        self._run_id = execution.run.id
        self._seen = execution.run.record.version
        self._scope = anyio.CancelScope()
        execution.run.buffer.on_stored.append(self._check)  # the stored record includes what others changed

    def end(self) -> None:
        """Stop watching. Idempotent."""
        self._scope.cancel()

    async def run(self) -> None:
        """Watch until the execution is stopped, or until `end`."""
        with self._scope:
            while True:
                try:
                    async with following(self._runs.broker, run_topic(self._run_id)) as follower:
                        await self._follow(follower)
                    return
                except BrokerUnavailable:
                    pass  # the ticker logs it
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
                newest = self._seen + 1  # the topic was removed, and so was the run
            if newest is not None and await self._is_stopped_by(newest):
                return
            await follower.wait()

    async def _is_stopped_by(self, version: int) -> bool:
        if version != self._seen:
            async with self._execution.run.buffer.storing:
                pass  # the topic can announce our own change before its call returns
        if version != self._seen and not self._execution.is_ending:
            self._check(await self._runs.restorer.restore_run(self._run_id))
        return self._execution.stopped_by is not None

    def _check(self, record: RunRecord | None) -> None:
        """Stop the execution if the record, or the lack of one, requires it."""
        owned = self._runs.owned.get(self._run_id)
        is_taken_over = record is not None and owned is not None and owned.is_taken_over(record)
        if record is not None:
            self._seen = record.version  # lower than before after a data loss
            is_to_stop = record.is_completed or record.cancel_requested_at_ms is not None
            if not is_to_stop and not is_taken_over:
                return
        execution = self._execution
        if execution.is_ending or execution.stopped_by is not None:
            return
        if record is None or record.status is Status.CRASHED:
            logger.warning("run %s was ended elsewhere while it executed here: its lease had expired", self._run_id)
        elif is_taken_over:
            logger.warning("run %s executes elsewhere now: the broker had lost that it executed here", self._run_id)
        execution.cancel()
