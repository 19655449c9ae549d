from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.runs import RunError, Status, StoredRecord
from asgi_realtime.runs.recent import MAX_FAILED, MAX_RUNS, RecentRuns, summarize

pytestmark = pytest.mark.anyio


class SharedLists(MemoryBroker):
    """A broker whose lists of runs are stored outside of the process, and can fail."""

    shared = True

    def __init__(self) -> None:
        super().__init__()
        self.lists: dict[str, dict[str, bytes]] = {}
        self.calls = 0
        self.failure: Exception | None = None
        self.during: Callable[[], object] = lambda: None

    async def note_runs(self, name: str, runs: Sequence[tuple[str, int, int, bytes]], *, size: int) -> None:
        self.calls += 1
        self.during()
        if self.failure is not None:
            raise self.failure
        stored = self.lists.setdefault(name, {})
        stored |= {run_id: summary for run_id, _, _, summary in runs}
        self.lists[name] = dict(list(stored.items())[-size:])

    async def noted_runs(self, name: str) -> list[bytes]:
        return list(self.lists.get(name, {}).values())


def record(number: int, status: Status = Status.EXECUTING, *, version: int = 1) -> StoredRecord:
    return StoredRecord(
        id=f"run_{number:05}",
        task="chat",
        status=status,
        version=version,
        created_at_ms=number,
        updated_at_ms=number + version,
        tags=("user:1",),
        payload_json=b'"' + b"x" * 1000 + b'"',
        error=RunError("ValueError", "a message that only the run has") if status is Status.FAILED else None,
    )


async def ids(recent: RecentRuns) -> list[str]:
    return [run.id for run in await recent.newest()]


@pytest.mark.parametrize("broker", [MemoryBroker, SharedLists], ids=["own", "shared"])
async def test_the_newest_runs_come_first_each_in_its_newest_version(broker: type[MemoryBroker]) -> None:
    recent = RecentRuns(broker(), period_s=0.01)
    for run in (record(1), record(2), record(1, Status.COMPLETED, version=3), record(1, version=2)):
        recent.note(run)
    newest = await recent.newest()
    assert newest == [summarize(record(2)), summarize(record(1, Status.COMPLETED, version=3))]


@pytest.mark.parametrize("broker", [MemoryBroker, SharedLists], ids=["own", "shared"])
async def test_failed_runs_outlast_others(broker: type[MemoryBroker]) -> None:
    """At 1,000 runs a second, a run that failed two seconds ago would be gone before anyone looks."""
    recent = RecentRuns(broker(), period_s=0.01)
    recent.note(record(0, Status.FAILED))
    for number in range(1, MAX_RUNS + 2):
        recent.note(record(number))
    assert len(await ids(recent)) == MAX_RUNS + 1
    assert (await ids(recent))[-1] == "run_00000"
    for number in range(MAX_RUNS + 2, MAX_RUNS + 2 + MAX_FAILED):
        recent.note(record(number, Status.CRASHED))
    assert "run_00000" not in await ids(recent)


async def test_any_number_of_changes_is_stored_with_one_call_for_each_list() -> None:
    broker = SharedLists()
    recent = RecentRuns(broker, period_s=0.01)
    for number in range(500):
        recent.note(record(number))
        recent.note(record(number, Status.FAILED, version=2))
    await recent.flush()
    assert broker.calls == 2
    await recent.flush()
    assert broker.calls == 2, "nothing has changed"
    assert max(map(len, broker.lists["recent"].values())) < 300, "a summary has no payload"


async def test_all_processes_see_the_runs_of_all() -> None:
    broker = SharedLists()
    one, other = RecentRuns(broker, period_s=0.01), RecentRuns(broker, period_s=0.01)
    one.note(record(1))
    await one.flush()
    other.note(record(2))
    assert await ids(other) == ["run_00002", "run_00001"]


async def test_what_cannot_be_stored_is_stored_later() -> None:
    broker = SharedLists()
    recent = RecentRuns(broker, period_s=0.01)
    broker.failure = BrokerUnavailable("down")
    broker.during = lambda: recent.note(record(1, Status.COMPLETED, version=2))
    recent.note(record(1))
    recent.note(record(2))
    with pytest.raises(BrokerUnavailable):
        await recent.flush()
    broker.failure = None
    assert await recent.newest() == [summarize(record(2)), summarize(record(1, Status.COMPLETED, version=2))]
