"""Following runs from the host's own code: one run, the runs with some tags, or the runs of a batch.

Every follower pulls. It follows its topic only during an `anext`, finds out what changed, loads those runs, and waits
otherwise. A change carries the version of its run, so a follower compares versions first. It loads nothing when it
wakes up for another reason, such as a chunk or a change that it has seen.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from asgi_realtime.brokers.base import Change, Changes, Cursor, StreamKey
from asgi_realtime.brokers.following import Follower, following
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.core.batch_progress import BatchProgress
from asgi_realtime.core.chunks import decode
from asgi_realtime.core.errors import RunNotFound
from asgi_realtime.core.run_record import RunRecord
from asgi_realtime.core.runs import StoredRecord, batch_topic, run_topic, tag_topic
from asgi_realtime.runs.paging import newest
from asgi_realtime.runs.store import RunStore
from asgi_realtime.streams.readers import BufferedIterator, ReaderShutdown, StreamCursor

Start = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """A chunk among run updates: its stream, its index there, the decoded chunk."""

    stream: str
    index: int
    chunk: Any


class _TopicFollower(BufferedIterator[Any]):
    """The runs of a topic: their current state, then each change. A slow consumer gets the newest state only."""

    def __init__(
        self, runs: RunStore, topic: str, *, run_id: str = "", start: Start, shutdown: ReaderShutdown | None
    ) -> None:
        super().__init__(runs, run_id=run_id, start=start, shutdown=shutdown)
        self._topic = topic
        self._versions: dict[str, int] = {}
        self._over = False

    async def __anext__(self) -> RunRecord:
        return RunRecord(await super().__anext__())  # not in the buffer, where a decoded record takes more memory

    async def _fill(self) -> None:
        if self._over:
            raise StopAsyncIteration
        async with following(self._runs.broker, self._topic) as follower:
            self._add_shutdown(follower.add)
            while True:
                await self._advance(follower)
                if self._ready:
                    return
                if self._over:
                    raise StopAsyncIteration
                self._check_shutdown()
                await follower.wait()

    @abstractmethod
    async def _advance(self, follower: Follower) -> None:
        """Buffer the runs that changed. Calls `follower.changes` exactly once: it starts the next wait."""

    def _add(self, record: StoredRecord) -> None:
        if self._versions.pop(record.id, 0) != record.version:  # after a data loss it can be lower than before
            self._ready.append(record)
        self._versions[record.id] = record.version


class RunFollower(_TopicFollower):
    """The states of one run. Raises `RunNotFound` if it does not exist or expires."""

    def __init__(
        self,
        runs: RunStore,
        run_id: str,
        *,
        stop_on_completion: bool,
        start: Start,
        shutdown: ReaderShutdown | None = None,
    ) -> None:
        super().__init__(runs, run_topic(run_id), run_id=run_id, start=start, shutdown=shutdown)
        self._stop_on_completion = stop_on_completion
        self._run = _CurrentRun(runs, run_id)

    async def _advance(self, follower: Follower) -> None:
        record = await self._run.load(follower)
        self._add(record)
        self._over = self._stop_on_completion and record.is_completed


class TagFollower(_TopicFollower):
    """The runs that have all of these tags and were created since a time. Never ends.

    The current state covers the newest `Limits.feed_runs` of them, among the `Limits.topic_runs` that a tag remembers.
    """

    def __init__(
        self,
        runs: RunStore,
        tags: Sequence[str],
        *,
        oldest_ms: int,
        start: Start,
        shutdown: ReaderShutdown | None = None,
    ) -> None:
        super().__init__(runs, tag_topic(min(tags)), start=start, shutdown=shutdown)
        self._tags = frozenset(tags)
        self._oldest_ms = oldest_ms
        self._cursor: Cursor | None = None

    async def _advance(self, follower: Follower) -> None:
        limits = self._runs.limits
        changes = await follower.changes(self._cursor, limit=limits.topic_runs)
        if changes.snapshot:
            records = await newest(changes.items, self._load, limit=limits.feed_runs)
        else:
            records = await self._load(changes.items)
        self._cursor = changes.cursor
        for record in records:
            self._add(record)
        while len(self._versions) > limits.topic_runs:
            del self._versions[next(iter(self._versions))]

    async def _load(self, changes: Sequence[Change]) -> list[StoredRecord]:
        records = await self._runs.load([change.run_id for change in changes]) if changes else []
        return [record for record in records if record is not None and self._wants(record)]

    def _wants(self, record: StoredRecord) -> bool:
        return record.created_at_ms >= self._oldest_ms and self._tags.issubset(record.tags)


class BatchFollower(_TopicFollower):
    """The runs of a batch, until all are over. Raises `RunNotFound` if it does not exist.

    `closed` returns whether no more runs join the batch, or None if only its runs are known; then it was created whole.
    """

    def __init__(
        self,
        runs: RunStore,
        batch_id: str,
        *,
        closed: Callable[[], Awaitable[bool | None]],
        start: Start,
        shutdown: ReaderShutdown | None = None,
    ) -> None:
        super().__init__(runs, batch_topic(batch_id), start=start, shutdown=shutdown)
        self._batch_id = batch_id
        self._closed = closed
        self._progress: BatchProgress | None = None

    async def _advance(self, follower: Follower) -> None:
        progress = self._progress = self._progress or await self._begin()
        changes = await follower.changes(None, limit=self._runs.limits.topic_runs)
        changed = [change for change in changes.items if self._versions.get(change.run_id) != change.version]
        records = await self._runs.load([change.run_id for change in changed]) if changed else []
        for record in records:
            if record is not None:
                self._add(record)
                progress.add(record)
        progress.retain({change.run_id for change in changes.items})  # a removal appears in no change
        self._over = progress.is_over

    async def _begin(self) -> BatchProgress:
        closed = await self._closed()
        if closed is None and not (await self._runs.broker.changes(self._topic, limit=1)).items:
            raise RunNotFound(f"no batch {self._batch_id!r}: it does not exist or has expired (Retention.after_end)")
        return BatchProgress(closed=closed is not False)


class _CurrentRun:
    """The newest record of one run, loaded only when its topic has changed."""

    def __init__(self, runs: RunStore, run_id: str) -> None:
        self._runs = runs
        self._run_id = run_id
        self._record: StoredRecord | None = None
        self._changes: Changes | None = None

    async def load(self, follower: Follower) -> StoredRecord:
        """Raises `RunNotFound`."""
        changes = await follower.changes(None, limit=1)
        if self._record is None or changes != self._changes:
            self._record = await self._runs.get(self._run_id)
            self._changes = changes
        return self._record


class RunWithStreams(BufferedIterator[RunRecord | StreamChunk]):
    """The states of one run among the chunks of all its streams. The terminal state follows the last chunk."""

    def __init__(
        self,
        runs: RunStore,
        run_id: str,
        *,
        stop_on_completion: bool,
        start: Start,
        shutdown: ReaderShutdown | None = None,
    ) -> None:
        super().__init__(runs, run_id=run_id, start=start, shutdown=shutdown)
        self._stop_on_completion = stop_on_completion
        self._run = _CurrentRun(runs, run_id)
        self._version = 0
        """Of the newest state that was returned."""
        self._cursors: dict[str, StreamCursor] = {}

    async def _fill(self) -> None:
        await self._runs.wait_created(self._run_id)
        async with AsyncExitStack() as stack:
            follower = await stack.enter_async_context(following(self._runs.broker, run_topic(self._run_id)))
            self._add_shutdown(follower.add)
            lives: dict[str, LiveLog] = {}
            while True:
                record = await self._run.load(follower)
                for name in record.streams:
                    if name not in lives:
                        cursor = self._cursors.setdefault(name, StreamCursor(StreamKey(self._run_id, name)))
                        live = lives[name] = await stack.enter_async_context(self._runs.broker.live(cursor.key))
                        follower.add(live.waiting)
                await self._take(record, lives)
                if self._ready:
                    return
                self._check_shutdown()
                await follower.wait()

    async def _take(self, record: StoredRecord, lives: dict[str, LiveLog]) -> None:
        if self._stop_on_completion and record.is_completed and self._version == record.version:
            raise StopAsyncIteration
        if not record.is_completed:
            self._add(record)
        read_to_end = True
        for name, live in lives.items():
            cursor = self._cursors[name]
            for entry in await cursor.entries(self._runs.broker, live):
                cursor.after = entry.seq
                self._ready.append(StreamChunk(name, entry.seq, decode(entry.data)))
            read_to_end = read_to_end and live.end is not None and cursor.at_end_of(live)
        if read_to_end and record.is_completed:
            self._add(record)

    def _add(self, record: StoredRecord) -> None:
        if self._version != record.version:
            self._version = record.version
            self._ready.append(RunRecord(record))
