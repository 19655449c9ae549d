"""The broker on Redis 7 or later, or Valkey: one server, a Sentinel's, or a Cluster.

Redis keeps everything and tells of every change; a process keeps what its readers follow. Each change is one script,
so it happens entirely or not at all, also if the caller is cancelled or the connection is lost meanwhile. What has to
change at two places (a run and its tags' topics, a claim) is done in an order in which dying in between leaves nothing
wrong, and a mark by which any process does the rest. Runs on asyncio.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
import secrets
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import msgspec
from redis.asyncio.client import Redis

from asgi_realtime.brokers.base import MARKS_KEPT, ChangeMark, LiveTopic
from asgi_realtime.brokers.redis import scripts
from asgi_realtime.brokers.redis.keys import DUE_OF_PARTITION, PARTITIONS, Keys, run_of_topic
from asgi_realtime.brokers.redis.listener import Listener
from asgi_realtime.brokers.redis.mirror import (
    NO_EPOCH,
    Mirror,
    StreamMirror,
    TopicMirror,
    changes_after,
    decode_end,
)
from asgi_realtime.brokers.redis.servers import Servers, open_client
from asgi_realtime.config import Limits, Retention, Timeouts
from asgi_realtime.core.log import End, Entry, Page, Position, Producer, StreamKey, misplaced
from asgi_realtime.core.runs import RunRecord, Status, due_times
from asgi_realtime.core.topics import Change, Changes, Cursor, TopicIndex
from asgi_realtime.errors import (
    BrokerUnavailable,
    LimitExceeded,
    ProducerGap,
    RealtimeError,
    RunNotFound,
    StateError,
    StreamBehind,
    StreamClosed,
    VersionConflict,
)
from asgi_realtime.livelog import LiveLog
from asgi_realtime.waiting import WakeSoon, on_asyncio

logger = logging.getLogger("asgi_realtime")

M = TypeVar("M", bound=Mirror)

PREFIX = "asgi_realtime"

_INLINE_BYTES = 64 * 1024
"""What a message carries itself. Of more it names the position only, and those who follow read it."""

_PAGE_BYTES = 256 * 1024
_SILENCE_S = 10.0
_MAX_STEP = 65536
"""Positions in topics grow by random steps: one that Redis acknowledged and lost is not taken for a later one."""

_SCANNED = 2
"""Partitions that are looked into for each kind at each call of `due` though nothing is noted of them. Notes are made
beside the commits, so one may be missing; all partitions have their turn within a minute or so."""

_EVICTS = (
    "Redis evicts keys when its memory is full, and with them runs that go on and chunks that are not read yet:"
    " set maxmemory-policy to noeviction"
)

_STATES = {Status.EXECUTING: "executing", Status.QUEUED: "queued"}

_json = msgspec.json.Encoder()
_record = msgspec.json.Decoder(RunRecord)


class _StreamNames(NamedTuple):
    """The keys of a stream in the order in which the scripts take them, its name, its channel."""

    keys: tuple[str, str, str]
    name: bytes
    channel: str


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
        self._keys = Keys(prefix)
        self._limits = limits or Limits()
        self._retention = retention or Retention()
        self._timeouts = timeouts or Timeouts()
        self._names = lru_cache(maxsize=10_000)(self._names_of)
        self._streams: dict[StreamKey, StreamMirror] = {}
        self._topics: dict[str, TopicMirror] = {}
        self._jobs: set[asyncio.Task[None]] = set()
        self._wakes = WakeSoon()
        self._scan_at = random.randrange(PARTITIONS)
        self._servers: Servers | None = None
        self._listener: Listener | None = None

    def __repr__(self) -> str:
        return "<RedisBroker>"

    async def __aenter__(self) -> RedisBroker:
        if not on_asyncio():
            raise RuntimeError("the Redis broker runs on asyncio only; on trio use the memory broker")
        self._servers = servers = Servers(self._client, timeout_s=self._timeouts.broker, spawn=self._spawn)
        self._listener = Listener(servers, timeout_s=self._timeouts.broker, silence_s=_SILENCE_S, spawn=self._spawn)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for mirror in (*self._streams.values(), *self._topics.values()):
            mirror.close()
        self._streams.clear()
        self._topics.clear()
        assert self._listener is not None and self._servers is not None
        await self._listener.aclose()
        await self._servers.aclose()
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
        if not task.cancelled() and (failure := task.exception()) is not None:
            logger.error("a job of the Redis broker failed", exc_info=failure)

    @property
    def _open(self) -> Servers:
        if self._servers is None:
            raise BrokerUnavailable("the Redis broker has not been entered")
        return self._servers

    @property
    def held(self) -> int:
        """What is held for readers: mirrors, their users, those who wait."""
        lives = [mirror.live for mirror in self._streams.values()]
        return (
            len(self._streams)
            + len(self._topics)
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
        answer = await self._open.run(
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
            tells=names.channel,
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

    async def _read_for_mirror(self, key: StreamKey, after: int | None) -> Page:
        """A page to be mirrored; the newest part of the stream if there is no position yet."""
        if after is None:
            return await self._read(key, "tail", limit=1_000_000, max_bytes=self._limits.mirror_bytes)
        return await self._read(key, str(after), limit=1_000_000, max_bytes=_PAGE_BYTES)

    async def _read(self, key: StreamKey, after: str, *, limit: int, max_bytes: int) -> Page:
        names = self._names(key)
        answer = await self._open.run(scripts.READ, names.keys, names.name, after, limit, max_bytes, bulk=True)
        if answer[0] == b"gone":
            raise _not_found(key.run)
        _, first, following, end, rows = answer
        entries = [Entry(int(row[0][:-2]) - 1, row[1][3], int(row[1][1])) for row in rows]
        return Page(entries, int(first), int(following), decode_end(end) if end else None)

    @asynccontextmanager
    async def live(self, key: StreamKey) -> AsyncIterator[LiveLog]:
        async with self._followed(self._streams, key, lambda: self._stream_mirror(key)) as mirror:
            mirror.live.enter()
            try:
                yield mirror.live
            finally:
                mirror.live.leave()

    def _stream_mirror(self, key: StreamKey) -> StreamMirror:
        assert self._listener is not None
        return StreamMirror(
            key,
            read=self._read_for_mirror,
            keys=self._keys,
            listener=self._listener,
            spawn=self._spawn,
            wakes=self._wakes,
            max_bytes=self._limits.mirror_bytes,
        )

    @asynccontextmanager
    async def _followed(self, mirrors: dict[Any, M], key: object, make: Any) -> AsyncIterator[M]:
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
                mirror.close()
                if mirrors.get(key) is mirror:
                    del mirrors[key]

    # Runs

    async def commit(
        self, record: RunRecord, *, expect: int, change: ChangeMark, floors: Mapping[str, int] | None = None
    ) -> int:
        try:
            version, began = await self._commit(record, expect, change, floors or {})
            noting = self._note(record, began=began)
            if record.topics:
                await asyncio.gather(noting, self._tell(record.id, version, record.topics))
            else:
                await noting
        except StateError:
            raise
        except BaseException:  # nobody knows whether it is stored; if so, somebody has to do the rest
            self._spawn(self._note_quietly(record))
            raise
        return version

    async def _commit(
        self, record: RunRecord, expect: int, change: ChangeMark, floors: Mapping[str, int]
    ) -> tuple[int, bool]:
        """Store a version. Returns its number, and whether a lease or the like began with it."""
        due = self._due_times(record)
        end = record.end
        answer = await self._open.run(
            scripts.COMMIT if end is None else scripts.COMMIT_END,
            [self._keys.run(record.id), self._keys.streams(record.id), *self._keys.due_of(record.id)],
            record.id,
            expect,
            record.version,
            f"{change.writer}:{change.number}",
            _json.encode(msgspec.structs.replace(record, payload_json=None, output_json=None)),
            record.payload_json or b"" if expect == 0 else b"",
            record.output_json or b"",
            b"" if end is None else _json.encode(end),
            _STATES.get(record.status, ""),
            record.owner or "",
            round(self._timeouts.lease * 1000),
            int(bool(record.topics)),
            self._keys.topic_channel(f"run:{record.id}"),
            random.randint(1, _MAX_STEP),
            secrets.token_hex(4),
            MARKS_KEPT,
            *(due.get(kind, "") for kind in ("delay", "ttl", "cancel", "expiry")),
            *chain.from_iterable(floors.items()),
            tells=self._keys.topic_channel(f"run:{record.id}"),
        )
        if answer[0] == b"short":
            raise StreamBehind(f"stream {answer[1].decode()!r} has lost entries that were acknowledged")
        if answer[0] == b"conflict":
            current = _decode_record(answer[2])
            raise VersionConflict(f"run {record.id!r} has version {int(answer[1])}, expected {expect}", current=current)
        return int(answer[1]), answer[2] == b"1"

    def _due_times(self, record: RunRecord) -> dict[str, int]:
        return due_times(record, cancel_s=self._timeouts.cancel, after_end_s=self._retention.after_end)

    async def _note(self, record: RunRecord, *, began: bool, untold: bool = False) -> None:
        """Note when the run's partition has something due, so that not all of them have to be looked into."""
        times = {kind: f"a{at}" for kind, at in self._due_times(record).items()}
        if began:
            kind = "lease" if record.status is Status.EXECUTING else "enqueue"
            times[kind] = f"r{round(self._timeouts.lease * 1000)}"
        if untold:
            times["untold"] = "r1000"
        if times:
            keys = [self._keys.hint(kind) for kind in times]
            await self._open.run(scripts.HINT, keys, self._keys.partition(record.id), *times.values())

    async def _note_quietly(self, record: RunRecord) -> None:
        with suppress(BrokerUnavailable):  # then it is found when all partitions have had their turn
            await self._note(record, began=record.status in _STATES, untold=True)

    async def _tell(self, run_id: str, version: int, topics: Sequence[str]) -> None:
        """Tell topics of a version, then take back the mark of its commit."""
        await asyncio.gather(*(self._tell_one(topic, run_id, version) for topic in topics))
        keys = [self._keys.run(run_id), self._keys.due("untold", self._keys.partition(run_id))]
        await self._open.run(scripts.TOLD, keys, run_id, version)

    async def _tell_one(self, topic: str, run_id: str, version: int) -> None:
        await self._open.run(
            scripts.TELL,
            self._keys.topic(topic),
            run_id,
            version,
            random.randint(1, _MAX_STEP),
            secrets.token_hex(4),
            self._limits.topic_runs,
            self._keys.topic_channel(topic),
            tells=self._keys.topic_channel(topic),
        )

    async def load(self, run_ids: Sequence[str]) -> list[RunRecord | None]:
        return list(await asyncio.gather(*(self._load(run_id) for run_id in run_ids)))

    async def _load(self, run_id: str) -> RunRecord | None:
        key = self._keys.run(run_id)
        return _decode_record(await self._open.call(key, "HMGET", key, "record", "payload", "output", bulk=True))

    async def changes(self, topic: str, *, after: Cursor | None = None, limit: int = 1000) -> Changes:
        run_id = run_of_topic(topic)
        if run_id is not None:
            return changes_after(await self._index_of_run(run_id), after, limit)
        cursor, _, items, snapshot = await self._changes(topic, after, limit)
        return Changes(cursor, items, snapshot)

    async def _changes(self, topic: str, after: Cursor | None, limit: int) -> tuple[Cursor, int, list[Change], bool]:
        """Where a topic is, the position of what it dropped last, what changed, and whether that is all there is."""
        epoch, position = after or ("-", 0)
        answer = await self._open.run(scripts.CHANGES, self._keys.topic(topic), epoch, position, limit)
        pairs = answer[4]
        items = [
            Change(int(position), run_id.decode(), int(version))
            for run_id, position, version in zip(pairs[::2], pairs[1::2], answer[5], strict=True)
        ]
        return Cursor(answer[0].decode(), int(answer[1])), int(answer[2]), items, bool(answer[3])

    async def _read_index(self, topic: str) -> TopicIndex:
        """The whole of a topic, to be mirrored."""
        run_id = run_of_topic(topic)
        if run_id is not None:
            return await self._index_of_run(run_id)
        cursor, floor, items, _ = await self._changes(topic, None, self._limits.topic_runs)
        index = TopicIndex(cursor.epoch, max_runs=self._limits.topic_runs)
        for change in items:
            index.put(change)
        index.position, index.floor = cursor.position, floor
        return index

    async def _index_of_run(self, run_id: str) -> TopicIndex:
        """The topic of one run: it stands in the run itself, so both change in one step."""
        key = self._keys.run(run_id)
        epoch, position, version = await self._open.call(key, "HMGET", key, "epoch", "position", "version")
        index = TopicIndex(epoch.decode() if epoch else NO_EPOCH, max_runs=1)
        if epoch:
            index.put(Change(int(position), run_id, int(version)))
        return index

    @asynccontextmanager
    async def follow(self, topic: str) -> AsyncIterator[LiveTopic]:
        async with self._followed(self._topics, topic, lambda: self._topic_mirror(topic)) as mirror:
            yield mirror

    def _topic_mirror(self, topic: str) -> TopicMirror:
        assert self._listener is not None
        return TopicMirror(
            topic,
            read=self._read_index,
            ask=lambda topic, after, limit: self.changes(topic, after=after, limit=limit),
            keys=self._keys,
            listener=self._listener,
            spawn=self._spawn,
        )

    async def remove(self, run_id: str) -> None:
        """Remove a run: from its topics first and itself last, so that dying in between leaves it due."""
        key = self._keys.run(run_id)
        record = await self._load(run_id)
        if record is None or not record.is_completed:
            return
        for topic in record.topics:
            await self._open.run(scripts.FORGET, self._keys.topic(topic), run_id, self._keys.topic_channel(topic))
        if record.claim is not None:
            await self._open.run(scripts.UNCLAIM, [self._keys.claim(record.claim)], run_id)
        fields = await self._open.call(key, "HKEYS", self._keys.streams(run_id))
        streams = [StreamKey(run_id, field[2:].decode()) for field in fields if field.startswith(b"n:")]
        await self._open.run(
            scripts.REMOVE,
            [key, self._keys.streams(run_id), *self._keys.due_of(run_id), *map(self._keys.entries, streams)],
            run_id,
            self._keys.topic_channel(f"run:{run_id}"),
            len(streams),
        )
        for channel in map(self._keys.topic_channel, record.topics):  # once more: now loading it tells
            await self._open.call(channel, "SPUBLISH", channel, "w")

    # Claims, due times, leases

    async def claim(self, key: str, value: str, *, ttl_s: float) -> str:
        name = self._keys.claim(key)
        px = max(1, round(ttl_s * 1000))
        stored = await self._open.call(name, "SET", name, value, "NX", "GET", "PX", px)
        return value if stored is None else stored.decode()

    async def due(self, kind: str, *, limit: int = 100, skip: int = 0) -> list[str]:
        if kind == "lease" and self._open.presence.well_for_s() < self._timeouts.lease:
            return []  # nobody could renew while Redis was away: owners have a lease's time to do so
        noted = await self._open.run(scripts.POLL, [self._keys.hint(kind)])
        scanned = {(self._scan_at + number) % PARTITIONS for number in range(_SCANNED)}
        if kind == DUE_OF_PARTITION[-1]:
            self._scan_at = (self._scan_at + _SCANNED) % PARTITIONS
        partitions = [*{*map(int, noted), *scanned}]
        found = await asyncio.gather(*(self._due_in(kind, partition, skip + limit) for partition in partitions))
        return [run_id for _, run_id in heapq.merge(*found)][skip : skip + limit]

    async def _due_in(self, kind: str, partition: int, limit: int) -> list[tuple[float, str]]:
        """What is due in one partition, by time. Notes when there is something next."""
        key = self._keys.due(kind, partition)
        pairs, following = await self._open.run(scripts.DUE, [key], limit)
        if following:
            await self._open.run(scripts.HINT, [self._keys.hint(kind)], partition, b"a" + following)
        return [(float(at), run_id.decode()) for run_id, at in zip(pairs[::2], pairs[1::2], strict=True)]

    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        await asyncio.gather(*(self._renew(run_id, owner) for run_id in run_ids))

    async def _renew(self, run_id: str, owner: str) -> None:
        lease, enqueue, *_ = self._keys.due_of(run_id)
        lease_ms = round(self._timeouts.lease * 1000)
        await self._open.run(scripts.RENEW, [self._keys.run(run_id), lease, enqueue], run_id, owner, lease_ms)

    def renew_from_thread(self, run_ids: Sequence[str], *, owner: str) -> None:
        """As `renew`, with a loop and connections of its own: the loop of the broker may be blocked."""

        async def renew() -> None:
            async with RedisBroker(self._client, limits=self._limits, timeouts=self._timeouts) as broker:
                broker._keys = self._keys
                await broker.renew(run_ids, owner=owner)

        asyncio.run(renew())

    async def enqueued(self, run_id: str) -> None:
        key = self._keys.due("enqueue", self._keys.partition(run_id))
        await self._open.run(scripts.ENQUEUED, [key], run_id)

    async def tell(self, run_id: str) -> None:
        record = await self._load(run_id)
        if record is not None:
            await self._tell(run_id, record.version, record.topics)

    async def ping(self) -> None:
        await self._open.check()
        if self._listener is not None and (trouble := self._listener.trouble) is not None:
            raise BrokerUnavailable(f"nothing can be followed: {trouble}")
        with suppress(BrokerUnavailable):  # INFO may not be allowed, and then nothing is known
            evicting = any(map(_evicts, await self._open.ask_all("INFO", "memory")))
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
    return msgspec.structs.replace(decoded, payload_json=payload, output_json=output)


def _not_found(run_id: str) -> RunNotFound:
    return RunNotFound(f"no run {run_id!r}: it never was, or it is past its retention")
