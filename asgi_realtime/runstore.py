"""Runs as the rest of the library uses them: read, create, change.

A change is a loop around the broker's compare-and-set: apply it to the newest record, commit, and on a conflict apply
it again to what the other wrote. So several processes may change one run at once and no change is lost.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import TypeVar

import anyio

from asgi_realtime.brokers.base import Broker, ChangeMark
from asgi_realtime.core.log import StreamKey
from asgi_realtime.core.runs import RunChange, RunRecord, StreamAdded, apply, run_topic
from asgi_realtime.errors import BrokerUnavailable, LimitExceeded, RunNotFound, VersionConflict, shown
from asgi_realtime.waiting import Parking, make_parker

_R = TypeVar("_R")

HIDDEN_STREAM = "$"
"""Streams whose name begins so are the library's own and are not listed in the run."""

_KNOWN_STREAMS = 10_000


class RunStore:
    """All access to run records. `clock` gives unix seconds; an absent broker is waited for `patience_s`."""

    def __init__(self, broker: Broker, *, clock: Callable[[], float], patience_s: float, streams_per_run: int) -> None:
        self._broker = broker
        self._clock = clock
        self._patience_s = patience_s
        self._streams_per_run = streams_per_run
        self.owner = secrets.token_hex(8)
        """This process, as the owner of the runs that it executes and the writer of its commits."""
        self._numbers = count()
        self._known_streams: dict[StreamKey, None] = {}
        self._opening: dict[str, Parking] = {}

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

        What is later than the end of the run is absorbed. Raises `RunNotFound`, `InvalidTransition`.
        """
        record = await self.patiently(lambda: self.get(run_id))
        while True:
            following = apply(record, changes, self.now_ms())
            if following is record:
                return record
            try:
                await self._commit(following, expect=record.version)
            except VersionConflict as conflict:
                if conflict.current is None:
                    raise RunNotFound(f"run {run_id!r} is past its retention") from conflict
                record = conflict.current
            else:
                return following

    async def claim(self, key: str, value: str, *, ttl_s: float) -> str:
        """As `Broker.claim`."""
        return await self.patiently(lambda: self._broker.claim(key, value, ttl_s=ttl_s))

    async def _commit(self, record: RunRecord, *, expect: int) -> None:
        mark = self._mark()
        await self.patiently(lambda: self._broker.commit(record, expect=expect, change=mark))

    def _mark(self) -> ChangeMark:
        return ChangeMark(self.owner, next(self._numbers))

    async def patiently(self, call: Callable[[], Awaitable[_R]]) -> _R:
        """Repeat a call that may be repeated while the broker is away, up to the patience of this store."""
        deadline = anyio.current_time() + self._patience_s
        pause_s = 0.05
        while True:
            try:
                return await call()
            except BrokerUnavailable:
                if anyio.current_time() + pause_s > deadline:
                    raise
            await anyio.sleep(pause_s)
            pause_s = min(pause_s * 2, 2.0)

    async def add_stream(self, key: StreamKey) -> None:
        """Make sure that the run lists the stream. Raises `RunNotFound`, `LimitExceeded`."""
        if key in self._known_streams or key.name.startswith(HIDDEN_STREAM):
            return
        record = await self.patiently(lambda: self.get(key.run))
        if key.name not in record.streams:
            if len(record.streams) >= self._streams_per_run:
                raise LimitExceeded(
                    f"run {key.run!r} has {len(record.streams)} streams, limit {self._streams_per_run}", status=422
                )
            await self.update(key.run, StreamAdded(key.name))
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
