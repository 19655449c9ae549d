from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from asgi_realtime.asgi import run_cache
from asgi_realtime.asgi.run_cache import RunCache
from asgi_realtime.asgi.trigger_dev import shapes
from asgi_realtime.core.metadata import encode_metadata
from asgi_realtime.core.run_json import run_json
from asgi_realtime.core.runs import Status, StoredRecord
from asgi_realtime.core.topics import Change

pytestmark = pytest.mark.anyio


class Runs:
    """Records which runs are loaded."""

    def __init__(self) -> None:
        self.records: dict[str, StoredRecord] = {}
        self.loaded: list[str] = []

    async def get(self, run_id: str) -> StoredRecord:
        return self.records[run_id]

    async def load(self, run_ids: Sequence[str], /) -> list[StoredRecord | None]:
        self.loaded += run_ids
        return [self.records.get(run_id) for run_id in run_ids]

    def put(self, run_id: str, version: int, payload: bytes | None = None, *, updated_at_ms: int = 0) -> StoredRecord:
        record = self.records[run_id] = StoredRecord(
            id=run_id,
            task="t",
            status=Status.QUEUED,
            version=version,
            created_at_ms=0,
            updated_at_ms=updated_at_ms,
            payload_json=payload,
        )
        return record


def change(run_id: str, version: int) -> Change:
    return Change(1, run_id, version)


async def test_a_version_is_loaded_once() -> None:
    runs = Runs()
    cache = RunCache(runs.load, max_runs=10)
    first = runs.put("a", 1)
    assert await cache.records([change("a", 1), change("gone", 1)]) == [first, None]
    assert await cache.records([change("a", 1)]) == [first]
    assert runs.loaded == ["a", "gone"]
    second = runs.put("a", 2)
    assert await cache.records([change("a", 2)]) == [second]
    assert await cache.records([change("a", 1)]) == [second]  # never an older version than a known one
    assert runs.loaded == ["a", "gone", "a", "a"]
    lost = runs.put("a", 1, updated_at_ms=1)
    assert await cache.records([change("a", 1)]) == [lost]  # unless the broker has lost the newer one


async def test_a_record_of_another_version_is_encoded_again() -> None:
    runs = Runs()
    cache = RunCache(runs.load, max_runs=10)
    first = runs.put("a", 1)
    await cache.records([change("a", 1)])
    assert cache.encoded(first, run_json) is cache.encoded(first, run_json)
    newer = msgspec.structs.replace(first, version=2, status=Status.EXECUTING)
    assert cache.encoded(newer, run_json) == run_json(newer)


async def test_each_encoding_is_made_once_and_counted() -> None:
    runs = Runs()
    cache = RunCache(runs.load, max_runs=10)
    record = runs.put("a", 1, b'"text"')
    await cache.records([change("a", 1)])
    before = cache._size
    plain = cache.encoded(record, shapes.row)
    short = cache.encoded(record, shapes.row, ("payload",))
    assert cache.encoded(record, shapes.row, ("payload",)) is short
    assert plain == shapes.row(record) != short
    assert cache._size == before + len(plain) + len(short)


async def test_encodings_per_run_are_limited() -> None:
    runs = Runs()
    cache = RunCache(runs.load, max_runs=10)
    record = runs.put("a", 1)
    await cache.records([change("a", 1)])
    for number in range(10):
        cache.encoded(record, run_json, (f"field{number}",))
    assert len(cache._cached["a"].encodings) == 4


async def test_the_least_recently_used_run_is_evicted() -> None:
    runs = Runs()
    cache = RunCache(runs.load, max_runs=2)
    for run_id in "abc":
        runs.put(run_id, 1)
    await cache.records([change("a", 1), change("b", 1)])
    await cache.records([change("a", 1)])
    await cache.records([change("c", 1)])
    runs.loaded.clear()
    await cache.records([change("a", 1), change("c", 1), change("b", 1)])
    assert runs.loaded == ["b"]


async def test_bytes_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_cache, "MAX_BYTES", 100_000)
    runs = Runs()
    cache = RunCache(runs.load, max_runs=1000)
    for number in range(10):
        runs.put(str(number), 1, b'"%b"' % (b"x" * 20_000))
        await cache.records([change(str(number), 1)])
        cache.encoded(runs.records[str(number)], run_json)
    assert len(cache._cached) == 2
    assert cache._size <= 100_000
    runs.put("large", 1, b'"%b"' % (b"x" * 200_000))
    await cache.records([change("large", 1)])
    assert list(cache._cached) == ["large"]


async def test_a_slow_load_does_not_restore_an_older_version() -> None:
    runs = Runs()
    cache = RunCache(runs.load, max_runs=10)
    old = runs.put("a", 1)

    class Racing(Runs):
        async def load(self, run_ids: Sequence[str], /) -> list[StoredRecord | None]:
            runs.put("a", 2)
            cache._load = runs.load
            await cache.records([change("a", 2)])
            return [old]

    cache._load = Racing().load
    assert await cache.records([change("a", 1)]) == [old]
    assert cache._cached["a"].record.version == 2


async def test_metadata_counts() -> None:
    """Two runs of 256 KiB of metadata counted as 4 KiB, so 10,000 of them took 2.5 GiB."""
    runs = Runs()
    cache = RunCache(runs.load, max_runs=10)
    record = runs.put("a", 1)
    runs.records["a"] = msgspec.structs.replace(record, metadata_json=encode_metadata({"a": "x" * 50_000}))
    await cache.records([change("a", 1)])
    assert 50_000 < cache._size < 53_000
