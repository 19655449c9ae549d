"""The runs that changed last, in all processes, for the inspector.

A topic of all runs would cost a write and a message for each change of each run, and a load of the run in each process
that follows it. Instead, each process notes the runs that it changes in memory, and a job writes summaries of them to
the broker a few times a second: two calls at most, whatever the number of runs. The broker retains those of the last
`MAX_RUNS` runs, and of the last `MAX_FAILED` that failed, which the others would push out soon. So at a high rate the
list is a sample: the newest runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anyio
import msgspec

from asgi_realtime.brokers.base import Broker, RunLists
from asgi_realtime.core.errors import RealtimeError
from asgi_realtime.core.runs import Status, StoredRecord
from asgi_realtime.loop.logger import logger

MAX_RUNS = 1000
MAX_FAILED = 200

_SIZES = {"recent": MAX_RUNS, "failed": MAX_FAILED}


class RunSummary(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel", gc=False):
    """What a list shows of a run. Times are in unix milliseconds."""

    id: str
    task: str
    status: Status
    version: int
    created_at_ms: int
    updated_at_ms: int
    started_at_ms: int | None = None
    finished_at_ms: int | None = None
    tags: tuple[str, ...] = ()
    error: str | None = None
    """The class name of the error."""


def summarize(record: StoredRecord) -> RunSummary:
    return RunSummary(
        id=record.id,
        task=record.task,
        status=record.status,
        version=record.version,
        created_at_ms=record.created_at_ms,
        updated_at_ms=record.updated_at_ms,
        started_at_ms=record.started_at_ms,
        finished_at_ms=record.completed_at_ms,
        tags=record.tags,
        error=None if record.error is None else record.error.name,
    )


class RecentRuns:
    """What this process has noted and, if the broker stores lists of runs, what all processes have."""

    def __init__(self, broker: Broker, *, period_s: float) -> None:
        self._stored = broker if broker.shared and isinstance(broker, RunLists) else None
        self._period_s = period_s
        self._noted: dict[str, dict[str, RunSummary]] = {name: {} for name in _SIZES}

    def note(self, record: StoredRecord) -> None:
        """A run has changed."""
        summary = summarize(record)
        self._add("recent", summary)
        if record.is_failed:
            self._add("failed", summary)

    def _add(self, name: str, summary: RunSummary) -> None:
        noted = self._noted[name]
        known = noted.pop(summary.id, summary)
        noted[summary.id] = summary if summary.version >= known.version else known
        if len(noted) > _SIZES[name]:
            del noted[next(iter(noted))]

    async def run(self) -> None:
        """Store what was noted, again and again, until cancelled."""
        while self._stored is not None:
            await anyio.sleep(self._period_s)
            try:
                await self.flush()
            except RealtimeError as exc:  # the ticker warns that the broker is unavailable
                logger.debug("the list of recent runs could not be stored: %s", exc)

    async def flush(self) -> None:
        """Store what was noted. Raises `BrokerUnavailable`, and then keeps it for the next time."""
        if self._stored is None:
            return
        for name, size in _SIZES.items():
            noted = self._noted[name]
            if not noted:
                continue
            self._noted[name] = {}
            try:
                await self._stored.note_runs(name, _encoded(noted), size=size)
            except BaseException:
                for summary in self._noted[name].values():
                    noted[summary.id] = summary
                self._noted[name] = dict(list(noted.items())[-size:])
                raise

    async def newest(self) -> list[RunSummary]:
        """The runs that changed last, newest first. Raises `BrokerUnavailable`."""
        found = [summary for noted in self._noted.values() for summary in noted.values()]
        if self._stored is not None:
            await self.flush()
            stored = [row for name in _SIZES for row in await self._stored.noted_runs(name)]
            found = [msgspec.json.decode(row, type=RunSummary) for row in stored]
        newest = {summary.id: summary for summary in found}
        return sorted(newest.values(), key=lambda summary: (summary.created_at_ms, summary.id), reverse=True)


def _encoded(noted: Mapping[str, RunSummary]) -> Sequence[tuple[str, int, int, bytes]]:
    return [
        (summary.id, summary.updated_at_ms, summary.version, msgspec.json.encode(summary)) for summary in noted.values()
    ]
