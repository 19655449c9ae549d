"""The broker of one process: readers follow its storage directly.

No method suspends, so each is atomic on its event loop, and a cancelled call has not begun. Nothing leaves the process.
The data survives a restart of the `Realtime`, not of the process.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

from asgi_realtime.brokers.base import INPUT_COST, MARKS_KEPT, ChangeMark, LiveTopic
from asgi_realtime.brokers.due_times import DueTimes
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.brokers.memory_costs import (
    APPEND_COST,
    MARK,
    NEW_STREAM_COST,
    PRODUCER,
    claim_cost,
    record_cost,
    stream_cost,
)
from asgi_realtime.brokers.memory_runs import Appender, StoredRun
from asgi_realtime.brokers.memory_space import Party, Space
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.core.errors import LimitExceeded, RunNotFound, StreamBehind
from asgi_realtime.core.log import End, Log, Page, Position, Producer, StreamKey
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import DUE_KINDS, LEASE_KINDS, Status, StoredRecord, due_times, lease_kind, run_topic
from asgi_realtime.core.topics import Changes, Cursor, TopicIndex
from asgi_realtime.loop.waiting import WaitList, WakeSoon

Clock = Callable[[], float]


class _MemoryTopic:
    __slots__ = ("failure", "followers", "index", "waiting")

    def __init__(self, index: TopicIndex) -> None:
        self.index = index
        self.waiting = WaitList()
        self.followers = 0
        self.failure: Exception | None = None

    async def changes(self, cursor: Cursor | None, *, limit: int = 1000) -> Changes:
        return self.index.after(cursor, limit=limit)


class _Reading:
    """What `MemoryBroker.live` returns. The frames of a generator would take 500 bytes for each idle reader."""

    __slots__ = ("_broker", "_key", "_live", "_run")

    def __init__(self, broker: MemoryBroker, key: StreamKey) -> None:
        self._broker = broker
        self._key = key

    async def __aenter__(self) -> LiveLog:
        self._run, self._live = self._broker._enter_stream(self._key)
        return self._live

    async def __aexit__(self, *exc_info: object) -> None:
        self._broker._leave_stream(self._key, self._run, self._live)


class _Following:
    """What `MemoryBroker.follow` returns."""

    __slots__ = ("_broker", "_entry", "_topic")

    def __init__(self, broker: MemoryBroker, topic: str) -> None:
        self._broker = broker
        self._topic = topic

    async def __aenter__(self) -> LiveTopic:
        self._entry = self._broker._enter_topic(self._topic)
        return self._entry

    async def __aexit__(self, *exc_info: object) -> None:
        self._broker._leave_topic(self._topic, self._entry)


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
        self._runs: dict[str, StoredRun] = {}
        self._topics: dict[str, _MemoryTopic] = {}
        self._claims: dict[str, tuple[str, int]] = {}
        self._claims_expire = DueTimes()
        self._due = {kind: DueTimes() for kind in DUE_KINDS}
        self._claim_parties: dict[str, Party] = {}  # of claims that owners have made
        self._space = Space(self._retention, self._remove)
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
        """The memory in use, in bytes, as `memory_costs` estimates it."""
        return self._space.size

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
        space = self._space
        if space.size + sum(map(len, items)) + APPEND_COST * len(items) + NEW_STREAM_COST > space.owners_total:
            self._make_room(run.party, self._growth(key, log, items, producer))
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
        cost = stream_cost(log)
        grown = cost - live.cost
        live.cost = cost
        run.party.size += grown  # not `space.change`: the party holds this run already
        space.size += grown
        live.wake()
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

    def appender(self, key: StreamKey) -> Appender:
        """The short path into a stream, which must have chunks and not be an input."""
        run = self._run(key.run)
        run.appenders = run.appenders or {}
        if key.name not in run.appenders:
            live, stream_bytes = run.streams[key.name], self._retention.stream_bytes
            run.appenders[key.name] = Appender(
                run.party, live, self._space, clock=self._clock, stream_bytes=stream_bytes
            )
        return run.appenders[key.name]

    async def read(self, key: StreamKey, *, after: int = -1, limit: int = 500) -> Page:
        run = self._run(key.run)
        live = run.streams.get(key.name)
        log = Log() if live is None else live.log
        return Page(log.entries(after, limit), log.first, log.next, log.end or run.record.end)

    async def produced(self, key: StreamKey, producer_id: str) -> int:
        live = self._run(key.run).streams.get(key.name)
        return 0 if live is None else live.log.counted(producer_id)

    def live(self, key: StreamKey) -> AbstractAsyncContextManager[LiveLog]:
        return _Reading(self, key)

    def _enter_stream(self, key: StreamKey) -> tuple[StoredRun, LiveLog]:
        """Add a reader to a stream, until `_leave_stream`."""
        run = self._run(key.run)
        live = run.streams.get(key.name)
        if live is None:
            live = run.streams[key.name] = self._make_stream(run)
        live.enter()
        return run, live

    def _leave_stream(self, key: StreamKey, run: StoredRun, live: LiveLog) -> None:
        """Remove a reader from a stream, and the stream if it was never written."""
        live.leave()
        if not live.readers and not live.log.next and live.end in (None, run.record.end):
            run.streams.pop(key.name, None)

    def _growth(self, key: StreamKey, log: Log, items: Sequence[bytes], producer: Producer | None) -> int:
        """What an append costs: nothing if its items are known or displace as much. Raises `ProducerGap`."""
        new = items if producer is None else log.unseen(items, producer)
        if not new or log.end is not None:
            return 0
        size = sum(map(len, new)) + APPEND_COST * len(new)
        if not key.hidden and size <= log.size and log.size + size > self._retention.stream_bytes:
            return 0 if producer is None else PRODUCER
        return size + (0 if log.next and producer is None else NEW_STREAM_COST)

    def _check_inputs(self, run: StoredRun, items: Sequence[bytes]) -> int:
        """The bytes that an append adds to the inputs of a run. Raises `LimitExceeded`."""
        added, held, limit = sum(map(len, items)) + INPUT_COST * len(items), run.inputs_bytes, self._limits.inputs_bytes
        if items and held + added > limit:
            raise LimitExceeded(f"the inputs of run {run.record.id!r} hold {held} bytes, limit {limit}", status=429)
        return added

    def _make_stream(self, run: StoredRun) -> LiveLog:
        live = LiveLog(Log(), self._wakes)
        if run.record.end is not None:
            live.log.close(run.record.end)
        return live

    def _run(self, run_id: str) -> StoredRun:
        run = self._runs.get(run_id)
        if run is None:
            raise RunNotFound(f"no run {run_id!r}: it does not exist or has expired (Retention.after_end)")
        return run

    # Runs

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
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
            party = self._space.party(record.token_owner)
            self._make_room(party, record_cost(record, record.topics) + MARK)
            run = self._runs[record.id] = StoredRun(record, party)
        was = run.record.status if stored else None
        run.record = record
        run.marks[change] = record.version
        if len(run.marks) > MARKS_KEPT:
            del run.marks[next(iter(run.marks))]
        self._schedule(record, was)
        self._publish(run_topic(record.id), record)
        if record.end is not None:
            for live in run.streams.values():
                live.log.close(record.end)
                live.wake()
        self._publish_topics(run)
        self._count_record(run)
        if record.id not in self._due["on_end"]:
            self._note_ended(run)
        if not self._space.fits(run.party):
            self._drop_expired_claims(self._now_ms(), limit=len(self._claims))
            self._space.make_room(run.party, keep=record.id)
        return record.version

    def _schedule(self, record: StoredRecord, was: Status | None) -> None:
        due = due_times(record, cancel_s=self._timeouts.cancel, after_end_s=self._retention.after_end)
        for kind in ("delay", "ttl", "cancel", "expiry"):
            self._due[kind].set(record.id, due.get(kind))
        if record.is_completed:
            self._due["unwatched"].set(record.id, None)
        if record.status is not was:
            needed = lease_kind(record)
            for kind in LEASE_KINDS:
                self._due[kind].set(record.id, self._lease_end() if kind == needed else None)

    def _note_ended(self, run: StoredRun) -> None:
        """Let the run make room for others, if it is over."""
        if run.record.completed_at_ms is not None:
            self._space.ended(run.party, run.record.id, run.record.completed_at_ms)

    def _lease_end(self) -> int:
        return self._now_ms() + round(self._timeouts.lease * 1000)

    def _publish_topics(self, run: StoredRun) -> None:
        topics = run.record.topics
        for topic in topics:
            self._publish(topic, run.record)
        run.published_to = tuple(dict.fromkeys((*run.published_to, *topics)))

    def _publish(self, topic: str, record: StoredRecord) -> None:
        entry = self._topics.get(topic) or self._add_topic(topic)
        if entry.index.update(record.id, record.version):
            entry.waiting.wake()

    def _add_topic(self, topic: str) -> _MemoryTopic:
        self._topics[topic] = _MemoryTopic(TopicIndex(secrets.token_hex(4), max_runs=self._limits.topic_runs))
        return self._topics[topic]

    async def load(self, run_ids: Sequence[str]) -> list[StoredRecord | None]:
        return [None if (run := self._runs.get(run_id)) is None else run.record for run_id in run_ids]

    async def changes(self, topic: str, *, after: Cursor | None = None, limit: int = 1000) -> Changes:
        async with self.follow(topic) as followed:
            return await followed.changes(after, limit=limit)

    def follow(self, topic: str) -> AbstractAsyncContextManager[LiveTopic]:
        return _Following(self, topic)

    def _enter_topic(self, topic: str) -> _MemoryTopic:
        """Add a follower to a topic, until `_leave_topic`."""
        entry = self._topics.get(topic) or self._add_topic(topic)
        entry.followers += 1
        return entry

    def _leave_topic(self, topic: str, entry: _MemoryTopic) -> None:
        """Remove a follower from a topic."""
        entry.followers -= 1
        self._drop_unused(topic, entry)

    def _drop_unused(self, topic: str, entry: _MemoryTopic) -> None:
        if not entry.followers and not len(entry.index) and self._topics.get(topic) is entry:
            del self._topics[topic]

    async def remove(self, run_id: str) -> None:
        if run_id not in self._due["on_end"]:
            self._remove(run_id)

    def _remove(self, run_id: str) -> None:
        run = self._runs.pop(run_id, None)
        if run is None:
            return
        self._space.forget(run.party, run_id)
        self._space.change(run.party, -run.size)
        for schedule in self._due.values():
            schedule.set(run_id, None)
        for claim in run.record.claims:
            if self._claims.get(claim, ("", 0))[0] == run_id:
                self._drop_claim(claim)
        for topic in (run_topic(run_id), *run.published_to):
            entry = self._topics.get(topic)
            if entry is not None:
                entry.index.forget(run_id)
                entry.waiting.wake()
                self._drop_unused(topic, entry)
        for live in run.streams.values():
            live.fail(RunNotFound(f"run {run_id!r} has expired (Retention.after_end)"))
        for appender in (run.appenders or {}).values():
            appender.detach()

    # Claims, due times, leases

    async def claim(
        self, key: str, value: str, *, ttl_s: float, owner: str | None = None, instead_of: str | None = None
    ) -> str:
        now_ms = self._now_ms()
        self._drop_expired_claims(now_ms, limit=100)
        stored = self._claimed(key, now_ms)
        if stored is not None and stored != instead_of:
            return stored
        party = self._space.party(owner)
        self._make_room(party, claim_cost(key, value) - (0 if stored is None else claim_cost(key, stored)))
        if key in self._claims:
            self._drop_claim(key)
        expires_ms = now_ms + round(ttl_s * 1000)
        self._claims[key] = (value, expires_ms)
        self._claims_expire.set(key, expires_ms)
        self._space.change(party, claim_cost(key, value))
        if owner is not None:
            self._claim_parties[key] = party
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
        self._space.change(self._claim_parties.pop(key, self._space.host), -claim_cost(key, value))

    async def due(self, kind: str, *, limit: int = 100, skip: int = 0) -> list[str]:
        return self._due[kind].due(self._now_ms(), skip + limit)[skip:]

    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        for run_id in run_ids:
            run = self._runs.get(run_id)
            if run is None or (run.record.status is Status.EXECUTING and run.record.owner != owner):
                continue
            for kind in LEASE_KINDS:
                if run_id in self._due[kind]:
                    self._due[kind].set(run_id, self._lease_end())

    async def enqueued(self, run_id: str) -> None:
        self._due["enqueue"].set(run_id, None)

    async def take_on_end(self, run_id: str) -> bool:
        is_due = self._due["on_end"].is_due(run_id, self._now_ms())
        if is_due:
            self._due["on_end"].set(run_id, self._lease_end())
        return is_due

    async def on_end_called(self, run_id: str) -> None:
        if run_id in self._due["on_end"]:
            self._due["on_end"].set(run_id, None)
            self._note_ended(self._runs[run_id])

    async def watch(self, run_id: str, *, process: str, readers: int, grace_s: float | None) -> None:
        run = self._runs.get(run_id)
        if run is None or run.record.is_completed:
            return
        run.watchers = run.watchers or {}
        run.watchers[process] = (readers, self._lease_end() if readers else self._now_ms())
        if grace_s is not None:
            last_ms = max(until_ms for _, until_ms in run.watchers.values())
            self._due["unwatched"].set(run_id, last_ms + round(grace_s * 1000))

    async def watchers(self, run_id: str) -> int:
        run, now_ms = self._runs.get(run_id), self._now_ms()
        if run is None or run.record.is_completed or run.watchers is None:
            return 0
        return sum(readers for readers, until_ms in run.watchers.values() if now_ms < until_ms)

    async def publish(self, run_id: str) -> None:
        run = self._runs.get(run_id)
        if run is not None:
            self._publish_topics(run)

    async def ping(self) -> None:
        self.warnings = self._space.warnings

    # Space

    def _make_room(self, party: Party, grown: int) -> None:
        """Raises `LimitExceeded` if the party cannot hold that much more."""
        if not self._space.fits(party, grown):
            self._drop_expired_claims(self._now_ms(), limit=len(self._claims))
            self._space.admit(party, grown)

    def _count_record(self, run: StoredRun) -> None:
        topics = dict.fromkeys((*run.published_to, *run.record.topics))
        size = record_cost(run.record, topics) + MARK * len(run.marks)
        self._grow(run, size - run.record_size)
        run.record_size = size

    def _grow(self, run: StoredRun, grown: int) -> None:
        self._space.change(run.party, grown)
