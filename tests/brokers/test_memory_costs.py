"""What the memory broker counts is about the memory that it takes."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Awaitable, Callable

import pytest

from asgi_realtime.brokers import MemoryBroker
from asgi_realtime.brokers.base import ChangeMark, Producer, StreamKey
from asgi_realtime.core.metadata import encode_metadata
from asgi_realtime.core.runs import Status, StoredRecord
from asgi_realtime.testing.conformance.kit import next_version
from tests.inprocess import make_realtime

pytestmark = pytest.mark.anyio

COUNT = 60


async def store(broker: MemoryBroker, number: int, **fields: object) -> StoredRecord:
    made = StoredRecord(
        **{"id": f"run_{number:026}", "task": "t", "status": Status.QUEUED}  # type: ignore[arg-type]
        | {"created_at_ms": 1_700_000_000_000 + number, "updated_at_ms": 1_700_000_000_000 + number}
        | fields
    )
    await broker.commit(made, expect=0, change=ChangeMark(f"writer {number}", 0))
    return made


async def runs(broker: MemoryBroker, number: int) -> None:
    await store(broker, number)


async def tags(broker: MemoryBroker, number: int) -> None:
    await store(broker, number, tags=tuple(f"{number} {tag}" for tag in range(10)))


async def long_tags(broker: MemoryBroker, number: int) -> None:
    await store(broker, number, tags=tuple(f"{'😀' * 120}{number} {tag}" for tag in range(10)))


async def metadata(broker: MemoryBroker, number: int) -> None:
    await store(broker, number, metadata_json=encode_metadata({"a": [{} for _ in range(1000)]}))


async def claims(broker: MemoryBroker, number: int) -> None:
    await broker.claim(f"{'😀' * 500}{number}", f"run_{number:026}", ttl_s=60 + number)


async def owners(broker: MemoryBroker, number: int) -> None:
    await store(broker, number, token_owner=f"user:{number}")


async def commits(broker: MemoryBroker, number: int) -> None:
    run = await store(broker, number)
    for version in range(1, 64):
        run = next_version(run)
        await broker.commit(run, expect=version, change=ChangeMark(f"{number:060}{version:04}", 1000))


async def streams(broker: MemoryBroker, number: int) -> None:
    run = await store(broker, number)
    for name in range(10):
        await broker.append(StreamKey(run.id, f"stream {name}"), [b"1"])


async def inputs(broker: MemoryBroker, number: int) -> None:
    run = await store(broker, number)
    for message in range(200):
        producer = Producer(f"request:{number:020}{message:012}", 0)
        await broker.append(StreamKey(run.id, "$input"), [b'{"data":0}'], producer=producer)


async def chunks(broker: MemoryBroker, number: int) -> None:
    run = await store(broker, number)
    for chunk in range(200):
        await broker.append(StreamKey(run.id, "s"), [b"%d" % chunk])


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    "make",
    [runs, tags, long_tags, metadata, claims, owners, commits, streams, inputs, chunks],
    ids=lambda make: make.__name__,
)
async def test_memory_is_counted(make: Callable[[MemoryBroker, int], Awaitable[None]]) -> None:
    broker = MemoryBroker()
    await make(broker, COUNT)
    gc.collect()
    tracemalloc.start()
    try:
        counted, held = broker.size, tracemalloc.get_traced_memory()[0]
        for number in range(COUNT):
            await make(broker, number)
        gc.collect()
        counted, held = broker.size - counted, tracemalloc.get_traced_memory()[0] - held
    finally:
        tracemalloc.stop()
    assert counted / 2 < held < counted * 1.4


async def test_a_removed_run_leaves_no_chunks_to_the_writers_of_its_process() -> None:
    """Writers that `append` shares are kept for thousands of runs."""
    async with make_realtime() as realtime:
        tracemalloc.start()
        try:
            async with realtime.open_run("r") as run:
                await realtime.append("x" * 500_000)
                await realtime.append("x" * 500_000)
                assert tracemalloc.get_traced_memory()[0] > 1_000_000
            await realtime.broker.remove(run.id)
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 500_000
        finally:
            tracemalloc.stop()
