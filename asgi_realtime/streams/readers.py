"""Reading streams and following runs from the host's own code.

All of it is pull, in batches: an iterator holds nothing of the broker while nobody advances it, so it may be left or
dropped at any point.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio

from asgi_realtime.brokers.base import Broker, Changes, Cursor, Entry, StreamKey
from asgi_realtime.brokers.following import following
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.core.chunks import decode
from asgi_realtime.core.errors import BrokerUnavailable, RunNotFound, StreamGap
from asgi_realtime.core.log import End
from asgi_realtime.core.run_errors import RunCanceled, RunEnded, RunFailed
from asgi_realtime.core.runs import RunRecord, batch_topic, run_topic
from asgi_realtime.runs.store import RunStore

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """A chunk among run updates: its stream, its index there, the decoded chunk."""

    stream: str
    index: int
    chunk: Any


class BatchIterator(AsyncIterator[T], Generic[T]):
    """An async iterator that is filled a batch at a time. `begin` is called before each, if it is given.

    While the broker is away it waits, as writers do; then it raises `BrokerUnavailable`, and may be asked again.
    """

    def __init__(self, runs: RunStore, begin: Callable[[], Awaitable[None]] | None = None) -> None:
        self._ready: deque[T] = deque()
        self._runs = runs
        self._begin = begin

    async def __anext__(self) -> T:
        while not self._ready:
            if self._begin is not None:
                await self._begin()
            await self._runs.retry(self._fill)
        return self._ready.popleft()

    @abstractmethod
    async def _fill(self) -> None:
        """Put what comes next into `_ready`, in the step that moves the cursor: whoever is cancelled loses nothing.

        Raises `StopAsyncIteration` at the end, or what the end is.
        """


class StreamReader(BatchIterator[Entry]):
    """The entries of one stream after a cursor. `end` is set once they are all read and the stream has ended.

    Raises `StreamGap` if entries are past their retention and goes on behind them, `TimeoutError` after so much
    silence, `RunNotFound`.
    """

    def __init__(
        self,
        broker: Broker,
        runs: RunStore,
        key: StreamKey,
        *,
        after: int = -1,
        timeout_s: float | None = None,
        begin: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(runs, begin)
        self.key = key
        self.after = after
        self.timeout_s = timeout_s
        self.end: End | None = None
        self._broker = broker

    async def _fill(self) -> None:
        if self.end is not None:
            raise StopAsyncIteration
        await self._runs.wait_created(self.key.run)
        async with self._broker.live(self.key) as live:
            while not (entries := await self._next_entries(live)):
                if live.end is not None:
                    self.end = live.end
                    raise StopAsyncIteration
                with anyio.fail_after(self.timeout_s):
                    await live.waiting.wait()
            self.after = entries[-1].seq
            self._ready.extend(entries)
            if self.after + 1 >= live.log.next:
                self.end = live.end  # now, since the run may be gone when the next is asked for

    async def _next_entries(self, live: LiveLog) -> list[Entry]:
        try:
            return await _next_entries(self._broker, live, self.key, self.after)
        except StreamGap as gap:
            self.after = gap.first - 1  # told once; who goes on gets what is there
            raise


async def _next_entries(broker: Broker, live: LiveLog, key: StreamKey, after: int) -> list[Entry]:
    """What follows the cursor. Suspends only for what this process does not hold.

    Raises `StreamGap`, or why the log cannot be followed: one that ended is all there.
    """
    if live.failure is not None and live.end is None:
        raise live.failure
    if live.gap(after) is None:
        return live.entries(after)
    page = await broker.read(key, after=after)
    if page.first > after + 1:
        raise StreamGap(
            f"chunk {after + 1} of stream {key.name!r} is past its retention, the oldest that is kept is {page.first}",
            requested=after + 1,
            first=page.first,
        )
    if not page.entries:
        raise BrokerUnavailable(f"what follows chunk {after} of stream {key.name!r} was there and is not any more")
    return page.entries


class ChunkReader(AsyncIterator[T], Generic[T]):
    """The decoded chunks of a stream. Ends if the run completed, and raises how it ended if it did not."""

    def __init__(self, entries: StreamReader, decode_chunk: Callable[[bytes], T]) -> None:
        self._entries = entries
        self._decode_chunk = decode_chunk

    async def __anext__(self) -> T:
        try:
            entry = await self._entries.__anext__()
        except StopAsyncIteration:
            end = self._entries.end
            if end is not None and end.reason != "complete":
                raise ended_otherwise(end) from None
            raise
        return self._decode_chunk(entry.data)


def ended_otherwise(end: End, record: RunRecord | None = None) -> RunEnded:
    """The error that says how a run without a result ended."""
    if end.reason == "canceled":
        return RunCanceled("the run was canceled", record=record)
    detail = f": {end.error}" if end.error else ""
    return RunFailed(f"the run ended {end.reason}{detail}", record=record)


class TopicFollower(BatchIterator[RunRecord]):
    """The runs of a topic: their present state, then each change, in its newest state.

    The present state is the newest `first` of the runs that `keep` wants, among the `limit` that the topic remembers.
    A record that `stop` says so of is the last.
    """

    def __init__(
        self,
        broker: Broker,
        runs: RunStore,
        topic: str,
        *,
        limit: int,
        first: int,
        keep: Callable[[RunRecord], bool] = lambda record: True,
        stop: Callable[[RunRecord], bool] = lambda record: False,
        run_id: str | None = None,
        begin: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(runs, begin)
        self._broker = broker
        self._topic = topic
        self._limit = limit
        self._first = first
        self._keep = keep
        self._stop = stop
        self._run_id = run_id
        self._cursor: Cursor | None = None
        self._versions: dict[str, int] = {}
        self._stopped = False

    async def _fill(self) -> None:
        if self._stopped:
            raise StopAsyncIteration
        async with following(self._broker, self._topic) as follower:
            while True:
                changes = await follower.changes(self._cursor, limit=self._limit)
                if self._run_id is not None:
                    await self._runs.get(self._run_id)
                await self._take(changes)
                if self._ready:
                    return
                if self._stopped:
                    raise StopAsyncIteration
                await follower.wait()

    async def _take(self, changes: Changes) -> None:
        records = await self._runs.load([change.run_id for change in changes.items])
        self._cursor = changes.cursor
        kept = [record for record in records if record is not None and self._keep(record)]
        for record in kept[-self._first :] if changes.snapshot else kept:
            if self._versions.pop(record.id, 0) != record.version:  # lower than before if the broker has lost some
                self._ready.append(record)
                self._stopped = self._stop(record) or self._stopped
            self._versions[record.id] = record.version
        while len(self._versions) > self._limit:
            del self._versions[next(iter(self._versions))]


class BatchFollower(TopicFollower):
    """The runs of a batch, until all are over. `closed` tells whether no more come, or None if only the runs are known.

    Raises `RunNotFound` if nothing is there at the begin.
    """

    def __init__(
        self,
        broker: Broker,
        runs: RunStore,
        batch_id: str,
        *,
        closed: Callable[[], Awaitable[bool | None]],
        limit: int,
        begin: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(broker, runs, batch_topic(batch_id), limit=limit, first=limit, begin=begin)
        self._batch_id = batch_id
        self._closed = closed
        self._complete: bool | None = None
        self._open: set[str] = set()

    async def _take(self, changes: Changes) -> None:
        if self._complete is None:
            closed = await self._closed()
            if closed is None and not changes.items:
                raise RunNotFound(f"no batch {self._batch_id!r}: it never was, or it is past its retention")
            self._complete = closed is not False  # of which nothing is kept was triggered whole
        await super()._take(changes)
        known = {change.run_id for change in changes.items} | self._open
        records = [record for record in await self._runs.load(list(known)) if record is not None]
        self._complete = self._complete or any(map(_is_last, records))
        self._open = {record.id for record in records if not self._was_told(record)}  # a removal stands in no change
        self._stopped = self._complete and not self._open

    def _was_told(self, record: RunRecord) -> bool:
        return record.is_completed and self._versions.get(record.id) == record.version


def _is_last(record: RunRecord) -> bool:
    return record.batch is not None and record.batch.index == record.batch.count - 1


class RunWithStreams(BatchIterator[RunRecord | StreamChunk]):
    """The states of one run among the chunks of all its streams. The terminal state comes after the last chunk."""

    def __init__(
        self,
        broker: Broker,
        runs: RunStore,
        run_id: str,
        *,
        stop_on_completion: bool,
        begin: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(runs, begin)
        self._broker = broker
        self._run_id = run_id
        self._stop_on_completion = stop_on_completion
        self._shown = 0
        self._after: dict[str, int] = {}

    async def _fill(self) -> None:
        await self._runs.wait_created(self._run_id)
        async with AsyncExitStack() as stack:
            follower = await stack.enter_async_context(following(self._broker, run_topic(self._run_id)))
            lives: dict[str, LiveLog] = {}
            while True:
                await follower.changes(None, limit=1)  # raises if nothing is heard any more
                record = await self._runs.get(self._run_id)
                for name in record.streams:
                    if name not in lives:
                        live = await stack.enter_async_context(self._broker.live(StreamKey(self._run_id, name)))
                        lives[name] = live
                        follower.add(live.waiting)
                await self._take(record, lives)
                if self._ready:
                    return
                await follower.wait()

    async def _take(self, record: RunRecord, lives: dict[str, LiveLog]) -> None:
        if self._stop_on_completion and record.is_completed and self._shown == record.version:
            raise StopAsyncIteration
        if record.version != self._shown and not record.is_completed:
            self._shown = record.version
            self._ready.append(record)
        read_to_end = True
        for name, live in lives.items():
            for entry in await self._next_entries(live, name):
                self._after[name] = entry.seq
                self._ready.append(StreamChunk(name, entry.seq, decode(entry.data)))
            read_to_end = read_to_end and live.end is not None and self._after.get(name, -1) + 1 >= live.log.next
        if read_to_end and record.is_completed and record.version != self._shown:
            self._shown = record.version
            self._ready.append(record)

    async def _next_entries(self, live: LiveLog, name: str) -> list[Entry]:
        key = StreamKey(self._run_id, name)
        try:
            return await _next_entries(self._broker, live, key, self._after.get(name, -1))
        except StreamGap as gap:
            self._after[name] = gap.first - 1
            raise
