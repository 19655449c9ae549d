"""The suite fails on sloppy brokers. Each has a mistake that a real backend has made, or nearly made."""

from __future__ import annotations

import functools
import heapq
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest

from asgi_realtime.brokers.base import ChangeMark, Changes, Cursor, End, Page, Position, Producer, StreamKey
from asgi_realtime.brokers.due_times import DueTimes
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.brokers.memory import MemoryBroker, _MemoryTopic
from asgi_realtime.brokers.memory_runs import StoredRun
from asgi_realtime.core.errors import RealtimeError, StreamClosed
from asgi_realtime.core.log import Log
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import Status, StoredRecord
from asgi_realtime.core.topics import TopicIndex
from asgi_realtime.loop.waiting import WaitList
from asgi_realtime.testing import conformance
from asgi_realtime.testing.conformance.kit import pause
from tests.brokers.backends import Memory

# Streams


class Mirrors(MemoryBroker, ABC):
    """Readers follow a copy, which has to be joined with the storage."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.mirrors: dict[StreamKey, list[LiveLog]] = {}

    def append_nowait(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        before = len(self._all(key)) if key.run in self._runs else 0
        position = super().append_nowait(key, items, producer=producer, end=end, at=at)
        for mirror in self.mirrors.get(key, []):
            mirror.log.append(self._all(key)[before:], 0)
            if end is not None:
                mirror.log.close(end)
            mirror.wake()
        return position

    def _all(self, key: StreamKey) -> list[bytes]:
        live = self._runs[key.run].streams.get(key.name)
        return [] if live is None else [entry.data for entry in live.log.entries(-1, 10_000)]

    @asynccontextmanager
    async def live(self, key: StreamKey) -> AsyncIterator[LiveLog]:
        mirror = LiveLog(Log())
        await self._join(key, mirror)
        ended = self._runs[key.run].streams.get(key.name)
        if ended is not None and ended.end is not None:
            mirror.log.close(ended.end)
        yield mirror

    @abstractmethod
    async def _join(self, key: StreamKey, mirror: LiveLog) -> None: ...


class JoinsInOneStep(Mirrors):
    """Not sloppy: shows that the next two are caught because of their join."""

    async def _join(self, key: StreamKey, mirror: LiveLog) -> None:
        mirror.log.append(self._all(key), 0)
        self.mirrors.setdefault(key, []).append(mirror)


class ReadsThenSubscribes(Mirrors):
    async def _join(self, key: StreamKey, mirror: LiveLog) -> None:
        mirror.log.append(self._all(key), 0)
        await pause(2)
        self.mirrors.setdefault(key, []).append(mirror)


class SubscribesThenReads(Mirrors):
    async def _join(self, key: StreamKey, mirror: LiveLog) -> None:
        self.mirrors.setdefault(key, []).append(mirror)
        await pause(2)
        end, mirror.log.end = mirror.log.end, None
        mirror.log.append(self._all(key), 0)
        mirror.log.end = end


class ForgetfulLog(Log):
    """Counts from 0 again when it is trimmed."""

    def trim(self, max_bytes: int) -> int:
        freed = super().trim(max_bytes)
        kept = [entry.data for entry in self.entries(-1, 10_000)]
        if freed:
            self.__init__()  # type: ignore[misc]
            self.append(kept, 0)
        return freed


class ReusesSeqs(MemoryBroker):
    @staticmethod
    def _make_stream(run: StoredRun) -> LiveLog:
        return LiveLog(ForgetfulLog())


class TrimsInputs(MemoryBroker):
    def _check_inputs(self, run: StoredRun, items: Sequence[bytes]) -> int:
        for live in run.streams.values():
            live.log.trim(2000)
        return 0


class CountsFramesOfInputs(MemoryBroker):
    def _check_inputs(self, run: StoredRun, items: Sequence[bytes]) -> int:
        run.inputs_bytes = sum(live.log.size for live in run.streams.values())
        return super()._check_inputs(run, items)


class CountsRetriedInputs(MemoryBroker):
    def append_nowait(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        if key.hidden:
            self._check_inputs(self._run(key.run), items)
        return super().append_nowait(key, items, producer=producer, end=end, at=at)


class ForgetsProducersWithTheirEntries(MemoryBroker):
    def append_nowait(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        position = super().append_nowait(key, items, producer=producer, end=end, at=at)
        log = self._runs[key.run].streams[key.name].log
        for name, (count, last) in list(log._producers.items()):
            if last < log.first and count:
                del log._producers[name]
        return position


class ReportsNoGaps(MemoryBroker):
    async def read(self, key: StreamKey, *, after: int = -1, limit: int = 500) -> Page:
        return (await super().read(key, after=after, limit=limit))._replace(first=0)


class IgnoresProducers(MemoryBroker):
    def append_nowait(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        return super().append_nowait(key, items, end=end)


class AcceptsGapsInProducers(MemoryBroker):
    def append_nowait(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        run = self._runs.get(key.run)
        live = None if run is None else run.streams.get(key.name)
        if producer is not None and live is not None:
            known, _ = live.log._producers.get(producer.id, (0, -1))
            producer = producer._replace(start=min(producer.start, known))
        return super().append_nowait(key, items, producer=producer, end=end, at=at)


class ChecksTheEndBeforeTheProducer(MemoryBroker):
    def append_nowait(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        live = self._run(key.run).streams.get(key.name)
        if live is not None and live.end is not None and items:
            raise StreamClosed("closed")
        return super().append_nowait(key, items, producer=producer, end=end, at=at)


class CountsWhatIsRetained(MemoryBroker):
    async def produced(self, key: StreamKey, producer_id: str) -> int:
        counted = await super().produced(key, producer_id)
        live = self._runs[key.run].streams.get(key.name)
        return counted if live is None else min(counted, live.log.next - live.log.first)


class ForgetsCountsAtTheEnd(MemoryBroker):
    async def produced(self, key: StreamKey, producer_id: str) -> int:
        counted = await super().produced(key, producer_id)
        return 0 if self._runs[key.run].record.is_completed else counted


class CountsAllProducers(MemoryBroker):
    async def produced(self, key: StreamKey, producer_id: str) -> int:
        return (await self.read(key)).next


class CountsForTheRun(MemoryBroker):
    async def produced(self, key: StreamKey, producer_id: str) -> int:
        await super().produced(key, producer_id)
        return sum(live.log.counted(producer_id) for live in self._runs[key.run].streams.values())


class CountsZeroForUnknownRuns(MemoryBroker):
    async def produced(self, key: StreamKey, producer_id: str) -> int:
        return await super().produced(key, producer_id) if key.run in self._runs else 0


class AppendsOneByOne(MemoryBroker):
    async def append(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        for number, item in enumerate(items):
            place = None if producer is None else Producer(producer.id, producer.start + number)
            self.append_nowait(key, [item], producer=place)
            await pause(1)
        return self.append_nowait(key, [], end=end)


class LastEndWins(MemoryBroker):
    def append_nowait(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        position = super().append_nowait(key, items, producer=producer, end=end, at=at)
        if end is not None:
            self._runs[key.run].streams[key.name].log.end = end
        return position


class DropsEndsWithReaders(MemoryBroker):
    """Drops a stream without entries with its last reader, though a writer has ended it."""

    @asynccontextmanager
    async def live(self, key: StreamKey) -> AsyncIterator[LiveLog]:
        async with super().live(key) as live:
            yield live
        if not live.readers and not live.log.next:
            self._runs[key.run].streams.pop(key.name, None)


class NeverLeaves(MemoryBroker):
    """Cleans up only if the body raised nothing."""

    @asynccontextmanager
    async def live(self, key: StreamKey) -> AsyncIterator[LiveLog]:
        run = self._run(key.run)
        live = run.streams[key.name] = run.streams.get(key.name) or self._make_stream(run)
        live.enter()
        yield live
        live.leave()


class LeaksWhileEntering(MemoryBroker):
    @asynccontextmanager
    async def live(self, key: StreamKey) -> AsyncIterator[LiveLog]:
        async with super().live(key) as live:
            live.enter()
            await pause(2)
            live.leave()
            yield live


class EndsTheRunBeforeItsStreams(MemoryBroker):
    """Acknowledges entries between the terminal record and the end of the streams."""

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        if record.end is None:
            return await super().commit(record, expect=expect, change=change, floors=floors)
        run = self._runs[record.id]
        streams, run.streams = run.streams, {}
        version = await super().commit(record, expect=expect, change=change, floors=floors)
        run.streams = streams
        await pause(3)
        for live in streams.values():
            live.log.close(record.end)
            live.wake()
        return version


class EndsOnlyWrittenStreams(MemoryBroker):
    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        run = self._runs.get(record.id)
        streams = {} if run is None else run.streams
        if run is not None:
            run.streams = {name: live for name, live in streams.items() if live.log.next}
        try:
            return await super().commit(record, expect=expect, change=change, floors=floors)
        finally:
            if run is not None:
                run.streams = streams


# Runs


class CommitsWithoutComparing(MemoryBroker):
    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        run = self._runs.get(record.id)
        stored = 0 if run is None else run.record.version
        record = msgspec.structs.replace(record, version=stored + 1)
        return await super().commit(record, expect=stored, change=change, floors=floors)


class ComparesAndThenCommits(MemoryBroker):
    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        run = self._runs.get(record.id)
        stored = 0 if run is None else run.record.version
        if stored != expect and (run is None or change not in run.marks):
            raise VersionConflict("other version", current=None if run is None else run.record)
        await pause(1)
        if run is not None and change not in run.marks:
            run.record = msgspec.structs.replace(run.record, version=expect)
        return await super().commit(record, expect=expect, change=change, floors=floors)


class ForgetsTheConflictingRecord(MemoryBroker):
    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        try:
            return await super().commit(record, expect=expect, change=change, floors=floors)
        except VersionConflict as conflict:
            raise VersionConflict(str(conflict)) from conflict


class KnowsOnlyTheLastMark(MemoryBroker):
    """Remembers one commit, so a retry after the commit of another writer is a conflict."""

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        version = await super().commit(record, expect=expect, change=change, floors=floors)
        self._runs[record.id].marks = {change: version}
        return version


class TakesLateCommitsForRetries(MemoryBroker):
    """Assumes that the numbers of a writer arrive in order."""

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        run = self._runs.get(record.id)
        for known, version in {} if run is None else run.marks.items():
            if known.writer == change.writer and known.number >= change.number:
                return version
        return await super().commit(record, expect=expect, change=change, floors=floors)


# Topics


class PublishesLater(MemoryBroker):
    """Publishes in a task."""

    async def __aenter__(self) -> PublishesLater:
        self._later = anyio.create_task_group()
        await self._later.__aenter__()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self._later.cancel_scope.cancel()
        await self._later.__aexit__(None, None, None)

    def _publish_topics(self, run: StoredRun) -> None:
        self._later.start_soon(self._tell_late, run)

    async def _tell_late(self, run: StoredRun) -> None:
        await pause(5)
        super()._publish_topics(run)


class PublishesWithoutMark(MemoryBroker):
    """A process that dies between the commit and the publication loses the change."""

    def _publish_topics(self, run: StoredRun) -> None:
        pass

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        version = await super().commit(record, expect=expect, change=change, floors=floors)
        await pause(1)
        super()._publish_topics(self._runs[record.id])
        return version


class PublishesTheRunTopicLater(MemoryBroker):
    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        publish, self._publish = self._publish, lambda topic, record: None  # type: ignore[method-assign]
        try:
            version = await super().commit(record, expect=expect, change=change, floors=floors)
        finally:
            self._publish = publish  # type: ignore[method-assign]
        await pause(1)
        self._publish(f"run:{record.id}", self._runs[record.id].record)
        self._publish_topics(self._runs[record.id])
        return version


class CarelessIndex(TopicIndex):
    """Accepts any version."""

    def update(self, run_id: str, version: int) -> bool:
        self._entries.pop(run_id, None)
        return super().update(run_id, version)


class OverwritesNewerVersions(MemoryBroker):
    def _add_topic(self, topic: str) -> _MemoryTopic:
        entry = super()._add_topic(topic)
        entry.index = CarelessIndex(entry.index.epoch, max_runs=entry.index.max_runs)
        return entry

    async def publish(self, run_id: str) -> None:
        run = self._runs.get(run_id)
        if run is not None:
            record = run.record
            await pause(2)
            for topic in record.topics:
                self._publish(topic, record)


class BoundlessIndex(TopicIndex):
    """Does not remember that it has dropped runs."""

    def after(self, cursor: Cursor | None, *, limit: int) -> Changes:
        self.floor = 0
        return super().after(cursor, limit=limit)


class MissesDroppedRuns(MemoryBroker):
    def _add_topic(self, topic: str) -> _MemoryTopic:
        entry = super()._add_topic(topic)
        entry.index = BoundlessIndex(entry.index.epoch, max_runs=entry.index.max_runs)
        return entry


class HasOneEpoch(MemoryBroker):
    def _add_topic(self, topic: str) -> _MemoryTopic:
        entry = super()._add_topic(topic)
        entry.index.epoch = "0"
        return entry


class WaitsAtUnknownPositions(MemoryBroker):
    """Mistakes an unknown position for one that will come."""

    async def changes(self, topic: str, *, after: Cursor | None = None, limit: int = 1000) -> Changes:
        changes = await super().changes(topic, after=after, limit=limit)
        if after is not None and after.position > changes.cursor.position:
            return Changes(after, [], False)
        return changes


# Claims and due times


class LastClaimWins(MemoryBroker):
    async def claim(
        self, key: str, value: str, *, ttl_s: float, owner: str | None = None, instead_of: str | None = None
    ) -> str:
        self._claims.pop(key, None)
        return await super().claim(key, value, ttl_s=ttl_s, owner=owner, instead_of=instead_of)


class ChecksAndThenClaims(MemoryBroker):
    async def claim(
        self, key: str, value: str, *, ttl_s: float, owner: str | None = None, instead_of: str | None = None
    ) -> str:
        if key in self._claims:
            return self._claims[key][0]
        await pause(1)
        self._claims[key] = (value, self._now_ms() + round(ttl_s * 1000))
        return value


class ProlongsClaims(MemoryBroker):
    async def claim(
        self, key: str, value: str, *, ttl_s: float, owner: str | None = None, instead_of: str | None = None
    ) -> str:
        stored = await super().claim(key, value, ttl_s=ttl_s, owner=owner, instead_of=instead_of)
        expires_ms = self._now_ms() + round(ttl_s * 1000)
        self._claims[key] = (stored, expires_ms)
        self._claims_expire.set(key, expires_ms)
        return stored


class ReplacesAnyClaim(MemoryBroker):
    async def claim(
        self, key: str, value: str, *, ttl_s: float, owner: str | None = None, instead_of: str | None = None
    ) -> str:
        if instead_of is not None:
            self._claims.pop(key, None)
        return await super().claim(key, value, ttl_s=ttl_s, owner=owner, instead_of=instead_of)


class ChecksAndThenReplaces(MemoryBroker):
    async def claim(
        self, key: str, value: str, *, ttl_s: float, owner: str | None = None, instead_of: str | None = None
    ) -> str:
        before = self._claims.get(key, ("", 0))[0]
        await pause(1)
        if before == instead_of:
            instead_of = self._claims.get(key, ("", 0))[0]
        return await super().claim(key, value, ttl_s=ttl_s, owner=owner, instead_of=instead_of)


class KeepsTheLifetimeOfAReplacedClaim(MemoryBroker):
    async def claim(
        self, key: str, value: str, *, ttl_s: float, owner: str | None = None, instead_of: str | None = None
    ) -> str:
        before = self._claims.get(key)
        stored = await super().claim(key, value, ttl_s=ttl_s, owner=owner, instead_of=instead_of)
        if before is not None and before[0] == instead_of:
            self._claims[key] = (stored, before[1])
        return stored


class SeesExpiredClaims(MemoryBroker):
    async def claimed(self, key: str) -> str | None:
        return self._claims[key][0] if key in self._claims else None


class ClaimsByLookup(MemoryBroker):
    async def claimed(self, key: str) -> str | None:
        found = await super().claimed(key)
        if found is None:
            self._claims[key] = ("", self._now_ms() + 60_000)
        return found


class ListsDueRunsOnce(MemoryBroker):
    """Forgets due runs once a process has asked, which may have died since."""

    async def due(self, kind: str, *, limit: int = 100, skip: int = 0) -> list[str]:
        found = await super().due(kind, limit=limit, skip=skip)
        for run_id in found:
            self._due[kind].set(run_id, None)
        return found


class RenewsForAnyone(MemoryBroker):
    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        for run_id in run_ids:
            self._due["lease"].set(run_id, self._lease_end())


class RenewsWithEveryCommit(MemoryBroker):
    def _schedule(self, record: StoredRecord, was: Status | None) -> None:
        super()._schedule(record, was)
        if record.status is Status.EXECUTING:
            self._due["lease"].set(record.id, self._lease_end())


class EnqueuesAfterEveryCommit(MemoryBroker):
    def _schedule(self, record: StoredRecord, was: Status | None) -> None:
        super()._schedule(record, was)
        if record.status is Status.QUEUED:
            self._due["enqueue"].set(record.id, self._lease_end())


class EnqueuesWhatAQueueHas(MemoryBroker):
    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        await super().renew(run_ids, owner=owner)
        for run_id in run_ids:
            run = self._runs.get(run_id)
            if run is not None and run.record.status is Status.QUEUED:
                self._due["enqueue"].set(run_id, self._lease_end())


class EnqueuesOnlyNewRuns(MemoryBroker):
    def _schedule(self, record: StoredRecord, was: Status | None) -> None:
        super()._schedule(record, was)
        if was is Status.DELAYED:
            self._due["enqueue"].set(record.id, None)


class MistakesAQueueForAnOwner(MemoryBroker):
    async def enqueued(self, run_id: str) -> None:
        await super().enqueued(run_id)
        self._due["lease"].set(run_id, None)


class TakesWhatIsNotDue(MemoryBroker):
    async def take_on_end(self, run_id: str) -> bool:
        return run_id in self._due["on_end"]


class ForgetsOnEnds(MemoryBroker):
    """Forgets an `on_end` once a process has taken it, which may die."""

    async def take_on_end(self, run_id: str) -> bool:
        taken = await super().take_on_end(run_id)
        if taken:
            self._due["on_end"].set(run_id, None)
        return taken


class RevivesOnEnds(MemoryBroker):
    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        await super().renew(run_ids, owner=owner)
        for run_id in run_ids:
            if run_id in self._runs and self._runs[run_id].record.has_on_end:
                self._due["on_end"].set(run_id, self._lease_end())


class RemovesBeforeTheOnEnd(MemoryBroker):
    async def remove(self, run_id: str) -> None:
        self._remove(run_id)


class WatchesOneProcess(MemoryBroker):
    async def watch(self, run_id: str, *, process: str, readers: int, grace_s: float | None) -> None:
        await super().watch(run_id, process="any", readers=readers, grace_s=grace_s)


class WatchesForever(MemoryBroker):
    """A process that dies keeps its readers."""

    async def watchers(self, run_id: str) -> int:
        run = self._runs.get(run_id)
        return 0 if run is None else sum(readers for readers, _ in (run.watchers or {}).values())


class CancelsAtTheLastLeave(MemoryBroker):
    async def watch(self, run_id: str, *, process: str, readers: int, grace_s: float | None) -> None:
        await super().watch(run_id, process=process, readers=readers, grace_s=grace_s)
        if not readers and grace_s is not None and run_id in self._runs:
            self._due["unwatched"].set(run_id, self._now_ms())


class WatchesEndedRuns(MemoryBroker):
    def _schedule(self, record: StoredRecord, was: Status | None) -> None:
        unwatched, self._due["unwatched"] = self._due["unwatched"], DueTimes()
        super()._schedule(record, was)
        self._due["unwatched"] = unwatched


class ListsInAnyOrder(MemoryBroker):
    async def due(self, kind: str, *, limit: int = 100, skip: int = 0) -> list[str]:
        return sorted(heapq.nlargest(limit, await super().due(kind, limit=10_000)))


class RemovesSilently(MemoryBroker):
    def _remove(self, run_id: str) -> None:
        for topic in self._topics.values():
            topic.waiting = WaitList()
        super()._remove(run_id)


class RevokesEnds(MemoryBroker):
    def _remove(self, run_id: str) -> None:
        for live in self._runs[run_id].streams.values():
            live.log.end = None
        super()._remove(run_id)


class KeepsClaimsOfRemovedRuns(MemoryBroker):
    def _remove(self, run_id: str) -> None:
        before = dict(self._claims)
        super()._remove(run_id)
        self._claims = before


class KeepsThreadsOfRemovedRuns(MemoryBroker):
    def _remove(self, run_id: str) -> None:
        claim = self._runs[run_id].record.thread_claim
        before = self._claims.get(claim or "")
        super()._remove(run_id)
        if claim is not None and before is not None:
            self._claims[claim] = before


class DropsClaimsOfOthers(MemoryBroker):
    def _remove(self, run_id: str) -> None:
        claims = self._runs[run_id].record.claims
        super()._remove(run_id)
        for claim in claims:
            self._claims.pop(claim, None)


class SkipsNothing(MemoryBroker):
    async def due(self, kind: str, *, limit: int = 100, skip: int = 0) -> list[str]:
        return await super().due(kind, limit=limit)


class LeavesTopicsBehind(MemoryBroker):
    def _remove(self, run_id: str) -> None:
        if run_id in self._runs:
            self._runs[run_id].published_to = ()
        super()._remove(run_id)


CATCHES: dict[type[MemoryBroker], tuple[str, ...]] = {
    ReadsThenSubscribes: ("test_whenever_a_reader_joins_and_leaves_nothing_is_lost_or_duplicated",),
    SubscribesThenReads: ("test_whenever_a_reader_joins_and_leaves_nothing_is_lost_or_duplicated",),
    ReusesSeqs: ("test_trimming_drops_the_oldest_entries_and_keeps_positions",),
    ForgetsProducersWithTheirEntries: ("test_a_retry_of_trimmed_items_is_still_recognized",),
    ReportsNoGaps: (
        "test_trimming_drops_the_oldest_entries_and_keeps_positions",
        "test_a_reader_before_the_retained_part_gets_a_gap",
        "test_whenever_entries_are_trimmed_each_loss_is_reported",
    ),
    IgnoresProducers: (
        "test_a_retried_append_stores_nothing_twice",
        "test_a_gap_in_the_count_of_a_producer_is_rejected",
    ),
    AcceptsGapsInProducers: ("test_whatever_producers_retry_each_item_is_stored_once",),
    ChecksTheEndBeforeTheProducer: (
        "test_a_retry_of_the_ending_append_succeeds",
        "test_a_retry_succeeds_after_the_run_has_ended",
    ),
    AppendsOneByOne: (
        "test_no_reader_sees_part_of_an_append",
        "test_concurrent_appends_are_serialized_and_never_interleaved",
        "test_a_cancelled_append_takes_full_effect_or_none",
    ),
    CountsWhatIsRetained: ("test_the_count_of_a_producer_outlives_its_entries_and_the_run",),
    ForgetsCountsAtTheEnd: ("test_the_count_of_a_producer_outlives_its_entries_and_the_run",),
    CountsAllProducers: ("test_the_count_of_a_producer_can_be_read",),
    CountsForTheRun: ("test_the_count_of_a_producer_can_be_read",),
    CountsZeroForUnknownRuns: ("test_a_run_that_does_not_exist_has_no_streams",),
    LastEndWins: ("test_the_first_end_is_final",),
    DropsEndsWithReaders: ("test_an_end_without_an_entry_is_durable_too",),
    NeverLeaves: ("test_leaving_releases_everything", "test_cancelled_readers_release_everything"),
    LeaksWhileEntering: ("test_entering_can_be_cancelled_at_every_await",),
    EndsTheRunBeforeItsStreams: ("test_acknowledged_entries_can_be_read_once_the_terminal_record_can",),
    EndsOnlyWrittenStreams: ("test_the_end_of_a_run_ends_all_its_streams_at_their_last_entry",),
    CommitsWithoutComparing: (
        "test_a_commit_on_another_version_is_rejected_with_the_stored_record",
        "test_one_of_concurrent_committers_wins_each_version",
    ),
    ComparesAndThenCommits: ("test_one_of_concurrent_committers_wins_each_version",),
    ForgetsTheConflictingRecord: ("test_a_run_is_created_once",),
    KnowsOnlyTheLastMark: ("test_a_retried_commit_is_recognized_after_later_ones",),
    TakesLateCommitsForRetries: ("test_a_late_commit_is_not_mistaken_for_a_retry",),
    PublishesLater: ("test_a_run_is_in_all_its_topics_when_the_commit_returns",),
    PublishesWithoutMark: ("test_a_cancelled_commit_takes_full_effect_or_none",),
    PublishesTheRunTopicLater: ("test_record_and_run_topic_change_in_one_step",),
    OverwritesNewerVersions: ("test_no_older_version_replaces_a_newer_one_under_concurrent_committers",),
    MissesDroppedRuns: ("test_a_topic_retains_its_newest_runs_and_older_cursors_get_a_snapshot",),
    HasOneEpoch: ("test_a_recreated_topic_has_a_new_epoch",),
    WaitsAtUnknownPositions: ("test_an_unusable_cursor_gets_a_snapshot_at_once",),
    LastClaimWins: ("test_the_first_claim_wins", "test_concurrent_claims_all_return_one_winner"),
    ChecksAndThenClaims: (
        "test_concurrent_claims_all_return_one_winner",
        "test_a_claim_expires_by_the_brokers_clock",
    ),
    ProlongsClaims: ("test_a_claim_expires_by_the_brokers_clock",),
    ReplacesAnyClaim: ("test_a_claim_replaces_only_the_expected_value",),
    ChecksAndThenReplaces: ("test_of_concurrent_replacements_one_succeeds",),
    KeepsTheLifetimeOfAReplacedClaim: ("test_a_replacement_has_its_own_lifetime",),
    SeesExpiredClaims: ("test_a_claim_can_be_looked_up",),
    ClaimsByLookup: ("test_a_claim_can_be_looked_up",),
    ListsDueRunsOnce: ("test_a_delayed_run_is_due_at_the_end_of_its_delay",),
    RenewsForAnyone: ("test_only_the_owner_renews_a_lease",),
    RenewsWithEveryCommit: ("test_a_change_of_the_run_does_not_renew_its_lease",),
    EnqueuesAfterEveryCommit: (
        "test_a_run_that_a_queue_has_is_not_due",
        "test_any_process_that_holds_a_queued_run_renews_it",
    ),
    EnqueuesWhatAQueueHas: ("test_a_run_that_a_queue_has_is_not_due",),
    EnqueuesOnlyNewRuns: ("test_a_delayed_run_is_due_for_enqueueing_from_the_end_of_its_delay",),
    MistakesAQueueForAnOwner: ("test_an_executing_run_keeps_its_lease_when_it_is_reported_as_enqueued",),
    TakesWhatIsNotDue: ("test_an_on_end_is_due_a_lease_after_the_end_and_taken_once",),
    ForgetsOnEnds: ("test_an_on_end_is_due_a_lease_after_the_end_and_taken_once",),
    RevivesOnEnds: ("test_an_on_end_is_renewed_and_due_until_it_was_called",),
    RemovesBeforeTheOnEnd: ("test_a_run_is_not_removed_before_its_on_end_was_called",),
    WatchesOneProcess: ("test_the_readers_of_all_processes_count_until_they_expire",),
    WatchesForever: ("test_the_readers_of_all_processes_count_until_they_expire",),
    CancelsAtTheLastLeave: (
        "test_a_run_is_unwatched_a_grace_period_after_its_last_reader",
        "test_a_run_with_a_reader_that_is_counted_again_is_not_unwatched",
    ),
    WatchesEndedRuns: ("test_the_readers_of_a_run_that_is_over_do_not_count",),
    ListsInAnyOrder: ("test_due_runs_are_listed_oldest_first_up_to_a_limit",),
    SkipsNothing: ("test_due_runs_are_listed_oldest_first_up_to_a_limit",),
    LeavesTopicsBehind: ("test_a_removed_run_disappears_everywhere",),
    RemovesSilently: ("test_a_removal_wakes_the_followers_of_the_runs_topics",),
    TrimsInputs: ("test_inputs_are_rejected_at_the_limit_and_never_trimmed",),
    CountsFramesOfInputs: ("test_the_limit_of_inputs_counts_their_items",),
    CountsRetriedInputs: ("test_inputs_are_rejected_at_the_limit_and_never_trimmed",),
    KeepsClaimsOfRemovedRuns: ("test_a_claim_is_removed_with_its_run",),
    KeepsThreadsOfRemovedRuns: ("test_a_claim_is_removed_with_its_run",),
    DropsClaimsOfOthers: ("test_the_claim_of_another_run_is_not_removed",),
    RevokesEnds: ("test_readers_of_a_removed_run_still_get_its_end",),
}


def leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


FAILURES = (AssertionError, TimeoutError, RealtimeError, pytest.fail.Exception)


PROPERTIES = {test: test.hypothesis.inner_test for test in vars(conformance).values() if hasattr(test, "hypothesis")}
"""The properties before anyio's plugin wraps them, which it does when pytest runs one."""


def run_test(name: str, broker: type[MemoryBroker], *, guard_s: float = 10.0) -> BaseException | None:
    """Run one test of the suite on asyncio. Return the error if it failed."""
    test = getattr(conformance, name)
    make_broker = Memory(broker, guard_s=guard_s)
    try:
        if hasattr(test, "hypothesis"):
            run_property(test, make_broker)
        else:
            anyio.run(test, make_broker)
    except BaseException as error:
        strange = [leaf for leaf in leaves(error) if not isinstance(leaf, FAILURES)]
        if strange:
            raise
        return error
    return None


def run_property(test: Any, make_broker: Memory) -> None:
    """As anyio's plugin for pytest, except that it stops at the first failure instead of shrinking it."""
    before, original = test.hypothesis.inner_test, PROPERTIES[test]
    failure: BaseException | None = None

    def run_example(**example: Any) -> None:
        nonlocal failure
        if failure is None:
            try:
                anyio.run(functools.partial(original, **example))
            except BaseException as error:
                failure = error
                raise

    test.hypothesis.inner_test = run_example
    try:
        test(make_broker=make_broker)
    except BaseException:
        raise failure or AssertionError("the test itself is broken") from None
    finally:
        test.hypothesis.inner_test = before


@pytest.mark.parametrize(
    ("broker", "name"),
    [(broker, name) for broker, names in CATCHES.items() for name in names],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_sloppy_broker_is_caught(broker: type[MemoryBroker], name: str) -> None:
    assert run_test(name, MemoryBroker) is None
    assert run_test(name, broker, guard_s=0.5) is not None  # some are caught because they wait forever


def test_a_join_in_one_step_is_not_caught() -> None:
    assert run_test("test_whenever_a_reader_joins_and_leaves_nothing_is_lost_or_duplicated", JoinsInOneStep) is None


def test_the_suite_names_all_its_tests() -> None:
    named = {name for name in conformance.__all__ if name.startswith("test_")}
    assert len(named) > 80
    assert {name for names in CATCHES.values() for name in names} <= named
