"""What the tests of the suite share: the broker under test, a reader, and cancellation at every waiting point.

`Backend` is what a user's fixture yields. `Reader` makes the same calls as a subscription. Nothing here sleeps, except
that `Backend.advance` does for backends whose clock cannot be moved; `open_backend` ends tests that wait forever.
"""

from __future__ import annotations

import itertools
import secrets
import time
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import anyio
import anyio.lowlevel
import msgspec
from hypothesis import HealthCheck, settings

from asgi_realtime.brokers.base import Broker, ChangeMark, Changes, Cursor, End, Entry, LiveTopic, StreamKey
from asgi_realtime.brokers.following import Follower
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.core.metadata import encode_metadata
from asgi_realtime.core.runs import Status, StoredRecord
from asgi_realtime.core.sse import chunk_frame

T = TypeVar("T")

COMPLETE = End("complete")

PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
"""For tests of random examples. Each example opens a new backend, which has no time limit."""


@dataclass(kw_only=True)
class Backend:
    """A broker under test, and what the suite needs to know about it."""

    broker: Broker
    peer: Broker
    """The same storage as another process sees it: a second broker object, or `broker` itself if it is not shared."""
    now: Callable[[], float] = time.time
    """The broker's clock, in unix seconds."""
    advance: Callable[[float], Awaitable[None]] = anyio.sleep
    """Moves that clock forward. Backends whose clock cannot be moved sleep, a few seconds in the whole suite."""
    held: Callable[[], int] = lambda: 0
    """How many subscriptions, mirrors, tasks and so on the two brokers hold for readers at the moment."""

    @property
    def processes(self) -> tuple[Broker, Broker]:
        return self.broker, self.peer

    def now_ms(self) -> int:
        return int(self.now() * 1000)


class MakeBroker(Protocol):
    """The fixture `make_broker`: opens a broker with these settings and closes it."""

    def __call__(
        self, *, limits: Limits, retention: Retention, timeouts: Timeouts
    ) -> AbstractAsyncContextManager[Backend]: ...


SHORT_S = 0.25
"""The delay of a test that has to wait for one."""

STEP_S = 0.02
"""How far a test lets the broker's clock move before it checks again."""

LATE_S = 5.0
"""How late, by its own clock, a broker may be before a test fails."""

TIMEOUTS = Timeouts(lease=0.3, cancel=0.2)

SHORT_MS = int(SHORT_S * 1000)
LEASE_MS = int(TIMEOUTS.lease * 1000)

GUARD_S = 10.0
"""The time limit of each test, on any backend."""


@asynccontextmanager
async def open_backend(
    make_broker: MakeBroker,
    *,
    stream_bytes: int = 1024 * 1024,
    inputs_bytes: int = 1024 * 1024,
    topic_runs: int = 1000,
    after_end: float = 3.0,
) -> AsyncIterator[Backend]:
    """A backend for one test, within the time limit."""
    with anyio.fail_after(getattr(make_broker, "guard_s", GUARD_S)):
        async with make_broker(
            limits=Limits(topic_runs=topic_runs, inputs_bytes=inputs_bytes),
            retention=Retention(stream_bytes=stream_bytes, after_end=after_end),
            timeouts=TIMEOUTS,
        ) as backend:
            yield backend


async def eventually(backend: Backend, condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Let the broker's clock move until a condition holds."""
    deadline = backend.now() + LATE_S
    while not await condition():
        assert backend.now() < deadline, f"still not so after {LATE_S:g} s: {what}"
        await backend.advance(STEP_S)


async def in_time(backend: Backend, within_s: float, attempt: Callable[[], Awaitable[T]]) -> T:
    """The result of an attempt that took less than `within_s`: on a machine that stalled it is repeated."""
    while True:
        until = backend.now() + within_s
        result = await attempt()
        if backend.now() < until:
            return result


# Runs


def new_record(backend: Backend, *, status: Status = Status.QUEUED, **fields: Any) -> StoredRecord:
    now_ms = backend.now_ms()
    run_id = f"run_{secrets.token_hex(8)}"
    return StoredRecord(
        id=run_id, task="test", status=status, created_at_ms=now_ms, updated_at_ms=now_ms, **_encoded(fields)
    )


def _encoded(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record, with the metadata as records store it."""
    metadata = fields.pop("metadata", None)
    return fields if metadata is None else {**fields, "metadata_json": encode_metadata(metadata)}


def new_tag() -> str:
    return f"tag-{secrets.token_hex(8)}"


def new_mark() -> ChangeMark:
    """The mark of a new writer."""
    return ChangeMark(secrets.token_hex(8), 0)


def next_version(record: StoredRecord, **fields: Any) -> StoredRecord:
    """The next version of a record."""
    return msgspec.structs.replace(record, **{"version": record.version + 1, **_encoded(fields)})


def finished(backend: Backend, record: StoredRecord, **fields: Any) -> StoredRecord:
    """The next version of a record, COMPLETED."""
    return next_version(record, status=Status.COMPLETED, completed_at_ms=backend.now_ms(), **fields)


async def create(backend: Backend, **fields: Any) -> StoredRecord:
    """Store a new run."""
    record = new_record(backend, **fields)
    assert await backend.broker.commit(record, expect=0, change=new_mark()) == 1
    return record


async def store(broker: Broker, record: StoredRecord) -> StoredRecord:
    """Commit the next version of a run."""
    assert await broker.commit(record, expect=record.version - 1, change=new_mark()) == record.version
    return record


async def new_key(backend: Backend, name: str = "default") -> StreamKey:
    """A stream of a new run."""
    return StreamKey((await create(backend)).id, name)


# Streams

CHUNK = b'"' + b"x" * 100 + b'"'
"""Large enough that a few of them exceed the retention of a test."""


def items(count: int, start: int = 0) -> list[bytes]:
    return [b"%d" % number for number in range(start, start + count)]


def data(entries: Sequence[Entry]) -> list[bytes]:
    return [entry.data for entry in entries]


def seqs(entries: Sequence[Entry]) -> list[int]:
    return [entry.seq for entry in entries]


async def read_all(broker: Broker, key: StreamKey, after: int = -1) -> list[Entry]:
    """All retained entries, page by page."""
    entries: list[Entry] = []
    while page := (await broker.read(key, after=after)).entries:
        entries += page
        after = page[-1].seq
    return entries


@dataclass
class Reader:
    """A subscriber with a cursor. It can leave and resume; it remembers the entries that it has seen."""

    broker: Broker
    key: StreamKey
    after: int = -1
    seen: list[Entry] = field(default_factory=list)
    gaps: list[tuple[int, int]] = field(default_factory=list)
    """(cursor, first retained seq) for each gap that was reported."""
    end: End | None = None

    async def run(self, *, enough: Callable[[Reader], bool] = lambda reader: False) -> Reader:
        """Read until the stream ends or `enough` is true."""
        async with self.broker.live(self.key) as live:
            await self.follow(live, enough=enough)
        return self

    async def follow(self, live: LiveLog, *, enough: Callable[[Reader], bool] = lambda reader: False) -> None:
        """As `run`, on a log that is followed already."""
        while not enough(self):
            if await self._take(live):
                continue
            if live.end is not None:
                self.end = live.end
                break
            if live.failure is not None:
                raise live.failure
            await live.waiting.wait()

    async def _take(self, live: LiveLog) -> bool:
        """Move the cursor forward; false if there is nothing after it."""
        if live.gap(self.after) is not None:
            await self._catch_up()
            return True
        found = live.take(self.after)
        if found is None:
            return False
        body, last = found
        entries = live.entries(self.after, 1_000_000)
        entries = entries[: last - entries[0].seq + 1]
        assert b"".join(chunk_frame(entry.seq, entry.data) for entry in entries) == body
        self._add(entries)
        return True

    async def _catch_up(self) -> None:
        """Read from storage what the process does not hold, or note that it was trimmed."""
        page = await self.broker.read(self.key, after=self.after)
        lost = page.first > self.after + 1
        assert lost or page.entries, f"neither the process nor the storage has entries after {self.after}"
        if lost:
            self.gaps.append((self.after, page.first))
            self.after = page.first - 1
        self._add(page.entries)

    def _add(self, entries: list[Entry]) -> None:
        for entry in entries:
            self.seen.append(entry)
            self.after = entry.seq

    def assert_seamless(self) -> None:
        """Every entry arrived once and in order, and every gap was reported."""
        jumps = {first: cursor for cursor, first in self.gaps}
        for entry, successor in itertools.pairwise(self.seen):
            if successor.seq != entry.seq + 1:
                assert successor.seq > entry.seq, f"{successor.seq} arrived after {entry.seq}"
                assert jumps.get(successor.seq) == entry.seq, f"{entry.seq + 1} to {successor.seq - 1} are missing"


def have(count: int) -> Callable[[Reader], bool]:
    """Whether a reader has seen this many entries."""
    return lambda reader: len(reader.seen) >= count


async def pause(steps: int) -> None:
    """Let other tasks run for some loop iterations."""
    for _ in range(steps):
        await anyio.lowlevel.checkpoint()


async def until_waiting(place: LiveLog | LiveTopic, count: int = 1) -> None:
    """Wait until this many readers wait."""
    while len(place.waiting) < count:
        await anyio.lowlevel.checkpoint()


# Topics


async def next_changes(topic: LiveTopic, cursor: Cursor | None, *, limit: int = 1000) -> Changes:
    """The changes after a cursor, as soon as there are any."""
    with Follower(topic) as follower:
        while not (changes := await follower.changes(cursor, limit=limit)).items:
            cursor = changes.cursor
            await follower.wait()
    return changes


def versions(changes: Changes) -> dict[str, int]:
    """The version of each run in an answer, which lists a run once."""
    found = {change.run_id: change.version for change in changes.items}
    assert len(found) == len(changes.items), "an answer lists a run twice"
    return found


async def versions_in(broker: Broker, topic: str) -> dict[str, int]:
    """The runs of a topic and their versions, as a new reader gets them."""
    changes = await broker.changes(topic)
    assert changes.snapshot
    return versions(changes)


# Due times


async def due_runs(backend: Backend, kind: str) -> list[str]:
    """The due runs. Both processes must return the same, unless one becomes due between the two calls."""
    for _ in range(10):
        ours, theirs = await backend.broker.due(kind), await backend.peer.due(kind)
        if ours == theirs:
            return ours
    raise AssertionError(f"the processes disagree on {kind}: {ours}, {theirs}")


async def assert_due(backend: Backend, kind: str, *run_ids: str) -> None:
    """Wait until as many runs are due, and check that they are these, in this order."""

    async def are_due() -> bool:
        return len(await due_runs(backend, kind)) >= len(run_ids)

    await eventually(backend, are_due, f"{len(run_ids)} runs are due for {kind}")
    assert await due_runs(backend, kind) == list(run_ids)


async def assert_due_from(backend: Backend, kind: str, run_id: str, at_ms: int) -> None:
    """The run is due from a time on, not before, and stays due."""
    while backend.now_ms() < at_ms:
        found = await due_runs(backend, kind)
        assert run_id not in found or backend.now_ms() >= at_ms, f"the run is due for {kind} too early"
        await backend.advance(STEP_S)
    await assert_due(backend, kind, run_id)
    assert await due_runs(backend, kind) == [run_id], "it stays due until something is done"


# Cancellation


async def cancelled_at(number: int, call: Coroutine[Any, Any, Any]) -> bool:
    """Run a call and cancel it at its `number`-th suspension, counted from 1 (0: before it starts).

    Returns whether the call finished before that. Nothing depends on time, so trying all numbers until the call
    finishes cancels it at each of its waiting points.
    """
    reached = [0]
    with anyio.CancelScope() as scope:
        if number == 0:
            scope.cancel()
        await _counting(call, reached, partial(_cancel_at, scope, number))
    return number > reached[0]


def _cancel_at(scope: anyio.CancelScope, number: int, reached: int) -> None:
    if reached == number:
        scope.cancel()


@types.coroutine
def _counting(
    call: Coroutine[Any, Any, Any], reached: list[int], suspended: Callable[[int], None]
) -> Generator[Any, Any, Any]:
    """As `yield from call`, and call `suspended` at each suspension."""
    resume: Callable[[], Any] = partial(call.send, None)
    while True:
        try:
            trap = resume()
        except StopIteration as stop:
            return stop.value
        reached[0] += 1
        suspended(reached[0])
        try:
            resume = partial(call.send, (yield trap))
        except BaseException as exc:
            resume = partial(call.throw, exc)
