"""Restoring lost data: what this process knows, what it holds, and how both come together.

tests/brokers/test_redis.py does the same with a Redis that really loses data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import anyio
import msgspec
import pytest

from asgi_realtime import Realtime, RunNotFound, Status, Timeouts
from asgi_realtime.brokers.base import End, Position, Producer, StreamKey
from asgi_realtime.core.config import Retention
from asgi_realtime.core.errors import BrokerUnavailable, StreamClosed, StreamLost
from asgi_realtime.core.log import Log
from asgi_realtime.core.metadata import encode_metadata
from asgi_realtime.core.run_changes import Finished, TagsAdded
from asgi_realtime.core.runs import RunError, StoredRecord
from asgi_realtime.runs import restoring
from asgi_realtime.runs.restoring import OwnedRuns, RestorableProducer
from asgi_realtime.streams.outbox import Outbox
from asgi_realtime.streams.writer import StreamWriter
from tests.faults import RemoteBroker, make, stored, until
from tests.inprocess import GUARD_S, FakeClock

pytestmark = pytest.mark.anyio


# Chunks


def producers(realtime: Realtime) -> Iterator[RestorableProducer]:
    for writer in realtime._producers._shared.values():
        assert writer._outbox is not None and writer._outbox._producer is not None
        yield writer._outbox._producer


def held_bytes(realtime: Realtime) -> int:
    return sum(producer.held_bytes for producer in producers(realtime))


async def test_a_quiet_producer_releases_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks were released only when another writer appended, so quiet writers held 256 KiB each forever."""
    monkeypatch.setattr(restoring, "HELD_S", 0.05)
    async with make(broker=RemoteBroker(), timeouts=Timeouts(tick=0.01)) as realtime, realtime.open_run("r"):
        for name in ("a", "b", "c"):
            await realtime.append("x" * 10_000, name)
        assert held_bytes(realtime) == 30_006
        with anyio.fail_after(GUARD_S):
            while held_bytes(realtime):  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert not realtime.runs.owned._holding


async def test_chunks_do_not_age_while_the_broker_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker that returns is the one that can have lost them."""
    monkeypatch.setattr(restoring, "HELD_S", 0.05)
    broker = RemoteBroker()
    async with make(broker=broker, timeouts=Timeouts(tick=0.01)) as realtime, realtime.open_run("r"):
        broker.away = {"due"}
        await until(lambda: broker.failed > 0)
        await realtime.append("x")
        await anyio.sleep(0.2)
        assert held_bytes(realtime) == 3
        broker.away = set()
        with anyio.fail_after(GUARD_S):
            while held_bytes(realtime):  # noqa: ASYNC110
                await anyio.sleep(0.01)


async def test_a_long_time_between_two_ticks_counts_as_an_outage() -> None:
    owned = OwnedRuns(lossy=True, clock=FakeClock(), retention=Retention())
    for now_s in (100.0, 101.0, 1000.0, 1000.5):
        owned.release_expired(now_s)
    assert owned.available_s == 1.0 + restoring._MAX_STEP_S + 0.5


async def test_the_end_of_a_run_releases_its_chunks() -> None:
    async with make(broker=RemoteBroker(), timeouts=Timeouts(tick=60)) as realtime:
        async with realtime.open_run("r"):
            await realtime.append("x" * 10_000)
            assert held_bytes(realtime) == 10_002
        assert held_bytes(realtime) == 0
        assert not realtime.runs.owned._holding


async def test_a_busy_producer_holds_a_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoring, "HELD_BYTES", 100)
    async with make(broker=RemoteBroker(), timeouts=Timeouts(tick=60)) as realtime, realtime.open_run("r"):
        for _ in range(20):
            await realtime.append("x" * 38)
        assert held_bytes(realtime) == 80


# Records


def record(
    version: int = 3, status: Status = Status.EXECUTING, owner: str | None = "us", **fields: object
) -> StoredRecord:
    made = StoredRecord(
        id="run_1", task="t", status=status, version=version, owner=owner, created_at_ms=1, updated_at_ms=1
    )
    return msgspec.structs.replace(made, **fields)


def owning(known: StoredRecord, *, lossy: bool = True) -> OwnedRuns:
    owned = OwnedRuns(lossy=lossy, clock=FakeClock(), retention=Retention(after_end=60))
    owned.own(known)
    return owned


@pytest.mark.parametrize(
    "stored",
    [
        record(3),
        record(4, metadata_json=encode_metadata({"by": "another process"})),
        record(2, Status.CRASHED),
        record(2, Status.COMPLETED, owner="them"),
        record(2, owner="them"),
    ],
)
async def test_what_others_stored_stays(stored: StoredRecord) -> None:
    assert owning(record(3)).reconcile("run_1", stored) is stored


async def test_a_lost_version_is_restored_with_what_others_added_since() -> None:
    owned = owning(record(5, tags=("a", "b"), metadata_json=encode_metadata({"n": 1})))
    stored = record(2, tags=("a", "c"), cancel_requested_at_ms=7)
    assert owned.reconcile("run_1", stored) == record(
        2, tags=("a", "b", "c"), metadata_json=encode_metadata({"n": 1}), cancel_requested_at_ms=7
    )


async def test_a_lost_start_of_the_execution_is_restored() -> None:
    stored = record(9, Status.QUEUED, owner=None)
    assert owning(record(3)).reconcile("run_1", stored) == record(9)


async def test_a_lost_run_is_restored_while_it_cannot_have_expired() -> None:
    clock = FakeClock()
    owned = OwnedRuns(lossy=True, clock=clock, retention=Retention(after_end=60))
    owned.own(record())
    clock.seconds += 59
    assert owned.reconcile("run_1", None) == record()
    clock.seconds += 2
    assert owned.reconcile("run_1", None) is None
    owned.renewed()
    assert owned.reconcile("run_1", None) == record()


@pytest.mark.parametrize("stored", [None, record(1)])
async def test_only_owned_runs_of_a_lossy_broker_are_restored(stored: StoredRecord | None) -> None:
    owned = owning(record(5))
    assert owned.reconcile("run_2", stored) is stored
    assert owning(record(5), lossy=False).reconcile("run_1", stored) is stored
    owned.disown("run_1")
    assert owned.reconcile("run_1", stored) is stored


async def test_a_run_is_taken_over_by_another_owner_only() -> None:
    owned = owning(record())["run_1"]
    assert owned.is_taken_over(record(owner="them"))
    assert not owned.is_taken_over(record())
    assert not owned.is_taken_over(record(owner=None))


async def test_the_newest_stored_version_is_the_known_one() -> None:
    owned = owning(record(3))
    owned["run_1"].record = record(4, metadata_json=encode_metadata({"n": 1}))
    assert owned.reconcile("run_1", None) == record(4, metadata_json=encode_metadata({"n": 1}))
    owned["run_1"].record = record(5, Status.COMPLETED)
    assert owned.reconcile("run_1", None) is None, "a run that is over is not restored"


async def test_a_commit_that_is_not_the_end_sets_no_floors() -> None:
    async with make(broker=RemoteBroker(), timeouts=Timeouts(tick=60)) as realtime, realtime.open_run("r") as run:
        await realtime.append("x")
        await realtime.append("y")
        (producer,) = producers(realtime)
        ending = msgspec.structs.replace(run.record, status=Status.COMPLETED)
        assert realtime.runs.owned[run.id].floors(run.record) == {}
        assert realtime.runs.owned[run.id].floors(ending) == {("default", producer.id): 2}
        assert (await realtime.runs.update(run.id, Finished(Status.FAILED))).is_completed


# A broker that loses data

STILL = Timeouts(tick=60)


class LosingBroker(RemoteBroker):
    """A broker that can go back to an earlier state, as after a failover."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[tuple[StreamKey, tuple[bytes, ...], Producer | None]] = []

    async def append(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        position = await super().append(key, items, producer=producer, end=end, at=at)
        self.history.append((key, tuple(items), producer))
        return position

    def lose_appends(self, run_id: str, *, keep: int = 0) -> None:
        """Lose all appends to a run but the first ones."""
        del self.history[keep:]
        for name, live in self.inner._runs[run_id].streams.items():
            live.log = Log()
            for key, items, producer in self.history:
                if key == (run_id, name):
                    live.log.append(items, 0, producer=producer)

    def lose_run(self, run_id: str) -> None:
        del self.inner._runs[run_id]
        self.history.clear()

    def lose_version(self, run_id: str, record: StoredRecord) -> None:
        self.inner._runs[run_id].record = record


@pytest.mark.parametrize("keep", range(4))
async def test_an_append_restores_lost_chunks(keep: int) -> None:
    broker = LosingBroker()
    async with make(broker=broker, timeouts=STILL) as realtime, realtime.open_run("r") as run:
        for number in range(3):
            await realtime.append(number)
        broker.lose_appends(run.id, keep=keep)
        await realtime.append(3)
        assert await stored(realtime, run.id) == [0, 1, 2, 3]


async def test_chunks_of_several_producers_return_to_their_seqs() -> None:
    """A process has a second producer of a stream after the first one failed."""
    broker = LosingBroker()
    async with make(broker=broker, timeouts=STILL) as realtime, realtime.open_run("r") as run:

        def own_outbox(key: StreamKey) -> Outbox:
            return Outbox(key, runs=realtime.runs, spawn=realtime.engine.spawn_brief)

        key = StreamKey(run.id, "default")
        one, other = (StreamWriter(key, runs=realtime.runs, find_outbox=own_outbox) for _ in range(2))
        for number in range(5):
            for writer in (one, other):
                writer.write(b"%d" % number)
                await writer.drain()
        broker.lose_appends(run.id, keep=3)
        other.write(b'"last"')
        await other.drain()
        assert await stored(realtime, run.id) == [number for number in range(5) for _ in range(2)] + ["last"]


async def test_the_end_of_a_run_restores_chunks_and_record() -> None:
    broker = LosingBroker()
    async with make(broker=broker, timeouts=STILL) as realtime:
        async with realtime.open_run("r", tags=["a"]) as run:
            await realtime.append("x")
            broker.lose_run(run.id)
        found = await realtime.get_run(run)
        assert (found.status, found.tags) == (Status.COMPLETED, ("a",))
        assert await stored(realtime, run.id) == ["x"]


async def test_an_append_restores_a_lost_run() -> None:
    broker = LosingBroker()
    async with make(broker=broker, timeouts=STILL) as realtime, realtime.open_run("r") as run:
        await realtime.append("x")
        broker.lose_run(run.id)
        await realtime.append("y")
        assert await stored(realtime, run.id) == ["x", "y"]


async def test_a_change_restores_a_lost_version() -> None:
    broker = LosingBroker()
    async with make(broker=broker, timeouts=STILL) as realtime, realtime.open_run("r") as run:
        before = await realtime.runs.get(run.id)
        run.metadata.set("n", 1)
        await run.metadata.flush()
        broker.lose_version(run.id, before)
        after = await realtime.runs.update(run.id, TagsAdded(("a",)))
        assert (after.metadata, after.tags) == ({"n": 1}, ("a",))


async def test_a_run_that_was_removed_is_not_restored_by_others() -> None:
    broker = LosingBroker()
    async with make(broker=broker, timeouts=STILL) as realtime, make(broker=broker, timeouts=STILL) as other:
        async with other.open_run("r") as run:
            await realtime.append("x", run=run)
            broker.lose_run(run.id)
            with pytest.raises(RunNotFound):
                await realtime.append("y", run=run)


async def test_chunks_that_are_not_held_are_lost_and_fail_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoring, "HELD_BYTES", 1)
    broker = LosingBroker()
    async with make(broker=broker, timeouts=STILL) as realtime:
        async with realtime.open_run("r") as run:
            for number in range(3):
                await realtime.append(number)
            broker.lose_appends(run.id)
            with pytest.raises(StreamLost, match="entries of stream 'default' were lost"):
                await realtime.append(3)
        found = await realtime.get_run(run)
        assert found.error is not None
        assert (found.status, found.error.name) == (Status.FAILED, "StreamLost")
        end = (await realtime.broker.read(StreamKey(run.id, "default"))).end
        assert end is not None
        assert end.reason == "lost"


async def test_chunks_whose_seqs_are_taken_are_lost() -> None:
    broker = LosingBroker()
    async with make(broker=broker, timeouts=STILL) as realtime, realtime.open_run("r") as run:
        await realtime.append("ours")
        broker.lose_appends(run.id)
        await broker.inner.append(StreamKey(run.id, "default"), [b'"theirs"'])
        with pytest.raises(StreamLost):
            await realtime.append("more")
        assert await stored(realtime, run.id) == ["theirs"]


async def test_a_run_that_ended_elsewhere_is_not_restored() -> None:
    broker = LosingBroker()
    async with make(broker=broker, timeouts=STILL) as realtime, realtime.open_run("r") as run:
        await realtime.append("x")
        broker.lose_appends(run.id)
        crashed = Finished(Status.CRASHED, error=RunError("Crashed", "its process is gone"))
        async with make(broker=RemoteBroker(broker.inner), timeouts=STILL) as other:
            await other.runs.update(run.id, crashed)
        with pytest.raises(StreamClosed):
            await realtime.append("y")


async def test_a_stream_that_cannot_be_restored_yet_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    broker = LosingBroker()
    async with make(broker=broker, timeouts=Timeouts(tick=60, append=0.1)) as realtime, realtime.open_run("r") as run:
        await realtime.append("x")
        broker.away = {"append"}
        await realtime.runs.restorer.restore_streams(run.id)
        assert f"stream 'default' of run {run.id} could not be restored yet" in caplog.text
        with pytest.raises(BrokerUnavailable):
            await realtime.append("y")
