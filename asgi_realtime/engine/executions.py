"""The runs that this process executes now.

An execution is registered once its run is EXECUTING and owned by this process, and removed once the run has ended.
While it is registered this process renews the lease of its run, restores what a broker loses of it, and shuts it down
when the server stops.

Other processes change runs too: they request the cancellation of a run, or end it. The topic of the run announces each
version. A watch knows the versions that this process has stored, so it loads the record only after a change by another
process. While nothing changes it sends no request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import anyio
import anyio.lowlevel

from asgi_realtime.brokers.following import Follower, following
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.run_changes import CancelRequested
from asgi_realtime.core.runs import Status, StoredRecord, run_topic
from asgi_realtime.engine.execution import Execution
from asgi_realtime.engine.run import RelatedRun, Run
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.loop.waiting import WaitList
from asgi_realtime.runs.handles import MakeHandle
from asgi_realtime.runs.store import RunStore

_PAUSE_S = 0.5
"""Pause between attempts to follow a topic while the broker is unavailable."""


_STARTED_AT_ONCE = 16
"""How many watches start in one iteration of the event loop."""


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
            # A topic without the run, or a wake-up without a change: the run was removed.
            newest = max((change.version for change in changes.items), default=self._seen + 1)
            if await self._is_stopped_by(newest):
                return
            await follower.wait()

    async def _is_stopped_by(self, version: int) -> bool:
        if version != self._seen:
            async with self._execution.run.buffer.storing:
                pass  # the topic can announce our own change before its call returns
        if version != self._seen and not self._execution.is_ending:
            self._check(await self._runs.restorer.restore_run(self._run_id))
        return self._execution.stopped_by is not None

    def _check(self, record: StoredRecord | None) -> None:
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


class Executions(Mapping[str, Execution]):
    """Executions by run id. `supervisor` returns the one that runs, starting it if needed; `on_held` is called when
    this process holds one more run; `handle` creates the handle of a run."""

    def __init__(
        self,
        runs: RunStore,
        *,
        debug: bool,
        supervisor: Callable[[], Supervisor],
        on_held: Callable[[], None],
        handle: MakeHandle,
    ) -> None:
        self.changed = WaitList()
        """Woken when an execution starts or ends."""
        self._runs = runs
        self._debug = debug
        self._supervisor = supervisor
        self._on_held = on_held
        self._handle = handle
        self._by_id: dict[str, Execution] = {}
        self._watches: dict[Execution, RunWatch] = {}

    def __getitem__(self, run_id: str) -> Execution:
        return self._by_id[run_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def ids(self) -> list[str]:
        """The ids of the runs. Thread-safe: the copy is made in one step."""
        return list(self._by_id)

    async def start(self, record: StoredRecord, *, handle_owner: str | None = None) -> Execution:
        """Register the execution of a run that is EXECUTING and owned by this process. See `Run.handle_owner`."""
        supervisor = self._supervisor()
        related = await self._related(record, supervisor)
        run = Run(
            record,
            runs=self._runs,
            supervisor=supervisor,
            handle=self._handle,
            handle_owner=handle_owner,
            parent=related.get(record.parent_id or ""),
            root=related.get(record.root_id or ""),
        )
        execution = self._by_id[record.id] = Execution(run, runs=self._runs, debug=self._debug)
        self._runs.owned.own(record)
        self._on_held()
        self.changed.wake()
        return execution

    async def _related(self, record: StoredRecord, supervisor: Supervisor) -> dict[str, RelatedRun]:
        """The parent and the root of a run, as far as they exist.

        The run is EXECUTING already, so a load that fails is retried: otherwise nothing would execute the run.
        """
        ids = {run_id for run_id in (record.parent_id, record.root_id) if run_id is not None and run_id != record.id}
        if not ids:
            return {}
        return {
            found.id: RelatedRun(found, runs=self._runs, supervisor=supervisor)
            for found in await self._runs.retry(self._runs.load, sorted(ids))
            if found is not None
        }

    async def watch(self) -> None:
        """Watch each execution for changes that other processes make to its run.

        The ticker calls this, so an execution that is shorter than a tick costs no watch. Starting a thousand at once
        would hold the event loop for 20 ms, so others run in between.
        """
        new = [execution for execution in self._by_id.values() if execution not in self._watches]
        for number, execution in enumerate(new, 1):
            if self._by_id.get(execution.run.id) is execution:
                watch = self._watches[execution] = RunWatch(execution, runs=self._runs)
                self._supervisor().spawn_brief(watch.run)
            if number % _STARTED_AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()

    def remove(self, execution: Execution) -> None:
        """Remove an execution whose run has ended. Idempotent."""
        run_id = execution.run.id
        if self._by_id.get(run_id) is execution:
            del self._by_id[run_id]
            self._runs.owned.disown(run_id)
        execution.run.span.end(execution.ended)
        watch = self._watches.pop(execution, None)
        if watch is not None:
            watch.end()
        self.changed.wake()

    async def cancel(self, run_id: str) -> StoredRecord:
        """Request that a run is canceled, and stop its execution if it has one. Raises `RunNotFound`."""
        record = await self._runs.update(run_id, CancelRequested())
        execution = self._by_id.get(run_id)
        if execution is not None and not record.is_completed:
            execution.cancel()
        return record

    async def shut_down(self) -> None:
        """Stop the code of every execution. A run that has no code to stop is ended here."""
        for execution in tuple(self._by_id.values()):
            execution.shut_down()
            if not execution.reachable():
                await execution.finish_stopped()
                self.remove(execution)

    def clear(self) -> None:
        """Forget all executions: those of a loop that was abandoned, or of the parent of a forked process."""
        self._by_id.clear()
        self._watches.clear()
        self.changed = WaitList()
