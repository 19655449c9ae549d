"""Run records in Redis: one hash per run, changed by scripts that compare the version first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import msgspec

from asgi_realtime.brokers.base import MARKS_KEPT, ChangeMark
from asgi_realtime.brokers.redis import scripts
from asgi_realtime.brokers.redis.keys import Keys
from asgi_realtime.brokers.redis.schedule import STATES, Schedule
from asgi_realtime.brokers.redis.servers import Servers
from asgi_realtime.brokers.redis.topics import new_epoch, random_step
from asgi_realtime.core.chunks import decode_as, encode_value
from asgi_realtime.core.errors import StreamBehind, UsageError
from asgi_realtime.core.log import StreamKey
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import StoredRecord, lease_kind, run_topic
from asgi_realtime.loop.logger import logger

_decode = msgspec.json.Decoder(StoredRecord).decode

_MAX_UNREADABLE = 1000
"""Runs that are remembered so that each is reported once."""


class Records:
    """Raises `BrokerUnavailable`."""

    def __init__(self, servers: Servers, keys: Keys, schedule: Schedule) -> None:
        self._servers = servers
        self._keys = keys
        self._schedule = schedule
        self._unreadable: set[str] = set()

    async def store(
        self, record: StoredRecord, expect: int, change: ChangeMark, floors: Mapping[tuple[str, str], int]
    ) -> tuple[int, bool]:
        """Store a version in one step with the run's own topic. Returns the version, and whether a lease begins.

        Raises `VersionConflict`, `StreamBehind`.
        """
        due = self._schedule.due_times(record)
        end = record.end
        channel = self._keys.topic_channel(run_topic(record.id))
        answer = await self._servers.run(
            scripts.COMMIT if end is None else scripts.COMMIT_END,
            [self._keys.run(record.id), self._keys.streams(record.id), *self._keys.due_of(record.id)],
            record.id,
            expect,
            record.version,
            f"{change.writer}:{change.number}",
            encode_value(msgspec.structs.replace(record, payload_json=None, payload_meta_json=None, output_json=None)),
            _encode_payload(record) if expect == 0 else b"",
            record.output_json or b"",
            b"" if end is None else encode_value(end),
            STATES.get(lease_kind(record), ""),
            record.owner or "",
            self._schedule.lease_ms,
            int(bool(record.topics)),
            channel,
            random_step(),
            new_epoch(),
            MARKS_KEPT,
            *(due.get(kind, "") for kind in ("delay", "ttl", "cancel", "expiry")),
            *chain.from_iterable((*stream_and_producer, count) for stream_and_producer, count in floors.items()),
            channel=channel,
        )
        if answer[0] == b"behind":
            raise StreamBehind(f"stream {answer[1].decode()!r} has lost entries that were acknowledged")
        if answer[0] == b"conflict":
            current = _decode_record(answer[2])
            raise VersionConflict(f"run {record.id!r} has version {int(answer[1])}, expected {expect}", current=current)
        return int(answer[1]), answer[2] == b"1"

    async def load(self, run_id: str) -> StoredRecord | None:
        """None also for a record that cannot be decoded, so that lists with other runs do not fail."""
        key = self._keys.run(run_id)
        fields = await self._servers.call(key, "HMGET", key, "record", "payload", "output", bulk=True)
        try:
            return _decode_record(fields)
        except (RecursionError, UsageError, msgspec.ValidationError) as exc:
            if run_id not in self._unreadable:
                if len(self._unreadable) >= _MAX_UNREADABLE:
                    self._unreadable.clear()
                self._unreadable.add(run_id)
                logger.error("the stored record of run %s cannot be decoded, so the run is not found: %s", run_id, exc)
            return None

    async def remove(self, run_id: str) -> None:
        """Remove a run that is over, with its streams and due times."""
        key = self._keys.run(run_id)
        fields = await self._servers.call(key, "HKEYS", self._keys.streams(run_id))
        streams = [StreamKey(run_id, field[2:].decode()) for field in fields if field.startswith(b"n:")]
        await self._servers.run(
            scripts.REMOVE_RUN,
            [key, self._keys.streams(run_id), *self._keys.due_of(run_id), *map(self._keys.entries, streams)],
            run_id,
            self._keys.topic_channel(run_topic(run_id)),
            len(streams),
        )


def _decode_record(fields: Sequence[bytes | None]) -> StoredRecord | None:
    record, payload, output = fields
    if record is None:
        return None
    try:
        decoded: StoredRecord = _decode(record)
    except msgspec.DecodeError:  # metadata with a lone surrogate
        decoded = decode_as(record, StoredRecord)
    if payload is None and output is None:
        return decoded
    payload, _, meta = (payload or b"").partition(b"\n")
    return msgspec.structs.replace(
        decoded, payload_json=payload or None, payload_meta_json=meta or None, output_json=output
    )


def _encode_payload(record: StoredRecord) -> bytes:
    """The payload, and after a line feed, which our JSON never contains, its superjson `meta`."""
    payload = record.payload_json or b""
    return payload if record.payload_meta_json is None else payload + b"\n" + record.payload_meta_json
