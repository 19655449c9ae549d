"""Threads: each has at most one active run, across processes. Such as the answers of one chat.

A thread is a claim of the broker; its value is the run that *holds* the thread. That run is active while it exists and
is not over. So a run frees its thread in the step that ends it, however it ends, and before a reader sees the end.

The claim is taken before the run is created, as in `tasks.launch`, and it passes to another run only if the one that
holds it

* is over;
* was asked to cancel (`replace`);
* does not exist, and never will. A run that is not found can be about to be created, or be lost by the broker and about
  to be restored by the process that executes it. It has `timeouts.find` to appear. Then a CANCELED run is stored under
  its id. A run is created or restored only where none is stored, so exactly one of the two succeeds, and a process that
  was slow finds its run canceled instead of executing a second one.
"""

from __future__ import annotations

from contextlib import suppress

import anyio

from asgi_realtime.brokers.following import following
from asgi_realtime.core.config import Timeouts
from asgi_realtime.core.errors import LimitExceeded, RunNotFound, ThreadBusy
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import Status, StoredRecord, run_topic, thread_claim
from asgi_realtime.engine.executions import Executions
from asgi_realtime.runs.store import RunStore


class RunThreads:
    """Creates runs in their threads."""

    def __init__(self, runs: RunStore, executions: Executions, *, timeouts: Timeouts) -> None:
        self._runs = runs
        self._executions = executions
        self._timeouts = timeouts

    async def active(self, thread: str, token_owner: str | None) -> StoredRecord | None:
        """The active run of a thread."""
        claim = thread_claim(thread, token_owner)
        run_id = await self._runs.claimed(claim)
        found = None if run_id is None else await self._find(run_id)
        return found if _is_active(found, claim) else None

    async def check_free(self, record: StoredRecord) -> None:
        """Raises `ThreadBusy` if another run is active in the thread of a new run. It can become busy right after."""
        if record.thread is not None:
            found = await self.active(record.thread, record.token_owner)
            if found is not None and found.id != record.id:
                raise ThreadBusy(record.thread, found.id)

    async def create(self, record: StoredRecord, *, replace: bool) -> None:
        """Store a new run, as the active one of its thread if it has a thread.

        Another run that is active there is canceled (`replace`), or raises `ThreadBusy`. Raises `VersionConflict` if
        the id exists.
        """
        if record.thread is None:
            await self._runs.create(record)
            return
        await self._hold(record, record.thread, replace=replace)
        try:
            await self._runs.create(record)
        except LimitExceeded:
            await self._runs.release_thread(record)
            raise
        except VersionConflict as conflict:
            holder = await self._runs.claimed(thread_claim(record.thread, record.token_owner))
            if holder in (record.id, None):
                if conflict.current is not None and conflict.current.thread_claim != record.thread_claim:
                    await self._runs.release_thread(record)  # no run with this id would free it
                raise
            raise ThreadBusy(record.thread, holder) from None  # another run took the thread before this one existed

    async def _hold(self, record: StoredRecord, thread: str, *, replace: bool) -> None:
        """Let a run that is yet to be created hold its thread."""
        holder = await self._runs.hold_thread(record)
        if holder != record.id and (found := await self._find(record.id)) is not None:  # it must not replace another
            raise VersionConflict(f"run {record.id!r} exists", current=found)
        while holder != record.id:
            if _is_active(await self._settled(holder, record), record.thread_claim):
                if not replace:
                    raise ThreadBusy(thread, holder)
                with suppress(RunNotFound):
                    await self._executions.cancel(holder)
            holder = await self._runs.hold_thread(record, instead_of=holder)

    async def _settled(self, holder: str, record: StoredRecord) -> StoredRecord | None:
        """The run that holds the thread of `record`, now or once it is created; None if it can no longer be created."""
        found = await self._find(holder)
        if found is not None:
            return found
        with anyio.move_on_after(self._timeouts.find):
            async with following(self._runs.broker, run_topic(holder)) as follower:
                while True:
                    await follower.changes(None, limit=1)
                    if (found := await self._find(holder)) is not None:
                        return found
                    await follower.wait()
        try:
            await self._runs.create(_canceled(holder, record, self._runs.now_ms()))
        except VersionConflict as conflict:
            return conflict.current
        return None

    async def _find(self, run_id: str) -> StoredRecord | None:
        (found,) = await self._runs.retry(self._runs.load, [run_id])
        return found


def _is_active(found: StoredRecord | None, claim: str | None) -> bool:
    """Whether the run that a claim names is active in the thread: it can have its id from another thread."""
    return found is not None and not found.is_completed and found.thread_claim == claim


def _canceled(run_id: str, record: StoredRecord, now_ms: int) -> StoredRecord:
    """A run that prevents the creation of the one with this id, which held the thread of `record`."""
    return StoredRecord(
        id=run_id,
        task=record.task,
        status=Status.CANCELED,
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
        completed_at_ms=now_ms,
        thread=record.thread,
        root_id=run_id,
        token_owner=record.token_owner,
    )
