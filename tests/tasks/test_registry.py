from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import anyio
import pytest

from asgi_realtime import (
    InvalidPayload,
    LimitExceeded,
    Limits,
    Realtime,
    Run,
    RunError,
    RunHandle,
    RunNotFound,
    RunRecord,
    Status,
    UnknownTask,
    UsageError,
)
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.runs import BatchMember
from asgi_realtime.core.scopes import admits
from tests.brokers.backends import DistantBroker
from tests.inprocess import FakeClock, ended, make_realtime, until

pytestmark = pytest.mark.anyio


def with_echo(**options: Any) -> Realtime:
    realtime = make_realtime(**options)

    @realtime.task("echo")
    async def echo(payload: Any) -> Any:
        return payload

    return realtime


async def count_runs(realtime: Realtime, topic: str) -> int:
    return len((await realtime.broker.changes(topic)).items)


async def test_a_run_is_found_by_its_id_as_soon_as_there_is_a_handle() -> None:
    async with with_echo() as realtime:
        handle = await realtime.trigger("echo", 1, tags=["a", "b", "a"], metadata={"n": 1})
        record = await realtime.get_run(handle)
        assert record.id == handle.id
        assert record.task == "echo"
        assert record.tags == ("a", "b")
        assert record.metadata == {"n": 1}
        assert record.payload == 1
        assert record.parent_id is None and record.root_id == handle.id and record.depth == 0
        assert not handle.is_cached


async def test_tags_may_be_one_string() -> None:
    async with with_echo() as realtime:
        assert (await realtime.get_run(await realtime.trigger("echo", tags="user:1"))).tags == ("user:1",)


async def test_a_task_that_nobody_registered_is_refused_with_those_that_are() -> None:
    async with with_echo() as realtime:
        with pytest.raises(UnknownTask, match="no task 'ecko' is registered; registered: echo"):
            await realtime.trigger("ecko")
    with pytest.raises(UnknownTask, match="registered: none"):
        await make_realtime().trigger("ecko")


async def test_a_task_of_another_realtime_is_known_by_its_id_only() -> None:
    other = make_realtime()

    @other.task("elsewhere")
    async def elsewhere() -> None: ...

    async with with_echo() as realtime:
        with pytest.raises(UnknownTask, match="no task 'elsewhere'"):
            await realtime.trigger(elsewhere)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tags": ["x"] * 3 + list("abcdefghij")}, LimitExceeded, "a run has 11 tags, limit 10"),
        ({"tags": "x" * 129}, LimitExceeded, "tag is 129 characters, limit 128"),
        ({"tags": [""]}, UsageError, "a tag is empty"),
        ({"tags": [1]}, UsageError, "a tag is a int; allowed is a str"),
        ({"metadata": {"x" * 129: 1}}, UsageError, "metadata key is 129 characters; allowed are 1 to 128"),
        ({"metadata": {"a": "x" * 300_000}}, LimitExceeded, "limit 262144"),
        ({"metadata": ["a"]}, UsageError, "metadata is a list; allowed is a dict"),
        ({"metadata": {"a": object()}}, UsageError, "object has no JSON form"),
        ({"idempotency_key": "x" * 513}, LimitExceeded, "idempotency_key is 513 characters, limit 512"),
        ({"idempotency_key": ""}, UsageError, "idempotency_key is ''; allowed is a non-empty str"),
        ({"idempotency_key": 3}, UsageError, "idempotency_key is 3"),
        ({"idempotency_key": "a\ud800b"}, UsageError, "contains a lone surrogate, which cannot be encoded as UTF-8"),
        ({"ttl": "soon"}, UsageError, "ttl is 'soon'"),
        ({"ttl": 0}, UsageError, "ttl is 0; it must be more than zero"),
        ({"delay": -1}, UsageError, "delay is -1; it must be more than zero"),
        ({"delay": datetime(2030, 1, 1)}, UsageError, "delay is 2030-01-01T00:00:00, without a time zone; pass one"),
        ({"delay": datetime(9999, 1, 1, tzinfo=UTC)}, UsageError, "it must be less than ten years from now"),
        ({"idempotency_key_ttl": 0}, UsageError, "idempotency_key_ttl is 0; it must be more than zero"),
        ({"max_duration": "long"}, UsageError, "max_duration is 'long'"),
        ({"token_expires_in": "1 year"}, UsageError, "token_expires_in is '1 year'"),
        ({"parent": "run_that_never_was"}, RunNotFound, "no run 'run_that_never_was'"),
        ({"tag": "x"}, UsageError, "unknown option tag; allowed: delay, idempotency_key, "),
        ({"parent": 3}, UsageError, "a run is a int; pass its id, a RunHandle, a Run or a RunRecord"),
    ],
)
async def test_what_is_not_allowed_is_refused_before_anything_happens(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    async with with_echo() as realtime:
        with pytest.raises(error) as caught:
            await realtime.trigger("echo", 1, **{"tags": "seen"} | options)
        assert message in str(caught.value)
        assert await count_runs(realtime, "tag:seen") == 0


async def test_limits_admit_what_is_just_within() -> None:
    async with with_echo() as realtime:
        handle = await realtime.trigger(
            "echo", tags=[*"abcdefghi", "x" * 128], metadata={"k" * 128: 1}, idempotency_key="i" * 512
        )
        assert len((await realtime.get_run(handle)).tags) == 10


async def test_a_delayed_run_begins_when_its_time_has_come() -> None:
    clock = FakeClock()
    async with with_echo(clock=clock) as realtime:
        handle = await realtime.trigger("echo", "late", delay="1m")
        record = await realtime.get_run(handle)
        assert record.status is Status.DELAYED
        assert record.delay_until_ms == record.created_at_ms + 60_000
        assert record.queued_at_ms is None
        clock.seconds += 59
        await realtime.broker.due("delay")
        assert (await realtime.get_run(handle)).status is Status.DELAYED
        clock.seconds += 2
        assert (await ended(realtime, handle)).output == "late"
        assert (await realtime.get_run(handle)).queued_at_ms == int(clock.seconds * 1000)


async def test_a_delay_may_last_until_a_time() -> None:
    clock = FakeClock()
    async with with_echo(clock=clock) as realtime:
        at = datetime.fromtimestamp(clock.seconds + 90.5, timezone(timedelta(hours=2)))
        record = await realtime.get_run(await realtime.trigger("echo", delay=at))
        assert (record.status, record.delay_until_ms) == (Status.DELAYED, record.created_at_ms + 90_500)
        clock.seconds += 91
        assert (await ended(realtime, record)).status is Status.COMPLETED
        over = await realtime.trigger("echo", 1, delay=at)
        assert (await realtime.get_run(over)).delay_until_ms is None, (
            "clocks differ, so a time that is over is no error"
        )
        assert await over.result(timeout=5) == 1


async def test_a_run_may_be_given_less_time_than_its_task() -> None:
    realtime = make_realtime()

    @realtime.task("endless", max_duration="1m")
    async def endless() -> None:
        await anyio.sleep_forever()

    @realtime.task("free")
    async def free() -> None:
        await anyio.sleep_forever()

    async with realtime:
        for task in (endless, free):
            record = await ended(realtime, await realtime.trigger(task, max_duration=0.01))
            assert (record.status, record.max_duration_s) == (Status.TIMED_OUT, 0.01)
        longer = await realtime.trigger(endless, max_duration="1h", delay="1h")
        assert (await realtime.get_run(longer)).max_duration_s == 60


async def test_a_delayed_run_can_be_canceled() -> None:
    clock = FakeClock()
    async with with_echo(clock=clock) as realtime:
        handle = await realtime.trigger("echo", delay=60)
        assert (await realtime.cancel(handle)).status is Status.CANCELED
        clock.seconds += 120
        assert await realtime.broker.due("delay") == []


async def test_a_run_that_did_not_begin_within_its_ttl_is_expired() -> None:
    clock = FakeClock()
    realtime = make_realtime(clock=clock)
    go = anyio.Event()
    begun: list[str] = []

    @realtime.task("t", concurrency_limit=1)
    async def task(payload: str) -> None:
        begun.append(payload)
        await go.wait()

    async with realtime:
        await realtime.trigger(task, "first")
        waiting = await realtime.trigger(task, "second", ttl="10m")
        delayed = await realtime.trigger(task, "third", ttl="10m", delay="1h")
        await until(lambda: begun)
        clock.seconds += 601
        record = await ended(realtime, waiting)
        assert record.status is Status.EXPIRED
        assert record.ttl_s == 600
        assert record.error == RunError("Expired", "the run was not started within its ttl")
        assert (await realtime.get_run(delayed)).status is Status.DELAYED  # a ttl counts from the end of the delay
        await realtime.cancel(delayed)
        go.set()
    assert begun == ["first"]


async def test_the_same_idempotency_key_gives_the_same_run() -> None:
    async with with_echo() as realtime:
        first = await realtime.trigger("echo", 1, idempotency_key="key")
        again = await realtime.trigger("echo", 2, idempotency_key="key")
        other = await realtime.trigger("echo", 3, idempotency_key="other")
        assert (first.is_cached, again.is_cached, other.is_cached) == (False, True, False)
        assert again["isCached"] is True
        assert again.id == first.id != other.id
        assert await again.result(timeout=5) == 1
        assert (await realtime.get_run(first)).idempotency_key == "key"


async def test_a_key_whose_run_is_gone_makes_a_new_run() -> None:
    """The order was executed a second time under the id of the first: old tokens and cursors met a foreign run."""
    async with with_echo() as realtime:
        first = await realtime.trigger("echo", 1, idempotency_key="key")
        await first.result(timeout=5)
        await realtime.broker.remove(first.id)
        second = await realtime.trigger("echo", 2, idempotency_key="key")
        assert second.id != first.id and not second.is_cached
        assert await second.result(timeout=5) == 2
        assert (await realtime.trigger("echo", 3, idempotency_key="key")).id == second.id


async def test_a_run_that_is_removed_while_its_key_is_looked_up_is_not_made_again() -> None:
    class RemovesBeforeALook(MemoryBroker):
        gone = ""

        async def load(self, run_ids: Sequence[str]) -> list[RunRecord | None]:
            await self.remove(self.gone)
            return await super().load(run_ids)

    broker = RemovesBeforeALook()
    async with with_echo(broker=broker) as realtime:
        first = await realtime.trigger("echo", 1, idempotency_key="key")
        await first.result(timeout=5)
        broker.gone = first.id
        second = await realtime.trigger("echo", 2, idempotency_key="key")
        assert second.id != first.id and not second.is_cached


async def test_idempotency_keys_belong_to_a_task_and_last_a_day() -> None:
    clock = FakeClock()
    realtime = with_echo(clock=clock)

    @realtime.task("other")
    async def other() -> None: ...

    async with realtime:
        first = await realtime.trigger("echo", idempotency_key="key")
        assert (await realtime.trigger(other, idempotency_key="key")).id != first.id
        clock.seconds += 24 * 3600 + 1
        assert (await realtime.trigger("echo", idempotency_key="key")).id != first.id


async def test_a_key_may_last_for_another_time() -> None:
    clock = FakeClock()
    async with with_echo(clock=clock) as realtime:
        first = await realtime.trigger("echo", idempotency_key="key", idempotency_key_ttl="1m")
        clock.seconds += 59
        assert (await realtime.trigger("echo", idempotency_key="key")).id == first.id
        clock.seconds += 2
        second = await realtime.trigger("echo", idempotency_key="key", idempotency_key_ttl="2d")
        assert second.id != first.id
        clock.seconds += 2 * 86400 - 1
        assert (await realtime.trigger("echo", idempotency_key="key")).id == second.id


@pytest.mark.parametrize("make_broker", [MemoryBroker, DistantBroker])
async def test_two_triggers_with_one_key_at_once_give_one_run(make_broker: type[MemoryBroker]) -> None:
    executions = 0
    realtime = make_realtime(broker=make_broker())

    @realtime.task("t")
    async def task() -> None:
        nonlocal executions
        executions += 1

    handles: list[RunHandle[None]] = []

    async def trigger() -> None:
        handles.append(await realtime.trigger(task, idempotency_key="key", tags="x"))

    async with realtime:
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(trigger)
        assert len({handle.id for handle in handles}) == 1
        assert sorted(handle.is_cached for handle in handles) == [False, True, True, True, True]
        await ended(realtime, handles[0])
        assert await count_runs(realtime, "tag:x") == 1
    assert executions == 1


async def test_a_claim_without_a_run_is_filled_under_the_same_id() -> None:
    """A process that died between the two steps left a key that gives nothing."""
    async with with_echo() as realtime:
        await realtime.broker.claim("idempotency:echo/key", "run_of_the_dead", ttl_s=60)
        handle = await realtime.trigger("echo", "filled", idempotency_key="key")
        assert handle.id == "run_of_the_dead"
        assert not handle.is_cached
        assert await handle.result(timeout=5) == "filled"
        assert (await realtime.get_run(handle)).root_id == "run_of_the_dead"
        async with realtime.open_run("parent") as parent:
            await realtime.broker.claim("idempotency:echo/child", "run_of_the_dead_child", ttl_s=60)
            child = await realtime.get_run(await realtime.trigger("echo", idempotency_key="child"))
            assert (child.parent_id, child.root_id) == (parent.id, parent.id)


async def test_a_run_that_is_triggered_in_a_run_is_its_child() -> None:
    realtime = make_realtime()

    @realtime.task("parent")
    async def parent() -> str:
        return (await realtime.trigger(child)).id

    @realtime.task("child")
    async def child(run: Run) -> str:
        assert run.parent is not None
        return (await realtime.trigger(grandchild)).id

    @realtime.task("grandchild")
    async def grandchild(run: Run) -> list[Any]:
        assert run.parent is not None
        return [run.parent.id, run.parent.task, run.root.id, run.root.task]

    async with realtime:
        top = await realtime.trigger(parent)
        child_id = await top.result(timeout=5)
        grandchild_id = await realtime.result(child_id, timeout=5)
        assert await realtime.result(grandchild_id, timeout=5) == [child_id, "child", top.id, "parent"]
        records = [await realtime.get_run(run_id) for run_id in (top.id, child_id, grandchild_id)]
    assert [record.parent_id for record in records] == [None, top.id, child_id]
    assert [record.root_id for record in records] == [top.id] * 3
    assert [record.depth for record in records] == [0, 1, 2]


async def test_a_parent_may_be_named_in_any_form() -> None:
    async with with_echo() as realtime:
        handle = await realtime.trigger("echo")
        record = await realtime.get_run(handle)
        async with realtime.open_run("other") as other:
            for parent in (handle, handle.id, record):
                child = await realtime.get_run(await realtime.trigger("echo", parent=parent))
                assert child.parent_id == handle.id
            child = await realtime.get_run(await realtime.trigger("echo", parent=other))
            assert child.parent_id == other.id


async def test_a_current_run_of_another_realtime_is_no_parent() -> None:
    async with with_echo() as realtime, make_realtime() as other, other.open_run("elsewhere"):
        assert (await realtime.get_run(await realtime.trigger("echo"))).parent_id is None


async def test_a_batch_has_one_token_for_itself_and_its_runs() -> None:
    async with with_echo() as realtime:
        batch = await realtime.batch_trigger([("echo", number) for number in range(3)])
        claims = realtime.verify_token(batch.public_access_token)
        assert admits(claims.scopes, "read", [("batch", batch.id)])
        assert not admits(claims.scopes, "read", [("batch", "batch_other")])
        assert not admits(claims.scopes, "write", [("batch", batch.id)])
        assert await batch.results(timeout=5) == [0, 1, 2]
        records = [await realtime.get_run(run_id) for run_id in batch.runs]
        assert [(record.batch.id, record.batch.index, record.batch.count) for record in records if record.batch] == [
            (batch.id, 0, 3),
            (batch.id, 1, 3),
            (batch.id, 2, 3),
        ]
        assert dict(batch) == {
            "id": batch.id,
            "publicAccessToken": batch.public_access_token,
            "isCached": False,
            "runs": [record.id for record in records],
            "runCount": 3,
        }
        seen = {record.id async for record in realtime.subscribe_to_batch(batch)}
        assert seen == set(batch.runs)


async def test_items_of_a_batch_have_options_and_a_common_parent() -> None:
    async with with_echo() as realtime, realtime.open_run("parent") as parent:
        batch = await realtime.batch_trigger(
            [("echo", 1, {"tags": "a", "metadata": {"n": 1}}), ("echo", 2, {"delay": 60, "ttl": 60})]
        )
        one, two = [await realtime.get_run(run_id) for run_id in batch.runs]
    assert (one.tags, one.metadata, one.parent_id) == (("a",), {"n": 1}, parent.id)
    assert (two.status, two.ttl_s) == (Status.DELAYED, 60)


async def test_an_item_of_a_batch_may_stand_for_an_earlier_run() -> None:
    async with with_echo() as realtime:
        before = await realtime.trigger("echo", "before", idempotency_key="k1")
        options = {"idempotency_key": "k0", "idempotency_key_ttl": "1h"}
        batch = await realtime.batch_trigger(
            [("echo", "a", options), ("echo", "b", {"idempotency_key": "k1"}), ("echo", "c", options), ("echo", "d")]
        )
        first, second, third, fourth = batch.runs
        assert (second, third) == (before.id, first)
        assert await batch.results(timeout=5) == ["a", "before", "a", "d"]
        members = [(await realtime.get_run(run_id)).batch for run_id in (first, fourth)]
        assert members == [BatchMember(batch.id, 0, 2), BatchMember(batch.id, 1, 2)]
        assert (await realtime.get_run(before)).batch is None
        with anyio.fail_after(5):
            assert {record.id async for record in realtime.subscribe_to_batch(batch)} == {first, fourth}
        claims = realtime.verify_token(batch.public_access_token)
        assert admits(claims.scopes, "read", [("runs", before.id)]), "its one token reads all that it stands for"
        again = await realtime.trigger("echo", "e", idempotency_key="k0")
        assert (again.id, again.is_cached) == (first, True)


@pytest.mark.parametrize(
    ("last", "error", "message"),
    [
        (("missing", 1), UnknownTask, "no task 'missing'"),
        (("echo", object()), InvalidPayload, "object has no JSON form"),
        (("echo", 1, {"tags": "x" * 129}), LimitExceeded, "limit 128"),
        (("echo", 1, {"tag": "x", "prio": 1}), UsageError, "unknown option prio, tag; allowed: "),
        ("echo", UsageError, "a batch item is 'echo'; allowed are (task, payload) and (task, payload, options)"),
        (("echo",), UsageError, "a batch item is ('echo',)"),
    ],
)
async def test_all_items_are_checked_before_the_first_run_starts(
    last: Any, error: type[Exception], message: str
) -> None:
    async with with_echo() as realtime:
        with pytest.raises(error) as caught:
            await realtime.batch_trigger([("echo", 1, {"tags": "seen"}), last])
        assert message in str(caught.value)
        assert await count_runs(realtime, "tag:seen") == 0


async def test_a_batch_has_at_least_one_run_and_at_most_the_limit() -> None:
    async with with_echo(limits=Limits(batch_runs=2)) as realtime:
        with pytest.raises(UsageError, match="a batch is empty"):
            await realtime.batch_trigger([])
        with pytest.raises(LimitExceeded, match="a batch has 3 runs, limit 2") as caught:
            await realtime.batch_trigger([("echo", 1, {"tags": "seen"})] * 3)
        assert caught.value.status == 422
        assert await count_runs(realtime, "tag:seen") == 0
        assert len((await realtime.batch_trigger([("echo", 1)] * 2)).runs) == 2


async def test_a_run_may_be_triggered_on_first_use() -> None:
    realtime = with_echo()
    handle = await realtime.trigger("echo", 1)
    assert await handle.result(timeout=5) == 1
    await realtime.stop()


async def test_executing_what_is_not_there_is_refused() -> None:
    async with with_echo() as realtime:
        with pytest.raises(RunNotFound):
            await realtime.execute("run_that_never_was")
        async with realtime.open_run("unregistered") as run:
            with pytest.raises(UnknownTask):
                await realtime.execute(run.id)


async def test_a_result_is_waited_for_up_to_the_timeout() -> None:
    realtime = make_realtime()
    go = anyio.Event()

    @realtime.task("t")
    async def task() -> int:
        await go.wait()
        return 1

    async with realtime:
        handle = await realtime.trigger(task)
        with pytest.raises(TimeoutError):
            await handle.result(timeout=0.01)
        with pytest.raises(UsageError, match="timeout is -1"):
            await handle.result(timeout=-1)
        go.set()
        assert await handle.result(timeout="5s") == 1
        assert await handle.result() == 1
        with pytest.raises(RunNotFound):
            await realtime.result("run_that_never_was")


async def test_cancelling_who_waits_for_a_result_does_not_cancel_the_run() -> None:
    realtime = make_realtime()
    go = anyio.Event()

    @realtime.task("t")
    async def task() -> int:
        await go.wait()
        return 1

    async with realtime:
        handle = await realtime.trigger(task)
        with anyio.move_on_after(0.01):
            await handle.result()
        go.set()
        assert await handle.result(timeout=5) == 1


class Executor:
    """Takes its time, and refuses the third run."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.go = anyio.Event()

    async def enqueue(self, run_id: str, task_id: str) -> None:
        await self.go.wait()
        if len(self.taken) == 2:
            raise UsageError("the queue takes two, and no more")
        self.taken.append(run_id)


async def test_a_trigger_that_is_cancelled_leaves_no_run_that_nobody_runs() -> None:
    """The run was stored, the client was gone, and it stayed QUEUED for ever; its key gave everyone that run."""
    broker = DistantBroker()
    executor = Executor()
    async with with_echo(executor=executor, broker=broker) as realtime:

        async def trigger() -> None:
            await realtime.trigger("echo", 1)

        async with anyio.create_task_group() as group:
            group.start_soon(trigger)
            await until(lambda: broker._runs)
            group.cancel_scope.cancel()
        executor.go.set()
        await until(lambda: executor.taken)
        assert executor.taken == list(broker._runs)


async def test_a_batch_that_fails_half_way_is_over() -> None:
    """Its first runs were executed though nobody got a handle for them, and its feed never ended."""
    executor = Executor()
    executor.go.set()
    async with with_echo(executor=executor) as realtime:
        with pytest.raises(UsageError, match="the queue takes two"):
            await realtime.batch_trigger([("echo", number, {"tags": "x"}) for number in range(5)])
        records = await realtime.runs.load([change.run_id for change in (await realtime.broker.changes("tag:x")).items])
        batches = [record.batch for record in records if record is not None and record.batch is not None]
        statuses = {record.batch.index: record.status for record in records if record and record.batch}
        assert statuses == {0: Status.CANCELED, 1: Status.CANCELED, 2: Status.FAILED}
        with anyio.fail_after(5):
            assert len([record async for record in realtime.subscribe_to_batch(batches[0].id)]) == 3
