"""What runs are due for, and when: sorted sets by Redis's clock, nine for each of the 256 partitions.

A commit updates the sets of its run's partition in its own step. Reading all partitions at every poll would be too
much, so after each commit a *hint* records when its partition has something due. A poll takes the hints that are
due, reads those partitions, and adds a hint for what comes next there.

A hint can be missing, because it is added after the commit. So a few partitions are read at each poll without a hint,
in rotation; all are read within about a minute. Hints make things fast, the rotation makes them certain. Nothing counts
as read before it was: a hint that was taken becomes due again unless its partition is read within `_READ_MS`."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Sequence

from asgi_realtime.brokers.redis import scripts
from asgi_realtime.brokers.redis.keys import DUE_OF_PARTITION, PARTITIONS, Keys
from asgi_realtime.brokers.redis.servers import Servers
from asgi_realtime.core.config import Retention, Timeouts
from asgi_realtime.core.runs import LEASE_KINDS, StoredRecord, due_times, lease_kind

_SCAN_S = 1.0
_SCANNED = 4
"""How many partitions are read without a hint, once per `_SCAN_S`."""

_READ_MS = 5000
"""How long a poll has to read the partitions whose hints it took, before other polls do."""

_UNPUBLISHED_MS = 1000
"""How long the committing process has to publish to topics before other processes do it."""

STATES: dict[str | None, str] = {"lease": "executing", "enqueue": "queued", "on_end": "ended"}
"""The states in which a run needs a process that renews it, as Redis stores them."""


class Schedule:
    """The due times of all runs. Raises `BrokerUnavailable`."""

    def __init__(self, servers: Servers, keys: Keys, *, timeouts: Timeouts, retention: Retention) -> None:
        self.lease_ms = round(timeouts.lease * 1000)
        self._servers = servers
        self._keys = keys
        self._timeouts = timeouts
        self._retention = retention
        self._next_scanned = random.randrange(PARTITIONS)
        self._scanned_at = -_SCAN_S

    def due_times(self, record: StoredRecord) -> dict[str, int]:
        return due_times(record, cancel_s=self._timeouts.cancel, after_end_s=self._retention.after_end)

    async def add_hints(self, record: StoredRecord, *, has_new_lease: bool, unpublished: bool = False) -> None:
        """Hint at the times at which a run is due, also at the end of a lease that begins with its status."""
        hints = {kind: f"a{at}" for kind, at in self.due_times(record).items()}
        kind = lease_kind(record)
        if has_new_lease and kind is not None:
            hints[kind] = f"r{self.lease_ms}"
        if unpublished:
            hints["unpublished"] = f"r{_UNPUBLISHED_MS}"
        if hints:
            keys = [self._keys.hints(kind) for kind in hints]
            await self._servers.run(scripts.ADD_HINTS, keys, self._keys.partition(record.id), *hints.values())

    async def due(self, kind: str, *, limit: int, skip: int) -> list[str]:
        """As `Broker.due`."""
        if kind in ("lease", "unwatched") and self._servers.health.answering_for_s() < self._timeouts.lease:
            return []  # no process could renew while Redis was unavailable: they get a lease's time to do so
        await self._scan()
        partitions, moved_to = await self._servers.run(scripts.TAKE_HINTS, [self._keys.hints(kind)], _READ_MS)
        found = await asyncio.gather(
            *(self._due_in(kind, int(partition), skip + limit, moved_to) for partition in partitions)
        )
        return [run_id for _, run_id in heapq.merge(*found)][skip : skip + limit]

    async def _due_in(self, kind: str, partition: int, limit: int, moved_to: bytes) -> list[tuple[float, str]]:
        """The due runs of a partition by time. Replaces the hint that was taken."""
        pairs, first = await self._servers.run(scripts.DUE, [self._keys.due(kind, partition)], limit)
        if first:
            await self._add_hint(kind, partition, first)
        else:
            await self._servers.run(scripts.DROP_HINT, [self._keys.hints(kind)], partition, moved_to)
        return [(float(at), run_id.decode()) for run_id, at in zip(pairs[::2], pairs[1::2], strict=True)]

    async def _scan(self) -> None:
        """Read the next partitions in rotation, and add hints for what they hold."""
        now = asyncio.get_running_loop().time()
        if now - self._scanned_at < _SCAN_S:
            return
        self._scanned_at = now
        partitions = [(self._next_scanned + number) % PARTITIONS for number in range(_SCANNED)]
        await asyncio.gather(*map(self._scan_one, partitions))
        self._next_scanned = (self._next_scanned + _SCANNED) % PARTITIONS  # not before: what failed is read again

    async def _scan_one(self, partition: int) -> None:
        keys = [self._keys.due(kind, partition) for kind in DUE_OF_PARTITION]
        firsts = await self._servers.run(scripts.FIRST_DUE, keys)
        for kind, first in zip(DUE_OF_PARTITION, firsts, strict=True):
            if first:
                await self._add_hint(kind, partition, first)

    async def _add_hint(self, kind: str, partition: int, at: bytes) -> None:
        await self._servers.run(scripts.ADD_HINTS, [self._keys.hints(kind)], partition, b"a" + at)

    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        """As `Broker.renew`."""
        await asyncio.gather(*(self._renew(run_id, owner) for run_id in run_ids))

    async def _renew(self, run_id: str, owner: str) -> None:
        leases = [self._keys.due(kind, self._keys.partition(run_id)) for kind in LEASE_KINDS]
        await self._servers.run(scripts.RENEW, [self._keys.run(run_id), *leases], run_id, owner, self.lease_ms)

    async def enqueued(self, run_id: str) -> None:
        """As `Broker.enqueued`."""
        await self._drop("enqueue", run_id)

    async def take_on_end(self, run_id: str) -> bool:
        """As `Broker.take_on_end`. Not repeated: a call without an answer leaves the run due."""
        key = self._keys.due("on_end", self._keys.partition(run_id))
        return bool(await self._servers.run(scripts.TAKE_DUE, [key], run_id, self.lease_ms, repeat=False))

    async def on_end_called(self, run_id: str) -> None:
        """As `Broker.on_end_called`."""
        await self._drop("on_end", run_id)

    async def has_on_end(self, run_id: str) -> bool:
        """Whether the `on_end` of the run has to be called still."""
        key = self._keys.due("on_end", self._keys.partition(run_id))
        return await self._servers.call(key, "ZSCORE", key, run_id) is not None

    async def watch(self, run_id: str, *, process: str, readers: int, grace_s: float | None) -> None:
        """As `Broker.watch`."""
        partition = self._keys.partition(run_id)
        keys = [self._keys.run(run_id), self._keys.watchers(run_id), self._keys.due("unwatched", partition)]
        grace_ms = "" if grace_s is None else round(grace_s * 1000)
        at = await self._servers.run(scripts.WATCH, keys, run_id, process, readers, self.lease_ms, grace_ms)
        if at:
            await self._add_hint("unwatched", partition, at)

    async def watchers(self, run_id: str) -> int:
        """As `Broker.watchers`."""
        keys = [self._keys.run(run_id), self._keys.watchers(run_id)]
        return int(await self._servers.run(scripts.WATCHERS, keys))

    async def _drop(self, kind: str, run_id: str) -> None:
        key = self._keys.due(kind, self._keys.partition(run_id))
        await self._servers.call(key, "ZREM", key, run_id)
