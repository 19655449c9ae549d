"""The broker on Redis 7 or later, or Valkey: one server, a Sentinel's, or a Cluster.

Redis stores everything and announces every change; a process holds only what its readers follow. Each change is one
script, so it happens entirely or not at all, also if its caller is cancelled or the connection is lost. Changes at two
places (a run and the topics of its tags, a claim) are ordered so that a crash in between leaves nothing wrong, and a
mark by which any process completes them. Runs on asyncio only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import lru_cache, partial
from typing import Any, NamedTuple

import anyio
from redis.asyncio.client import Redis

from asgi_realtime.brokers.base import INPUT_COST, ChangeMark, LiveTopic
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.brokers.redis import scripts
from asgi_realtime.brokers.redis.clients import NO_MEMORY, open_client
from asgi_realtime.brokers.redis.keys import Keys
from asgi_realtime.brokers.redis.mirrors import Mirrors
from asgi_realtime.brokers.redis.pubsub import PubSub
from asgi_realtime.brokers.redis.records import Records
from asgi_realtime.brokers.redis.schedule import Schedule
from asgi_realtime.brokers.redis.servers import Servers
from asgi_realtime.brokers.redis.stream_mirror import StreamMirror, decode_end
from asgi_realtime.brokers.redis.topic_mirror import TopicMirror
from asgi_realtime.brokers.redis.topics import Topics
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.core.errors import (
    BrokerUnavailable,
    LimitExceeded,
    ProducerGap,
    RealtimeError,
    RunNotFound,
    ServerShutdown,
    StateError,
    StreamClosed,
)
from asgi_realtime.core.log import End, Entry, Page, Position, Producer, StreamKey, misplaced
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.core.topics import Changes, Cursor
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.thread_calls import ThreadLoop
from asgi_realtime.loop.waiting import WakeSoon, on_asyncio

PREFIX = "asgi_realtime"

_INLINE_BYTES = 64 * 1024
"""The largest append that a message carries. For a larger one it carries the position, and subscribers read."""

_PAGE_BYTES = 256 * 1024
_SILENCE_S = 10.0

_EVICTS = (
    "Redis deletes keys when its memory is full, including active runs and unread chunks;"
    " set maxmemory-policy to noeviction"
)


class _StreamNames(NamedTuple):
    """A stream's keys in the order of the scripts, its name, its channel."""

    keys: tuple[str, str, str]
    name: bytes
    channel: str


class _Open(NamedTuple):
    """The parts of a broker between its start and its stop."""

    servers: Servers
    pubsub: PubSub
    records: Records
    topics: Topics
    mirrors: Mirrors
    schedule: Schedule


class RedisBroker:
    """Everything in Redis, shared by all processes that use the same server and prefix.

    `server` is a URL as redis-py takes it (`redis://`, `rediss://`, `unix://`), of one server or of any node of a
    Cluster; or an asyncio client of redis-py, such as `Sentinel(…).master_for("mymaster")`, whose settings are used for
    the broker's own connections. `prefix` separates applications on one server. Raises `InvalidConfiguration`.
    """

    shared = True
    warnings: Sequence[str] = ()

    def __init__(
        self,
        server: str | Redis,
        *,
        prefix: str = PREFIX,
        limits: Limits | None = None,
        retention: Retention | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        self._client = open_client(server) if isinstance(server, str) else server
        self._prefix = prefix
        self._keys = Keys(prefix)
        self._limits = limits or Limits()
        self._retention = retention or Retention()
        self._timeouts = timeouts or Timeouts()
        self._names = lru_cache(maxsize=10_000)(self._names_of)
        self._jobs: set[asyncio.Task[None]] = set()
        self._quiet = False
        self._was_open = False
        self._opened: _Open | None = None

    def __repr__(self) -> str:
        return "<RedisBroker>"

    async def __aenter__(self) -> RedisBroker:
        if not on_asyncio():
            raise RuntimeError("the Redis broker runs on asyncio only; on trio use the memory broker")
        self._jobs = set()  # jobs of a loop that was closed without a stop never end
        servers = Servers(self._client, timeout_s=self._timeouts.broker, spawn=self._spawn, quiet=self._quiet)
        pubsub = PubSub(servers, silence_s=_SILENCE_S)
        topics = Topics(servers, self._keys, max_runs=self._limits.topic_runs)
        wakes, max_bytes = WakeSoon(), self._limits.mirror_bytes
        mirrors = Mirrors(
            partial(StreamMirror, self._keys, pubsub, read=self._read_for_mirror, wakes=wakes, max_bytes=max_bytes),
            partial(TopicMirror, self._keys, pubsub, topics),
        )
        schedule = Schedule(servers, self._keys, timeouts=self._timeouts, retention=self._retention)
        records = Records(servers, self._keys, schedule)
        self._opened = _Open(servers, pubsub, records, topics, mirrors, schedule)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        opened, self._opened = self._open, None
        self._was_open = True
        opened.mirrors.close()
        with anyio.CancelScope(shield=True):  # a stop cancels the task that is here, and connections would stay open
            await opened.pubsub.aclose()
            await opened.servers.aclose()
            for job in tuple(self._jobs):
                job.cancel()
            await asyncio.gather(*self._jobs, return_exceptions=True)

    def _spawn(self, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a job until it ends or the broker is closed."""
        task = asyncio.get_running_loop().create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._jobs.discard(task)
        failure = None if task.cancelled() else task.exception()
        if failure is not None and not isinstance(failure, ServerShutdown):
            logger.error("a job of the Redis broker failed", exc_info=failure)

    @property
    def _open(self) -> _Open:
        if self._opened is None:
            if self._was_open:
                raise ServerShutdown()
            raise BrokerUnavailable("the Redis broker has not been entered")
        return self._opened

    @property
    def held(self) -> int:
        """How much is held for readers, see `Mirrors.held`."""
        return 0 if self._opened is None else self._opened.mirrors.held

    # Streams

    def _names_of(self, key: StreamKey) -> _StreamNames:
        keys = self._keys
        return _StreamNames(
            (keys.run(key.run), keys.streams(key.run), keys.entries(key)), key.name.encode(), keys.stream_channel(key)
        )

    async def append(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        names = self._names(key)
        answer = await self._open.servers.run(
            scripts.APPEND,
            names.keys,
            names.name,
            "" if producer is None else producer.id,
            0 if producer is None else producer.start,
            0 if key.hidden else self._retention.stream_bytes,
            self._limits.inputs_bytes if key.hidden else 0,
            b"" if end is None else encode_value(end),
            "" if at is None else at,
            names.channel,
            _INLINE_BYTES,
            INPUT_COST,
            *items,
            repeat=producer is not None or not items,
            channel=names.channel,
        )
        if answer[0] == b"ok":
            return Position(int(answer[1]), int(answer[2]))
        raise self._append_error(key, answer[0], answer[-1], at)

    def _append_error(self, key: StreamKey, reason: bytes, detail: bytes, at: int | None) -> RealtimeError:
        match reason:
            case b"missing":
                return _not_found(key.run)
            case b"hole":
                return ProducerGap(f"the append leaves a hole, expected item {int(detail)}", expected=int(detail))
            case b"misplaced":
                return misplaced(at or 0, int(detail))
            case b"full":
                limit = self._limits.inputs_bytes
                return LimitExceeded(
                    f"the inputs of run {key.run!r} hold {int(detail)} bytes, limit {limit}", status=429
                )
            case _:
                return StreamClosed(f"the stream has ended ({decode_end(detail).reason}); nothing can be appended")

    async def read(self, key: StreamKey, *, after: int = -1, limit: int = 500) -> Page:
        return await self._read(key, after, limit, _PAGE_BYTES)

    async def produced(self, key: StreamKey, producer_id: str) -> int:
        names = self._names(key)
        counted = await self._open.servers.run(scripts.PRODUCED, names.keys[:2], names.name, producer_id)
        if counted is None:
            raise _not_found(key.run)
        return int(counted)

    async def _read_for_mirror(self, key: StreamKey, after: int | None) -> Page:
        """A page after a seq; the newest part of the stream if that is None."""
        return await self._read(key, after, 1_000_000, self._limits.mirror_bytes if after is None else _PAGE_BYTES)

    async def _read(self, key: StreamKey, after: int | None, limit: int, max_bytes: int) -> Page:
        names = self._names(key)
        args = (names.name, "tail" if after is None else after, limit, max_bytes)
        answer = await self._open.servers.run(scripts.READ, names.keys, *args, bulk=True)
        if answer[0] == b"missing":
            raise _not_found(key.run)
        _, first, following, end, rows = answer
        entries = [Entry(int(row[0][:-2]) - 1, row[1][3], int(row[1][1])) for row in rows]
        return Page(entries, int(first), int(following), decode_end(end) if end else None)

    def live(self, key: StreamKey) -> AbstractAsyncContextManager[LiveLog]:
        return self._open.mirrors.live(key)

    # Runs

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        opened = self._open
        try:
            version, has_new_lease = await opened.records.store(record, expect, change, floors or {})
            hints = opened.schedule.add_hints(record, has_new_lease=has_new_lease)
            if record.topics:
                await asyncio.gather(hints, opened.topics.publish(record.id, version, record.topics))
            else:
                await hints
        except StateError:
            raise
        except BaseException:  # if it was stored, another process has to complete it
            self._spawn(self._hint_at(record))
            raise
        return version

    async def _hint_at(self, record: StoredRecord) -> None:
        with suppress(BrokerUnavailable):  # then it is found when its partition is scanned
            await self._open.schedule.add_hints(record, has_new_lease=True, unpublished=True)

    async def load(self, run_ids: Sequence[str]) -> list[StoredRecord | None]:
        return list(await asyncio.gather(*map(self._open.records.load, run_ids)))

    async def remove(self, run_id: str) -> None:
        """Remove a run: from its topics first and itself last, so that after a crash in between it is still due."""
        opened = self._open
        record = await opened.records.load(run_id)
        if (
            record is None
            or not record.is_completed
            or (record.has_on_end and await opened.schedule.has_on_end(run_id))
        ):
            return
        await opened.topics.remove(run_id, record.topics)
        for claim in record.claims:
            await opened.servers.run(scripts.RELEASE_CLAIM, [self._keys.claim(claim)], run_id)
        await opened.records.remove(run_id)
        await opened.topics.wake(record.topics)  # now followers that load the run do not find it

    # Topics

    async def changes(self, topic: str, *, after: Cursor | None = None, limit: int = 1000) -> Changes:
        return await self._open.topics.changes(topic, after, limit)

    def follow(self, topic: str) -> AbstractAsyncContextManager[LiveTopic]:
        return self._open.mirrors.follow(topic)

    async def publish(self, run_id: str) -> None:
        record = await self._open.records.load(run_id)
        if record is not None:
            await self._open.topics.publish(run_id, record.version, record.topics)

    # Claims, due times, leases

    async def claim(
        self, key: str, value: str, *, ttl_s: float, owner: str | None = None, instead_of: str | None = None
    ) -> str:
        ttl_ms = max(1, round(ttl_s * 1000))
        stored = await self._open.servers.run(
            scripts.CLAIM, [self._keys.claim(key)], value, ttl_ms, "" if instead_of is None else instead_of
        )
        claimed: str = stored.decode()
        return claimed

    async def claimed(self, key: str) -> str | None:
        name = self._keys.claim(key)
        stored = await self._open.servers.call(name, "GET", name)
        return None if stored is None else stored.decode()

    async def due(self, kind: str, *, limit: int = 100, skip: int = 0) -> list[str]:
        return await self._open.schedule.due(kind, limit=limit, skip=skip)

    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        await self._open.schedule.renew(run_ids, owner=owner)

    def renew_from_thread(self, run_ids: Sequence[str], *, owner: str) -> None:
        """As `renew`, on its own loop and connections, because the broker's loop can be blocked."""

        async def renew() -> None:
            broker = RedisBroker(self._client, prefix=self._prefix, timeouts=self._timeouts)
            broker._quiet = True  # the caller logs
            async with broker:
                await broker.renew(run_ids, owner=owner)

        with asyncio.Runner(loop_factory=ThreadLoop) as runner:
            runner.run(renew())

    async def enqueued(self, run_id: str) -> None:
        await self._open.schedule.enqueued(run_id)

    async def take_on_end(self, run_id: str) -> bool:
        return await self._open.schedule.take_on_end(run_id)

    async def on_end_called(self, run_id: str) -> None:
        await self._open.schedule.on_end_called(run_id)

    async def watch(self, run_id: str, *, process: str, readers: int, grace_s: float | None) -> None:
        await self._open.schedule.watch(run_id, process=process, readers=readers, grace_s=grace_s)

    async def watchers(self, run_id: str) -> int:
        return await self._open.schedule.watchers(run_id)

    # Lists of runs

    async def note_runs(self, name: str, runs: Sequence[tuple[str, int, int, bytes]], *, size: int) -> None:
        ttl_ms = round(self._retention.after_end * 1000)
        arguments = (argument for run in runs for argument in run)
        await self._open.servers.run(scripts.NOTE_RUNS, self._keys.run_list(name), size, ttl_ms, *arguments, bulk=True)

    async def noted_runs(self, name: str) -> list[bytes]:
        _, summaries = self._keys.run_list(name)
        found: list[bytes] = await self._open.servers.call(summaries, "HVALS", summaries, bulk=True)
        return [noted.partition(b" ")[2] for noted in found]

    async def ping(self) -> None:
        try:
            await self._open.servers.check()
        except BrokerUnavailable as exc:
            if NO_MEMORY in str(exc):
                self.warnings = (NO_MEMORY,)
            raise
        if (trouble := self._open.pubsub.trouble) is not None:
            raise BrokerUnavailable(f"nothing can be followed: {trouble}")
        self.warnings = tuple(warning for warning in self.warnings if warning != NO_MEMORY)
        with suppress(BrokerUnavailable):  # the Redis user can lack the permission for INFO
            evicts = any(map(_evicts, await self._open.servers.ask_all("INFO", "memory")))
            if evicts and not self.warnings:
                logger.warning("%s", _EVICTS)
            self.warnings = (_EVICTS,) if evicts else ()


def _evicts(info: bytes) -> bool:
    """Whether the server deletes keys when memory is full."""
    fields = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
    return fields.get("maxmemory", "0") != "0" and fields.get("maxmemory_policy", "noeviction") != "noeviction"


def _not_found(run_id: str) -> RunNotFound:
    return RunNotFound(f"no run {run_id!r}: it does not exist or has expired (Retention.after_end)")
