"""The broker of one process: readers follow its storage directly.

No method suspends, so each is atomic on its event loop, and a cancelled call has not begun. Nothing leaves the process.
The data survives a restart of the `Realtime`, not of the process.
"""

from __future__ import annotations

import heapq
import math
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from asgi_realtime.brokers.base import MARKS_KEPT, ChangeMark, LiveTopic
from asgi_realtime.brokers.due_times import DueTimes
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.core.errors import LimitExceeded, RunNotFound, StreamBehind
from asgi_realtime.core.log import HIDDEN_STREAM, End, Log, Page, Position, Producer, StreamKey
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import DUE_KINDS, RunRecord, Status, due_times, run_topic
from asgi_realtime.core.topics import Changes, Cursor, TopicIndex
from asgi_realtime.loop.waiting import WaitList, WakeSoon

_RECORD_BYTES = 3072
"""What a stored run costs in addition to its payload, output, metadata and streams, roughly."""

ENTRY_BYTES = 64
"""What an entry costs in addition to the bytes of its frame, roughly."""

_PRODUCER_BYTES = 220
"""What the count of a producer costs, roughly. Each append over HTTP has its own producer."""

_CLAIM_BYTES = 256
"""What a claim costs in addition to its key and value, roughly."""

_LEASES = {"enqueue": Status.QUEUED, "lease": Status.EXECUTING}
"""The statuses in which a run has a lease, and what it is due for unless it is renewed."""

Clock = Callable[[], float]


class _StoredRun:
    """A run, and what is removed with it."""

    __slots__ = ("inputs_bytes", "marks", "published_to", "record", "record_size", "size", "streams")

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.streams: dict[str, LiveLog] = {}
        self.marks: dict[ChangeMark, int] = {}  # the versions that the newest commits stored
        self.published_to: tuple[str, ...] = ()  # every topic that has ever listed the run
        self.inputs_bytes = 0
        self.record_size = 0
        self.size = 0


class _MemoryTopic:
    __slots__ = ("failure", "followers", "index", "waiting")

    def __init__(self, index: TopicIndex) -> None:
        self.index = index
        self.waiting = WaitList()
        self.followers = 0
        self.failure: Exception | None = None

    async def changes(self, cursor: Cursor | None, *, limit: int = 1000) -> Changes:
        return self.index.after(cursor, limit=limit)


class MemoryBroker:
    """Everything in this process. `clock` gives unix seconds."""

    shared = False
    warnings: Sequence[str] = ()

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        retention: Retention | None = None,
        timeouts: Timeouts | None = None,
        clock: Clock = time.time,
    ) -> None:
        self._limits = limits or Limits()
        self._retention = retention or Retention()
        self._timeouts = timeouts or Timeouts()
        self._clock = clock
        self._name = secrets.token_hex(6)
        self._runs: dict[str, _StoredRun] = {}
        self._topics: dict[str, _MemoryTopic] = {}
        self._claims: dict[str, tuple[str, int]] = {}
        self._claims_expire = DueTimes()
        self._due = {kind: DueTimes() for kind in DUE_KINDS}
        self._size = 0
        self._room_at = self._retention.total_bytes  # the size at which to make room
        self._full = False  # no room could be made
        self._wakes = WakeSoon()

    async def __aenter__(self) -> MemoryBroker:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        return None

    @property
    def home(self) -> str:
        return f"{self._name}-{os.getpid()}"  # after a fork, each process has its own data

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    @property
    def size(self) -> int:
        """The bytes in use, roughly: frames, payloads, outputs, metadata and claims, with their overhead."""
        return self._size

    # Streams

    def append_nowait(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        run = self._run(key.run)
        live = run.streams.get(key.name) or self._make_stream(run)
        log = live.log
        before = _log_bytes(log)
        if self._full and items:
            self._refuse()
        added = 0
        if key.hidden and log.end is None:
            added = self._check_inputs(run, items if producer is None else log.unseen(items, producer))
        position = log.append(items, self._now_ms(), producer=producer, at=at)
        run.inputs_bytes += added
        if end is not None:
            log.close(end)
        run.streams[key.name] = live  # only now, so that a refused append leaves no trace
        if log.size > self._retention.stream_bytes and not key.hidden:
            log.trim(self._retention.stream_bytes)
        grown = _log_bytes(log) - before
        run.size += grown
        self._size += grown
        live.wake()
        if self._size > self._room_at:
            self._make_room(key.run)
        return position

    async def append(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        return self.append_nowait(key, items, producer=producer, end=end, at=at)

    async def read(self, key: StreamKey, *, after: int = -1, limit: int = 500) -> Page:
        run = self._run(key.run)
        live = run.streams.get(key.name)
        log = Log() if live is None else live.log
        return Page(log.entries(after, limit), log.first, log.next, log.end or run.record.end)

    async def produced(self, key: StreamKey, producer_id: str) -> int:
        live = self._run(key.run).streams.get(key.name)
        return 0 if live is None else live.log.counted(producer_id)

    @asynccontextmanager
    async def live(self, key: StreamKey) -> AsyncIterator[LiveLog]:
        run = self._run(key.run)
        live = run.streams[key.name] = run.streams.get(key.name) or self._make_stream(run)
        live.enter()
        try:
            yield live
        finally:
            live.leave()
            if not live.readers and not live.log.next and live.end in (None, run.record.end):
                run.streams.pop(key.name, None)  # it was never written

    def _refuse(self) -> None:
        limit = self._retention.total_bytes
        raise LimitExceeded(
            f"the broker holds {self._size} bytes of active runs, limit {limit} (Retention.total_bytes)", status=503
        )

    def _check_inputs(self, run: _StoredRun, items: Sequence[bytes]) -> int:
        """The bytes that an append adds to the inputs of a run. Raises `LimitExceeded`."""
        added, held, limit = sum(map(len, items)), run.inputs_bytes, self._limits.inputs_bytes
        if items and held + added > limit:
            raise LimitExceeded(f"the inputs of run {run.record.id!r} hold {held} bytes, limit {limit}", status=429)
        return added

    def _make_stream(self, run: _StoredRun) -> LiveLog:
        live = LiveLog(Log(), self._wakes)
        if run.record.end is not None:
            live.log.close(run.record.end)
        return live

    def _run(self, run_id: str) -> _StoredRun:
        run = self._runs.get(run_id)
        if run is None:
            raise RunNotFound(f"no run {run_id!r}: it does not exist or has expired (Retention.after_end)")
        return run

    # Runs

    async def commit(
        self, record: RunRecord, *, expect: int, change: ChangeMark, floors: Mapping[tuple[str, str], int] | None = None
    ) -> int:
        run = self._runs.get(record.id)
        if run is not None:
            version = run.marks.get(change)
            if version is not None:
                return version
        stored = 0 if run is None else run.record.version
        over = run is not None and run.record.is_completed
        if over or stored != expect or (expect and record.version != expect + 1):
            current = None if run is None else run.record
            raise VersionConflict(f"run {record.id!r} has version {stored}, expected {expect}", current=current)
        for (name, producer), floor in (floors or {}).items():
            live = None if run is None else run.streams.get(name)
            if (0 if live is None else live.log.counted(producer)) < floor:
                raise StreamBehind(f"stream {name!r} has lost entries that were acknowledged")
        if run is None:
            if self._full:
                self._refuse()
            run = self._runs[record.id] = _StoredRun(record)
        if not run.record_size or record.is_completed or record.metadata is not run.record.metadata:
            record_size = _record_bytes(record)
            self._resize(run, run.size - run.record_size + record_size)
            run.record_size = record_size
        was = run.record.status if stored else None
        run.record = record
        run.marks[change] = record.version
        if len(run.marks) > MARKS_KEPT:
            del run.marks[next(iter(run.marks))]
        self._schedule(record, was)
        self._publish(run_topic(record.id), record)
        if record.end is not None:
            self._full = False
            self._room_at = self._retention.total_bytes
            for live in run.streams.values():
                live.log.close(record.end)
                live.wake()
        self._publish_topics(run)
        if self._size > self._room_at:
            self._make_room(record.id)
        return record.version

    def _schedule(self, record: RunRecord, was: Status | None) -> None:
        due = due_times(record, cancel_s=self._timeouts.cancel, after_end_s=self._retention.after_end)
        for kind in ("delay", "ttl", "cancel", "expiry"):
            self._due[kind].set(record.id, due.get(kind))
        if record.status is not was:
            for kind, status in _LEASES.items():
                self._due[kind].set(record.id, self._lease_end() if record.status is status else None)

    def _lease_end(self) -> int:
        return self._now_ms() + round(self._timeouts.lease * 1000)

    def _publish_topics(self, run: _StoredRun) -> None:
        topics = run.record.topics
        for topic in topics:
            self._publish(topic, run.record)
        run.published_to = tuple(dict.fromkeys((*run.published_to, *topics)))

    def _publish(self, topic: str, record: RunRecord) -> None:
        entry = self._topics.get(topic) or self._add_topic(topic)
        if entry.index.update(record.id, record.version):
            entry.waiting.wake()

    def _add_topic(self, topic: str) -> _MemoryTopic:
        self._topics[topic] = _MemoryTopic(TopicIndex(secrets.token_hex(4), max_runs=self._limits.topic_runs))
        return self._topics[topic]

    async def load(self, run_ids: Sequence[str]) -> list[RunRecord | None]:
        return [None if (run := self._runs.get(run_id)) is None else run.record for run_id in run_ids]

    async def changes(self, topic: str, *, after: Cursor | None = None, limit: int = 1000) -> Changes:
        async with self.follow(topic) as followed:
            return await followed.changes(after, limit=limit)

    @asynccontextmanager
    async def follow(self, topic: str) -> AsyncIterator[LiveTopic]:
        entry = self._topics.get(topic) or self._add_topic(topic)
        entry.followers += 1
        try:
            yield entry
        finally:
            entry.followers -= 1
            self._drop_unused(topic, entry)

    def _drop_unused(self, topic: str, entry: _MemoryTopic) -> None:
        if not entry.followers and not len(entry.index) and self._topics.get(topic) is entry:
            del self._topics[topic]

    async def remove(self, run_id: str) -> None:
        self._remove(run_id)

    def _remove(self, run_id: str) -> None:
        run = self._runs.pop(run_id, None)
        if run is None:
            return
        self._size -= run.size
        self._full = self._full and self._size > self._retention.total_bytes
        for schedule in self._due.values():
            schedule.set(run_id, None)
        claim = run.record.claim
        if claim is not None and self._claims.get(claim, ("", 0))[0] == run_id:
            self._drop_claim(claim)
        for topic in (run_topic(run_id), *run.published_to):
            entry = self._topics.get(topic)
            if entry is not None:
                entry.index.forget(run_id)
                entry.waiting.wake()
                self._drop_unused(topic, entry)
        for live in run.streams.values():
            live.fail(RunNotFound(f"run {run_id!r} has expired (Retention.after_end)"))

    # Claims, due times, leases

    async def claim(self, key: str, value: str, *, ttl_s: float) -> str:
        now_ms = self._now_ms()
        self._drop_expired_claims(now_ms, limit=100)
        stored = self._claimed(key, now_ms)
        if stored is not None:
            return stored
        if self._full:
            self._refuse()
        if key in self._claims:
            self._drop_claim(key)
        expires_ms = now_ms + round(ttl_s * 1000)
        self._claims[key] = (value, expires_ms)
        self._claims_expire.set(key, expires_ms)
        self._size += _claim_bytes(key, value)
        if self._size > self._room_at:
            self._make_room("")
        return value

    async def claimed(self, key: str) -> str | None:
        return self._claimed(key, self._now_ms())

    def _claimed(self, key: str, now_ms: int) -> str | None:
        value, expires_ms = self._claims.get(key, ("", 0))
        return value if expires_ms > now_ms else None

    def _drop_expired_claims(self, now_ms: int, *, limit: int) -> None:
        for expired in self._claims_expire.due(now_ms, limit=limit):
            self._drop_claim(expired)

    def _drop_claim(self, key: str) -> None:
        value, _ = self._claims.pop(key)
        self._claims_expire.set(key, None)
        self._size -= _claim_bytes(key, value)
        self._full = self._full and self._size > self._retention.total_bytes

    async def due(self, kind: str, *, limit: int = 100, skip: int = 0) -> list[str]:
        return self._due[kind].due(self._now_ms(), skip + limit)[skip:]

    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        for run_id in run_ids:
            run = self._runs.get(run_id)
            if run is None or (run.record.status is Status.EXECUTING and run.record.owner != owner):
                continue
            for kind in _LEASES:
                if run_id in self._due[kind]:
                    self._due[kind].set(run_id, self._lease_end())

    async def enqueued(self, run_id: str) -> None:
        self._due["enqueue"].set(run_id, None)

    async def publish(self, run_id: str) -> None:
        run = self._runs.get(run_id)
        if run is not None:
            self._publish_topics(run)

    async def ping(self) -> None:
        return None

    # Retention

    def _resize(self, run: _StoredRun, size: int) -> None:
        self._size += size - run.size
        run.size = size

    def _make_room(self, run_id: str) -> None:
        """Free memory until a tenth of the total is unused: remove ended runs, oldest first, then trim large streams.

        The run that was just written to stays, because its writer gets an acknowledgement. If less can be
        freed, the next attempt is made after some growth or when a run ends, and until then appends beyond the total
        are rejected.
        """
        total = self._retention.total_bytes
        target = total * 9 // 10
        self._drop_expired_claims(self._now_ms(), limit=len(self._claims))
        expiry = self._due["expiry"]
        while self._size > target and (ended := [one for one in expiry.due(math.inf, 2) if one != run_id]):
            self._remove(ended[0])
        if run_id in expiry:
            return  # it has ended, so the next write to another run removes it
        if self._size > target:
            self._halve_streams(target)
        self._room_at = total if self._size <= target else max(total, self._size + total // 50)
        self._full = self._size > total

    def _halve_streams(self, target: int) -> None:
        """Halve the largest streams until the target is met. Inputs and the last entry of each stream stay."""
        streams = [(run, name, live.log) for run in self._runs.values() for name, live in run.streams.items()]
        largest = [
            (-log.size, number, run, log)
            for number, (run, name, log) in enumerate(streams)
            if log.next - log.first > 1 and not name.startswith(HIDDEN_STREAM)
        ]
        heapq.heapify(largest)
        while self._size > target and largest:
            _, number, run, log = largest[0]
            before = _log_bytes(log)
            log.trim(log.size // 2)
            self._resize(run, run.size - before + _log_bytes(log))
            if log.next - log.first > 1:
                heapq.heapreplace(largest, (-log.size, number, run, log))
            else:
                heapq.heappop(largest)


def _log_bytes(log: Log) -> int:
    return log.size + ENTRY_BYTES * (log.next - log.first) + _PRODUCER_BYTES * log.producers


def _claim_bytes(key: str, value: str) -> int:
    return _CLAIM_BYTES + len(key) + len(value)


def _record_bytes(record: RunRecord) -> int:
    metadata = len(encode_value(record.metadata)) if record.metadata else 0
    payload = len(record.payload_json or b"") + len(record.payload_meta_json or b"")
    return _RECORD_BYTES + payload + len(record.output_json or b"") + metadata
