"""Changes of a run's metadata and tags that wait to be stored.

Changes take effect in memory at once and are stored together, at most 50 ms later, by one background job. The end of
the run stores whatever still waits in the same version as the result. Changes can come from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import anyio

from asgi_realtime.core.errors import BrokerUnavailable, LimitExceeded, RunNotFound
from asgi_realtime.core.run_changes import RunChange
from asgi_realtime.core.run_errors import RunEnded
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.runs.store import RunStore

COALESCE_S = 0.05
"""How long a change of metadata or tags waits for others."""


class ChangeBuffer:
    """The changes of one run that are not stored yet."""

    def __init__(self, run_id: str, *, runs: RunStore, supervisor: Supervisor) -> None:
        self.run_id = run_id
        self.lock = threading.RLock()
        self.storing = anyio.Lock(fast_acquire=True)
        """Held while changes are stored, so that they keep their order and none follows the end of the run."""
        self.on_stored: list[Callable[[StoredRecord], None]] = []
        """Called with each record that results from storing changes; changes of other processes are part of it."""
        self._runs = runs
        self._supervisor = supervisor
        self._pending: list[RunChange] = []
        self._has_job = False
        self._closed = False
        self._has_warned = False

    def add(self, change: RunChange) -> None:
        """Add a change, to be stored within `COALESCE_S`. Thread-safe. Raises `RunEnded`."""
        with self.lock:
            self.check_open("its metadata and tags")
            self._pending.append(change)
            if self._has_job:
                return
            self._has_job = True
        self._supervisor.post_or_call(lambda: self._supervisor.spawn_detached(self._store_in_background))

    def pending(self) -> list[RunChange]:
        """The changes that wait, as a copy."""
        with self.lock:
            return list(self._pending)

    def take(self) -> list[RunChange]:
        """Remove and return all changes, to be stored together with something else."""
        with self.lock:
            taken, self._pending = self._pending, []
            return taken

    def close(self) -> list[RunChange]:
        """As `take`, for the commit that ends the run: later changes would be lost, so they raise `RunEnded`."""
        with self.lock:
            self._closed = True
            return self.take()

    def check_open(self, what: str) -> None:
        """Raise `RunEnded` if this process has ended the run."""
        if self._closed:
            raise RunEnded(f"run {self.run_id!r} is over; {what} can no longer change")

    async def flush(self) -> None:
        """Store all changes now. If that fails they stay pending, and the error is raised.

        Cancelling the caller does not cancel the call: interrupted, it would be unknown whether it took effect.
        """
        await self._supervisor.shielded(self._store)

    async def _store_in_background(self) -> None:
        """The only background job of this buffer. It ends when no changes wait."""
        unavailable = False
        try:
            while self._continues():
                await anyio.sleep(COALESCE_S)
                try:
                    await self._store()
                    unavailable = False
                except LimitExceeded as exc:
                    logger.warning("a change of run %s was refused: %s", self.run_id, exc)
                except BrokerUnavailable as exc:
                    if not unavailable:
                        logger.warning("metadata of run %s is not stored yet: %s", self.run_id, exc)
                    unavailable = True
        except BaseException as exc:
            with self.lock:
                self._has_job = False
            if not isinstance(exc, RunNotFound):
                raise
            logger.warning("metadata of run %s is lost: %s", self.run_id, exc)

    def _continues(self) -> bool:
        """Whether changes wait. If none do the job ends, and the next change starts another, in one step."""
        with self.lock:
            self._has_job = bool(self._pending)
            return self._has_job

    async def _store(self) -> None:
        async with self.storing:
            changes = self.take()
            if not changes:
                return
            try:
                record, rejected = await self._runs.try_change(self.run_id, *changes)
            except BaseException:
                with self.lock:
                    self._pending[:0] = changes
                raise
            if record.is_completed:
                self._warn_lost(record)
            for notify in self.on_stored:
                notify(record)
            if rejected is not None:
                raise rejected

    def _warn_lost(self, record: StoredRecord) -> None:
        """Log, once, that changes came after the end of a run that another execution or process ended.

        A run can outlive its parent, so a change of the parent does not raise.
        """
        if not self._has_warned:
            logger.warning("changes of metadata or tags of run %s are lost: it is %s", self.run_id, record.status)
        self._has_warned = True
