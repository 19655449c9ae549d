"""The broker on Redis 7 or later, or Valkey: one server, a Sentinel's, or a Cluster.

Redis keeps everything and tells of every change; a process keeps what its readers follow. Each change is one script,
so it happens entirely or not at all, also if the caller is cancelled or the connection is lost meanwhile. What has to
change at two places (a run and its tags' topics, a claim) is done in an order in which dying in between leaves nothing
wrong, and a mark by which any process does the rest. Runs on asyncio.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import anyio
import msgspec
from redis.asyncio.client import Redis

from asgi_realtime.brokers.base import MARKS_KEPT, ChangeMark, LiveTopic
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.brokers.redis import scripts
from asgi_realtime.brokers.redis.idle_mirrors import IdleMirrors
from asgi_realtime.brokers.redis.keys import Keys
from asgi_realtime.brokers.redis.listener import Listener
from asgi_realtime.brokers.redis.mirror import Mirror, StreamMirror, TopicMirror, decode_end
from asgi_realtime.brokers.redis.schedule import STATES, Schedule
from asgi_realtime.brokers.redis.servers import Servers, open_client
from asgi_realtime.brokers.redis.topics import Topics, new_epoch, random_step
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.core.errors import (
    BrokerUnavailable,
    LimitExceeded,
    ProducerGap,
    RealtimeError,
    RunNotFound,
    ServerShutdown,
    StateError,
    StreamBehind,
    StreamClosed,
)
from asgi_realtime.core.log import End, Entry, Page, Position, Producer, StreamKey, misplaced
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import RunRecord, due_times
from asgi_realtime.core.topics import Changes, Cursor
from asgi_realtime.loop.waiting import WakeSoon, on_asyncio

logger = logging.getLogger("asgi_realtime")

M = TypeVar("M", bound=Mirror)

PREFIX = "asgi_realtime"

_INLINE_BYTES = 64 * 1024
"""What a message carries itself. Of more it names the position only, and those who follow read it."""

_PAGE_BYTES = 256 * 1024
_SILENCE_S = 10.0

_EVICTS = (
    "Redis evicts keys when its memory is full, and with them runs that go on and chunks that are not read yet:"
    " set maxmemory-policy to noeviction"
)

_json = msgspec.json.Encoder()
_record = msgspec.json.Decoder(RunRecord)


class _StreamNames(NamedTuple):
    """The keys of a stream in the order in which the scripts take them, its name, its channel."""

    keys: tuple[str, str, str]
    name: bytes
    channel: str


class _Open(NamedTuple):
    """What a broker consists of between its start and its stop."""

    servers: Servers
    listener: Listener
    topics: Topics
    schedule: Schedule


class RedisBroker:
    """Everything in Redis, shared by all processes that use the same server and prefix.

    `server` is a URL as redis-py takes it (`redis://`, `rediss://`, `unix://`), of one server or of any node of a
    Cluster; or an asyncio client of redis-py, such as `Sentinel(…).master_for("mymaster")`, whose settings are used for
    connections of the broker's own. `prefix` keeps applications on one server apart. Raises `InvalidConfiguration`.
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
        self._streams: dict[StreamKey, StreamMirror] = {}
        self._topics: dict[str, TopicMirror] = {}
        self._lingering = IdleMirrors(self._forget_topic)
        self._jobs: set[asyncio.Task[None]] = set()
        self._wakes = WakeSoon()
        self._quiet = False
        self._left = False
        self._opened: _Open | None = None

    def __repr__(self) -> str:
        return "<RedisBroker>"

    async def __aenter__(self) -> RedisBroker:
        if not on_asyncio():
            raise RuntimeError("the Redis broker runs on asyncio only; on trio use the memory broker")
        # Of a loop that was closed without a stop something may be left, and it hears nothing any more.
        self._streams, self._topics, self._jobs = {}, {}, set()
        self._lingering = IdleMirrors(self._forget_topic)
        servers = Servers(self._client, timeout_s=self._timeouts.broker, spawn=self._spawn, quiet=self._quiet)
        self._opened = _Open(
            servers,
            Listener(servers, timeout_s=self._timeouts.broker, silence_s=_SILENCE_S, spawn=self._spawn),
            Topics(servers, self._keys, max_runs=self._limits.topic_runs),
            Schedule(servers, self._keys, lease_s=self._timeouts.lease),
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        opened, self._opened = self._open, None
        self._left = True
        self._lingering.clear()
        for mirror in (*self._streams.values(), *self._topics.values()):
            mirror.shut_down()
        self._streams.clear()
        self._topics.clear()
        with anyio.CancelScope(shield=True):  # a stop cancels who has entered, and connections would stay open
            await opened.listener.aclose()
            await opened.servers.aclose()
            for job in tuple(self._jobs):
                job.cancel()
            await asyncio.gather(*self._jobs, return_exceptions=True)

    def _spawn(self, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a job of the broker's own; it is ended with the broker."""
        task = asyncio.get_running_loop().create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._jobs.discard(task)
        failure = None if task.cancelled() else task.exception()
        if failure is not None and not isinstance(failure, ServerShutdown):
            logger.error("a job of the Redis broker failed", exc_info=failure)

    @property
    def _open(self) -> _Open:
        if self._opened is None:
            if self._left:
                raise ServerShutdown()
            raise BrokerUnavailable("the Redis broker has not been entered")
        return self._opened

    @property
    def held(self) -> int:
        """What is held for readers: mirrors, their users, those who wait."""
        lives = [mirror.live for mirror in self._streams.values()]
        return (
            len(self._streams)
            + sum(1 for mirror in self._topics.values() if mirror.users)  # the others only linger
            + sum(mirror.users for mirror in (*self._streams.values(), *self._topics.values()))
            + sum(live.readers + len(live.waiting) for live in lives)
            + sum(len(mirror.waiting) for mirror in self._topics.values())
        )

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
            b"" if end is None else _json.encode(end),
            "" if at is None else at,
            names.channel,
            _INLINE_BYTES,
            *items,
            repeat=producer is not None or not items,
            channel=names.channel,
        )
        if answer[0] == b"ok":
            return Position(int(answer[1]), int(answer[2]))
        raise self._refusal(key, answer[0], answer[-1], at)

    def _refusal(self, key: StreamKey, reason: bytes, detail: bytes, at: int | None) -> RealtimeError:
        """Why an append was refused."""
        match reason:
            case b"gone":
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
        return await self._read(key, str(after), limit=limit, max_bytes=_PAGE_BYTES)

    async def produced(self, key: StreamKey, producer_id: str) -> int:
        names = self._names(key)
        counted = await self._open.servers.run(scripts.PRODUCED, names.keys[:2], names.name, producer_id)
        if counted is None:
            raise _not_found(key.run)
        return int(counted)

    async def _read_for_mirror(self, key: StreamKey, after: int | None) -> Page:
        """A page to be mirrored; the newest part of the stream if there is no position yet."""
        if after is None:
            return await self._read(key, "tail", limit=1_000_000, max_bytes=self._limits.mirror_bytes)
        return await self._read(key, str(after), limit=1_000_000, max_bytes=_PAGE_BYTES)

    async def _read(self, key: StreamKey, after: str, *, limit: int, max_bytes: int) -> Page:
        names = self._names(key)
        answer = await self._open.servers.run(scripts.READ, names.keys, names.name, after, limit, max_bytes, bulk=True)
        if answer[0] == b"gone":
            raise _not_found(key.run)
        _, first, following, end, rows = answer
        entries = [Entry(int(row[0][:-2]) - 1, row[1][3], int(row[1][1])) for row in rows]
        return Page(entries, int(first), int(following), decode_end(end) if end else None)

    @asynccontextmanager
    async def live(self, key: StreamKey) -> AsyncIterator[LiveLog]:
        async with self._followed(self._streams, key, lambda: self._stream_mirror(key), self._forget) as mirror:
            mirror.live.enter()
            try:
                yield mirror.live
            finally:
                mirror.live.leave()

    def _stream_mirror(self, key: StreamKey) -> StreamMirror:
        return StreamMirror(
            key,
            read=self._read_for_mirror,
            keys=self._keys,
            listener=self._open.listener,
            spawn=self._spawn,
            wakes=self._wakes,
            max_bytes=self._limits.mirror_bytes,
        )

    def _forget(self, mirror: StreamMirror) -> None:
        mirror.close()
        if self._streams.get(mirror.key) is mirror:
            del self._streams[mirror.key]

    @asynccontextmanager
    async def _followed(
        self, mirrors: dict[Any, M], key: object, make: Callable[[], M], leave: Callable[[M], None]
    ) -> AsyncIterator[M]:
        _ = self._open
        mirror = mirrors.get(key)
        if mirror is None or mirror.gone:
            mirror = mirrors[key] = make()
        mirror.users += 1
        try:
            await mirror.joined()
            yield mirror
        finally:
            mirror.users -= 1
            if not mirror.users:
                leave(mirror)

    # Runs

    async def commit(
        self, record: RunRecord, *, expect: int, change: ChangeMark, floors: Mapping[tuple[str, str], int] | None = None
    ) -> int:
        try:
            version, began = await self._commit(record, expect, change, floors or {})
            noting = self._open.schedule.note(
                record.id, self._due_times(record), status=record.status if began else None
            )
            if record.topics:
                await asyncio.gather(noting, self._open.topics.publish(record.id, version, record.topics))
            else:
                await noting
        except StateError:
            raise
        except BaseException:  # nobody knows whether it is stored; if so, somebody has to do the rest
            self._spawn(self._note_quietly(record))
            raise
        return version

    async def _commit(
        self, record: RunRecord, expect: int, change: ChangeMark, floors: Mapping[tuple[str, str], int]
    ) -> tuple[int, bool]:
        """Store a version. Returns its number, and whether a lease or the like began with it."""
        due = self._due_times(record)
        end = record.end
        answer = await self._open.servers.run(
            scripts.COMMIT if end is None else scripts.COMMIT_END,
            [self._keys.run(record.id), self._keys.streams(record.id), *self._keys.due_of(record.id)],
            record.id,
            expect,
            record.version,
            f"{change.writer}:{change.number}",
            _json.encode(msgspec.structs.replace(record, payload_json=None, payload_meta_json=None, output_json=None)),
            _stored_payload(record) if expect == 0 else b"",
            record.output_json or b"",
            b"" if end is None else _json.encode(end),
            STATES.get(record.status, ""),
            record.owner or "",
            self._open.schedule.lease_ms,
            int(bool(record.topics)),
            self._keys.topic_channel(f"run:{record.id}"),
            random_step(),
            new_epoch(),
            MARKS_KEPT,
            *(due.get(kind, "") for kind in ("delay", "ttl", "cancel", "expiry")),
            *chain.from_iterable((*of, count) for of, count in floors.items()),
            channel=self._keys.topic_channel(f"run:{record.id}"),
        )
        if answer[0] == b"short":
            raise StreamBehind(f"stream {answer[1].decode()!r} has lost entries that were acknowledged")
        if answer[0] == b"conflict":
            current = _decode_record(answer[2])
            raise VersionConflict(f"run {record.id!r} has version {int(answer[1])}, expected {expect}", current=current)
        return int(answer[1]), answer[2] == b"1"

    def _due_times(self, record: RunRecord) -> dict[str, int]:
        return due_times(record, cancel_s=self._timeouts.cancel, after_end_s=self._retention.after_end)

    async def _note_quietly(self, record: RunRecord) -> None:
        with suppress(BrokerUnavailable):  # then it is found when its partition has its turn
            await self._open.schedule.note(record.id, self._due_times(record), status=record.status, unpublished=True)

    async def load(self, run_ids: Sequence[str]) -> list[RunRecord | None]:
        return list(await asyncio.gather(*(self._load(run_id) for run_id in run_ids)))

    async def _load(self, run_id: str) -> RunRecord | None:
        key = self._keys.run(run_id)
        return _decode_record(
            await self._open.servers.call(key, "HMGET", key, "record", "payload", "output", bulk=True)
        )

    async def changes(self, topic: str, *, after: Cursor | None = None, limit: int = 1000) -> Changes:
        return await self._open.topics.changes(topic, after, limit)

    @asynccontextmanager
    async def follow(self, topic: str) -> AsyncIterator[LiveTopic]:
        known = self._topics.get(topic)
        async with self._followed(self._topics, topic, lambda: self._topic_mirror(topic), self._leave_topic) as mirror:
            self._lingering.take_back(mirror)
            if mirror is known:
                await mirror.refresh()
            yield mirror

    def _leave_topic(self, mirror: TopicMirror) -> None:
        if mirror.gone or self._opened is None:
            self._forget_topic(mirror)
        else:
            self._lingering.keep(mirror)

    def _forget_topic(self, mirror: TopicMirror) -> None:
        if not mirror.users:
            mirror.close()
            if self._topics.get(mirror.topic) is mirror:
                del self._topics[mirror.topic]

    def _topic_mirror(self, topic: str) -> TopicMirror:
        opened = self._open
        return TopicMirror(
            topic,
            read=opened.topics.index,
            ask=opened.topics.changes,
            keys=self._keys,
            listener=opened.listener,
            spawn=self._spawn,
        )

    async def remove(self, run_id: str) -> None:
        """Remove a run: from its topics first and itself last, so that dying in between leaves it due."""
        key = self._keys.run(run_id)
        record = await self._load(run_id)
        if record is None or not record.is_completed:
            return
        await self._open.topics.remove(run_id, record.topics)
        if record.claim is not None:
            await self._open.servers.run(scripts.RELEASE_CLAIM, [self._keys.claim(record.claim)], run_id)
        fields = await self._open.servers.call(key, "HKEYS", self._keys.streams(run_id))
        streams = [StreamKey(run_id, field[2:].decode()) for field in fields if field.startswith(b"n:")]
        await self._open.servers.run(
            scripts.REMOVE_RUN,
            [key, self._keys.streams(run_id), *self._keys.due_of(run_id), *map(self._keys.entries, streams)],
            run_id,
            self._keys.topic_channel(f"run:{run_id}"),
            len(streams),
        )
        await self._open.topics.wake(record.topics)  # who looks now finds that it is gone

    # Claims, due times, leases

    async def claim(self, key: str, value: str, *, ttl_s: float) -> str:
        name = self._keys.claim(key)
        px = max(1, round(ttl_s * 1000))
        stored = await self._open.servers.call(name, "SET", name, value, "NX", "GET", "PX", px)
        return value if stored is None else stored.decode()

    async def claimed(self, key: str) -> str | None:
        name = self._keys.claim(key)
        stored = await self._open.servers.call(name, "GET", name)
        return None if stored is None else stored.decode()

    async def due(self, kind: str, *, limit: int = 100, skip: int = 0) -> list[str]:
        return await self._open.schedule.due(kind, limit=limit, skip=skip)

    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        await self._open.schedule.renew(run_ids, owner=owner)

    def renew_from_thread(self, run_ids: Sequence[str], *, owner: str) -> None:
        """As `renew`, with a loop and connections of its own: the loop of the broker may be blocked."""

        async def renew() -> None:
            broker = RedisBroker(self._client, prefix=self._prefix, timeouts=self._timeouts)
            broker._quiet = True  # whoever renews tells the log
            async with broker:
                await broker.renew(run_ids, owner=owner)

        asyncio.run(renew())

    async def enqueued(self, run_id: str) -> None:
        await self._open.schedule.enqueued(run_id)

    async def publish(self, run_id: str) -> None:
        record = await self._load(run_id)
        if record is not None:
            await self._open.topics.publish(run_id, record.version, record.topics)

    async def ping(self) -> None:
        await self._open.servers.check()
        if (trouble := self._open.listener.trouble) is not None:
            raise BrokerUnavailable(f"nothing can be followed: {trouble}")
        with suppress(BrokerUnavailable):  # INFO may not be allowed, and then nothing is known
            evicting = any(map(_evicts, await self._open.servers.ask_all("INFO", "memory")))
            if evicting and not self.warnings:
                logger.warning("%s", _EVICTS)
            self.warnings = (_EVICTS,) if evicting else ()


def _evicts(info: bytes) -> bool:
    """Whether the server deletes keys when memory is full."""
    fields = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
    return fields.get("maxmemory", "0") != "0" and fields.get("maxmemory_policy", "noeviction") != "noeviction"


def _decode_record(fields: Sequence[bytes | None]) -> RunRecord | None:
    record, payload, output = fields
    if record is None:
        return None
    decoded: RunRecord = _record.decode(record)
    if payload is None and output is None:
        return decoded
    payload, _, meta = (payload or b"").partition(b"\n")
    return msgspec.structs.replace(
        decoded, payload_json=payload or None, payload_meta_json=meta or None, output_json=output
    )


def _stored_payload(record: RunRecord) -> bytes:
    """The payload, and behind a line break, which no JSON of ours holds, what superjson says of it."""
    payload = record.payload_json or b""
    return payload if record.payload_meta_json is None else payload + b"\n" + record.payload_meta_json


def _not_found(run_id: str) -> RunNotFound:
    return RunNotFound(f"no run {run_id!r}: it never was, or it is past its retention")
