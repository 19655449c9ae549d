"""Runs as the rest of the library uses them: read, create, change.

A change is a loop around the broker's compare-and-set: apply it to the newest record, commit, and on a conflict apply
it again to what the other wrote. So several processes may change one run at once and no change is lost.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Protocol, TypeVar

import anyio
import msgspec

from asgi_realtime.brokers.base import Broker, ChangeMark
from asgi_realtime.config import Limits
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.log import StreamKey
from asgi_realtime.core.metadata import check_size
from asgi_realtime.core.runs import InputAdded, RunChange, RunRecord, StreamAdded, apply, run_topic
from asgi_realtime.errors import (
    BrokerUnavailable,
    LimitExceeded,
    RealtimeError,
    RunNotFound,
    StreamBehind,
    StreamLost,
    VersionConflict,
    shown,
)
from asgi_realtime.supervisor import logger
from asgi_realtime.waiting import Parking, make_parker

_R = TypeVar("_R")

_KNOWN_STREAMS = 10_000


class Writer(Protocol):
    """A writer of this process, as the owner of its run sees it."""

    key: StreamKey
    last_index: int | None
    failure: RealtimeError | None

    async def restore(self) -> None:
        """Write again what the broker has lost, or set `failure`. Raises `BrokerUnavailable`."""


class _Owned:
    """A run that this process executes: its newest record, and who writes to its streams here."""

    __slots__ = ("record", "writers")

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.writers: dict[Writer, None] = {}


class RunStore:
    """All access to run records. `clock` gives unix seconds; an absent broker is waited for `patience_s`."""

    def __init__(self, broker: Broker, *, clock: Callable[[], float], patience_s: float, limits: Limits) -> None:
        self._broker = broker
        self._clock = clock
        self._patience_s = patience_s
        self._limits = limits
        self.owner = secrets.token_hex(8)
        """This process, as the owner of the runs that it executes and the writer of its commits."""
        self._numbers = count()
        self._known_streams: dict[StreamKey, None] = {}
        self._opening: dict[str, Parking] = {}
        self._owned: dict[str, _Owned] = {}

    def now_ms(self) -> int:
        return int(self._clock() * 1000)

    async def load(self, run_ids: Sequence[str]) -> list[RunRecord | None]:
        """The records, in the order asked; None for those that do not exist."""
        return await self._broker.load(run_ids)

    async def get(self, run_id: str) -> RunRecord:
        """The newest record. Raises `RunNotFound`; a run that this process is about to create is waited for."""
        await self.present(run_id)
        (record,) = await self._broker.load([run_id])
        if record is None:
            raise RunNotFound(f"no run {shown(run_id)}: it never was, or it is past its retention")
        return record

    def announce(self, run_id: str) -> None:
        """The run is about to be created: `get` waits until `opened`."""
        self._opening.setdefault(run_id, Parking())

    def opened(self, run_id: str) -> None:
        """The run was created, or never will be."""
        opening = self._opening.pop(run_id, None)
        if opening is not None:
            opening.wake()

    async def present(self, run_id: str) -> None:
        """Wait while this process is about to create the run."""
        while (opening := self._opening.get(run_id)) is not None:
            await opening.wait()

    async def create(self, record: RunRecord) -> None:
        """Store a new run. Raises `VersionConflict` if there is one with this id."""
        mark = self._mark()
        await self.patiently(lambda: self._broker.commit(record, expect=0, change=mark))

    async def update(self, run_id: str, *changes: RunChange) -> RunRecord:
        """Apply the changes to the newest record and store it, as one version; return the record.

        What is later than the end of the run is absorbed. Raises `RunNotFound`, `InvalidTransition`, and for changes
        that would take the run over a limit `LimitExceeded`, once the others are stored; if those have ended the run
        it is logged instead.
        """
        record, refusal = await self.change(run_id, *changes)
        if refusal is not None:
            if not record.is_completed:
                raise refusal
            logger.warning("a change of run %s was refused: %s", run_id, refusal)
        return record

    async def change(self, run_id: str, *changes: RunChange) -> tuple[RunRecord, LimitExceeded | None]:
        """As `update`, but returns why a change was left out, if one was."""
        record, stored = await self._newest(run_id)
        while True:
            if self.taken(record):
                return record, None
            following, refusal = self._apply(record, changes)
            if following is record and stored == record.version:
                return record, refusal
            try:
                await self._commit(following, expect=stored)
            except VersionConflict as conflict:
                record, stored = await self._newest(run_id, conflict)
            except StreamBehind:
                await self.restore_streams(run_id)
            else:
                owned = self._owned.get(run_id)
                if owned is not None:
                    owned.record = following
                return following, refusal

    # What a broker may lose of a run that this process executes

    def own(self, record: RunRecord) -> None:
        """This process executes the run: it knows the newest state, and may have to store it again."""
        self._owned[record.id] = _Owned(record)

    def disown(self, run_id: str) -> None:
        """The execution is over."""
        self._owned.pop(run_id, None)

    def taken(self, record: RunRecord) -> bool:
        """Whether another process executes a run that began here: the broker has lost that it did. It is not ours then,
        and nothing that comes of it here counts."""
        owned = self._owned.get(record.id)
        return owned is not None and record.owner is not None and record.owner != owned.record.owner

    def writes(self, writer: Writer) -> None:
        """A writer of this process writes to a stream of the run."""
        owned = self._owned.get(writer.key.run)
        if owned is not None:
            owned.writers[writer] = None

    async def recreated(self, run_id: str) -> bool:
        """Store a run again that the broker has lost. False if it is not ours, or over: then it is gone for good."""
        owned = self._owned.get(run_id)
        if owned is None or owned.record.is_completed or not self._broker.shared:
            return False
        with suppress(VersionConflict):  # somebody was faster
            await self._commit(owned.record, expect=0)
        return True

    async def _newest(self, run_id: str, conflict: VersionConflict | None = None) -> tuple[RunRecord, int]:
        """The newest record that is known, and the version that is stored; 0 if a run of ours is to be stored again.

        Who owns a run knows every version that he has stored. Less is there after a failover that lost some.
        """
        if conflict is not None:
            record = conflict.current
        else:
            await self.present(run_id)
            (record,) = await self.patiently(lambda: self._broker.load([run_id]))
        owned = self._owned.get(run_id)
        if owned is not None and self._broker.shared and not owned.record.is_completed:
            if record is None:
                return owned.record, 0
            if record.version < owned.record.version:
                return msgspec.structs.replace(owned.record, version=record.version), record.version
        if record is None:
            raise RunNotFound(f"no run {shown(run_id)}: it never was, or it is past its retention")
        return record, record.version

    async def restore_streams(self, run_id: str, *writers: Writer) -> None:
        """Have writers, and all of this process if the run is ours, write again what the broker lost of their streams.

        All at once: where several wrote into one stream each may have to wait for the others.
        """
        owned = self._owned.get(run_id)
        async with anyio.create_task_group() as group:
            for writer in dict.fromkeys((*writers, *(() if owned is None else owned.writers))):
                group.start_soon(self._restore, writer)

    async def _restore(self, writer: Writer) -> None:
        try:
            await writer.restore()
        except BrokerUnavailable as exc:
            logger.warning("stream %r of run %s waits to be restored: %s", writer.key.name, writer.key.run, exc)

    def _floors(self, record: RunRecord) -> dict[str, int]:
        """Where the streams of a run that ends have to be, so that all that our writers were told is there.

        Raises `StreamLost` if the run would be a success and one of its streams was lost.
        """
        floors: dict[str, int] = {}
        owned = self._owned.get(record.id) if record.is_completed else None
        for writer in () if owned is None else owned.writers:
            if isinstance(writer.failure, StreamLost) and record.is_success:
                raise writer.failure
            if writer.last_index is not None:
                floors[writer.key.name] = max(writer.last_index + 1, floors.get(writer.key.name, 0))
        return floors

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
        return await self.patiently(lambda: self._broker.claim(key, value, ttl_s=ttl_s))

    async def _commit(self, record: RunRecord, *, expect: int) -> None:
        mark = self._mark()
        floors = self._floors(record)
        await self.patiently(lambda: self._broker.commit(record, expect=expect, change=mark, floors=floors))

    def _mark(self) -> ChangeMark:
        return ChangeMark(self.owner, next(self._numbers))

    async def patiently(self, call: Callable[[], Awaitable[_R]]) -> _R:
        """Repeat a call that may be repeated while the broker is away, up to the patience of this store."""
        deadline: float | None = None
        pause_s = 0.05
        while True:
            try:
                return await call()
            except BrokerUnavailable:
                now = anyio.current_time()
                deadline = now + self._patience_s if deadline is None else deadline
                if now + pause_s > deadline:
                    raise
            await anyio.sleep(pause_s)
            pause_s = min(pause_s * 2, 2.0)

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
        await self.get(run_id)
        parker = make_parker()
        async with self._broker.follow(run_topic(run_id)) as topic:
            try:
                while True:
                    changed = parker.arm()
                    topic.waiting.add(parker)
                    record = await self.get(run_id)
                    if record.is_completed:
                        return record
                    await changed
            finally:
                topic.waiting.discard(parker)


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
