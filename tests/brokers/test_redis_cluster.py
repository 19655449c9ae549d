"""On a Cluster: slots move and primaries fail while streams are written and followed."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from threading import Event

import pytest

from asgi_realtime import Retention, Timeouts
from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.brokers.redis import RedisBroker, server_health
from asgi_realtime.brokers.redis import broker as redis_broker
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.testing.conformance.kit import COMPLETE, Backend, Reader, new_key
from tests.brokers.streaming import Iterations, Log, Streaming, assert_quiet, processes, streaming, until
from tests.redis_servers import GUARD_S, ClientType, RedisCluster, RedisServer
from tests.requirements import redis_binary

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.redis,
    pytest.mark.cluster,
    pytest.mark.slow,
]

SHORT = Timeouts(broker=1.0)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the comparison of positions after ten seconds of silence, which would hide lost messages."""
    monkeypatch.setattr(redis_broker, "_SILENCE_S", 3600.0)
    monkeypatch.setattr(server_health, "_STEADY_S", 0.25)


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Log]:
    caplog.set_level(logging.INFO, "asgi_realtime")
    yield Log(caplog)
    assert_quiet(caplog)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    """A Cluster for these tests: if a node is down, only its own slots are unavailable."""
    settings = {"cluster-require-full-coverage": "no"}
    with RedisCluster(redis_binary(), keeps_data=True, settings=settings) as cluster:
        yield cluster


def slot_of(cluster: RedisCluster, backend: Backend, key: StreamKey) -> int:
    assert isinstance(backend.broker, RedisBroker)
    return cluster.slot_of(backend.broker._keys.entries(key))


async def key_at(cluster: RedisCluster, backend: Backend, node: RedisServer) -> StreamKey:
    """A new stream that a node owns."""
    while True:
        key = await new_key(backend)
        slot = await asyncio.to_thread(slot_of, cluster, backend, key)
        if await asyncio.to_thread(cluster.slot_owner, slot) is node:
            return key


@asynccontextmanager
async def on_each_node(cluster: RedisCluster, backend: Backend) -> AsyncIterator[dict[RedisServer, Streaming]]:
    """A stream on each node."""
    keys = {node: await key_at(cluster, backend, node) for node in cluster.nodes}
    async with streaming(backend, keys=list(keys.values())) as streams:
        yield dict(zip(keys, streams, strict=True))


async def test_a_slot_moves_while_its_stream_is_written_and_followed(cluster: RedisCluster, log: Log) -> None:
    async with processes(cluster.url) as backend, streaming(backend) as (stream,):
        slot = slot_of(cluster, backend, stream.key)
        for _ in range(4):
            owner = await asyncio.to_thread(cluster.slot_owner, slot)
            other = next(node for node in cluster.nodes if node is not owner)
            await asyncio.to_thread(cluster.move_slot, slot, other)
            await stream.continues(20)
        assert stream.resumed == 0
    assert (log.outages, log.broke) == (0, 0)


async def test_a_stream_continues_while_its_slot_is_moving(cluster: RedisCluster) -> None:
    """While it moves, calls for keys that have moved already are redirected to the other node."""
    async with processes(cluster.url) as backend, streaming(backend, count=3) as streams:
        slot = slot_of(cluster, backend, streams[0].key)
        owner = await asyncio.to_thread(cluster.slot_owner, slot)
        other = next(node for node in cluster.nodes if node is not owner)

        def move_slowly() -> None:
            with cluster.moving_slot(slot, other):
                cluster.move_keys(slot, owner, other)
                moved.set()
                end.wait(30)

        moved, end = Event(), Event()
        moving = asyncio.create_task(asyncio.to_thread(move_slowly))
        await until(moved.is_set)
        await streams[0].continues()
        end.set()
        await moving
        await streams[0].continues()


@pytest.mark.parametrize("kind", ["normal", "pubsub"])
async def test_each_node_closes_connections(cluster: RedisCluster, log: Log, kind: ClientType) -> None:
    async with processes(cluster.url) as backend, on_each_node(cluster, backend) as streams:
        for node, stream in streams.items():
            assert await asyncio.to_thread(node.cut_clients, kind) >= 1
            await stream.continues()
        assert sum(stream.resumed for stream in streams.values()) == 0
    assert log.outages == 0


async def seconds(call: Awaitable[object]) -> float:
    began = time.monotonic()
    await call
    return time.monotonic() - began


@pytest.mark.parametrize("how", ["killed", "paused"])
async def test_a_primary_fails_and_the_others_continue(cluster: RedisCluster, log: Log, how: str) -> None:
    async with processes(cluster.url, timeouts=SHORT) as backend:
        async with on_each_node(cluster, backend) as streams:
            node = cluster.nodes[0]  # the node of the URL
            node.kill() if how == "killed" else node.pause()
            for broker in backend.processes:
                with pytest.raises(BrokerUnavailable):
                    await broker.ping()
            took = [
                await seconds(asyncio.gather(*(streams[other].continues() for other in cluster.nodes[1:])))
                for _ in range(3)
            ]
            assert min(took) < SHORT.broker  # waiting for the primary that is down would delay them all
            await asyncio.to_thread(node.restart, keep_data=True) if how == "killed" else node.resume()
            await asyncio.to_thread(cluster.until_well)
            await streams[node].continues()
        for broker in backend.processes:
            await broker.ping()
        await log.assert_reported_once()
        assert all(f"Redis at 127.0.0.1:{node.port} is " in line for line in log.having(" is unavailable: "))


async def test_nothing_spins_while_a_primary_is_down(cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    node = cluster.nodes[1]
    async with processes(cluster.url) as backend:
        keys = [await key_at(cluster, backend, node) for _ in range(20)]
        async with streaming(backend, keys=keys):
            node.kill()
            with pytest.raises(BrokerUnavailable):
                await backend.broker.ping()
            iterations = Iterations(monkeypatch)
            await asyncio.sleep(1)  # the length of the measurement
            counted = iterations.count
            await asyncio.to_thread(node.restart, keep_data=True)
            await asyncio.to_thread(cluster.until_well)
    assert counted < 1000


async def test_many_streams_resume_when_a_primary_restarts(cluster: RedisCluster, log: Log) -> None:
    async with processes(cluster.url) as backend:
        async with streaming(backend, count=200) as streams:
            await asyncio.to_thread(cluster.nodes[2].restart, keep_data=True)
            await asyncio.to_thread(cluster.until_well)
            await asyncio.gather(*(stream.continues(3) for stream in streams))
        await log.until_available()
        assert log.outages <= 2


async def test_a_primary_disconnects_a_process_that_was_blocked(cluster: RedisCluster, log: Log) -> None:
    """In mid-stream, by `client-output-buffer-limit`. Streams at other primaries are not affected."""
    chunk = b'"%s"' % (b"x" * 8000)
    node, other = cluster.nodes[:2]
    retention = Retention(stream_bytes=64 * 1024 * 1024)
    async with processes(cluster.url, retention=retention) as backend:
        key, elsewhere = await key_at(cluster, backend, node), await key_at(cluster, backend, other)
        readers = [Reader(backend.peer, each) for each in (key, elsewhere)]
        reading = asyncio.gather(*(reader.run() for reader in readers))
        for each in (key, elsewhere):
            await backend.broker.append(each, [chunk])
        await until(lambda: all(reader.seen for reader in readers))
        node.configure("client-output-buffer-limit", "pubsub 256kb 0 0")
        assert isinstance(backend.broker, RedisBroker)
        prefix = backend.broker._keys._prefix

        async def write() -> None:
            async with RedisBroker(cluster.url, prefix=prefix, retention=retention) as broker:
                for _ in range(2500):
                    await broker.append(key, [chunk])
                await broker.append(key, [chunk], end=COMPLETE)
                await broker.append(elsewhere, [b"1"], end=COMPLETE)

        writing = threading.Thread(target=asyncio.run, args=(write(),))
        writing.start()
        writing.join()  # blocks this loop, and thereby the readers
        node.configure("client-output-buffer-limit", "pubsub 32mb 8mb 60")
        assert "overcoming of output buffer limits" in node.log
        async with asyncio.timeout(GUARD_S):
            await reading
        for reader, last in zip(readers, (2501, 1), strict=True):
            reader.assert_seamless()
            assert reader.gaps == []
            assert (reader.after, reader.end) == (last, COMPLETE)
        await log.until_available()
