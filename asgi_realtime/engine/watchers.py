"""Counts the readers of runs, for `on_unwatched`.

Only runs that ask for it (`StoredRecord.counts_watchers`) are counted. Each process counts its own readers in memory,
and its ticker reports what has changed to the broker, which adds up the counts of all processes. A count is valid for
one lease and is reported again before that, so a process that dies leaves no reader behind. The broker knows when
nobody has watched a run for its grace period (`Broker.due("unwatched")`), and the ticker of any process cancels it
then.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import anyio

from asgi_realtime.core.config import Timeouts
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.runs.store import RunStore

BETWEEN_POLLS_S = 5.0
"""How long a client that polls counts as a reader after a response."""

_REPORTS_PER_LEASE = 3

_AT_ONCE = 16
"""How many runs are reported concurrently: one after another would take seconds with thousands of runs on Redis."""

_LATE_TICKS = 2
"""Added to the grace period: a reader that returns in time is reported at the next tick, and counted by another."""


class Watched:
    """A run with readers in this process."""

    __slots__ = ("has_changed", "readers", "record", "reported_at")

    def __init__(self) -> None:
        self.readers = 0
        self.has_changed = True
        """Since the last report."""
        self.record: StoredRecord | None = None
        """The run as it was at the first report."""
        self.reported_at = -math.inf


class Watchers:
    """The readers of this process, by run. `clock` returns unix seconds."""

    def __init__(self, runs: RunStore, *, clock: Callable[[], float], timeouts: Timeouts) -> None:
        self._runs = runs
        self._clock = clock
        self._period_s = timeouts.lease / _REPORTS_PER_LEASE
        self._late_s = timeouts.tick * _LATE_TICKS
        self._watched: dict[str, Watched] = {}
        self._between_polls: dict[str, deque[float]] = {}  # until when each client counts

    def enter(self, run_id: str) -> None:
        """Count a reader of a run that asks for it."""
        self._change(run_id, 1)

    def leave(self, run_id: str) -> None:
        """Stop counting a reader."""
        self._change(run_id, -1)

    def enter_poll(self, run_id: str) -> None:
        """Count a client that polls, unless it still counts since its last poll."""
        waiting = self._between_polls.get(run_id)
        if waiting:
            waiting.popleft()
        else:
            self.enter(run_id)

    def leave_poll(self, run_id: str) -> None:
        """Stop counting a client if it does not poll again soon."""
        self._between_polls.setdefault(run_id, deque()).append(self._clock() + BETWEEN_POLLS_S)

    def _end_polls(self, now: float) -> None:
        for run_id, waiting in tuple(self._between_polls.items()):
            while waiting and waiting[0] <= now:
                waiting.popleft()
                self.leave(run_id)
            if not waiting:
                del self._between_polls[run_id]

    def clear(self) -> None:
        """Forget all readers: those of a loop that was abandoned, or of the parent of a forked process."""
        self._watched.clear()
        self._between_polls.clear()

    def _change(self, run_id: str, by: int) -> None:
        watched = self._watched.setdefault(run_id, Watched())
        watched.readers = max(0, watched.readers + by)  # not less: readers can leave after `clear`
        watched.has_changed = True

    async def report(self) -> None:
        """Report what has changed, and what was reported too long ago. Called at each tick."""
        now = self._clock()
        self._end_polls(now)
        due = {
            run_id: watched
            for run_id, watched in self._watched.items()
            if watched.has_changed or not 0 <= now - watched.reported_at < self._period_s
        }
        waiting, failures = list(due.items()), list[Exception]()

        async def report_next() -> None:
            while waiting and not failures:
                run_id, watched = waiting.pop()
                try:
                    await self._report(run_id, watched)
                    watched.reported_at = now
                except Exception as exc:
                    failures.append(exc)

        async with anyio.create_task_group() as group:
            for _ in range(min(_AT_ONCE, len(due))):
                group.start_soon(report_next)
        for run_id, watched in due.items():
            if not (watched.readers or watched.has_changed):
                self._watched.pop(run_id, None)
        if failures:
            raise failures[0]

    async def _report(self, run_id: str, watched: Watched) -> None:
        if watched.record is None:
            (watched.record,) = await self._runs.load([run_id])
        record = watched.record
        if record is None or not record.counts_watchers:
            watched.has_changed = False
            return
        grace_s = None if record.unwatched_grace_s is None else record.unwatched_grace_s + self._late_s
        watched.has_changed, readers = False, watched.readers
        try:
            await self._runs.broker.watch(run_id, process=self._runs.owner, readers=readers, grace_s=grace_s)
        except BaseException:
            watched.has_changed = True
            raise
