"""Runs as the rest of the library uses them: read, create, change.

A change is a loop around the broker's compare-and-set: apply it to the newest record, commit, and on a conflict apply
it again to what the other wrote. So several processes may change one run at once and no change is lost.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from itertools import count

import anyio
import msgspec

from asgi_realtime.brokers.base import Broker, ChangeMark
from asgi_realtime.brokers.following import following
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.config import Limits, Retention
from asgi_realtime.core.errors import BrokerUnavailable, LimitExceeded, RunNotFound, StreamBehind, shown
from asgi_realtime.core.log import StreamKey
from asgi_realtime.core.metadata import check_size
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import InputAdded, RunChange, RunRecord, StreamAdded, apply, run_topic
from asgi_realtime.loop.retry import Retry
from asgi_realtime.loop.waiting import WaitList
from asgi_realtime.runs.restoring import OwnedRuns, Writer

logger = logging.getLogger("asgi_realtime")

_KNOWN_STREAMS = 10_000


class RunStore:
    """All access to run records. `clock` gives unix seconds; an absent broker is waited for `patience_s`."""

    def __init__(
        self,
        broker: Broker,
        *,
        clock: Callable[[], float],
        patience_s: float,
        limits: Limits,
        after_end_s: float = Retention().after_end,
    ) -> None:
        self._broker = broker
        self._clock = clock
        self.retry = Retry(patience_s)
        self._limits = limits
        self.owner = secrets.token_hex(8)
        """This process, as the owner of the runs that it executes and the writer of its commits."""
        self._numbers = count()
        self._known_streams: dict[StreamKey, None] = {}
        self._opening: dict[str, WaitList] = {}
        self.owned = OwnedRuns(lossy=broker.shared, clock=clock, after_end_s=after_end_s)

    def now_ms(self) -> int:
        return int(self._clock() * 1000)

    async def load(self, run_ids: Sequence[str]) -> list[RunRecord | None]:
        """The records, in the order asked; None for those that do not exist."""
        return await self._broker.load(run_ids)

    async def get(self, run_id: str) -> RunRecord:
        """The newest record. Raises `RunNotFound`; a run that this process is about to create is waited for."""
        await self.wait_created(run_id)
        (record,) = await self._broker.load([run_id])
        if record is None:
            raise RunNotFound(f"no run {shown(run_id)}: it never was, or it is past its retention")
        return record

    def expect_creation(self, run_id: str) -> None:
        """The run is about to be created: `get` waits until `creation_settled`."""
        self._opening.setdefault(run_id, WaitList())

    def creation_settled(self, run_id: str) -> None:
        """The run was created, or never will be."""
        opening = self._opening.pop(run_id, None)
        if opening is not None:
            opening.wake()

    async def wait_created(self, run_id: str) -> None:
        """Wait while this process is about to create the run."""
        while (opening := self._opening.get(run_id)) is not None:
            await opening.wait()

    async def create(self, record: RunRecord) -> None:
        """Store a new run. Raises `VersionConflict` if there is one with this id."""
        mark = self._mark()
        await self.retry(self._broker.commit, record, expect=0, change=mark)

    async def update(
        self, run_id: str, *changes: RunChange, mark: ChangeMark | None = None, known: RunRecord | None = None
    ) -> RunRecord:
        """Apply the changes to the newest record and store it, as one version; return the record.

        What is later than the end of the run is absorbed. Raises `RunNotFound`, `InvalidTransition`, and for changes
        that would take the run over a limit `LimitExceeded`, once the others are stored; if those have ended the run
        it is logged instead. With a `mark` of the caller the same call again changes nothing, as long as the mark is
        among the newest `MARKS_KEPT` of the run. `known` is a version that the caller has just loaded or stored, which
        saves a load; if it is outdated, the changes still apply to the newest version.
        """
        record, refusal = await self.try_change(run_id, *changes, mark=mark, known=known)
        if refusal is not None:
            if not record.is_completed:
                raise refusal
            logger.warning("a change of run %s was refused: %s", run_id, refusal)
        return record

    async def try_change(
        self, run_id: str, *changes: RunChange, mark: ChangeMark | None = None, known: RunRecord | None = None
    ) -> tuple[RunRecord, LimitExceeded | None]:
        """As `update`, but returns why a change was left out, if one was."""
        record, stored = await self._newest(run_id) if known is None else (known, known.version)
        while True:
            if self.owned.taken(record):
                return record, None
            following, refusal = self._apply(record, changes)
            if following is record and stored == record.version:
                return record, refusal
            try:
                version = await self._commit(following, expect=stored, mark=mark)
            except VersionConflict as conflict:
                record, stored = await self._newest(run_id, conflict)
            except StreamBehind:
                if not stored:
                    await self.restored(run_id)
                await self.restore_streams(run_id)
                record, stored = await self._newest(run_id)
            else:
                if version != following.version:  # it was stored before
                    return (await self._newest(run_id))[0], None
                return following, refusal

    # What a broker may lose of a run that this process executes

    async def restored(self, run_id: str) -> RunRecord | None:
        """Store again what the broker has lost of a run that executes here; return what is stored then, if anything."""
        (stored,) = await self.retry(self._broker.load, [run_id])
        record = self.owned.restore_candidate(run_id, stored)
        if record is None or record is stored:
            return record
        if stored is not None:
            record = msgspec.structs.replace(record, version=stored.version + 1)
        try:
            await self._commit(record, expect=0 if stored is None else stored.version)
        except VersionConflict as conflict:
            return conflict.current
        return record

    async def _newest(self, run_id: str, conflict: VersionConflict | None = None) -> tuple[RunRecord, int]:
        """What the run is, and the version that is stored: 0 if a run of ours was lost."""
        if conflict is not None:
            stored = conflict.current
        else:
            await self.wait_created(run_id)
            (stored,) = await self.retry(self._broker.load, [run_id])
        record = self.owned.restore_candidate(run_id, stored)
        if record is None:
            raise RunNotFound(f"no run {shown(run_id)}: it never was, or it is past its retention")
        return record, 0 if stored is None else stored.version

    async def restore_streams(self, run_id: str, *writers: Writer) -> None:
        """Have writers, and all of this process if the run is ours, write again what the broker lost of their streams.

        All at once: where several wrote into one stream each may have to wait for the others.
        """
        async with anyio.create_task_group() as group:
            for writer in dict.fromkeys((*writers, *self.owned.writers(run_id))):
                group.start_soon(self._restore, writer)

    async def _restore(self, writer: Writer) -> None:
        try:
            await writer.restore()
        except BrokerUnavailable as exc:
            logger.warning("stream %r of run %s waits to be restored: %s", writer.key.name, writer.key.run, exc)

    def _apply(self, record: RunRecord, changes: Sequence[RunChange]) -> tuple[RunRecord, LimitExceeded | None]:
        """The record after the changes that are within the limits, and why the others are not.

        Each was within them where it was made. But several may change one run, each on what it knew.
        """
        now_ms = self.now_ms()
        following = apply(record, changes, now_ms)
        if _excess(record, following, self._limits) is None:
            return following, None
        present, accepted = record, list[RunChange]()
        refusal = None
        for change in changes:
            following = apply(present, [change], now_ms)
            excess = _excess(present, following, self._limits)
            if excess is None:
                present = following
                accepted.append(change)
            else:
                refusal = excess
        return apply(record, accepted, now_ms), refusal

    async def claim(self, key: str, value: str, *, ttl_s: float) -> str:
        """As `Broker.claim`."""
        return await self.retry(self._broker.claim, key, value, ttl_s=ttl_s)

    async def claimed(self, key: str) -> str | None:
        """As `Broker.claimed`."""
        return await self.retry(self._broker.claimed, key)

    async def _commit(self, record: RunRecord, *, expect: int, mark: ChangeMark | None = None) -> int:
        """Store a version; return its number, or another if the mark says that this was stored before."""
        change = mark or self._mark()
        floors = self.owned.floors(record)
        version = await self.retry(self._broker.commit, record, expect=expect, change=change, floors=floors)
        if version == record.version:
            self.owned.stored(record)
        return version

    def _mark(self) -> ChangeMark:
        return ChangeMark(self.owner, next(self._numbers))

    async def add_stream(self, key: StreamKey) -> None:
        """Make sure that the run lists the stream or input. Raises `RunNotFound`, `LimitExceeded`."""
        if key in self._known_streams:
            return
        await self.update(key.run, InputAdded(key.name) if key.hidden else StreamAdded(key.name))
        if len(self._known_streams) >= _KNOWN_STREAMS:
            del self._known_streams[next(iter(self._known_streams))]
        self._known_streams[key] = None

    async def ended(self, run_id: str) -> RunRecord:
        """Wait until the run is over and return its last record. Raises `RunNotFound`."""
        record = await self.retry(self.get, run_id)
        if record.is_completed:
            return record
        async with following(self._broker, run_topic(run_id)) as follower:
            while True:
                await follower.changes(None, limit=1)  # raises if nothing is heard any more
                record = await self.retry(self.get, run_id)
                if record.is_completed:
                    return record
                await follower.wait()


def _excess(before: RunRecord, after: RunRecord, limits: Limits) -> LimitExceeded | None:
    """The limit that a record has gone over. One that was over it before, under other limits, may still shrink."""
    for what, had, has, limit in (
        ("streams", before.streams, after.streams, limits.streams_per_run),
        ("inputs", before.inputs, after.inputs, limits.inputs_per_run),
        ("tags", before.tags, after.tags, limits.tags),
    ):
        if len(has) > limit and len(has) > len(had):
            return LimitExceeded(f"run {after.id!r} would have {len(has)} {what}, limit {limit}")
    if after.metadata is not before.metadata:
        try:
            check_size(after.metadata, limits.metadata_bytes)
        except LimitExceeded as excess:
            if len(encode_value(after.metadata)) > len(encode_value(before.metadata)):
                return excess
    return None
