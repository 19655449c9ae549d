"""Restores what a broker has lost.

**What can be lost.** A shared broker can lose data that it acknowledged: after a failover of Redis, the new primary
lacks the last second or so. Each run then falls back to an older state, or disappears: versions of its record, chunks
at the end of its streams, the start of its execution.

**What this process knows.** The process that executes a run is its owner. It knows the newest record that it stored
(`OwnedRuns`), and each of its producers knows how many chunks were acknowledged and holds the newest of them, together
with their seqs (`RestorableProducer`). Nothing else can be restored; a run without an owner keeps its older state.

**How a loss is found.** No broker announces it. It shows when the owner uses the run:

* The broker returns no record, or an older one than the owner stored (`OwnedRuns.reconcile`).
* An append starts after the broker's count for its producer (`ProducerGap`), or finds no run (`RunNotFound`).
* The commit that ends the run carries the number of acknowledged chunks of each producer. If a stream has fewer, the
  broker refuses it (`StreamBehind`).

**In which order.** First the record, because streams need their run. Then the streams, all producers of the run at
once: their chunks can interleave in one stream, and each chunk has to return to its old seq. A producer that is too
early gets `RestoreOutOfOrder` and retries. Then the call that found the loss is repeated.

**What wins.** Whatever other processes stored after the loss stays: the end of the run, a new owner, tags, a request to
cancel. A run that another process executes by now is lost to this one, and so is everything that it would still store.

**Threads.** If another run has taken the thread of a run that disappeared, the restored run is canceled.

**What is given up.** If the lost chunks are no longer held here, or another producer has written at their seqs, the
stream ends as `lost`, because its readers have seen chunks that no longer exist. A run that would be COMPLETED with
such a stream becomes FAILED. A run that disappeared is restored only if its lease was renewed within
`Retention.after_end`; otherwise it could have ended and expired elsewhere.

**Readers** are not restored but corrected. A process that has received lost entries is ahead of the broker, so the
broker fails its copy of the stream, and its readers resume by their cursors. The version of a run can decrease, so
feeds and followers check whether it differs, not whether it is higher.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import anyio
import msgspec

from asgi_realtime.brokers.base import Broker
from asgi_realtime.core.config import Retention
from asgi_realtime.core.errors import (
    BrokerUnavailable,
    ProducerGap,
    RealtimeError,
    RestoreOutOfOrder,
    RunNotFound,
    StreamClosed,
    StreamLost,
)
from asgi_realtime.core.log import End, Position, Producer, StreamKey
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.retry import Retry

HELD_BYTES = 256 * 1024
HELD_S = 10.0
"""Acknowledged chunks that each producer holds. The time counts only while the broker answers: if it returns after a
longer outage, the chunks that it may have lost are still here."""

_MAX_STEP_S = 2.0
"""The longest time between two ticks that counts. A longer one means that the broker did not answer in between."""

_CALL_ITEMS = 500
"""Chunks of one append."""


class OwnedRun:
    """A run that this process executes: its newest stored record, since when, and its producers."""

    __slots__ = ("producers", "record", "since")

    def __init__(self, record: StoredRecord, since: float) -> None:
        self.record = record
        self.since = since
        self.producers: dict[RestorableProducer, None] = {}

    def is_taken_over(self, record: StoredRecord) -> bool:
        """Whether another process executes the run by now. Then this execution has no effect anymore."""
        return record.owner is not None and record.owner != self.record.owner

    def floors(self, record: StoredRecord) -> Mapping[tuple[str, str], int]:
        """By stream and producer id, how many acknowledged chunks the run must have to end with this record.

        Raises `StreamLost` if the run would be COMPLETED although one of its streams was lost.
        """
        if not record.is_completed:
            return {}
        for producer in self.producers:
            if record.is_success and isinstance(producer.failure, StreamLost):
                raise producer.failure
        return {(one.key.name, one.id): one.count for one in self.producers if one.failure is None}


class OwnedRuns(dict[str, OwnedRun]):
    """The runs that this process executes, by id, and the chunks that its producers hold.

    Empty unless the broker is `lossy`: one that loses nothing needs no restoring. `clock` returns unix seconds.
    """

    def __init__(self, *, lossy: bool, clock: Callable[[], float], retention: Retention) -> None:
        super().__init__()
        self._lossy = lossy
        self._clock = clock
        self._retention = retention
        self._renewed_at = clock()
        self._holding: dict[RestorableProducer, None] = {}  # ordered by their last append, oldest first
        self._ticked_at: float | None = None
        self.available_s = 0.0
        """How long the broker has been available, as seen by the ticker. Held chunks age by this clock."""

    def own(self, record: StoredRecord) -> None:
        """Call when this process starts to execute a run."""
        if self._lossy:
            self[record.id] = OwnedRun(record, self._clock())

    def disown(self, run_id: str) -> None:
        """Call when an execution is over. Its producers release their chunks: a run that is over is not restored."""
        owned = self.pop(run_id, None)
        for producer in () if owned is None else owned.producers:
            self._holding.pop(producer, None)
            producer.drop()

    def renewed(self) -> None:
        """Call when the leases were renewed. Thread-safe."""
        self._renewed_at = self._clock()

    # Records

    def reconcile(self, run_id: str, stored: StoredRecord | None) -> StoredRecord | None:
        """Compare what the broker returned with what this process knows. Returns what the run is.

        `stored` itself if nothing was lost. Otherwise the record to store in its place, which has the version of
        `stored`; or None if the run does not exist.
        """
        owned = self.get(run_id)
        if owned is None or owned.record.is_completed:
            return stored
        known = owned.record
        if stored is None:
            seen_at = max(owned.since, self._renewed_at)
            return known if self._clock() - seen_at < self._retention.after_end else None
        if stored.is_completed or owned.is_taken_over(stored):
            return stored
        if not stored.is_queued and stored.version >= known.version:
            return stored
        return msgspec.structs.replace(
            known,
            version=stored.version,
            tags=tuple(dict.fromkeys((*known.tags, *stored.tags))),
            cancel_requested_at_ms=known.cancel_requested_at_ms or stored.cancel_requested_at_ms,
        )

    # Chunks

    def note_held(self, producer: RestorableProducer) -> None:
        """Call when a producer holds chunks that were just acknowledged."""
        owned = self.get(producer.key.run)
        if owned is not None:
            owned.producers[producer] = None
        self._holding.pop(producer, None)
        self._holding[producer] = None

    def release_expired(self, now_s: float) -> None:
        """Release the chunks that were held for `HELD_S`. The ticker calls this at each tick that reached the broker.

        `now_s` is monotonic.
        """
        if self._ticked_at is not None:
            self.available_s += min(now_s - self._ticked_at, _MAX_STEP_S)
        self._ticked_at = now_s
        while self._holding:
            oldest = next(iter(self._holding))
            if not oldest.release_expired():
                return
            del self._holding[oldest]


class Restorer:
    """Stores again what the broker lost. `commit` stores a record, as `Broker.commit` with a new mark; `reconcile` is
    that of the store."""

    def __init__(
        self,
        broker: Broker,
        owned: OwnedRuns,
        *,
        retry: Retry,
        commit: Callable[..., Awaitable[int]],
        reconcile: Callable[[str, StoredRecord | None], Awaitable[StoredRecord | None]],
    ) -> None:
        self.broker = broker
        self.owned = owned
        self.retry = retry
        self._commit = commit
        self._reconcile = reconcile

    async def restore_run(self, run_id: str) -> StoredRecord | None:
        """Store the record of an owned run again if the broker lost it. Returns the stored record, if there is one."""
        (stored,) = await self.retry(self.broker.load, [run_id])
        record = await self._reconcile(run_id, stored)
        if record is None or record is stored:
            return record
        if stored is not None:
            record = msgspec.structs.replace(record, version=stored.version + 1)
        try:
            await self._commit(record, expect=0 if stored is None else stored.version)
        except VersionConflict as conflict:
            return conflict.current
        return record

    async def restore_streams(self, run_id: str, *producers: RestorableProducer) -> None:
        """Restore the streams of these producers, and of all producers of the run if it is owned.

        Concurrently: each can have to wait for the chunks of the others.
        """
        owned = self.owned.get(run_id)
        async with anyio.create_task_group() as group:
            for producer in dict.fromkeys((*producers, *(() if owned is None else owned.producers))):
                group.start_soon(self._restore_stream, producer)

    async def _restore_stream(self, producer: RestorableProducer) -> None:
        try:
            await producer.restore()
        except BrokerUnavailable as exc:
            key = producer.key
            logger.warning("stream %r of run %s could not be restored yet: %s", key.name, key.run, exc)


class _HeldChunk(NamedTuple):
    seq: int
    data: bytes
    since: float
    """When it was acknowledged, in `OwnedRuns.available_s`."""


class RestorableProducer:
    """One producer of one stream. Holds its newest acknowledged chunks, to append them again if the broker loses them.

    `on_lost` is called once the chunks cannot be restored; `failure` is set then, and nothing can be appended.
    """

    def __init__(self, key: StreamKey, restorer: Restorer, *, on_lost: Callable[[RealtimeError], None]) -> None:
        self.key = key
        self.id = secrets.token_hex(8)
        self.count = 0
        """Acknowledged chunks."""
        self.failure: RealtimeError | None = None
        self._restorer = restorer
        self._on_lost = on_lost
        self._held: deque[_HeldChunk] = deque()
        self.held_bytes = 0
        self._restoring = anyio.Lock(fast_acquire=True)

    async def append(self, items: Sequence[bytes]) -> Position:
        """Append the next chunks. If the broker has lost earlier ones, restores those first.

        Raises as `Broker.append`, and `StreamLost` if they cannot be restored.
        """
        producer = Producer(self.id, self.count)
        while True:
            try:
                position = await self._append(items, producer)
                break
            except ProducerGap:
                await self._restorer.restore_streams(self.key.run, self)
            except RunNotFound:
                if await self._restorer.restore_run(self.key.run) is None:
                    raise
            self._check()
        self._check()  # another writer can have restored all streams of the run concurrently, and found this one lost
        self._hold(items, position.last)
        return position

    async def _append(self, items: Sequence[bytes], producer: Producer, at: int | None = None) -> Position:
        append = self._restorer.broker.append
        return await self._restorer.retry(append, self.key, items, producer=producer, at=at)

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    # Holding

    def _hold(self, items: Sequence[bytes], last: int) -> None:
        self.count += len(items)
        owned = self._restorer.owned
        for seq, data in enumerate(items, last - len(items) + 1):
            self._held.append(_HeldChunk(seq, data, owned.available_s))
            self.held_bytes += len(data)
        self.release_expired()
        owned.note_held(self)

    def release_expired(self) -> bool:
        """Release the chunks beyond `HELD_BYTES` or `HELD_S`. Returns whether none is left."""
        oldest_s = self._restorer.owned.available_s - HELD_S
        held = self._held
        while held and (self.held_bytes > HELD_BYTES or held[0].since < oldest_s):
            self.held_bytes -= len(held.popleft().data)
        return not held

    def drop(self) -> None:
        """Release all chunks."""
        self._held.clear()
        self.held_bytes = 0

    # Restoring

    async def restore(self) -> None:
        """Append the lost chunks again, at their old seqs. Raises `BrokerUnavailable`.

        The broker skips the chunks that it still has. If the others cannot be restored, the stream ends as `lost`.
        """
        async with self._restoring:
            if self.failure is not None:
                return
            held = list(self._held)  # more can be appended and held while this waits
            index = self.count - len(held)
            try:
                if not held:  # appending nothing makes the broker compare the counts
                    await self._append((), Producer(self.id, index))
                for chunks in _adjacent(held):
                    items = [chunk.data for chunk in chunks]
                    await self._append(items, Producer(self.id, index), at=chunks[0].seq)
                    index += len(chunks)
            except (ProducerGap, StreamLost, RestoreOutOfOrder):  # not all of it is held, or its seq is taken
                await self._lose()
            except StreamClosed as exc:
                self._fail(exc)

    async def _lose(self) -> None:
        failure = StreamLost(f"entries of stream {self.key.name!r} were lost by the broker and could not be restored")
        self._fail(failure)
        end = End("lost", str(failure))
        await self._restorer.retry(self._restorer.broker.append, self.key, [], end=end)

    def _fail(self, failure: RealtimeError) -> None:
        self.failure = failure
        self.drop()
        self._on_lost(failure)


def _adjacent(chunks: Iterable[_HeldChunk]) -> Iterator[list[_HeldChunk]]:
    """Groups of chunks with consecutive seqs, each small enough for one append."""
    group: list[_HeldChunk] = []
    for chunk in chunks:
        if group and (chunk.seq != group[-1].seq + 1 or len(group) == _CALL_ITEMS):
            yield group
            group = []
        group.append(chunk)
    if group:
        yield group
