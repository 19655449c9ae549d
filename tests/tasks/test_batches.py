from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime import (
    InvalidPayload,
    LimitExceeded,
    Limits,
    Status,
    UnknownTask,
    UsageError,
)
from asgi_realtime.core.runs import BatchMember
from asgi_realtime.core.scopes import grants
from tests.inprocess import GUARD_S, make_realtime
from tests.tasks.echo import SlowExecutor, count_runs, with_echo

pytestmark = pytest.mark.anyio


async def test_a_batch_has_one_token_for_itself_and_its_runs() -> None:
    async with with_echo() as realtime:
        batch = await realtime.batch_trigger([("echo", number) for number in range(3)])
        claims = realtime.verify_token(batch.public_access_token)
        assert grants(claims.scopes, "read", [("batch", batch.id)])
        assert not grants(claims.scopes, "read", [("batch", "batch_other")])
        assert not grants(claims.scopes, "write", [("batch", batch.id)])
        assert await batch.results(timeout=GUARD_S) == [0, 1, 2]
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
    assert (two.status, two.ttl) == (Status.DELAYED, "60s")


async def test_an_item_of_a_batch_can_refer_to_an_earlier_run() -> None:
    async with with_echo() as realtime:
        before = await realtime.trigger("echo", "before", idempotency_key="k1")
        options = {"idempotency_key": "k0", "idempotency_key_ttl": "1h"}
        batch = await realtime.batch_trigger(
            [("echo", "a", options), ("echo", "b", {"idempotency_key": "k1"}), ("echo", "c", options), ("echo", "d")]
        )
        first, second, third, fourth = batch.runs
        assert (second, third) == (before.id, first)
        assert await batch.results(timeout=GUARD_S) == ["a", "before", "a", "d"]
        members = [(await realtime.get_run(run_id)).batch for run_id in (first, fourth)]
        assert members == [BatchMember(batch.id, 0, 2), BatchMember(batch.id, 1, 2)]
        assert (await realtime.get_run(before)).batch is None
        with anyio.fail_after(GUARD_S):
            assert {record.id async for record in realtime.subscribe_to_batch(batch)} == {first, fourth}
        claims = realtime.verify_token(batch.public_access_token)
        assert grants(claims.scopes, "read", [("runs", before.id)]), "its token reads every run that it lists"
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
        (("echo", 1, ["x"]), UsageError, "the options of a batch item are a list; allowed is a dict"),
    ],
)
async def test_all_items_are_checked_before_the_first_run_is_created(
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


async def test_a_batch_that_fails_halfway_is_over() -> None:
    """Its first runs executed although the caller got no handle for them, and its feed never ended."""
    executor = SlowExecutor()
    executor.go.set()
    async with with_echo(executor=executor) as realtime:
        with pytest.raises(UsageError, match="the queue takes two runs"):
            await realtime.batch_trigger([("echo", number, {"tags": "x"}) for number in range(5)])
        records = await realtime.runs.load([change.run_id for change in (await realtime.broker.changes("tag:x")).items])
        batches = [record.batch for record in records if record is not None and record.batch is not None]
        statuses = {record.batch.index: record.status for record in records if record and record.batch}
        assert statuses == {0: Status.CANCELED, 1: Status.CANCELED, 2: Status.FAILED}
        with anyio.fail_after(GUARD_S):
            assert len([record async for record in realtime.subscribe_to_batch(batches[0].id)]) == 3


async def test_large_payloads_of_a_batch_are_decoded_in_different_iterations() -> None:
    realtime, iterations, seen = make_realtime(), 0, []

    @realtime.task("large")
    async def large(payload: str) -> None:
        seen.append(iterations)

    async def count() -> None:
        nonlocal iterations
        while True:
            await anyio.lowlevel.checkpoint()
            iterations += 1

    async with realtime, anyio.create_task_group() as group:
        group.start_soon(count)
        batch = await realtime.batch_trigger([("large", "x" * 100_000)] * 4)
        await batch.results(timeout=GUARD_S)
        group.cancel_scope.cancel()
    assert max(seen) - min(seen) >= 2  # trio runs the tasks of an iteration in random order
