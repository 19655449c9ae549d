"""Runs as the rest of the library uses them: get, create, update, wait.

An update is a loop around the broker's compare-and-set: apply the changes to the newest record, commit, and after a
conflict apply them to the record that won. Several processes can therefore change one run concurrently and no change is
lost. What a broker can lose is in `restoring.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from itertools import count
from typing import NamedTuple

import msgspec

from asgi_realtime.brokers.base import Broker, ChangeMark
from asgi_realtime.brokers.following import following
from asgi_realtime.core.config import MAX_SPAN_S, Limits, Retention
from asgi_realtime.core.errors import LimitExceeded, RunNotFound, StreamBehind, shown
from asgi_realtime.core.log import StreamKey
from asgi_realtime.core.metadata import check_size
from asgi_realtime.core.run_changes import InputAdded, RunChange, StreamAdded, apply
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import StoredRecord, run_topic
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.retry import Retry
from asgi_realtime.loop.waiting import WaitList
from asgi_realtime.runs.reporter import Reporter
from asgi_realtime.runs.restoring import OwnedRuns, Restorer

_KNOWN_STREAMS = 10_000


class Changed(NamedTuple):
    """A run after an update. `rejected` is the limit that some of the changes would exceed; they were not applied."""

    record: StoredRecord
    rejected: LimitExceeded | None = None


class RunStore:
    """All access to run records, with the broker and the limits behind it. `clock` returns unix seconds.

    Calls retry for `patience_s` while the broker is unavailable, then raise `BrokerUnavailable`.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        clock: Callable[[], float],
        patience_s: float,
        limits: Limits,
        retention: Retention | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self.broker = broker
        self.reporter = reporter or Reporter()
        self._clock = clock
        self.limits = limits
        self.retry = Retry(patience_s, on_failure=self.reporter.broker_failed)
        self.owner = secrets.token_hex(8)
        """Identifies this process as the owner of the runs that it executes and the author of its commits."""
        self.owned = OwnedRuns(lossy=broker.shared, clock=clock, retention=retention or Retention())
        self.restorer = Restorer(broker, self.owned, retry=self.retry, commit=self._commit, reconcile=self.reconcile)
        self._mark_numbers = count()
        self._known_streams: dict[StreamKey, None] = {}
        self.creating: dict[str, WaitList] = {}
        self.on_ended: Callable[[StoredRecord], None] = lambda record: None
        """Called with each terminal record that this process has stored."""
        self.on_stored: Callable[[StoredRecord], None] | None = None
        """Called with each record that this process has stored."""

    def now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _make_mark(self) -> ChangeMark:
        return ChangeMark(self.owner, next(self._mark_numbers))

    # Get

    async def load(self, run_ids: Sequence[str]) -> list[StoredRecord | None]:
        """As `Broker.load`."""
        return await self.broker.load(run_ids)

    async def get(self, run_id: str) -> StoredRecord:
        """The newest record. Waits for a run that this process is creating. Raises `RunNotFound`."""
        if run_id in self.creating:
            await self.wait_created(run_id)
        (record,) = await self.broker.load([run_id])
        if record is None:
            raise _not_found(run_id)
        return record

    # Create

    async def create(self, record: StoredRecord) -> None:
        """Store a new run. Raises `VersionConflict` if its id exists."""
        mark = self._make_mark()
        await self.retry(self.broker.commit, record, expect=0, change=mark)
        self.reporter.run_changed(None, record)
        if self.on_stored is not None:
            self.on_stored(record)

    def expect_creation(self, run_id: str) -> None:
        """This process is about to create the run: `get` waits until `creation_settled`."""
        self.creating.setdefault(run_id, WaitList())

    def creation_settled(self, run_id: str) -> None:
        """The run was created, or will not be."""
        waiting = self.creating.pop(run_id, None)
        if waiting is not None:
            waiting.wake()

    async def wait_created(self, run_id: str) -> None:
        """Wait while this process is creating the run."""
        while (waiting := self.creating.get(run_id)) is not None:
            await waiting.wait()

    # Update

    async def update(
        self, run_id: str, *changes: RunChange, mark: ChangeMark | None = None, known: StoredRecord | None = None
    ) -> StoredRecord:
        """Apply changes to the newest record and store the result as one version; return it.

        A run that is over ignores changes. Raises `RunNotFound`, `InvalidTransition`, and `LimitExceeded` if a change
        would exceed a limit; the other changes are stored then. If they ended the run, the excess is logged instead.
        A repeated call with the same `mark` changes nothing, as long as the mark is among the newest `MARKS_KEPT` of
        the run. `known`, a record that the caller has just loaded, saves a load; if it is outdated, the
        changes still apply to the newest record.
        """
        record, rejected = await self.try_change(run_id, *changes, mark=mark, known=known)
        if rejected is not None:
            if not record.is_completed:
                raise rejected
            logger.warning("a change of run %s was rejected: %s", run_id, rejected)
        return record

    async def try_change(
        self, run_id: str, *changes: RunChange, mark: ChangeMark | None = None, known: StoredRecord | None = None
    ) -> Changed:
        """As `update`, but returns an excess instead of raising it."""
        current = await self._current(run_id) if known is None else (known, known.version)
        while True:
            record, stored_version = current
            owned = self.owned.get(run_id)
            if owned is not None and owned.is_taken_over(record):
                return Changed(record)
            changed = self._apply(record, changes)
            if changed.record is record and stored_version == record.version:
                return changed
            try:
                version = await self._commit(changed.record, expect=stored_version, mark=mark)
            except VersionConflict as conflict:
                current = await self._reconcile(run_id, conflict.current)
            except StreamBehind:
                if not stored_version:
                    await self.restorer.restore_run(run_id)
                await self.restorer.restore_streams(run_id)
                current = await self._current(run_id)
            else:
                if version != changed.record.version:  # the mark is known: an earlier call stored the changes
                    return Changed((await self._current(run_id))[0])
                self.reporter.run_changed(record, changed.record)
                return changed

    async def _commit(self, record: StoredRecord, *, expect: int, mark: ChangeMark | None = None) -> int:
        """As `Broker.commit`, and the commit of an ending run verifies that no acknowledged chunk is missing."""
        owned = self.owned.get(record.id)
        floors = None if owned is None else owned.floors(record)
        version = await self.retry(
            self.broker.commit, record, expect=expect, change=mark or self._make_mark(), floors=floors
        )
        if owned is not None and version == record.version:
            owned.record = record
        if self.on_stored is not None:
            self.on_stored(record)
        if record.is_completed:
            self.on_ended(record)
        return version

    async def _current(self, run_id: str) -> tuple[StoredRecord, int]:
        """The run as this process knows it, and the version that the broker has: 0 if it has lost the run."""
        await self.wait_created(run_id)
        (stored,) = await self.retry(self.broker.load, [run_id])
        return await self._reconcile(run_id, stored)

    async def _reconcile(self, run_id: str, stored: StoredRecord | None) -> tuple[StoredRecord, int]:
        record = await self.reconcile(run_id, stored)
        if record is None:
            raise _not_found(run_id)
        return record, 0 if stored is None else stored.version

    async def reconcile(self, run_id: str, stored: StoredRecord | None) -> StoredRecord | None:
        """As `OwnedRuns.reconcile`, and a lost run is canceled if another run has taken its thread since."""
        record = self.owned.reconcile(run_id, stored)
        if record is None or record.thread is None or stored is not None:
            return record
        if await self.hold_thread(record) != run_id:
            canceled_ms = record.cancel_requested_at_ms or self.now_ms()
            return msgspec.structs.replace(record, cancel_requested_at_ms=canceled_ms)
        return record

    def _apply(self, record: StoredRecord, changes: Sequence[RunChange]) -> Changed:
        """Apply the changes that stay within the limits.

        Each change was within them where it was made, but several processes can change one run concurrently.
        """
        now_ms = self.now_ms()
        following = apply(record, changes, now_ms)
        if _excess(record, following, self.limits) is None:
            return Changed(following)
        accepted: list[RunChange] = []
        present, rejected = record, None
        for change in changes:
            following = apply(present, [change], now_ms)
            excess = _excess(present, following, self.limits)
            if excess is None:
                present = following
                accepted.append(change)
            else:
                rejected = excess
        return Changed(apply(record, accepted, now_ms), rejected)

    async def add_stream(self, key: StreamKey) -> None:
        """Make sure that the run lists the stream or input. Raises `RunNotFound`, `LimitExceeded`."""
        if key in self._known_streams:
            return
        await self.update(key.run, InputAdded(key.name) if key.hidden else StreamAdded(key.name))
        if len(self._known_streams) >= _KNOWN_STREAMS:
            del self._known_streams[next(iter(self._known_streams))]
        self._known_streams[key] = None

    async def hold_thread(self, record: StoredRecord, *, instead_of: str | None = None) -> str:
        """Let the run hold its thread if no other run does, or only `instead_of`. Returns the run that holds it then.

        The claim has no lifetime of its own: it is removed with the run.
        """
        return await self._claim_thread(record, instead_of, ttl_s=MAX_SPAN_S)

    async def release_thread(self, record: StoredRecord) -> None:
        """Let the run, which could not be created, hold its thread no longer."""
        await self._claim_thread(record, record.id, ttl_s=0)

    async def _claim_thread(self, record: StoredRecord, instead_of: str | None, *, ttl_s: float) -> str:
        assert record.thread_claim is not None
        return await self.retry(
            self.broker.claim,
            record.thread_claim,
            record.id,
            ttl_s=ttl_s,
            owner=record.token_owner,
            instead_of=instead_of,
        )

    async def claim(self, key: str, value: str, *, ttl_s: float, owner: str | None = None) -> str:
        """As `Broker.claim`."""
        return await self.retry(self.broker.claim, key, value, ttl_s=ttl_s, owner=owner)

    async def claimed(self, key: str) -> str | None:
        """As `Broker.claimed`."""
        return await self.retry(self.broker.claimed, key)

    # Wait

    async def ended(self, run_id: str) -> StoredRecord:
        """Wait until the run is over and return its last record. Raises `RunNotFound`."""
        record = await self.retry(self.get, run_id)
        if record.is_completed:
            return record
        async with following(self.broker, run_topic(run_id)) as follower:
            while True:
                await follower.changes(None, limit=1)  # raises if the topic cannot be followed any more
                record = await self.retry(self.get, run_id)
                if record.is_completed:
                    return record
                await follower.wait()


def _not_found(run_id: str) -> RunNotFound:
    return RunNotFound(f"no run {shown(run_id)}: it does not exist or has expired (Retention.after_end)")


def _excess(before: StoredRecord, after: StoredRecord, limits: Limits) -> LimitExceeded | None:
    """The limit that an update exceeds. A run that exceeded it before, under other limits, can still shrink."""
    for what, had, has, limit in (
        ("streams", before.streams, after.streams, limits.streams_per_run),
        ("inputs", before.inputs, after.inputs, limits.inputs_per_run),
        ("tags", before.tags, after.tags, limits.tags),
    ):
        if len(has) > limit and len(has) > len(had):
            return LimitExceeded(f"run {after.id!r} would have {len(has)} {what}, limit {limit}")
    if len(after.metadata_json) > len(before.metadata_json):
        try:
            check_size(after.metadata_json, limits.metadata_bytes)
        except LimitExceeded as excess:
            return excess
    return None
