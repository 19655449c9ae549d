from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import anyio
import msgspec
import pytest

from asgi_realtime import BrokerUnavailable, LimitExceeded, RunNotFound, Status
from asgi_realtime.brokers.base import MARKS_KEPT, ChangeMark, StreamKey
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.config import Limits
from asgi_realtime.core.errors import InvalidTransition
from asgi_realtime.core.metadata import Append, Delete, Increment, Set, encode_metadata
from asgi_realtime.core.run_changes import Finished, MetadataChanged, Started, TagsAdded
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.runs.store import RunStore
from tests.brokers.backends import DistantBroker
from tests.inprocess import FakeClock, until

pytestmark = pytest.mark.anyio


def store(broker: MemoryBroker, *, patience_s: float = 5.0, **limits: int) -> RunStore:
    return RunStore(broker, clock=FakeClock(), patience_s=patience_s, limits=Limits(**{"streams_per_run": 3} | limits))


def record(run_id: str = "run_1", status: Status = Status.EXECUTING) -> StoredRecord:
    return StoredRecord(id=run_id, task="t", status=status, created_at_ms=1, updated_at_ms=1)


def increment(by: int = 1) -> MetadataChanged:
    return MetadataChanged((Increment("n", by),))


async def test_a_run_is_created_once() -> None:
    runs = store(MemoryBroker())
    await runs.create(record())
    assert (await runs.get("run_1")).version == 1
    with pytest.raises(VersionConflict):
        await runs.create(record())
    with pytest.raises(RunNotFound, match="no run 'run_2': it does not exist or has expired"):
        await runs.get("run_2")
    assert await runs.load(["run_2", "run_1"]) == [None, await runs.get("run_1")]


async def test_the_changes_of_one_call_make_one_version() -> None:
    runs = store(MemoryBroker())
    await runs.create(record())
    after = await runs.update("run_1", increment(), increment(2), Finished(Status.COMPLETED))
    assert (after.version, after.metadata, after.status) == (2, {"n": 3}, Status.COMPLETED)
    assert await runs.get("run_1") == after


async def test_a_known_record_saves_a_load() -> None:
    class Counting(MemoryBroker):
        loads = 0

        async def load(self, run_ids: Sequence[str]) -> list[StoredRecord | None]:
            self.loads += 1
            return await super().load(run_ids)

    broker = Counting()
    runs = store(broker)
    await runs.create(record())
    after = await runs.update("run_1", increment(), known=record())
    assert (after.version, broker.loads) == (2, 0)


async def test_changes_apply_to_the_newest_version_if_the_known_record_is_outdated() -> None:
    runs = store(MemoryBroker())
    await runs.create(record())
    await runs.update("run_1", increment())
    after = await runs.update("run_1", increment(), known=record())
    assert (after.version, after.metadata) == (3, {"n": 2})


async def test_a_change_without_effect_makes_no_version() -> None:
    runs = store(MemoryBroker())
    await runs.create(record())
    await runs.update("run_1", Finished(Status.FAILED))
    assert (await runs.update("run_1", increment())).version == 2
    assert (await runs.update("run_1", Finished(Status.COMPLETED))).status is Status.FAILED
    with pytest.raises(RunNotFound):
        await runs.update("run_2", increment())


async def test_an_invalid_transition_is_rejected() -> None:
    runs = store(MemoryBroker())
    await runs.create(record())
    with pytest.raises(InvalidTransition):
        await runs.update("run_1", Started("me"))
    assert (await runs.get("run_1")).version == 1


async def test_limits_hold_for_concurrent_changes_of_several_processes() -> None:
    """Each process checked only what it knew of the run: ten children grew the metadata of a parent to seven times its
    limit."""
    broker = DistantBroker()
    stores = [store(broker, metadata_bytes=100, tags=3) for _ in range(4)]
    await stores[0].create(record())
    refused: list[str] = []
    logged = Append("log", "x" * 30)

    async def change(runs: RunStore, number: int) -> None:
        try:
            await runs.update(
                "run_1",
                increment(),
                MetadataChanged((logged,)),
                TagsAdded((f"a{number}", f"b{number}")),
            )
        except LimitExceeded as exc:
            refused.append(str(exc))

    async with anyio.create_task_group() as group:
        for number, runs in enumerate(stores):
            group.start_soon(change, runs, number)
    after = await stores[0].get("run_1")
    assert after.metadata == {"n": 4, "log": ["x" * 30] * 2}, "what was within the limits is stored"
    assert len(after.tags) == 2
    assert set(refused) == {"run 'run_1' would have 4 tags, limit 3"}


async def test_a_run_ends_even_if_other_changes_are_rejected(caplog: pytest.LogCaptureFixture) -> None:
    runs = store(MemoryBroker(), tags=1)
    await runs.create(record())
    after = await runs.update("run_1", TagsAdded(("a", "b")), increment(), Finished(Status.COMPLETED))
    assert (after.status, after.tags, after.metadata) == (Status.COMPLETED, (), {"n": 1})
    assert "a change of run run_1 was rejected: run 'run_1' would have 2 tags, limit 1" in caplog.text


async def test_a_run_over_a_limit_can_shrink() -> None:
    runs = store(MemoryBroker(), metadata_bytes=20, tags=1)
    await runs.create(
        msgspec.structs.replace(record(), metadata_json=encode_metadata({"a": "x" * 50, "b": 1}), tags=("a", "b"))
    )
    assert (await runs.update("run_1", MetadataChanged((Delete("b"),)))).metadata == {"a": "x" * 50}
    assert (await runs.update("run_1", MetadataChanged((Set("a", "x" * 30),)))).metadata == {"a": "x" * 30}
    with pytest.raises(LimitExceeded, match="metadata is [0-9]+ bytes, limit 20"):
        await runs.update("run_1", MetadataChanged((Set("b", 1),)))


async def test_inputs_and_streams_are_counted_separately() -> None:
    """A client with the public token of a handle could open any number of streams in a run."""
    runs = store(MemoryBroker(), inputs_per_run=2)
    await runs.create(record())
    for name in ("$trigger.input:a", "$trigger.input:b", "$trigger.input:a", "a", "b", "c"):
        await runs.add_stream(StreamKey("run_1", name))
    with pytest.raises(LimitExceeded, match="run 'run_1' would have 3 inputs, limit 2"):
        await runs.add_stream(StreamKey("run_1", "$trigger.input:c"))
    after = await runs.get("run_1")
    assert (len(after.inputs), after.streams) == (2, ("a", "b", "c"))


async def test_concurrent_changes_of_one_run_lose_nothing() -> None:
    broker = DistantBroker()
    stores = [store(broker) for _ in range(4)]
    await stores[0].create(record())
    async with anyio.create_task_group() as group:
        for runs in stores:
            for _ in range(10):
                group.start_soon(runs.update, "run_1", increment())
    after = await stores[0].get("run_1")
    assert after.metadata == {"n": 40}
    assert after.version == 41


class Removing(MemoryBroker):
    """Removes a run between its load and its commit."""

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        if expect:
            await self.remove(record.id)
        return await super().commit(record, expect=expect, change=change, floors=floors)


async def test_a_run_that_is_removed_during_an_update_is_not_found() -> None:
    runs = store(Removing())
    await runs.create(record())
    with pytest.raises(RunNotFound, match="has expired"):
        await runs.update("run_1", increment())


class Flaky(MemoryBroker):
    """Fails a number of times, after it has done the work."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures
        self.marks: list[ChangeMark] = []

    def fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise BrokerUnavailable("no answer")

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        self.marks.append(change)
        version = await super().commit(record, expect=expect, change=change, floors=floors)
        self.fail()
        return version

    async def claim(
        self, key: str, value: str, *, ttl_s: float, owner: str | None = None, instead_of: str | None = None
    ) -> str:
        claimed = await super().claim(key, value, ttl_s=ttl_s, owner=owner, instead_of=instead_of)
        self.fail()
        return claimed

    async def load(self, run_ids: Sequence[str]) -> list[StoredRecord | None]:
        return await super().load(run_ids)


async def test_a_commit_without_a_response_is_repeated_and_counts_once() -> None:
    broker = Flaky(2)
    runs = store(broker)
    await runs.create(record())
    broker.failures = 1
    after = await runs.update("run_1", increment())
    assert (after.metadata, after.version) == ({"n": 1}, 2)
    assert (await runs.get("run_1")).metadata == {"n": 1}
    assert len(broker.marks) == 5
    assert len(set(broker.marks)) == 2
    broker.failures = 1
    assert await runs.claim("key", "value", ttl_s=60) == "value"


async def test_a_change_with_a_mark_is_stored_once() -> None:
    runs = store(MemoryBroker())
    await runs.create(record())
    mark = ChangeMark("a request", 0)
    first = await runs.update("run_1", increment(), mark=mark)
    await runs.update("run_1", increment())
    again = await runs.update("run_1", increment(), mark=mark)
    assert (first.metadata, again.metadata, again.version) == ({"n": 1}, {"n": 2}, 3)
    assert again == await runs.get("run_1")
    for _ in range(MARKS_KEPT):
        await runs.update("run_1", increment())
    assert (await runs.update("run_1", increment(), mark=mark)).metadata == {"n": 3 + MARKS_KEPT}, "it is forgotten"


async def test_calls_retry_for_a_limited_time() -> None:
    broker = Flaky(1000)
    runs = store(broker, patience_s=0.12)
    with pytest.raises(BrokerUnavailable, match="no answer"):
        await runs.create(record())
    assert len(broker.marks) == 2


async def test_get_waits_for_a_run_that_is_being_created() -> None:
    runs = store(MemoryBroker())
    got: list[str] = []

    async def get(run_id: str) -> None:
        try:
            got.append((await runs.get(run_id)).id)
        except RunNotFound:
            got.append("none")

    runs.expect_creation("run_1")
    runs.expect_creation("run_1")
    runs.expect_creation("run_2")
    async with anyio.create_task_group() as group:
        group.start_soon(get, "run_1")
        group.start_soon(get, "run_2")
        await anyio.wait_all_tasks_blocked()
        assert got == []
        await runs.create(record())
        runs.creation_settled("run_1")
        await until(lambda: got == ["run_1"])
        runs.creation_settled("run_2")
    assert got == ["run_1", "none"]
    runs.creation_settled("run_1")
    await runs.wait_created("run_1")


async def test_streams_are_listed_up_to_the_limit() -> None:
    runs = store(MemoryBroker(), streams_per_run=2)
    await runs.create(record())
    for name in ("a", "b", "a", "$hidden"):
        await runs.add_stream(StreamKey("run_1", name))
    with pytest.raises(LimitExceeded, match="run 'run_1' would have 3 streams, limit 2") as caught:
        await runs.add_stream(StreamKey("run_1", "c"))
    assert caught.value.status == 422
    assert (await runs.get("run_1")).streams == ("a", "b")
    assert (await runs.get("run_1")).version == 4
    with pytest.raises(RunNotFound):
        await runs.add_stream(StreamKey("run_2", "a"))


async def test_a_limited_number_of_known_streams_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_realtime.runs.store._KNOWN_STREAMS", 2)
    runs = store(MemoryBroker())
    await runs.create(record())
    for name in ("a", "b", "c", "a"):
        await runs.add_stream(StreamKey("run_1", name))
    assert (await runs.get("run_1")).streams == ("a", "b", "c")
    assert len(runs._known_streams) == 2


class Followed(MemoryBroker):
    followers = 0

    @asynccontextmanager
    async def follow(self, topic: str) -> AsyncIterator[object]:  # type: ignore[override]
        async with super().follow(topic) as followed:
            self.followers += 1
            try:
                yield followed
            finally:
                self.followers -= 1


async def test_waiting_for_the_end_of_a_run_leaves_nothing_behind() -> None:
    broker = Followed()
    runs = store(broker)
    await runs.create(record())
    ended: list[Status] = []

    async def wait() -> None:
        ended.append((await runs.ended("run_1")).status)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await runs.update("run_1", increment())
        await anyio.wait_all_tasks_blocked()
        assert ended == []
        with anyio.move_on_after(0.01):
            await runs.ended("run_1")
        await runs.update("run_1", Finished(Status.CRASHED))
    assert ended == [Status.CRASHED] * 3
    assert (await runs.ended("run_1")).is_completed
    assert broker.followers == 0
    with pytest.raises(RunNotFound):
        await runs.ended("run_2")
