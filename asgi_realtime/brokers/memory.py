"""The broker of one process: its storage is what readers follow.

Every method does its work without suspending, so each is atomic on its loop and a cancelled call has not begun. Nothing
leaves the process; a restart of the `Realtime` keeps what is stored, a restart of the process starts empty.
"""

from __future__ import annotations

import heapq
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager

from asgi_realtime.brokers.base import MARKS_KEPT, ChangeMark, LiveTopic
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
"""What a stored run costs besides its payload, output, metadata and streams, roughly."""

ENTRY_BYTES = 64
"""What an entry costs besides the bytes of its frame, roughly."""

_PRODUCER_BYTES = 220
"""What the count of a producer costs, roughly: each append over HTTP is one of its own."""

_CLAIM_BYTES = 256
"""What a claim costs besides its key and value, roughly."""

_LEASES = {"enqueue": Status.QUEUED, "lease": Status.EXECUTING}
"""What a run is due for a lease after it came to a status, unless somebody has it in hand."""

Clock = Callable[[], float]


class _StoredRun:
    """A run and all that lives and ends with it."""

    __slots__ = ("marks", "record", "record_size", "size", "streams", "told")

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.streams: dict[str, LiveLog] = {}
        self.marks: dict[ChangeMark, int] = {}  # the versions that the newest commits made
        self.told: tuple[str, ...] = ()  # topics that the run was ever told to
        self.record_size = 0
        self.size = 0


class _MemoryTopic:
    __slots__ = ("followers", "index", "waiting")

    def __init__(self, index: TopicIndex) -> None:
        self.index = index
        self.waiting = WaitList()
        self.followers = 0

    async def changes(self, cursor: Cursor | None, *, limit: int = 1000) -> Changes:
        return self.index.after(cursor, limit=limit)


class _Schedule:
    """Times at which runs are due, for one kind. Entries that were superseded are skipped when they come up."""

    __slots__ = ("_at", "_heap")

    def __init__(self) -> None:
        self._at: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._at

    def set(self, run_id: str, at_ms: int | None) -> None:
        if at_ms is None:
            self._at.pop(run_id, None)
        elif self._at.get(run_id) != at_ms:
            self._at[run_id] = at_ms
            heapq.heappush(self._heap, (at_ms, run_id))
        if len(self._heap) > 64 + 2 * len(self._at):
            self._heap = [(at, run) for run, at in self._at.items()]
            heapq.heapify(self._heap)

    def due(self, now_ms: int, limit: int) -> list[str]:
        """The due runs; they stay due."""
        found: dict[str, int] = {}
        while self._heap and self._heap[0][0] <= now_ms and len(found) < limit:
            at_ms, run_id = heapq.heappop(self._heap)
            if self._at.get(run_id) == at_ms:
                found[run_id] = at_ms
        for run_id, at_ms in found.items():
            heapq.heappush(self._heap, (at_ms, run_id))
        return list(found)

    def first(self, *, besides: str) -> str | None:
        """The run that is due next, if any, leaving one out."""
        left_out: tuple[int, str] | None = None
        while self._heap:
            at_ms, run_id = self._heap[0]
            current = self._at.get(run_id) == at_ms
            if current and run_id != besides:
                break
            heapq.heappop(self._heap)
            left_out = (at_ms, run_id) if current else left_out
        found = self._heap[0][1] if self._heap else None
        if left_out is not None:
            heapq.heappush(self._heap, left_out)
        return found


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
        self._claims_expire = _Schedule()
        self._due = {kind: _Schedule() for kind in DUE_KINDS}
        self._size = 0
        self._room_at = self._retention.total_bytes  # the size at which room is made
        self._full = False  # there was no room to be made
        self._wakes = WakeSoon()

    async def __aenter__(self) -> MemoryBroker:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        return None

    @property
    def home(self) -> str:
        return f"{self._name}-{os.getpid()}"  # what is written after a fork, the other one does not have

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    @property
    def size(self) -> int:
        """Bytes held, roughly: retained frames, payloads, outputs, metadata, claims, and a sum for each of these."""
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
        if key.hidden:
            self._check_inputs(run, items if producer is None else log.unseen(items, producer))
        position = log.append(items, self._now_ms(), producer=producer, at=at)
        if end is not None:
            log.close(end)
        run.streams[key.name] = live  # not before: a refused append leaves nothing behind
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
                run.streams.pop(key.name, None)  # only readers ever knew it

    def _refuse(self) -> None:
        limit = self._retention.total_bytes
        raise LimitExceeded(f"the broker holds {self._size} bytes of runs that go on, limit {limit}", status=503)

    def _check_inputs(self, run: _StoredRun, items: Sequence[bytes]) -> None:
        held = sum(live.log.size for name, live in run.streams.items() if name.startswith(HIDDEN_STREAM))
        limit = self._limits.inputs_bytes
        if items and held + sum(map(len, items)) > limit:
            raise LimitExceeded(f"the inputs of run {run.record.id!r} hold {held} bytes, limit {limit}", status=429)

    def _make_stream(self, run: _StoredRun) -> LiveLog:
        live = LiveLog(Log(), self._wakes)
        if run.record.end is not None:
            live.log.close(run.record.end)
        return live

    def _run(self, run_id: str) -> _StoredRun:
        run = self._runs.get(run_id)
        if run is None:
            raise RunNotFound(f"no run {run_id!r}: it never was, or it is past its retention")
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
            if live is None or live.log.counted(producer) < floor:
                raise StreamBehind(f"stream {name!r} has less than {floor} items of one of its producers")
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
        self._tell(run_topic(record.id), record)
        if record.end is not None:
            self._full = False
            self._room_at = self._retention.total_bytes
            for live in run.streams.values():
                live.log.close(record.end)
                live.wake()
        self._tell_topics(run)
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

    def _tell_topics(self, run: _StoredRun) -> None:
        topics = run.record.topics
        for topic in topics:
            self._tell(topic, run.record)
        run.told = tuple(dict.fromkeys((*run.told, *topics)))

    def _tell(self, topic: str, record: RunRecord) -> None:
        entry = self._topics.get(topic)
        if entry is None:
            entry = self._add_topic(topic)
        if entry.index.tell(record.id, record.version):
            entry.waiting.wake()

    def _add_topic(self, topic: str) -> _MemoryTopic:
        index = TopicIndex(secrets.token_hex(4), max_runs=self._limits.topic_runs)
        entry = self._topics[topic] = _MemoryTopic(index)
        return entry

    async def load(self, run_ids: Sequence[str]) -> list[RunRecord | None]:
        return [None if (run := self._runs.get(run_id)) is None else run.record for run_id in run_ids]

    async def changes(self, topic: str, *, after: Cursor | None = None, limit: int = 1000) -> Changes:
        async with self.follow(topic) as followed:
            return await followed.changes(after, limit=limit)

    @asynccontextmanager
    async def follow(self, topic: str) -> AsyncIterator[LiveTopic]:
        entry = self._topics.get(topic)
        if entry is None:
            entry = self._add_topic(topic)
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
        for topic in (run_topic(run_id), *run.told):
            entry = self._topics.get(topic)
            if entry is not None:
                entry.index.forget(run_id)
                entry.waiting.wake()
                self._drop_unused(topic, entry)
        for live in run.streams.values():
            live.fail(RunNotFound(f"run {run_id!r} is past its retention"))

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
            self._tell_topics(run)

    async def ping(self) -> None:
        return None

    # Retention

    def _resize(self, run: _StoredRun, size: int) -> None:
        self._size += size - run.size
        run.size = size

    def _make_room(self, run_id: str) -> None:
        """Get a tenth below the total: runs that ended first go, then the older halves of the largest streams.

        The run that has just been written to stays: its writer was told that this is stored. If less can be freed, the
        next try comes after some growth or once a run has ended, and until then nothing is appended beyond the total.
        """
        total = self._retention.total_bytes
        target = total * 9 // 10
        self._drop_expired_claims(self._now_ms(), limit=len(self._claims))
        expiry = self._due["expiry"]
        while self._size > target and (ended := expiry.first(besides=run_id)) is not None:
            self._remove(ended)
        if run_id in expiry:
            return  # it has ended and goes next, as soon as another is written to
        if self._size > target:
            self._halve_streams(target)
        self._room_at = total if self._size <= target else max(total, self._size + total // 50)
        self._full = self._size > total

    def _halve_streams(self, target: int) -> None:
        """Trim the largest streams, as far as they can be: the last entry stays, and so do inputs."""
        found = (
            (-live.log.size, number, run, live.log)
            for number, (run, name, live) in enumerate(self._streams())
            if live.log.next - live.log.first > 1 and not name.startswith(HIDDEN_STREAM)
        )
        largest = list(found)
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

    def _streams(self) -> Iterator[tuple[_StoredRun, str, LiveLog]]:
        for run in self._runs.values():
            for name, live in run.streams.items():
                yield run, name, live


def _log_bytes(log: Log) -> int:
    return log.size + ENTRY_BYTES * (log.next - log.first) + _PRODUCER_BYTES * log.producers


def _claim_bytes(key: str, value: str) -> int:
    return _CLAIM_BYTES + len(key) + len(value)


def _record_bytes(record: RunRecord) -> int:
    metadata = len(encode_value(record.metadata)) if record.metadata else 0
    payload = len(record.payload_json or b"") + len(record.payload_meta_json or b"")
    return _RECORD_BYTES + payload + len(record.output_json or b"") + metadata
