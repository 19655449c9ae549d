"""What runs are due for, and when: sorted sets by Redis's clock, seven for each partition.

A commit writes those of its run in its own step. Nobody wants to look into all partitions all the time, so beside
each commit a note is made of when its partition has to be looked into next. Who polls puts the notes that are due
aside, looks, and notes anew. A note may be missing, since it is made after the commit; so a few partitions are looked
into at each poll though nothing is noted of them, and all have their turn within about a minute.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Mapping, Sequence

from asgi_realtime.brokers.redis import scripts
from asgi_realtime.brokers.redis.keys import DUE_OF_PARTITION, PARTITIONS, Keys
from asgi_realtime.brokers.redis.servers import Servers
from asgi_realtime.core.runs import Status

_SCAN_S = 1.0
_SCANNED = 4
"""Partitions that are looked into after so much time though nothing is noted of them."""

_UNPUBLISHED_MS = 1000
"""How long whoever has committed has to tell the topics, before others do it."""

STATES = {Status.EXECUTING: "executing", Status.QUEUED: "queued"}
"""Statuses in which somebody has to look after a run, and what they are called in Redis."""

_LOOKED_AFTER = {Status.EXECUTING: "lease", Status.QUEUED: "enqueue"}


class Schedule:
    """The due times of all runs. Raises `BrokerUnavailable`."""

    def __init__(self, servers: Servers, keys: Keys, *, lease_s: float) -> None:
        self._servers = servers
        self._keys = keys
        self._lease_s = lease_s
        self.lease_ms = round(lease_s * 1000)
        self._next = random.randrange(PARTITIONS)
        self._scanned_at = -_SCAN_S

    async def note(
        self, run_id: str, times: Mapping[str, int], *, status: Status | None = None, unpublished: bool = False
    ) -> None:
        """Note when a run is due for what, in unix milliseconds; with a status, that its lease or the like begins."""
        notes = {kind: f"a{at}" for kind, at in times.items()}
        if status in _LOOKED_AFTER:
            notes[_LOOKED_AFTER[status]] = f"r{self.lease_ms}"
        if unpublished:
            notes["unpublished"] = f"r{_UNPUBLISHED_MS}"
        if notes:
            keys = [self._keys.note(kind) for kind in notes]
            await self._servers.run(scripts.ADD_HINTS, keys, self._keys.partition(run_id), *notes.values())

    async def due(self, kind: str, *, limit: int, skip: int) -> list[str]:
        """As `Broker.due`."""
        if kind == "lease" and self._servers.presence.present_for_s() < self._lease_s:
            return []  # nobody could renew while Redis was away: owners have a lease's time to do so
        await self._scan()
        partitions = await self._servers.run(scripts.TAKE_HINTS, [self._keys.note(kind)])
        found = await asyncio.gather(*(self._due_in(kind, int(partition), skip + limit) for partition in partitions))
        return [run_id for _, run_id in heapq.merge(*found)][skip : skip + limit]

    async def _due_in(self, kind: str, partition: int, limit: int) -> list[tuple[float, str]]:
        """What is due in one partition, by time. Notes when there is something next."""
        pairs, following = await self._servers.run(scripts.DUE, [self._keys.due(kind, partition)], limit)
        if following:
            await self._note_again(kind, partition, following)
        return [(float(at), run_id.decode()) for run_id, at in zip(pairs[::2], pairs[1::2], strict=True)]

    async def _scan(self) -> None:
        """Look into some partitions, each in its turn, and note what is in them."""
        now = asyncio.get_running_loop().time()
        if now - self._scanned_at < _SCAN_S:
            return
        self._scanned_at = now
        partitions = [(self._next + number) % PARTITIONS for number in range(_SCANNED)]
        self._next = (self._next + _SCANNED) % PARTITIONS
        await asyncio.gather(*map(self._scan_one, partitions))

    async def _scan_one(self, partition: int) -> None:
        keys = [self._keys.due(kind, partition) for kind in DUE_OF_PARTITION]
        firsts = await self._servers.run(scripts.FIRST_DUE, keys)
        for kind, first in zip(DUE_OF_PARTITION, firsts, strict=True):
            if first:
                await self._note_again(kind, partition, first)

    async def _note_again(self, kind: str, partition: int, at: bytes) -> None:
        await self._servers.run(scripts.ADD_HINTS, [self._keys.note(kind)], partition, b"a" + at)

    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        """As `Broker.renew`."""
        await asyncio.gather(*(self._renew(run_id, owner) for run_id in run_ids))

    async def _renew(self, run_id: str, owner: str) -> None:
        lease, enqueue, *_ = self._keys.due_of(run_id)
        await self._servers.run(scripts.RENEW, [self._keys.run(run_id), lease, enqueue], run_id, owner, self.lease_ms)

    async def enqueued(self, run_id: str) -> None:
        """As `Broker.enqueued`."""
        key = self._keys.due("enqueue", self._keys.partition(run_id))
        await self._servers.run(scripts.ENQUEUED, [key], run_id)
