from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asgi_realtime import BrokerUnavailable, Limits, Realtime, Run, Timeouts
from asgi_realtime.asgi.trigger_dev import metadata as metadata_endpoints
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.testing import AsgiClient
from tests.asgi.official_sdk import Answer, call, count_runs, on_one_loop, with_tasks
from tests.faults import RemoteBroker
from tests.inprocess import ended

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def opened(metadata: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[tuple[Realtime, Run]]:
    async with with_tasks(**options) as realtime, realtime.open_run("r", metadata=metadata) as run:
        yield realtime, run


async def update(realtime: Realtime, run_id: str, body: Any, **more: Any) -> Answer:
    return await call(realtime, "PUT", f"/api/v1/runs/{run_id}/metadata", body, **more)


async def add_tags(realtime: Realtime, run_id: str, body: Any, **more: Any) -> Answer:
    return await call(realtime, "POST", f"/api/v1/runs/{run_id}/tags", body, **more)


def op(type: str, key: str | None = None, value: Any = ...) -> dict[str, Any]:
    operation = {"type": type, "key": key, "value": value}
    return {name: item for name, item in operation.items() if item is not ... and (name != "key" or item is not None)}


@on_one_loop
@pytest.mark.parametrize(
    ("operations", "metadata"),
    [
        ([], {"n": 1, "list": [1, 2, 1]}),
        ([op("set", "a", {"b": None})], {"n": 1, "list": [1, 2, 1], "a": {"b": None}}),
        ([op("set", "a", {}), op("set", "$.a.b", 1)], {"n": 1, "list": [1, 2, 1], "a": {"b": 1}}),
        ([op("delete", "n"), op("delete", "missing")], {"list": [1, 2, 1]}),
        ([op("append", "list", 3), op("append", "new", 4)], {"n": 1, "list": [1, 2, 1, 3], "new": [4]}),
        ([op("remove", "list", 1), op("remove", "n", 1)], {"n": 1, "list": [2]}),
        ([op("increment", "n", 2.5), op("increment", "m", -1)], {"n": 3.5, "m": -1, "list": [1, 2, 1]}),
        ([op("update", value={"only": True})], {"only": True}),
        ([op("update", value={}), op("set", "a", 1), op("increment", "a", 1)], {"a": 2}),
    ],
)
async def test_operations_are_applied_in_order(operations: Any, metadata: Any) -> None:
    async with opened({"n": 1, "list": [1, 2, 1]}) as (realtime, run):
        answer = await update(realtime, run.id, {"operations": operations})
        assert (answer.status, answer.json) == (200, {"metadata": metadata})
        assert (await realtime.get_run(run.id)).metadata == metadata
    assert (await ended(realtime, run.id)).metadata == metadata


async def test_metadata_is_replaced_before_operations_apply() -> None:
    async with opened({"old": 1}) as (realtime, run):
        answer = await update(realtime, run.id, {"metadata": {"a": 1}, "operations": [op("increment", "a", 1)]})
        assert answer.json == {"metadata": {"a": 2}}


async def test_operations_change_the_parent_and_the_root() -> None:
    async with opened() as (realtime, root):
        child = (await realtime.trigger("echo", parent=root, delay="1h")).id
        grandchild = (await realtime.trigger("echo", parent=child, delay="1h")).id
        body = {
            "operations": [op("set", "at", "grandchild")],
            "parentOperations": [op("set", "at", "child")],
            "rootOperations": [op("set", "at", "root"), op("increment", "n", 1)],
        }
        assert (await update(realtime, grandchild, body)).json == {"metadata": {"at": "grandchild"}}
        found = [(await realtime.get_run(run_id)).metadata for run_id in (grandchild, child, root.id)]
        assert found == [{"at": "grandchild"}, {"at": "child"}, {"at": "root", "n": 1}]
        answer = await update(realtime, root.id, body)
        assert answer.json == {"metadata": {"at": "root", "n": 2}}, "a run without a parent counts as its own"


async def test_a_parent_that_is_over_or_removed_is_skipped() -> None:
    async with with_tasks() as realtime:
        parent = await realtime.trigger("echo", 1)
        child = await realtime.trigger("echo", parent=parent, delay="1h")
        await ended(realtime, parent.id)
        body = {"operations": [op("set", "a", 1)], "parentOperations": [op("set", "b", 1)]}
        assert (await update(realtime, child.id, body)).status == 200
        await realtime.broker.remove(parent.id)
        assert (await update(realtime, child.id, body)).json == {"metadata": {"a": 1}}


@on_one_loop
@pytest.mark.parametrize(
    ("bad", "status", "message"),
    [
        (op("nope", "a", 1), 400, "operations[1] does not fit: Invalid value 'nope' - at `$.type`"),
        (op("set", "a"), 400, "missing required field `value`"),
        (op("set", None, 1), 400, "missing required field `key`"),
        (op("increment", "a", "1"), 400, "Expected `int | float`, got `str`"),
        (op("update", value=[1]), 400, "Expected `object`, got `array`"),
        (op("set", "", 1), 422, "operations[1]: metadata key is 0 characters"),
        (op("set", "$.*", 1), 422, "operations[1]: metadata key '$.*' has the step '*'"),
        (op("increment", "text", 1), 422, "metadata 'text' is 't' and cannot change by 1"),
        (op("set", "a", "x" * 1000), 422, "limit 1000"),
        (op("set", "a", "x" * 5000), 413, "limit 4000"),
    ],
)
async def test_one_invalid_operation_and_nothing_is_applied(
    bad: Any, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata_endpoints, "MAX_UPDATE_BYTES", 4000)
    async with opened({"text": "t"}, limits=Limits(metadata_bytes=1000)) as (realtime, run):
        for name in ("operations", "parentOperations", "rootOperations"):
            answer = await update(realtime, run.id, {name: [op("set", "ok", 1), bad]})
            assert answer.status == status
            assert message.replace("operations", name) in answer.error
        assert (await realtime.get_run(run.id)).metadata == {"text": "t"}


async def test_operations_that_do_not_fit_a_parent_that_is_over_are_skipped() -> None:
    """An increment of text in the ended parent was rejected, and the child was not changed either."""
    async with with_tasks() as realtime:
        parent = await realtime.trigger("echo", 1, metadata={"n": "text"})
        child = await realtime.trigger("echo", parent=parent, delay="1h")
        body = {"operations": [op("set", "a", 1)], "parentOperations": [op("increment", "n", 1)]}
        await ended(realtime, parent.id)
        answer = await update(realtime, child.id, body)
        assert (answer.status, answer.json) == (200, {"metadata": {"a": 1}})
        assert (await realtime.get_run(parent)).metadata == {"n": "text"}


class Flaky(RemoteBroker):
    """Rejects changes of one run."""

    rejected = ""

    async def commit(self, record: StoredRecord, **options: Any) -> int:
        if record.id == self.rejected:
            raise BrokerUnavailable("its partition is away")
        return await super().commit(record, **options)


async def test_a_repeated_request_changes_each_run_once() -> None:
    """After a lost response, or a failure at the second run, the repeat counted the increments twice."""
    broker = Flaky(MemoryBroker())
    async with with_tasks(broker=broker, timeouts=Timeouts(append=0.01)) as realtime:
        parent = await realtime.trigger("echo", 1, delay="1h")
        child = await realtime.trigger("echo", 1, delay="1h", parent=parent)
        body = {name: [op("increment", "n", 1), op("append", "l", 1)] for name in ("operations", "parentOperations")}
        broker.rejected = parent.id
        assert (await update(realtime, child.id, body, key="a")).status == 503
        broker.rejected = ""
        for _ in range(2):
            assert (await update(realtime, child.id, body, key="a")).json == {"metadata": {"n": 1, "l": [1]}}
            assert (await realtime.get_run(parent)).metadata == {"n": 1, "l": [1]}
        assert (await update(realtime, child.id, body, key="b")).json == {"metadata": {"n": 2, "l": [1, 1]}}
        assert (await update(realtime, child.id, body)).json == {"metadata": {"n": 3, "l": [1] * 3}}
        assert (await update(realtime, child.id, body)).json == {"metadata": {"n": 4, "l": [1] * 4}}
        assert (await update(realtime, child.id, body, key="ä")).status == 400


@pytest.mark.parametrize(("counts", "status"), [((1, 1, 1), 200), ((2, 1, 1), 422), ((0, 0, 4), 422)])
async def test_the_operations_of_a_request_are_limited(
    counts: tuple[int, int, int], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata_endpoints, "MAX_OPERATIONS", 3)
    async with opened() as (realtime, run):
        names = ("operations", "parentOperations", "rootOperations")
        body = {name: [op("increment", "n", 1)] * count for name, count in zip(names, counts, strict=True)}
        answer = await update(realtime, run.id, body)
        assert answer.status == status
        if status == 422:
            assert answer.json["code"] == "limit_exceeded"
            assert "has 4 operations, limit 3" in answer.error


async def test_operations_are_counted_before_their_paths_are_parsed() -> None:
    """A body of 1 MiB holds 6,700 long paths, and parsing them blocks the event loop for a second."""
    async with opened() as (realtime, run):
        answer = await update(realtime, run.id, {"operations": [op("set", "$.*", 1)] * 1001})
        assert (answer.status, answer.json["code"]) == (422, "limit_exceeded")


async def test_deeply_nested_values_are_compared() -> None:
    deep = "[" * 900 + "]" * 900
    async with opened() as (realtime, run):
        body = '{"operations":[{"type":"set","key":"a","value":[%s]},{"type":"remove","key":"a","value":%s}]}'
        answer = await update(realtime, run.id, (body % (deep, deep)).encode())
        assert (answer.status, answer.json) == (200, {"metadata": {"a": []}})


@on_one_loop
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"operations": {}}', b'{"metadata": [1]}'])
async def test_a_malformed_update_is_400(body: bytes) -> None:
    async with opened() as (realtime, run):
        assert (await update(realtime, run.id, body)).status == 400
        assert (await add_tags(realtime, run.id, body.replace(b"operations", b"tags"))).status == 400


async def test_reading_metadata_needs_a_scope_for_the_run() -> None:
    async with opened({"a": 1}) as (realtime, run):
        path = f"/api/v1/runs/{run.id}/metadata"
        token = realtime.create_public_token(scopes=[f"read:runs:{run.id}"])
        assert (await call(realtime, "GET", path, token=token)).json == {"metadata": {"a": 1}}
        token = realtime.create_public_token(scopes=[f"read:runs:{run.id}"], skip_columns=["metadata"])
        assert (await call(realtime, "GET", path, token=token)).json == {"metadata": {}}
        token = realtime.create_public_token(scopes=["read:runs:x"])
        assert (await call(realtime, "GET", path, token=token)).status == 403
        assert (await call(realtime, "GET", path.replace(run.id, "run_nope"))).status == 404


async def test_tags_are_added() -> None:
    async with opened() as (realtime, run):
        answer = await add_tags(realtime, run.id, {"tags": ["a", "b"]})
        assert (answer.status, answer.json) == (200, {"message": f"run {run.id} has 2 tags"})
        assert (await add_tags(realtime, run.id, {"tags": "b"})).status == 200
        assert (await realtime.get_run(run.id)).tags == ("a", "b")
        assert await count_runs(realtime, "tag:b") == 1


@on_one_loop
@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([""], "a tag is empty"),
        (["x,y"], "a comma"),
        ("x" * 129, "limit 128"),
        ([str(number) for number in range(10)], "a run has 11 tags, limit 10"),
    ],
)
async def test_invalid_tags_are_422(tags: Any, message: str) -> None:
    async with opened() as (realtime, run):
        await add_tags(realtime, run.id, {"tags": "first"})
        answer = await add_tags(realtime, run.id, {"tags": tags})
        assert answer.status == 422
        assert message in answer.error
        assert (await realtime.get_run(run.id)).tags == ("first",)


@pytest.mark.parametrize("change", [update, add_tags])
async def test_changing_a_run_needs_the_secret_key(change: Any) -> None:
    body = {"operations": [op("set", "a", 1)], "tags": "x"}
    async with opened() as (realtime, run):
        for scope in (f"write:runs:{run.id}", "admin"):
            answer = await change(realtime, run.id, body, token=realtime.create_public_token(scopes=[scope]))
            assert (answer.status, answer.json["code"]) == (403, "forbidden")
            assert "needs the secret key" in answer.error
        assert (await AsgiClient(realtime).request("PUT", f"/api/v1/runs/{run.id}/metadata")).status_code == 401
        assert (await AsgiClient(realtime).post(f"/api/v1/runs/{run.id}/tags")).status_code == 401
        assert (await change(realtime, "run_nope", body)).status == 404
        assert (await realtime.get_run(run.id)).metadata == {}


@pytest.mark.parametrize("change", [update, add_tags])
async def test_a_run_that_is_over_cannot_be_changed(change: Any) -> None:
    async with opened() as (realtime, run):
        pass
    async with realtime:
        answer = await change(realtime, run.id, {"operations": [op("set", "a", 1)], "tags": "x"})
        assert answer.status == 422
        assert f"run '{run.id}' is over (COMPLETED) and cannot be changed" in answer.error


async def test_the_executing_run_sees_changes_made_over_http() -> None:
    async with opened({"n": 1}) as (realtime, run):
        run.metadata.increment("n", 1)
        await update(realtime, run.id, {"operations": [op("increment", "n", 5)]})
        await run.metadata.flush()
        assert run.metadata.get("n") == 7


async def test_an_error_does_not_repeat_a_long_input() -> None:
    async with opened() as (realtime, run):
        answer = await update(realtime, run.id, {"operations": [op("x" * 100_000, "a")]})
        assert answer.status == 400
        assert len(answer.error) < 500
