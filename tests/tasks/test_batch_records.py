from __future__ import annotations

import pytest

from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.tasks.batch_records import BatchRecord, Plan, Stage, run_id_in
from asgi_realtime.tasks.batches import Batches
from tests.inprocess import make_realtime

pytestmark = pytest.mark.anyio

BATCH = BatchRecord("batch_1", 3, 1_000, waits_until_ms=2_000, owner="user:1")
PLAN = Plan(["run_a", "run_b", "run_c"], [0, 2])


def make_records(broker: MemoryBroker | None = None) -> Batches:
    return make_realtime(broker=broker or MemoryBroker()).tasks.batches


async def test_the_latest_stage_is_found() -> None:
    records = make_records()
    assert await records.find("batch_1") is None
    for stage, batch in (
        (Stage.OPEN, BATCH),
        (Stage.PLANNED, BATCH.with_plan(PLAN)),
        (Stage.SEALED, BATCH.with_plan(PLAN).sealed()),
    ):
        assert await records.store(stage, batch) == batch
        assert await records.find("batch_1") == batch


async def test_a_stage_can_be_skipped() -> None:
    records = make_records()
    await records.store(Stage.OPEN, BATCH)
    await records.store(Stage.SEALED, BATCH.sealed())
    assert await records.find("batch_1") == BATCH.sealed()


async def test_of_two_processes_the_second_learns_the_plan_of_the_first() -> None:
    broker = MemoryBroker()
    one, two = make_records(broker), make_records(broker)
    first = await one.store(Stage.PLANNED, BATCH.with_plan(PLAN))
    assert await two.store(Stage.PLANNED, BATCH.with_plan(Plan(["run_x"] * 3, []))) == first


def test_without_a_plan_the_runs_follow_from_the_id() -> None:
    assert BATCH.plan == Plan([run_id_in("batch_1", index) for index in range(3)], [0, 1, 2])
    assert BATCH.last_id == run_id_in("batch_1", 2)
    assert len({*BATCH.plan.run_ids, run_id_in("batch_2", 0)}) == 4


@pytest.mark.parametrize(
    ("batch", "now_ms", "is_closed"),
    [
        (BATCH, 1_999, False),
        (BATCH, 2_000, True),
        (BATCH.sealed(), 1_000, True),
        (BATCH.with_plan(PLAN), 1_000, False),
        (BATCH.with_plan(Plan(["run_a"] * 3, [])), 1_000, True),
    ],
)
def test_a_batch_is_closed_if_it_gets_no_more_runs(batch: BatchRecord, now_ms: int, is_closed: bool) -> None:
    assert batch.is_closed(now_ms) is is_closed
