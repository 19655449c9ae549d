"""Whatever happens to Redis: nothing that it still has is lost or duplicated, nothing hangs, no process restarts."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel

from asgi_realtime import Retention, Timeouts
from asgi_realtime.brokers.base import Producer, StreamKey
from asgi_realtime.brokers.redis import RedisBroker, pubsub, schedule, server_health
from asgi_realtime.brokers.redis import broker as redis_broker
from asgi_realtime.brokers.redis.pubsub import PubSub
from asgi_realtime.brokers.redis.server_health import ServerHealthLog
from asgi_realtime.core.errors import BrokerUnavailable, RunNotFound
from asgi_realtime.core.runs import DUE_KINDS, Status, tag_topic
from asgi_realtime.testing.conformance.kit import (
    COMPLETE,
    Backend,
    Reader,
    create,
    data,
    finished,
    have,
    items,
    new_key,
    new_mark,
    new_record,
    new_tag,
    next_changes,
    read_all,
    store,
    versions_in,
)
from tests.brokers.streaming import Iterations, Log, Streaming, assert_quiet, patiently, processes, streaming, until
from tests.redis_servers import GUARD_S, RedisServer, ReplicaPair
from tests.requirements import redis_binary

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.slow]

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


# A stream continues


async def killed(server: RedisServer, stream: Streaming) -> None:
    await asyncio.to_thread(server.restart, keep_data=True)


async def killed_for_long(server: RedisServer, stream: Streaming) -> None:
    server.kill()
    with pytest.raises(BrokerUnavailable):
        await stream.reader.broker.ping()
    await asyncio.to_thread(server.restart, keep_data=True)


async def paused(server: RedisServer, stream: Streaming) -> None:
    with server.paused(), pytest.raises(BrokerUnavailable, match="no answer for 1 s"):
        await stream.reader.broker.ping()


async def commands_closed(server: RedisServer, stream: Streaming) -> None:
    assert await asyncio.to_thread(server.cut_clients, "normal") >= 2


async def subscriptions_closed(server: RedisServer, stream: Streaming) -> None:
    assert await asyncio.to_thread(server.cut_clients, "pubsub") >= 1


async def all_closed(server: RedisServer, stream: Streaming) -> None:
    assert await asyncio.to_thread(server.cut_clients) >= 3


async def scripts_flushed(server: RedisServer, stream: Streaming) -> None:
    await asyncio.to_thread(server.command, "SCRIPT", "FLUSH")


FAULTS = [killed, killed_for_long, paused, commands_closed, subscriptions_closed, all_closed, scripts_flushed]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_stream_continues(
    redis_server: RedisServer, log: Log, fault: Callable[[RedisServer, Streaming], Awaitable[None]]
) -> None:
    async with processes(redis_server.url, timeouts=SHORT) as backend:
        async with streaming(backend) as (stream,):
            await fault(redis_server, stream)
            await stream.continues()
        await backend.broker.ping()
        await backend.peer.ping()
        assert stream.resumed == 0
        await log.until_available()
    assert log.outages <= 2


async def test_connections_are_closed_repeatedly_under_load(redis_server: RedisServer, log: Log) -> None:
    async with processes(redis_server.url) as backend:
        async with streaming(backend, count=10) as streams:
            for number in range(30):  # 3 connections each time
                await asyncio.to_thread(redis_server.cut_clients, "normal" if number % 3 else "pubsub")
                await streams[number % 10].continues(3)
        assert sum(stream.resumed for stream in streams) == 0
    assert (log.outages, log.recoveries) == (0, 0)
    assert 1 <= log.broke <= 6


async def test_many_streams_resume_at_once(redis_server: RedisServer, log: Log) -> None:
    """More channels than fit into one SSUBSCRIBE."""
    async with processes(redis_server.url) as backend:
        async with streaming(backend, count=300) as streams:
            await asyncio.to_thread(redis_server.restart, keep_data=True)
            await asyncio.gather(*(stream.continues(3) for stream in streams))
        await log.assert_reported_once()
        assert sum(stream.resumed for stream in streams) == 0


async def test_nothing_spins_while_redis_is_down(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with processes(redis_server.url) as backend, streaming(backend, count=50):
        redis_server.kill()
        with pytest.raises(BrokerUnavailable):
            await backend.broker.ping()
        iterations = Iterations(monkeypatch)
        for _ in range(10):
            with pytest.raises(BrokerUnavailable):
                await backend.peer.ping()
            await asyncio.sleep(0.1)
        counted = iterations.count
        await asyncio.to_thread(redis_server.restart, keep_data=True)
    assert counted < 1000


async def test_a_restart_without_data(redis_server: RedisServer, log: Log) -> None:
    async with processes(redis_server.url) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, items(3))
        async with backend.peer.live(key) as live, backend.peer.follow(f"run:{key.run}") as topic:
            cursor = (await topic.changes(None)).cursor
            await asyncio.to_thread(redis_server.restart, keep_data=False)
            await until(lambda: live.failure is not None, "a stream that was lost can no longer be followed")
            assert isinstance(live.failure, RunNotFound)
            changes = await topic.changes(cursor)
            assert (changes.snapshot, changes.items) == (True, [])
        with pytest.raises(RunNotFound):
            await backend.broker.append(key, items(1), producer=Producer("p", 0))
        await log.assert_reported_once()
        async with streaming(backend):
            pass


# Redis is full or refuses access


async def test_memory_full(redis_server: RedisServer, log: Log, hurried: None) -> None:
    async with processes(redis_server.url, retention=Retention(after_end=0.1)) as backend:
        over = await create(backend)
        async with streaming(backend, size=1000) as (stream,):
            redis_server.configure("maxmemory", 1)
            with pytest.raises(BrokerUnavailable, match=r"no memory left \(maxmemory\)"):
                await backend.broker.append(stream.key, items(1))
            with pytest.raises(BrokerUnavailable, match="no memory left"):
                await backend.broker.ping()
            assert "no memory left" in backend.broker.warnings[0]
            await store(backend.broker, finished(backend, over))  # this frees memory in the end
            (ended,) = await backend.peer.load([over.id])
            assert ended is not None and ended.is_completed
            while over.id not in await backend.peer.due("expiry"):  # runs whose removal frees memory are still found
                for kind in DUE_KINDS:
                    await backend.peer.due(kind)
            await backend.peer.remove(over.id)
            assert await backend.broker.load([over.id]) == [None]
            redis_server.configure("maxmemory", 0)
            await stream.continues()
        await backend.broker.ping()
        assert backend.broker.warnings == ()
        await until(lambda: log.having("accepts calls again"))
    assert len(log.having("Redis refuses calls: Redis has no memory left")) == 1
    assert (log.outages, log.recoveries) == (0, 0)


async def test_the_password_is_changed_and_changed_back(log: Log) -> None:
    with RedisServer(redis_binary(), password="right") as server:
        async with processes(server.url) as backend, streaming(backend) as (stream,):
            server.configure("requirepass", "another")
            server.password = "another"
            server.cut_clients()
            with pytest.raises(BrokerUnavailable, match="password"):
                await backend.peer.ping()
            server.configure("requirepass", "right")
            server.password = "right"
            await stream.continues()
            await log.assert_reported_once()
    assert "password" in log.having("is unavailable")[0]
    assert "another" not in "".join(log.having(""))


async def test_a_wrong_password_from_the_start(log: Log) -> None:
    with RedisServer(redis_binary(), password="right") as server:
        async with processes(server.url.replace("right", "wrong")) as backend:
            for broker in backend.processes:
                with pytest.raises(BrokerUnavailable, match="password"):
                    await broker.ping()
            with pytest.raises(BrokerUnavailable, match="password"):
                await create(backend)
            server.configure("requirepass", "wrong")
            async with streaming(backend):
                pass
            await log.assert_reported_once()
    assert "wrong" not in "".join(log.having(""))


class IdleSubscriber:
    def on_message(self, message: bytes) -> None: ...

    def check(self, *, routine: bool) -> None: ...


async def test_a_user_without_permission_to_subscribe(
    redis_server: RedisServer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That showed only in readers that received nothing."""
    monkeypatch.setattr(pubsub, "_TROUBLE_S", 0.2)
    monkeypatch.setattr(server_health, "_STEADY_S", 1.0)  # commands work, so it must outlast the retries of pub/sub
    url = redis_server.add_user("app", "secret", "+@all", "~*")
    async with processes(redis_server.url) as backend, streaming(backend) as (stream,):
        async with RedisBroker(url, prefix=prefix_of(backend), timeouts=SHORT) as broker:
            reader = Reader(broker, stream.key)
            # The connection must not lose its last channel between two attempts of the reader: without one, it works.
            broker._open.pubsub.add("idle", IdleSubscriber())
            await until(lambda: broker._open.pubsub.trouble)
            with pytest.raises(BrokerUnavailable, match="(?i)no permissions to access .* channel"):
                await reader.run()
            following = asyncio.create_task(patiently(partial(reader.run, enough=have(stream.sent + 10))))
            with pytest.raises(BrokerUnavailable, match="(?i)nothing can be followed: .*no permissions"):
                await broker.ping()
            redis_server.command("ACL", "SETUSER", "app", "&*")
            await following
            reader.assert_seamless()
            await broker.ping()
            await log.assert_reported_once(processes=1)


# Redis starts later


async def test_redis_starts_later(redis_server: RedisServer, log: Log) -> None:
    redis_server.kill()
    async with processes(redis_server.url) as backend:
        with pytest.raises(BrokerUnavailable):
            await backend.broker.ping()
        creating = asyncio.create_task(patiently(partial(create, backend)))
        await asyncio.to_thread(redis_server.restart, keep_data=True)
        await creating
        async with streaming(backend):
            await log.assert_reported_once()


@pytest.mark.parametrize("why", ["killed", "paused"])
async def test_many_calls_fail_as_fast_as_one_while_redis_is_down(redis_server: RedisServer, why: str) -> None:
    """Each asked whether it is a Cluster, one after the other."""
    redis_server.pause() if why == "paused" else redis_server.kill()
    async with processes(redis_server.url, timeouts=SHORT) as backend:
        calls = [backend.broker.load([f"run_{number}"]) for number in range(200)]
        async with asyncio.timeout(10):
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome).__mro__[-4] for outcome in outcomes} <= set(BrokerUnavailable.__mro__)
        assert all(isinstance(outcome, BrokerUnavailable) for outcome in outcomes)


# A reader that is too slow


@pytest.mark.parametrize("kept", ["all", "not all"])
async def test_redis_disconnects_a_process_that_was_blocked(log: Log, kept: str) -> None:
    """Its messages exceeded the limit. It reads what it missed, or reports what has been trimmed."""
    retention = Retention(stream_bytes=(64 if kept == "all" else 4) * 1024 * 1024)
    chunk = b'"%s"' % (b"x" * 8000)  # Valkey stores longer ones once for all clients, and does not count them
    with RedisServer(redis_binary(), keeps_data=False) as redis_server:
        redis_server.configure("client-output-buffer-limit", "pubsub 256kb 0 0")
        async with processes(redis_server.url, retention=retention) as backend:
            key = await new_key(backend)
            reader = Reader(backend.peer, key)
            reading = asyncio.create_task(reader.run())
            await backend.broker.append(key, [chunk])
            await until(lambda: reader.seen)

            async def write() -> None:
                async with RedisBroker(redis_server.url, prefix=prefix_of(backend), retention=retention) as broker:
                    for _ in range(2500):
                        await broker.append(key, [chunk])
                    await broker.append(key, [chunk], end=COMPLETE)

            elsewhere = threading.Thread(target=asyncio.run, args=(write(),))
            elsewhere.start()
            elsewhere.join()  # blocks this loop, and thereby the reader
            assert "overcoming of output buffer limits" in redis_server.log
            async with asyncio.timeout(GUARD_S):
                await reading
            reader.assert_seamless()
            assert reader.after == 2501
            assert reader.end == COMPLETE
            assert bool(reader.gaps) == (kept == "not all")
            await log.until_available()


def prefix_of(backend: Backend) -> str:
    assert isinstance(backend.broker, RedisBroker)
    return backend.broker._keys._prefix


# Messages that are lost or unreadable


async def test_a_lost_message_is_noticed_after_some_silence(
    redis_server: RedisServer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_broker, "_SILENCE_S", 0.2)
    async with processes(redis_server.url, timeouts=SHORT) as backend:
        key = await new_key(backend)
        reader = Reader(backend.peer, key)
        reading = asyncio.create_task(reader.run())
        await backend.broker.append(key, items(1))
        await until(lambda: reader.seen)
        with monkeypatch.context() as patched:
            patched.setattr(PubSub, "on_message", lambda *message: None)
            connected = {client["id"] for client in redis_server.clients("pubsub")}
            await backend.broker.append(key, items(2, start=1))
            await until(lambda: len(reader.seen) == 3)
            # And the connection that missed it is replaced.
            await until(lambda: connected.isdisjoint(client["id"] for client in redis_server.clients("pubsub")))
        await backend.broker.append(key, items(1, start=3), end=COMPLETE)
        await reading
        reader.assert_seamless()
    assert data(reader.seen) == items(4)


@pytest.mark.parametrize(
    "message", [b"", b"a", b"a x y\n0", b"a 1 0\n\xff", b"e 7\n{", b"E 1", b"p", b"c 1 2", b"t", b"?"]
)
async def test_an_unreadable_message_stops_nothing(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture, message: bytes
) -> None:
    async with processes(redis_server.url) as backend:
        async with streaming(backend) as (stream,):
            assert isinstance(backend.broker, RedisBroker)
            names = backend.broker._keys
            for channel in (names.stream_channel(stream.key), names.topic_channel(f"run:{stream.key.run}")):
                redis_server.command("SPUBLISH", channel, message)
            await stream.continues()
        assert stream.resumed == 0
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) <= 2
    assert all("cannot read a message on" in record.getMessage() for record in errors)
    caplog.clear()


# A process that dies between a commit and its publication


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitions without hints are read within a minute, which is too long for a test."""
    monkeypatch.setattr(schedule, "_SCAN_S", 0.0)


async def test_another_process_publishes_what_was_not_published(
    redis_server: RedisServer, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with processes(redis_server.url) as backend:
        assert isinstance(backend.broker, RedisBroker)
        monkeypatch.setattr(backend.broker._open.topics, "publish", lambda *args: asyncio.sleep(3600))
        tag = new_tag()
        record = new_record(backend, tags=(tag,))
        async with backend.peer.follow(tag_topic(tag)) as topic:
            committing = asyncio.create_task(backend.broker.commit(record, expect=0, change=new_mark()))
            await until_published(backend, record.id)
            committing.cancel()
            changes = await next_changes(topic, None)
        assert [change.run_id for change in changes.items] == [record.id]
        assert await versions_in(backend.broker, tag_topic(tag)) == {record.id: 1}
        assert await backend.peer.due("unpublished") == []


async def until_published(backend: Backend, run_id: str) -> None:
    """Do what the ticker of the other process does, until it has published the run."""
    async with asyncio.timeout(GUARD_S):
        while True:
            for kind in DUE_KINDS:
                if run_id in (due := await backend.peer.due(kind)):
                    assert (kind, due) == ("unpublished", [run_id])
                    return await backend.peer.publish(run_id)


async def test_a_process_is_killed_before_it_publishes(redis_server: RedisServer, hurried: None) -> None:
    program = """
        import asyncio, sys
        from asgi_realtime.brokers.redis import RedisBroker
        from asgi_realtime.testing.conformance.kit import Backend, new_mark, new_record

        async def main(url, prefix, tag):
            async with RedisBroker(url, prefix=prefix) as broker:
                async def publish(run_id, *args):
                    print(run_id, flush=True)
                    await asyncio.sleep(3600)
                broker._open.topics.publish = publish
                record = new_record(Backend(broker=broker, peer=broker), tags=(tag,))
                await broker.commit(record, expect=0, change=new_mark())

        asyncio.run(main(*sys.argv[1:]))
    """
    async with processes(redis_server.url) as backend:
        tag = new_tag()
        command = [sys.executable, "-c", textwrap.dedent(program), redis_server.url, prefix_of(backend), tag]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        run_id = (await process.stdout.readline()).decode().strip()
        process.kill()
        assert await process.wait() == -signal.SIGKILL
        assert await versions_in(backend.peer, tag_topic(tag)) == {}
        await until_published(backend, run_id)
        assert await versions_in(backend.broker, tag_topic(tag)) == {run_id: 1}


# A failover


def master_of(pair: ReplicaPair) -> Redis:
    client = Sentinel(pair.sentinels).master_for(pair.service)  # type: ignore[no-untyped-call]
    assert isinstance(client, Redis)
    return client


@pytest.mark.parametrize("how", ["killed", "handed over"])
async def test_a_failover_that_loses_nothing(redis_pair: ReplicaPair, log: Log, how: str) -> None:
    async with processes(partial(master_of, redis_pair), timeouts=SHORT) as backend:
        async with streaming(backend) as (stream,):
            async with stream.paused():
                await asyncio.to_thread(redis_pair.until_in_step)
                await asyncio.to_thread(redis_pair.fail_over if how == "killed" else redis_pair.hand_over)
                await asyncio.to_thread(redis_pair.bring_back)
            await stream.continues()
        await log.until_available()
        assert log.outages <= 2


async def test_a_failover_that_loses_the_last_writes(redis_pair: ReplicaPair, log: Log) -> None:
    """Readers are ahead of the remaining entries. They end, resume, and get the restored items."""
    async with processes(partial(master_of, redis_pair)) as backend:
        key = await new_key(backend)
        await backend.broker.append(key, items(5), producer=Producer("p", 0))
        await asyncio.to_thread(redis_pair.until_in_step)
        async with backend.peer.live(key) as live:
            await asyncio.to_thread(redis_pair.isolate_replica)
            await backend.broker.append(key, items(5, start=5), producer=Producer("p", 5))
            await until(lambda: live.log.next == 10)
            await asyncio.to_thread(redis_pair.fail_over)
            await until(lambda: live.failure is not None, "a reader that is ahead of its log ends")
            assert "stream 'default' has 5 entries left of 10" in str(live.failure)
        reader = Reader(backend.peer, key, after=9)
        reading = asyncio.create_task(patiently(reader.run))
        again = partial(backend.broker.append, key, items(5, start=5), producer=Producer("p", 5), at=5)
        assert (await patiently(again)).next == 10
        await backend.broker.append(key, items(1, start=10), producer=Producer("p", 10), end=COMPLETE)
        await reading
        assert data(reader.seen) == [b"10"]
        assert data(await read_all(backend.broker, key)) == items(11)
        await log.until_available()
        assert log.outages <= 2


async def test_leases_are_renewed_from_a_thread_with_a_sentinel(redis_pair: ReplicaPair) -> None:
    """The thread used connections to the sentinels that belong to the loop, which was blocked."""
    timeouts = Timeouts(lease=2.0)
    async with processes(partial(master_of, redis_pair), timeouts=timeouts) as backend:
        record = await create(backend, status=Status.EXECUTING, owner="me")
        assert isinstance(backend.broker, RedisBroker)
        for _ in range(3):
            thread = threading.Thread(target=partial(backend.broker.renew_from_thread, [record.id], owner="me"))
            thread.start()
            thread.join(GUARD_S)  # blocks this loop
            assert not thread.is_alive()
        lease = backend.broker._keys.due("lease", backend.broker._keys.partition(record.id))
        assert redis_pair.primary.command("ZSCORE", lease, record.id) is not None


async def test_an_outage_longer_than_a_lease_crashes_no_runs(redis_server: RedisServer, log: Log) -> None:
    """When Redis was available again, tickers were faster than owners, and every executing run became CRASHED."""
    timeouts = Timeouts(lease=0.8)
    async with processes(redis_server.url, timeouts=timeouts) as backend:
        held, left = [(await create(backend, status=Status.EXECUTING, owner="me")).id for _ in range(2)]
        expired = time.time() + timeouts.lease
        redis_server.kill()
        for broker in backend.processes:
            with pytest.raises(BrokerUnavailable):
                await broker.ping()
        await until(lambda: time.time() > expired)
        restarted = time.monotonic()
        await asyncio.to_thread(redis_server.restart, keep_data=True)
        due = await patiently(partial(backend.peer.due, "lease"))
        assert not due or time.monotonic() - restarted > timeouts.lease  # if this process stalled
        async with asyncio.timeout(GUARD_S):
            while left not in due or held in due:
                await patiently(partial(backend.broker.renew, [held], owner="me"))
                for kind in DUE_KINDS:
                    found = await backend.peer.due(kind)
                    due = found if kind == "lease" else due


# A server that is not Redis


@asynccontextmanager
async def other_server(answer: bytes) -> AsyncIterator[tuple[str, list[int]]]:
    """A server that gives this answer to everything and disconnects. Yields its URL and the connections it had."""
    connections: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        if answer:
            await reader.read(1)
            writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", connections


OTHER_SERVERS = {
    "silent": b"",
    "web server": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "talkative": b"+OK\r\n" * 10,
    "wrong length": b"*-7\r\n",
    "binary": b"\xff\xfe",
}


@pytest.mark.parametrize("answer", OTHER_SERVERS.values(), ids=OTHER_SERVERS.keys())
async def test_a_server_that_is_not_redis_counts_as_unavailable(log: Log, answer: bytes) -> None:
    async with other_server(answer) as (url, connections), processes(url, timeouts=Timeouts(broker=0.3)) as backend:
        calls = [backend.broker.load(["run_1"]) for _ in range(50)]
        async with asyncio.timeout(GUARD_S):
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome).__mro__ for outcome in outcomes if not isinstance(outcome, BrokerUnavailable)] == []
        assert all(map(str, outcomes)), "each error has a message"
        with pytest.raises(BrokerUnavailable):
            await Reader(backend.peer, StreamKey("run_1", "default")).run()
        assert len(connections) <= 40
    assert log.outages <= 2


async def test_repeated_failures_within_a_second_are_one_outage(log: Log) -> None:
    health = ServerHealthLog()
    health.not_answering("it")
    for _ in range(100):
        health.failed("it", "it is unavailable", "unknown reason")
        health.works("it", "it is available again")
        await asyncio.sleep(0)
    assert log.having("it is") == ["it is unavailable: unknown reason"]
    assert health.answering_for_s() == 0.0
    health.answering("it")
    assert health.answering_for_s() < GUARD_S
    await until(lambda: log.having("it is available again, after "))
    assert len(log.having("it is")) == 2


async def test_a_server_that_has_left_the_cluster_is_forgotten(log: Log) -> None:
    health = ServerHealthLog()
    health.not_answering("it")
    health.failed("it", "it is unavailable", "unknown reason")
    health.works("it", "it is available again")
    health.forget("it")
    health.failed("it", "it is unavailable", "it failed again")
    assert len(log.having("it is unavailable")) == 2
    assert health.answering_for_s() < GUARD_S


async def test_a_connection_that_keeps_breaking_is_logged_once(log: Log) -> None:
    health = ServerHealthLog()
    for _ in range(100):
        health.broke("it", "it", "unknown reason")
    assert log.broke == 1
