"""What this process knows and holds of its runs. tests/brokers/test_redis.py restores from a real data loss."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import msgspec
import pytest

from asgi_realtime import Realtime, RunRecord, Status, Timeouts
from asgi_realtime.core.config import Retention
from asgi_realtime.core.runs import Finished
from asgi_realtime.runs import restoring
from asgi_realtime.runs.restoring import OwnedRuns, RestorableProducer
from tests.faults import RemoteBroker, make, until
from tests.inprocess import FakeClock

pytestmark = pytest.mark.anyio


# Chunks


def producers(realtime: Realtime) -> Iterator[RestorableProducer]:
    for writer in realtime._producers._shared.values():
        assert writer._producer is not None
        yield writer._producer


def held_bytes(realtime: Realtime) -> int:
    return sum(producer.held_bytes for producer in producers(realtime))


async def test_a_quiet_producer_releases_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks were released only when another writer appended, so quiet writers held 256 KiB each forever."""
    monkeypatch.setattr(restoring, "HELD_S", 0.05)
    async with make(broker=RemoteBroker(), timeouts=Timeouts(tick=0.01)) as realtime, realtime.open_run("r"):
        for name in ("a", "b", "c"):
            await realtime.append("x" * 10_000, name)
        assert held_bytes(realtime) == 30_006
        with anyio.fail_after(5):
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
        with anyio.fail_after(5):
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
) -> RunRecord:
    made = RunRecord(
        id="run_1", task="t", status=status, version=version, owner=owner, created_at_ms=1, updated_at_ms=1
    )
    return msgspec.structs.replace(made, **fields)


def owning(known: RunRecord, *, lossy: bool = True) -> OwnedRuns:
    owned = OwnedRuns(lossy=lossy, clock=FakeClock(), retention=Retention(after_end=60))
    owned.own(known)
    return owned


@pytest.mark.parametrize(
    "stored",
    [
        record(3),
        record(4, metadata={"by": "another process"}),
        record(2, Status.CRASHED),
        record(2, Status.COMPLETED, owner="them"),
        record(2, owner="them"),
    ],
)
async def test_what_others_stored_stays(stored: RunRecord) -> None:
    assert owning(record(3)).reconcile("run_1", stored) is stored


async def test_a_lost_version_is_restored_with_what_others_added_since() -> None:
    owned = owning(record(5, tags=("a", "b"), metadata={"n": 1}))
    stored = record(2, tags=("a", "c"), cancel_requested_at_ms=7)
    assert owned.reconcile("run_1", stored) == record(
        2, tags=("a", "b", "c"), metadata={"n": 1}, cancel_requested_at_ms=7
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
async def test_only_owned_runs_of_a_lossy_broker_are_restored(stored: RunRecord | None) -> None:
    owned = owning(record(5))
    assert owned.reconcile("run_2", stored) is stored
    assert owning(record(5), lossy=False).reconcile("run_1", stored) is stored
    owned.disown("run_1")
    assert owned.reconcile("run_1", stored) is stored


async def test_a_run_is_taken_over_by_another_owner_only() -> None:
    owned = owning(record())
    assert owned.is_taken_over(record(owner="them"))
    assert not owned.is_taken_over(record())
    assert not owned.is_taken_over(record(owner=None))
    assert not owned.is_taken_over(msgspec.structs.replace(record(owner="them"), id="run_2"))


async def test_the_newest_stored_version_is_the_known_one() -> None:
    owned = owning(record(3))
    owned.note_stored(record(4, metadata={"n": 1}))
    assert owned.reconcile("run_1", None) == record(4, metadata={"n": 1})
    owned.note_stored(record(5, Status.COMPLETED))
    assert owned.reconcile("run_1", None) is None, "a run that is over is not restored"


async def test_a_commit_that_is_not_the_end_sets_no_floors() -> None:
    async with make(broker=RemoteBroker(), timeouts=Timeouts(tick=60)) as realtime, realtime.open_run("r") as run:
        await realtime.append("x")
        await realtime.append("y")
        (producer,) = producers(realtime)
        ending = msgspec.structs.replace(run.record, status=Status.COMPLETED)
        assert realtime.runs.owned.floors(run.record) == {}
        assert realtime.runs.owned.floors(ending) == {("default", producer.id): 2}
        assert (await realtime.runs.update(run.id, Finished(Status.FAILED))).is_completed
