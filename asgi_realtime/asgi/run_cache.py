"""The runs that feeds send: each version is loaded once and encoded once, for all feeds of this process.

Values that a reader could not parse are removed from them: one run must not end the feed of a tag for all its readers.
This version stores no such values, but an older one did, and so can another program.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import msgspec

from asgi_realtime.core.errors import LimitExceeded
from asgi_realtime.core.metadata import NO_METADATA
from asgi_realtime.core.nesting import check_depth
from asgi_realtime.core.runs import StoredRecord, content_bytes
from asgi_realtime.core.topics import Change
from asgi_realtime.loop.logger import logger

MAX_BYTES = 64 * 1024 * 1024
"""The limit of the whole cache: metadata, payload and output of one run can be many megabytes."""

MAX_RUNS = 10_000

_RUN_BYTES = 2048
"""An estimate of a record without its contents."""

_EMPTY: dict[str, Any] = {
    "metadata_json": NO_METADATA,
    "payload_json": None,
    "payload_meta_json": None,
    "output_json": None,
}
"""What can be nested too deeply, and what replaces it."""

_MAX_REPORTED = 1000
"""Runs that are remembered so that each is reported once."""

_MAX_ENCODINGS = 4
"""Encodings per run. Events and polls have one each, and so has each choice of columns to leave out."""


LoadRuns = Callable[[Sequence[str]], Awaitable[list[StoredRecord | None]]]
"""The newest records, in the given order; None for each run that does not exist."""

EncodeRun = Callable[[StoredRecord, Collection[str]], bytes]
"""Encodes a run without some columns, as `core.run_json.run_json` does."""


class _CachedRun:
    __slots__ = ("encodings", "record", "size")

    def __init__(self, record: StoredRecord) -> None:
        self.record = record
        self.encodings: dict[tuple[EncodeRun, tuple[str, ...]], bytes] = {}
        self.size = _RUN_BYTES + content_bytes(record)


class RunCache:
    """The newest version of each run, up to `max_runs` runs and about `MAX_BYTES`. Evicts the least recently used."""

    def __init__(self, load: LoadRuns, *, max_runs: int = MAX_RUNS) -> None:
        self._load = load
        self._max_runs = max_runs
        self._cached: dict[str, _CachedRun] = {}  # least recently used first
        self._size = 0
        self._reported: set[str] = set()

    async def records(self, changes: Sequence[Change]) -> list[StoredRecord | None]:
        """The records of changed runs, each at least as new as its change; None for a run that has expired."""
        found = [self._get(change) for change in changes]
        missing = [place for place, record in enumerate(found) if record is None]
        if missing:
            loaded = await self._load([changes[place].run_id for place in missing])
            for place, record in zip(missing, loaded, strict=True):
                if record is not None:
                    record = self._readable(record)
                    self._put(_CachedRun(record))
                found[place] = record
        return found

    def encoded(self, record: StoredRecord, encode: EncodeRun, skip: tuple[str, ...] = ()) -> bytes:
        """The encoded record, without the columns in `skip`."""
        cached = self._cached.get(record.id)
        if cached is None or cached.record.version != record.version:
            return encode(record, skip)
        encoding = cached.encodings.get((encode, skip))
        if encoding is None:
            encoding = encode(cached.record, skip)
            if len(cached.encodings) < _MAX_ENCODINGS:
                cached.encodings[encode, skip] = encoding
                cached.size += len(encoding)
                self._size += len(encoding)
                self._evict()
        return encoding

    def add(self, record: StoredRecord) -> None:
        """Cache a record that was loaded elsewhere, so that its encodings are shared."""
        cached = self._cached.get(record.id)
        if cached is None or cached.record.version != record.version:
            self._put(_CachedRun(self._readable(record)))

    def _get(self, change: Change) -> StoredRecord | None:
        cached = self._cached.get(change.run_id)
        if cached is None or cached.record.version != change.version:
            return None  # a later version can be one that the broker has lost
        self._cached[change.run_id] = self._cached.pop(change.run_id)
        return cached.record

    def _readable(self, record: StoredRecord) -> StoredRecord:
        """The record without values that are nested too deeply."""
        removed = {name: empty for name, empty in _EMPTY.items() if _is_too_deep(getattr(record, name))}
        if not removed:
            return record
        if record.id not in self._reported:
            if len(self._reported) >= _MAX_REPORTED:
                self._reported.clear()
            self._reported.add(record.id)
            names = ", ".join(name.removesuffix("_json") for name in removed)
            logger.warning("feeds omit the %s of run %s: it is nested too deeply", names, record.id)
        if "payload_json" in removed:
            removed["payload_meta_json"] = None
        return msgspec.structs.replace(record, **removed)

    def _put(self, cached: _CachedRun) -> None:
        run_id = cached.record.id
        known = self._cached.get(run_id)
        if known is not None and _is_newer(known.record, cached.record):
            return  # a concurrent call has loaded a newer version
        self._drop(run_id)
        self._cached[run_id] = cached
        self._size += cached.size
        self._evict()

    def _evict(self) -> None:
        while len(self._cached) > self._max_runs or (self._size > MAX_BYTES and len(self._cached) > 1):
            self._drop(next(iter(self._cached)))

    def _drop(self, run_id: str) -> None:
        cached = self._cached.pop(run_id, None)
        if cached is not None:
            self._size -= cached.size


def _is_too_deep(data: bytes | msgspec.Raw | None) -> bool:
    try:
        check_depth(bytes(data or b""))
    except LimitExceeded:
        return True
    return False


def _is_newer(record: StoredRecord, other: StoredRecord) -> bool:
    """A higher version alone proves nothing after the broker has lost data."""
    return record.version >= other.version and record.updated_at_ms >= other.updated_at_ms
