"""The Redis broker: pages that a process does not hold, positions, trimming, data loss, due runs."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import secrets
import warnings
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Connection, Redis

from asgi_realtime import (
    Limits,
    Realtime,
    Retention,
    Run,
    RunCanceled,
    RunFailed,
    RunRecord,
    ServerShutdown,
    Status,
    StreamGap,
    StreamLost,
    TaskError,
    Timeouts,
)
from asgi_realtime.brokers.base import Changes, End, Producer, StreamKey
from asgi_realtime.brokers.redis import RedisBroker, mirrors, schedule
from asgi_realtime.brokers.redis.keys import Keys
from asgi_realtime.brokers.redis.topic_mirror import TopicMirror
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.run_changes import Finished, TagsAdded, apply
from asgi_realtime.core.runs import RunError
from asgi_realtime.core.sse import chunk_frame
from asgi_realtime.tasks.options import RunOptions
from asgi_realtime.testing import AsgiClient
from asgi_realtime.testing.conformance.kit import Backend, create, data, items, new_record, read_all, store
from tests.faults import SECRET
from tests.inprocess import GUARD_S, until
from tests.redis_servers import RedisServer
from tests.requirements import redis_binary

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

CHUNK = "x" * 1000


class Storage:
    """One prefix of a Redis server, to inspect and to turn back."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.prefix = f"t{secrets.token_hex(4)}"
        self.client = Redis.from_url(url)

    def broker(self, **settings: Any) -> RedisBroker:
        return RedisBroker(self.url, prefix=self.prefix, **settings)

    def realtime(self, **settings: Any) -> Realtime:
        return Realtime(
            secret_key=SECRET, signals=False, broker=self.broker(**settings), timeouts=Timeouts(tick=0.05, append=5)
        )

    async def keys(self) -> list[bytes]:
        return [key async for key in self.client.scan_iter(f"{self.prefix}*", count=1000)]

    async def dump(self) -> dict[bytes, bytes]:
        """All data at the moment."""
        dumped = {key: await self.client.dump(key) for key in await self.keys()}
        return {key: value for key, value in dumped.items() if value is not None}

    async def turn_back(self, dumped: dict[bytes, bytes], *, noticed: bool = True) -> None:
        """Restore a dump, as after a failover to a replica without the rest. `noticed`: connections are lost."""
        pipe = self.client.pipeline(transaction=True)
        for key in await self.keys():
            pipe.delete(key)
        for key, value in dumped.items():
            pipe.restore(key, 0, value)
        await pipe.execute()
        if noticed:
            await self.client.client_kill_filter(_type="pubsub")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def storage(redis_url: str, anyio_backend: str) -> AsyncIterator[Storage]:
    storage = Storage(redis_url)
    yield storage
    for key in await storage.keys():
        await storage.client.delete(key)
    await storage.client.aclose()


@asynccontextmanager
async def opened(storage: Storage, **settings: Any) -> AsyncIterator[Backend]:
    async with storage.broker(**settings) as broker, storage.broker(**settings) as peer:
        yield Backend(broker=broker, peer=peer)


# Data that a process does not hold


async def test_a_reader_before_the_mirror_reads_pages_and_then_follows(storage: Storage) -> None:
    async with storage.realtime(limits=Limits(mirror_bytes=5000)) as realtime:
        async with realtime.open_run("r") as run:
            for number in range(100):
                await realtime.append([number, CHUNK])
            reader = realtime.read(run)
            read = [(await anext(reader))[0] for _ in range(50)]
            live = next(iter(storage_mirrors(realtime).values()), None)
            assert live is None, "an iterator holds nothing between batches"
            await realtime.append([100, CHUNK])
        read += [chunk[0] async for chunk in reader]
        assert read == list(range(101))


def held(realtime: Realtime) -> int:
    broker = realtime.broker
    assert isinstance(broker, RedisBroker)
    return broker.held


def storage_mirrors(realtime: Realtime) -> dict[StreamKey, Any]:
    broker = realtime.broker
    assert isinstance(broker, RedisBroker)
    return broker._open.mirrors.streams


async def change_and_await(run: Run, mirror: TopicMirror) -> None:
    """Change the run and wait until the mirror of one of its topics has the change."""
    position = mirror._index.position
    run.metadata.increment("n")
    await run.metadata.flush()
    await until(lambda: mirror._index.position > position)


async def test_a_topic_that_is_followed_repeatedly_is_read_once(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "IDLE_S", 3600.0)  # this test runs the sweeps, however slow the machine is
    async with storage.realtime() as realtime, realtime.open_run("r", tags=["a"]) as run:
        broker = realtime.broker
        assert isinstance(broker, RedisBroker)
        async with broker.follow("tag:a"):
            first = broker._open.mirrors.topics["tag:a"]
        for _ in range(3):
            async with broker.follow("tag:a") as topic:
                assert topic is first
                await change_and_await(run, first)
        assert not first.users
        broker._open.mirrors.idle._sweep()
        async with broker.follow("tag:a") as topic:
            assert topic is first, "it is retained for one period of the timer"
        for _ in range(2):
            broker._open.mirrors.idle._sweep()
        assert "tag:a" not in broker._open.mirrors.topics  # the executor can follow the topic of the run
        async with broker.follow("tag:a") as topic:
            assert topic is not first
            broker._open.mirrors.idle._sweep()
            broker._open.mirrors.idle._sweep()
            assert (await topic.changes(None)).items[0].run_id == run.id


@pytest.mark.parametrize("kind", ["run", "tag"])
@pytest.mark.parametrize("followed", [True, False])
async def test_a_new_follower_knows_earlier_commits_however_late_messages_are(
    storage: Storage, kind: str, followed: bool
) -> None:
    async with opened(storage) as backend, AsyncExitStack() as stack:
        broker, peer = backend.broker, backend.peer
        assert isinstance(broker, RedisBroker)
        record = new_record(backend, tags=("a",))
        topic = f"run:{record.id}" if kind == "run" else "tag:a"
        async with broker.follow(topic) as empty:
            assert not (await empty.changes(None)).items
        if followed:  # by someone else
            await stack.enter_async_context(broker.follow(topic))
        broker._open.mirrors.topics[topic].on_message = lambda message: None  # type: ignore[method-assign]
        await store(peer, record)
        async with broker.follow(topic) as first:
            changes = await first.changes(None)
            assert [(change.run_id, change.version) for change in changes.items] == [(record.id, 1)]
        await store(peer, apply(record, [TagsAdded(("b",))], 1))
        async with broker.follow(topic) as second:
            later = await second.changes(changes.cursor)
            assert [(change.run_id, change.version) for change in later.items] == [(record.id, 2)]
            assert not later.snapshot
            assert await second.changes(later.cursor) == Changes(later.cursor, [], False)


async def test_idle_topics_are_limited(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "MAX_IDLE", 3)
    async with opened(storage) as backend:
        broker = backend.broker
        assert isinstance(broker, RedisBroker)
        for number in range(10):
            async with broker.follow(f"tag:{number}"):
                pass
            assert len(broker._open.mirrors.topics) <= 4
        assert list(broker._open.mirrors.topics) == ["tag:7", "tag:8", "tag:9"]
        broker._open.mirrors.idle._sweep()
        for number in range(8, 12):
            async with broker.follow(f"tag:{number}"):
                pass
        assert list(broker._open.mirrors.topics) == ["tag:9", "tag:10", "tag:11"]


def test_mirrors_of_a_closed_loop_are_not_used_on_the_next(storage: Storage) -> None:
    """A host that has a loop for each request and never stops the library."""
    broker = storage.broker()

    async def follow_and_leave() -> None:
        await broker.__aenter__()
        async with broker.follow("tag:a") as topic:
            assert not (await topic.changes(None)).items

    async def follow_again() -> None:
        async with broker:
            record = await create(Backend(broker=broker, peer=broker), tags=("a",))
            async with broker.follow("tag:a") as topic:
                assert [change.run_id for change in (await topic.changes(None)).items] == [record.id]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # its connections are left open too
        asyncio.run(follow_and_leave())
        asyncio.run(follow_again())
        gc.collect()


async def test_idle_topics_are_closed_with_the_broker(storage: Storage) -> None:
    async with storage.realtime() as realtime:
        broker = realtime.broker
        assert isinstance(broker, RedisBroker)
        async with broker.follow("tag:a"):
            pass
        topics = broker._open.mirrors.topics
        assert topics
    assert not topics


async def test_over_http_pages_and_the_mirror_join_byte_for_byte(storage: Storage) -> None:
    async with storage.realtime(limits=Limits(mirror_bytes=5000)) as realtime:
        async with realtime.open_run("r") as run:
            for number in range(400):
                await realtime.append([number, CHUNK])
            token = realtime.create_public_token(scopes={"read": {"runs": [run.id]}})
            path, headers = f"/v1/streams/{run.id}/default", {"authorization": f"Bearer {token}"}
            async with AsgiClient(realtime).stream(path, headers=headers) as response:
                body = bytearray()
                while len(body) < 400 * 1000:
                    body += await response.chunk()
                (mirror,) = storage_mirrors(realtime).values()
                assert mirror.live.log.first > 390
                await realtime.append([400, CHUNK])
                body += await response.chunk()
        frames = [chunk_frame(number, b'[%d,"%b"]' % (number, CHUNK.encode())) for number in range(401)]
        assert bytes(body).endswith(b"".join(frames))


async def test_a_gap_starts_where_redis_has_trimmed_not_where_the_mirror_does(storage: Storage) -> None:
    settings: dict[str, Any] = {"limits": Limits(mirror_bytes=3000), "retention": Retention(stream_bytes=20_000)}
    async with storage.realtime(**settings) as realtime:
        async with realtime.open_run("r") as run:
            for number in range(50):
                await realtime.append([number, CHUNK])
            reader = realtime.read(run)
            with pytest.raises(StreamGap) as gap:
                await anext(reader)
            assert 50 - 20 <= gap.value.first < 40, "the first retained seq, not the first that this process holds"
            assert (await anext(reader))[0] == gap.value.first


async def test_trimming_by_bytes_is_exact(storage: Storage) -> None:
    async with opened(storage, retention=Retention(stream_bytes=1000)) as backend:
        key = StreamKey((await create(backend)).id, "s")
        for number in range(200):
            await backend.broker.append(key, [b'"%s"' % (b"x" * (number % 90))])
            page = await backend.peer.read(key)
            size = sum(len(chunk_frame(entry.seq, entry.data)) for entry in page.entries)
            oldest = chunk_frame(page.first - 1, b'"%s"' % (b"x" * ((page.first - 1) % 90)))
            assert size <= 1000
            assert page.first == 0 or size + len(oldest) > 1000, "one more entry would fit"
        names = backend.broker._names(key)  # type: ignore[attr-defined]
        assert await storage.client.xlen(names.keys[2]) == len(page.entries)


async def test_a_large_append_is_announced_and_read(storage: Storage) -> None:
    async with opened(storage) as backend:
        key = StreamKey((await create(backend)).id, "s")
        large = [b'"%s"' % (b"%d" % number * 50_000) for number in range(4)]
        async with backend.peer.live(key) as live:
            await backend.broker.append(key, large)
            await backend.broker.append(key, items(1))
            await until(lambda: live.log.next == 5)
            assert data(live.entries(-1)) == [*large, *items(1)]


async def test_removing_leaves_nothing_in_redis(storage: Storage) -> None:
    async with storage.realtime(retention=Retention(after_end=0.01)) as realtime:

        @realtime.task("t")
        async def task() -> None:
            await realtime.pipe([1, 2, 3]).wait_until_complete()

        handle = await realtime.trigger(task, tags=["a", "b"], idempotency_key="once")
        await handle.result(timeout=GUARD_S)
        removed = until_removed(storage)
        await asyncio.wait_for(removed, GUARD_S)


async def collect(states: AsyncIterator[RunRecord]) -> list[RunRecord]:
    return [state async for state in states]


async def until_removed(storage: Storage) -> None:
    while left := [key for key in await storage.keys() if b"{due}" not in key]:
        await asyncio.sleep(0.05)
        assert left


# Data loss


async def test_lost_chunks_are_restored_with_their_seqs(storage: Storage) -> None:
    async with storage.realtime() as realtime:
        async with realtime.open_run("r") as run:
            await realtime.append("a")
            before = await storage.dump()
            await realtime.append("b")
            await realtime.append("c")
            await storage.turn_back(before)
            await realtime.append("d")
            entries = await read_all(realtime.broker, StreamKey(run.id, "default"))
        assert [(entry.seq, entry.data) for entry in entries] == [(0, b'"a"'), (1, b'"b"'), (2, b'"c"'), (3, b'"d"')]
        assert [chunk async for chunk in realtime.read(run)] == ["a", "b", "c", "d"]


async def test_several_writers_restore_one_stream_in_its_order(storage: Storage) -> None:
    """Each has to wait for the others: the writer that notices first makes all of them restore."""
    async with storage.realtime() as realtime:
        async with realtime.open_run("r") as run, realtime.writer() as one, realtime.writer() as other:
            before = await storage.dump()
            for number in range(4):
                for name, writer in (("one", one), ("other", other)):
                    await writer.write([name, number])
                    await writer._writer.drain()
            await storage.turn_back(before)
            await one.write(["one", 4])
        chunks = [chunk async for chunk in realtime.read(run)]
        assert chunks == [*([name, number] for number in range(4) for name in ("one", "other")), ["one", 4]]


async def test_a_run_with_a_lost_stream_does_not_complete(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """No writer used that stream any more, and the run completed without it."""
    monkeypatch.setattr("asgi_realtime.runs.restoring.HELD_BYTES", 10)
    async with storage.realtime() as realtime:
        async with realtime.open_run("r") as run:
            before = await storage.dump()
            for number in range(8):
                await realtime.append([number, "long enough"], "early")
            await storage.turn_back(before)
            await realtime.append("x", "late")
        record = await realtime.get_run(run)
        assert record.error is not None
        assert (record.status, record.error.name) == (Status.FAILED, "StreamLost")


async def test_the_end_of_a_run_restores_what_was_lost_before(storage: Storage) -> None:
    """The writer had finished and the run completed without its last chunks, because no append noticed the loss."""
    async with storage.realtime() as realtime:
        async with realtime.open_run("r") as run:
            await realtime.append("a")
            before = await storage.dump()
            result = await realtime.pipe(["b", "c"], "other").wait_until_complete()
            assert result.chunks == 2
            await realtime.append("d")
            run.metadata.set("stage", "last")
            await run.metadata.flush()
            await storage.turn_back(before)
        record = await realtime.get_run(run)
        assert (record.status, record.metadata) == (Status.COMPLETED, {"stage": "last"})
        assert [chunk async for chunk in realtime.read(run)] == ["a", "d"]
        assert [chunk async for chunk in realtime.read(run, "other")] == ["b", "c"]


async def test_the_owner_restores_a_run_that_redis_has_lost(storage: Storage) -> None:
    async with storage.realtime() as realtime:
        async with realtime.open_run("r", tags="tag") as run:
            await realtime.append("a")
            await storage.turn_back({})
            await realtime.append("b")
        assert (await realtime.get_run(run)).status is Status.COMPLETED
        assert [chunk async for chunk in realtime.read(run)] == ["a", "b"]
        assert (await anext(realtime.subscribe_to_runs_with_tag("tag"))).id == run.id


async def test_a_stream_that_cannot_be_restored_is_lost_and_fails_the_run(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asgi_realtime.runs.restoring.HELD_BYTES", 10)
    async with storage.realtime() as realtime:

        @realtime.task("t")
        async def task() -> None:
            for number in range(8):
                await realtime.append([number, "long enough"])
            written.set()
            await go_on.wait()
            await realtime.append("more")

        written, go_on = asyncio.Event(), asyncio.Event()
        handle = await realtime.trigger(task)
        key = StreamKey(handle.id, "default")
        await written.wait()
        path = f"/v1/streams/{handle.id}/default"
        headers = {"authorization": f"Bearer {handle.public_access_token}"}
        async with AsgiClient(realtime).stream(path, headers=headers) as response:
            await response.read_until("message")
            await storage.turn_back({})
            go_on.set()
            events = await response.read_all_events()
        assert all(event.event != "end" or "complete" not in event.data for event in events)
        with pytest.raises(RunFailed):
            await handle.result(timeout=GUARD_S)
        record = await realtime.get_run(handle)
        assert record.error is not None
        assert (record.status, record.error.name) == (Status.FAILED, "StreamLost")
        end = (await realtime.broker.read(key)).end
        assert end is not None
        assert end.reason == "lost"
        async with AsgiClient(realtime).stream(path, headers={**headers, "last-event-id": "7"}) as response:
            assert [event.event for event in await response.read_all_events()][-1] == "end"


async def test_a_run_whose_start_was_lost_and_that_executes_elsewhere_is_stopped_here(storage: Storage) -> None:
    """Its queue delivered it again after the failover, and one run had the effects of both executions."""
    async with storage.realtime() as ours, storage.realtime() as theirs:
        started: list[Realtime] = []
        go_on, stopped = asyncio.Event(), asyncio.Event()

        def register(process: Realtime) -> None:
            @process.task("t")
            async def task() -> str:
                started.append(process)
                try:
                    await go_on.wait()
                finally:
                    if process is ours:
                        stopped.set()
                return "ours" if process is ours else "theirs"

        register(ours)
        register(theirs)
        record = ours.tasks.prepare("t", None, RunOptions()).record
        await ours.runs.create(record)
        before = await storage.dump()
        executing = asyncio.ensure_future(ours.execute(record.id))
        await until(lambda: started == [ours])
        await until(lambda: held(ours) >= 3)  # its watch starts with the next tick
        await storage.turn_back(before, noticed=False)
        again = asyncio.ensure_future(theirs.execute(record.id))
        await until(lambda: started == [ours, theirs])
        await theirs.runs.update(record.id, TagsAdded(("theirs",)))
        await asyncio.wait_for(stopped.wait(), 5)
        await asyncio.wait_for(executing, GUARD_S)
        go_on.set()
        await asyncio.wait_for(again, GUARD_S)
        stored = await ours.runs.get(record.id)
        assert (stored.status, stored.output, stored.owner) == (Status.COMPLETED, "theirs", theirs.runs.owner)


async def test_the_lost_start_of_a_run_is_restored(storage: Storage) -> None:
    """The run became EXPIRED while it executed, as if it had never started."""
    async with storage.realtime() as realtime:
        go_on = asyncio.Event()

        @realtime.task("t")
        async def task() -> str:
            await go_on.wait()
            return "done"

        record = realtime.tasks.prepare("t", None, RunOptions(ttl=1)).record
        await realtime.runs.create(record)
        before = await storage.dump()
        executing = asyncio.ensure_future(realtime.execute(record.id))
        await until(lambda: held(realtime))
        await storage.turn_back(before)
        async with asyncio.timeout(5):
            while (await realtime.get_run(record.id)).status is not Status.EXECUTING:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        go_on.set()
        await executing
        assert (await realtime.get_run(record.id)).output == "done"


async def test_an_end_that_others_stored_after_a_loss_is_final(storage: Storage) -> None:
    """The owner knew newer versions, which were lost, and stored its own over a run that had become CRASHED. Readers
    that had seen those versions missed the end, whose version was lower."""
    async with storage.realtime() as ours, storage.realtime() as theirs, AsyncExitStack() as leaving:
        opened: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def own() -> None:
            async with ours.open_run("r") as run:
                before.update(await storage.dump())
                for number in range(5):
                    run.metadata.set("n", number)
                    await run.metadata.flush()
                opened.set_result(run.id)
                await asyncio.Event().wait()

        before: dict[bytes, bytes] = {}
        owning = asyncio.ensure_future(own())
        run_id = await opened
        token = theirs.create_public_token(scopes={"read": {"runs": [run_id]}})
        headers = {"authorization": f"Bearer {token}", "accept": "text/event-stream"}
        feed = AsgiClient(theirs).stream(f"/v1/runs/{run_id}", headers=headers)
        response = await leaving.enter_async_context(feed)
        await response.read_until("ready")
        states = asyncio.ensure_future(collect(theirs.subscribe_to_run(run_id)))
        await until(lambda: held(theirs) >= 5)
        await storage.turn_back(before)
        await theirs.runs.update(run_id, Finished(Status.CRASHED, error=RunError("Crashed", "gone")))
        assert (await asyncio.wait_for(states, GUARD_S))[-1].status is Status.CRASHED
        assert json.loads((await response.read_all_events())[-1].data)["reason"] == "crashed"
        assert (await ours.runs.update(run_id, TagsAdded(("late",)))).status is Status.CRASHED
        with pytest.raises(RunCanceled):
            await asyncio.wait_for(owning, GUARD_S)
        assert (await theirs.get_run(run_id)).status is Status.CRASHED


async def test_chunks_at_the_seqs_of_lost_ones_do_not_complete_the_stream(storage: Storage) -> None:
    """The stream was long enough again, but chunks of another process had the seqs of those that were acknowledged and
    lost."""
    async with storage.realtime() as realtime, storage.realtime() as other:
        async with realtime.open_run("r") as run:
            await realtime.append("a")
            before = await storage.dump()
            await realtime.pipe(["b", "c"]).wait_until_complete()
            await storage.turn_back(before)
            await other.append("d", run=run)
            await other.append("e", run=run)
        record = await realtime.get_run(run)
        assert record.error is not None
        assert (record.status, record.error.name) == (Status.FAILED, "StreamLost")
        assert (await realtime.broker.read(StreamKey(run.id, "default"))).end.reason == "lost"  # type: ignore[union-attr]


async def test_the_end_of_a_run_restores_a_run_that_was_lost(storage: Storage) -> None:
    async with storage.realtime() as realtime:
        async with realtime.open_run("r") as run:
            await realtime.pipe(["a", "b"]).wait_until_complete()
            await storage.turn_back({}, noticed=False)
            run.set_output("done")
        record = await realtime.get_run(run)
        assert (record.status, record.output) == (Status.COMPLETED, "done")
        assert [chunk async for chunk in realtime.read(run)] == ["a", "b"]


async def test_other_writers_do_not_disturb_restoring(storage: Storage) -> None:
    async with storage.realtime() as realtime:
        async with realtime.open_run("r") as run, realtime.writer() as one, realtime.writer() as other:
            before = await storage.dump()
            for number in range(30):
                for writer in (one, other):
                    await writer.write(number)
                    await writer._writer.drain()
            await storage.turn_back(before)

            async def write(writer: Any) -> None:
                for number in range(30, 60):
                    await writer.write(number)
                    await asyncio.sleep(0)

            await asyncio.gather(write(one), write(other), realtime.runs.restorer.restore_streams(run.id))
        chunks = [chunk async for chunk in realtime.read(run)]
        assert chunks[:60] == [number for number in range(30) for _ in range(2)]
        assert sorted(chunks[60:]) == [number for number in range(30, 60) for _ in range(2)]


async def test_readers_get_an_error_when_their_realtime_stops(storage: Storage) -> None:
    """They waited forever for a run that executes elsewhere."""
    async with storage.realtime() as theirs, theirs.open_run("r") as run:
        async with storage.realtime() as ours:
            waiting = [
                asyncio.ensure_future(anext(ours.read(run.id))),
                asyncio.ensure_future(anext(ours.subscribe_to_runs_with_tag("none"))),
                asyncio.ensure_future(ours.result(run.id)),
            ]
            await until(lambda: held(ours) >= 3)  # including those that are still opening
        for done in await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5):
            assert isinstance(done, ServerShutdown)


async def test_a_stop_closes_every_connection(storage: Storage) -> None:
    """The stop cancels the task that has entered the broker, and that cancelled the closing too: a call a moment later
    used a Realtime that was stopped, and waited forever."""
    ours = await storage.client.client_id()
    async with storage.realtime() as realtime, realtime.open_run("r") as run:
        await realtime.append(1)
        assert await anext(realtime.read(run)) == 1
    async with asyncio.timeout(5):
        while any(int(client["id"]) > ours for client in await storage.client.client_list()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    with pytest.raises(ServerShutdown):
        async with realtime.broker.follow("tag:t"):
            raise AssertionError("followed")


async def test_items_whose_seqs_were_taken_are_lost(storage: Storage) -> None:
    async with opened(storage) as backend:
        key = StreamKey((await create(backend)).id, "s")
        await backend.broker.append(key, items(2), producer=Producer("p", 0))
        before = await storage.dump()
        await backend.broker.append(key, items(1), producer=Producer("p", 2))
        await storage.turn_back(before)
        await backend.peer.append(key, [b'"other"'])
        with pytest.raises(StreamLost):
            await backend.broker.append(key, items(1), producer=Producer("p", 2), at=2)
        await backend.broker.append(key, [], end=End("lost"))


async def test_a_mirror_ahead_of_its_log_ends_its_readers(storage: Storage) -> None:
    async with opened(storage) as backend:
        key = StreamKey((await create(backend)).id, "s")
        await backend.broker.append(key, items(2))
        before = await storage.dump()
        async with backend.peer.live(key) as live:
            await backend.broker.append(key, items(3, start=2))
            await until(lambda: live.log.next == 5)
            await storage.turn_back(before)
            await until(lambda: live.failure is not None)
        async with backend.peer.live(key) as live:
            assert live.log.next == 2


# Positions, health, calls, URLs


async def test_a_position_in_a_topic_is_not_used_again_after_a_loss(storage: Storage) -> None:
    """A change got the position of one that was lost, and a feed that had seen the lost one missed it."""
    async with storage.realtime() as realtime:
        async with realtime.open_run("r", tags="t") as run:
            before = await storage.dump()
            run.metadata.set("n", 1)
            await run.metadata.flush()
            cursor = (await realtime.broker.changes("tag:t")).cursor
            await storage.turn_back(before)
            run.metadata.set("n", 2)
            await run.metadata.flush()
            changes = await realtime.broker.changes("tag:t", after=cursor)
            assert [change.run_id for change in changes.items] == [run.id]


async def test_health_warns_of_a_memory_policy_that_evicts(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    async with storage.realtime() as realtime:
        assert (await AsgiClient(realtime).get("/v1/health")).body == b'{"status":"ok","broker":"ok"}'
        await storage.client.config_set("maxmemory", "1gb")
        await storage.client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            for _ in range(3):
                answer = await AsgiClient(realtime).get("/v1/health")
                assert (answer.status_code, b"noeviction" in answer.body) == (200, True)
        finally:
            await storage.client.config_set("maxmemory-policy", "noeviction")
            await storage.client.config_set("maxmemory", "0")
        assert sum("noeviction" in record.getMessage() for record in caplog.records) == 1
        assert (await AsgiClient(realtime).get("/v1/health")).body == b'{"status":"ok","broker":"ok"}'


async def test_calls_of_one_loop_iteration_share_one_write(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Group commit: the appends of many streams are sent in one piece."""
    writes = 0
    send = Connection.send_packed_command

    async def counted(self: Connection, *args: Any, **kwargs: Any) -> None:
        nonlocal writes
        writes += 1
        await send(self, *args, **kwargs)

    async with opened(storage) as backend:
        keys = [StreamKey((await create(backend)).id, "s") for _ in range(50)]
        monkeypatch.setattr(Connection, "send_packed_command", counted)
        await asyncio.gather(*(backend.broker.append(key, items(1)) for key in keys))
        assert writes <= 3


@pytest.mark.parametrize("way", ["tls", "unix", "password"])
async def test_urls_are_parsed_by_redis_py(way: str) -> None:
    password = "pass:word/with?signs" if way == "password" else None
    with RedisServer(redis_binary(), tls=way == "tls", password=password, keeps_data=False) as server:
        async with RedisBroker(server.unix_url if way == "unix" else server.url) as broker:
            backend = Backend(broker=broker, peer=broker)
            key = StreamKey((await create(backend)).id, "s")
            async with broker.live(key) as live:
                await broker.append(key, items(3))
                await until(lambda: live.log.next == 3)
            await broker.ping()


# Due runs


async def fail(*args: object) -> None:
    raise BrokerUnavailable("the connection was lost")


async def test_a_poll_that_failed_is_repeated_soon(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs in the partitions that it was about to read were found a minute later."""
    monkeypatch.setattr(schedule, "_SCANNED", 0)
    monkeypatch.setattr(schedule, "_READ_MS", 50)
    async with opened(storage) as backend:
        run = await create(backend, status=Status.DELAYED, delay_until_ms=backend.now_ms())
        with monkeypatch.context() as patched:
            patched.setattr(schedule.Schedule, "_due_in", fail)
            with pytest.raises(BrokerUnavailable):
                await backend.broker.due("delay")
        async with asyncio.timeout(10):
            while await backend.peer.due("delay") != [run.id]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_hints_of_partitions_with_nothing_due_are_dropped(storage: Storage) -> None:
    async with opened(storage) as backend:
        run = await create(backend, status=Status.DELAYED, delay_until_ms=backend.now_ms())
        await store(backend.broker, apply(run, [Finished(Status.CANCELED)], backend.now_ms()))
        assert await backend.broker.due("delay") == []
        assert await storage.client.zcard(storage.broker()._keys.hints("delay")) == 0


async def test_partitions_whose_scan_failed_are_scanned_again(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their turn came a minute later."""
    monkeypatch.setattr(schedule, "_SCANNED", 1)
    monkeypatch.setattr(schedule, "_SCAN_S", 0.0)
    async with opened(storage) as backend:
        broker = backend.broker
        assert isinstance(broker, RedisBroker)
        run = await create(backend, status=Status.DELAYED, delay_until_ms=backend.now_ms())
        await storage.client.delete(broker._keys.hints("delay"))
        broker._open.schedule._next_scanned = broker._keys.partition(run.id)
        with monkeypatch.context() as patched:
            patched.setattr(schedule.Schedule, "_scan_one", fail)
            with pytest.raises(BrokerUnavailable):
                await broker.due("delay")
        assert await broker.due("delay") == [run.id]


async def test_lone_surrogates_survive_in_redis(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    # The log contains the error. pytest adds the log to its report, and xdist cannot encode a surrogate.
    monkeypatch.setattr(logging.getLogger("asgi_realtime"), "disabled", True)
    async with storage.realtime() as writer, storage.realtime() as reader:
        with pytest.raises(TaskError):
            async with writer.open_run("chat") as run:
                run.metadata.set("half", "\ud83d")
                await writer.append("\ude00")
                raise TaskError("\ud83d")
        record = await reader.get_run(run.id)
        assert record.metadata == {"half": "\ud83d"}
        assert record.error == RunError("TaskError", "\ud83d")
        with pytest.raises(RunFailed, match="\ud83d"):
            assert [chunk async for chunk in reader.read(run.id)] == []


async def test_a_record_that_cannot_be_decoded_is_not_found_and_others_are(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(storage) as backend:
        broken, other = [await create(backend, tags=("a",)) for _ in range(2)]
        deep = b'{"id":"%b","metadata":{"a":%b}}' % (broken.id.encode(), b"[" * 2000 + b"]" * 2000)
        await storage.client.hset(Keys(storage.prefix).run(broken.id), "record", deep)
        for _ in range(2):
            loaded = await backend.broker.load([broken.id, other.id])
            assert [record and record.id for record in loaded] == [None, other.id]
    assert [f"the stored record of run {broken.id} cannot be decoded" in text for text in caplog.messages] == [True]
