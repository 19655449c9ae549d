from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime import Limits, Realtime, Retention, Status, Timeouts
from asgi_realtime.brokers.base import Broker
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.errors import LimitExceeded
from asgi_realtime.core.runs import BatchMember, StoredRecord
from asgi_realtime.testing import AsgiClient, EventParser
from tests.asgi.official_sdk import (
    Answer,
    call,
    count_runs,
    create_batch,
    fill_batch,
    item,
    lines,
    on_one_loop,
    send_cut_off,
    with_tasks,
)
from tests.brokers.backends import DistantBroker
from tests.inprocess import GUARD_S, SECRET, FakeClock, ended

pytestmark = pytest.mark.anyio

BATCHES = "/api/v3/batches"
UP_TO_DATE = {"headers": {"control": "up-to-date"}}


async def batch_of(realtime: Realtime, *items: Any, token: str = SECRET, **more: Any) -> str:
    """Create a batch and fill it; return its id."""
    created = await create_batch(realtime, len(items), token=token, **more)
    assert created.status == 202, created.json
    batch_id: str = created.json["id"]
    filled = await fill_batch(realtime, batch_id, lines(*items), token=token)
    assert (filled.status, filled.json["sealed"]) == (200, True), filled.json
    return batch_id


async def retrieve(realtime: Realtime, batch_id: str, *, token: str = SECRET) -> Answer:
    return await call(realtime, "GET", f"/api/v2/batches/{batch_id}", token=token)


async def members(realtime: Realtime, batch_id: str) -> list[StoredRecord]:
    """The runs of a batch, in order."""
    changes = await realtime.broker.changes(f"batch:{batch_id}")
    records = await realtime.runs.load([change.run_id for change in changes.items])
    return sorted((record for record in records if record and record.batch), key=lambda record: record.batch.index)  # type: ignore[union-attr]


# Create and fill


async def test_a_batch_is_created_and_then_filled() -> None:
    async with with_tasks() as realtime:
        created = await create_batch(realtime, 3, taskIdentifiers=["echo", "number"])
        batch_id = created.json["id"]
        assert (created.status, created.json) == (202, {"id": batch_id, "runCount": 3, "isCached": False})
        assert batch_id.startswith("batch_")
        assert realtime.verify_token(created.token).scopes == (f"read:batch:{batch_id}",)
        body = lines(item(0, "a"), item(1, 2, "number"), item(2, None, tags=["x"]))
        filled = await fill_batch(realtime, batch_id, body)
        assert (filled.status, filled.json) == (
            200,
            {"id": batch_id, "itemsAccepted": 3, "itemsDeduplicated": 0, "sealed": True},
        )
        records = await members(realtime, batch_id)
        assert [record.batch for record in records] == [BatchMember(batch_id, index, 3) for index in range(3)]
        assert [record.payload for record in records] == ["a", 2, None]
        assert [(await ended(realtime, record.id)).output for record in records] == ["a", 2, None]
        assert await count_runs(realtime, "tag:x") == 1
        run = await call(realtime, "GET", f"/api/v3/runs/{records[0].id}", token=created.token)
        assert (run.status, run.json["batchId"], run.json["triggerFunction"]) == (200, batch_id, "batchTrigger")


async def test_items_start_in_the_order_of_their_indexes() -> None:
    async with with_tasks() as realtime:
        batch_id = await batch_of(realtime, item(2, "c"), item(0, "a"), item(1, "b"))
        assert [record.payload for record in await members(realtime, batch_id)] == ["a", "b", "c"]


async def test_checking_a_large_batch_does_not_block_the_event_loop() -> None:
    async with with_tasks() as realtime:
        batch_id = (await create_batch(realtime, 100)).json["id"]
        iterations = 0
        filling = True

        async def count() -> None:
            nonlocal iterations
            while filling:
                iterations += 1
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            group.start_soon(count)
            body = lines(*(item(index, index) for index in range(99)), item(99, "text", "number"))
            assert (await fill_batch(realtime, batch_id, body)).status == 422
            filling = False
        assert iterations >= 4


async def test_blank_lines_and_both_line_breaks_are_accepted() -> None:
    async with with_tasks() as realtime:
        batch_id = (await create_batch(realtime, 2)).json["id"]
        body = b"\r\n" + lines(item(0, "\u2028 \ud83d\ude00")) + b"\n\n" + lines(item(1, "b"))[:-1]
        assert (await fill_batch(realtime, batch_id, body)).json["sealed"]
        assert [record.payload for record in await members(realtime, batch_id)] == ["\u2028 \U0001f600", "b"]


async def test_the_feed_of_a_batch_ends_with_its_runs() -> None:
    async with with_tasks() as realtime:
        created = await create_batch(realtime, 3)
        headers = {"authorization": f"Bearer {created.token}", "accept": "text/event-stream"}
        batch_id = created.json["id"]
        body = lines(*(item(index, index) for index in range(3)))
        async with anyio.create_task_group() as group:
            group.start_soon(fill_batch, realtime, batch_id, body)
            response = await AsgiClient(realtime).get(f"/v1/batches/{batch_id}", headers=headers)
        events = EventParser().feed(response.body)
        assert (events[-1].event, json.loads(events[-1].data)) == ("end", {"reason": "complete"})
        last = {
            run["id"]: run["status"] for run in (json.loads(event.data) for event in events if event.event == "run")
        }
        assert last == {record.id: "COMPLETED" for record in await members(realtime, batch_id)}


# Batches of earlier runs

MakeBatch = Callable[[Realtime], Awaitable[str]]


async def over_http(realtime: Realtime) -> str:
    return await batch_of(realtime, item(0, 1, "open", idempotencyKey="k0"), item(1, 1, "open", idempotencyKey="k1"))


async def in_process(realtime: Realtime) -> str:
    items: list[Any] = [("open", 1, {"idempotency_key": f"k{index}"}) for index in range(2)]
    return (await realtime.batch_trigger(items)).id


def with_open_task(**options: Any) -> tuple[Realtime, anyio.Event]:
    """`with_tasks` with a task "open", whose runs continue until the event is set."""
    realtime, gate = with_tasks(**options), anyio.Event()

    @realtime.task("open")
    async def open_task(payload: Any) -> None:
        await gate.wait()

    return realtime, gate


@pytest.mark.parametrize("make", [over_http, in_process])
async def test_a_batch_of_earlier_runs_has_their_status(make: MakeBatch) -> None:
    """It was COMPLETED while they still executed, and 404 if triggered in process."""
    realtime, gate = with_open_task()
    async with realtime:
        earlier = [(await realtime.trigger("open", 1, idempotency_key=f"k{index}")).id for index in range(2)]
        batch_id = await make(realtime)
        batch = (await retrieve(realtime, batch_id)).json
        assert (batch["status"], batch["runs"], batch["runCount"]) == ("PROCESSING", earlier, 2)
        gate.set()
        for run_id in earlier:
            await ended(realtime, run_id)
        assert (await retrieve(realtime, batch_id)).json["status"] == "COMPLETED"


@pytest.mark.parametrize("make", [over_http, in_process])
async def test_the_feeds_of_a_batch_of_earlier_runs_are_empty_and_end(make: MakeBatch) -> None:
    """They were 404, after which the official client waits forever without an error."""
    realtime, gate = with_open_task(timeouts=Timeouts(poll=0.01, tick=0.01))
    async with realtime:
        for index in range(2):
            await realtime.trigger("open", 1, idempotency_key=f"k{index}")
        batch_id = await make(realtime)
        path, headers = f"/v1/batches/{batch_id}", {"authorization": f"Bearer {SECRET}"}
        feed = await AsgiClient(realtime).get(path, headers=headers | {"accept": "text/event-stream"})
        events = EventParser().feed(feed.body)
        assert [(event.event, event.data) for event in events] == [
            ("ready", '{"count":0}'),
            ("end", '{"reason":"complete"}'),
        ]
        last = headers | {"accept": "text/event-stream", "last-event-id": events[-1].id or ""}
        assert (await AsgiClient(realtime).get(path, headers=last)).status_code == 204
        shape = await AsgiClient(realtime).get(path, query="offset=-1", headers=headers)
        assert (shape.status_code, json.loads(shape.body)) == (200, [UP_TO_DATE])
        query = f"offset={shape.headers['electric-offset']}&handle={shape.headers['electric-handle']}&live=true"
        held = await AsgiClient(realtime).get(path, query=query, headers=headers)
        assert (held.status_code, json.loads(held.body)) == (200, [UP_TO_DATE])
        assert [record async for record in realtime.subscribe_to_batch(batch_id)] == []
        gate.set()


async def test_a_batch_has_a_feed_before_it_is_filled() -> None:
    async with with_tasks() as realtime:
        batch_id = (await create_batch(realtime, 2)).json["id"]
        followed = realtime.subscribe_to_batch(batch_id)
        statuses: dict[Any, Status] = {}

        async def follow() -> None:
            async for record in followed:
                statuses[record.payload] = record.status

        async with anyio.create_task_group() as group:
            group.start_soon(follow)
            headers = {"authorization": f"Bearer {SECRET}", "accept": "text/event-stream"}
            async with AsgiClient(realtime).stream(f"/v1/batches/{batch_id}", headers=headers) as stream:
                assert stream.status_code == 200
                await fill_batch(realtime, batch_id, lines(item(0, "a"), item(1, "b")))
                events = EventParser().feed(await stream.read())
        assert (events[-1].event, events[-1].data) == ("end", '{"reason":"complete"}')
        assert statuses == {"a": Status.COMPLETED, "b": Status.COMPLETED}


# Incomplete batches


class RejectsThird(MemoryBroker):
    """Accepts two runs, then no more."""

    room = 2

    async def commit(self, record: StoredRecord, *, expect: int, **more: Any) -> int:
        if expect == 0:
            if self.room == 0:
                raise LimitExceeded("there is no room", status=503)
            self.room -= 1
        return await super().commit(record, expect=expect, **more)


async def test_an_incomplete_batch_is_partial_failed_when_it_expires() -> None:
    """An hour later it was COMPLETED with three runs, of which two existed, and its feed stayed open."""
    clock = FakeClock()
    async with with_tasks(clock=clock, broker=RejectsThird(clock=clock)) as realtime:
        batch_id = (await create_batch(realtime, 3)).json["id"]
        assert (await fill_batch(realtime, batch_id, lines(*(item(n, n) for n in range(3))))).status == 503
        started = [record.id for record in await members(realtime, batch_id)]
        for run_id in started:
            await ended(realtime, run_id)
        assert (await retrieve(realtime, batch_id)).json["status"] == "PENDING"
        clock.seconds += 3601
        batch = (await retrieve(realtime, batch_id)).json
        assert (batch["status"], batch["runCount"], batch["runs"]) == ("PARTIAL_FAILED", 3, started)
        headers = {"authorization": f"Bearer {SECRET}", "accept": "text/event-stream"}
        feed = await AsgiClient(realtime).get(f"/v1/batches/{batch_id}", headers=headers)
        assert [event.event for event in EventParser().feed(feed.body)] == ["run", "run", "ready", "end"]


async def test_a_batch_that_is_never_filled_is_aborted() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        batch_id = (await create_batch(realtime, 3)).json["id"]
        clock.seconds += 3601
        assert (await retrieve(realtime, batch_id)).json["status"] == "ABORTED"


# Errors


@on_one_loop
@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "malformed"),
        (b"[]", 400, "Expected `object`"),
        (b"{}", 400, "Object missing required field `runCount`"),
        (b'{"runCount": "3"}', 400, "Expected `int`, got `str` - at `$.runCount`"),
        (b'{"runCount": 1.5}', 400, "Expected `int`"),
        (b'{"runCount": 0}', 422, "a batch is empty; it needs at least one run"),
        (b'{"runCount": -1}', 422, "a batch is empty"),
        (b'{"runCount": 4}', 422, "a batch has 4 runs, limit 3"),
        (b'{"runCount": 1, "taskIdentifiers": ["nope"]}', 404, "no task 'nope' is registered"),
        (b'{"runCount": 1, "taskIdentifiers": "echo"}', 400, "Expected `array | null`"),
        (b'{"runCount": 1, "idempotencyKey": ""}', 422, "idempotency_key is ''"),
        (b'{"runCount": 1, "idempotencyKey": "%b"}' % (b"x" * 513), 422, "513 characters, limit 512"),
        (b'{"runCount": 1, "parentRunId": "run_nope"}', 404, "no run 'run_nope'"),
        (b'{"runCount": 1}' + b" " * 71_000, 413, "limit 70912"),
    ],
)
async def test_an_invalid_batch_is_not_created(body: bytes, status: int, message: str) -> None:
    async with with_tasks(limits=Limits(batch_runs=3)) as realtime:
        answer = await call(realtime, "POST", BATCHES, body)
        assert answer.status == status
        assert message in answer.error
        assert (await create_batch(realtime, 3)).status == 202


GOOD = item(0, 1, tags="seen")


@on_one_loop
@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (lines(GOOD) + b"{", 400, "line 2 is malformed: not valid JSON"),
        (lines(GOOD) + b"[]", 400, "line 2 does not fit: Expected `object`"),
        (lines(GOOD, {"index": "1", "task": "echo"}), 400, "line 2 does not fit: Expected `int`"),
        (lines(GOOD) + b"\xff", 400, "line 2 is malformed"),
        (lines(GOOD, {"task": "echo"}), 422, "line 2 has index -1; the batch has 2 runs"),
        (lines(GOOD, item(2, 1)), 422, "line 2 has index 2; the batch has 2 runs, counted from 0"),
        (lines(GOOD, item(1, 1), item(2, 1)), 422, "line 3 has index 2; the batch has 2 runs"),
        (lines(GOOD, item(0, 2)), 422, "line 2 has index 0, as an earlier line"),
        (lines(GOOD, {"index": 1}), 400, "item 1: task is missing"),
        (lines(GOOD, item(1, 1, "nope")), 404, "item 1: no task 'nope' is registered"),
        (lines(GOOD, item(1, "text", "number")), 422, "item 1: the payload of task 'number' does not fit int"),
        (lines(GOOD, item(1, 1, ttl="soon")), 422, "item 1: ttl is 'soon'"),
        (lines(GOOD, item(1, 1, payloadType="text/plain")), 400, "item 1: the payload has the type text/plain"),
        (
            lines(GOOD, item(1, "x", payloadType="application/store")),
            413,
            "item 1: the official client uploads",
        ),
        (lines(GOOD, item(1, "x" * 200)), 413, "item 1: the payload is 202 bytes, limit 200"),
        (lines(GOOD) + b"\n" * 8, 413, "the body has 9 line breaks, limit 8 for a batch of 2 runs"),
        (lines(GOOD, item(1, 1)) + b" " * 66_200 + b"{}", 413, "a line is at least 66202 bytes, limit 66136"),
        (lines(GOOD, item(1, "x" * 100_000)), 413, "limit 100000"),
    ],
)
async def test_one_invalid_item_and_nothing_starts(body: bytes, status: int, message: str) -> None:
    async with with_tasks(limits=Limits(payload_bytes=200, metadata_bytes=100, batch_bytes=100_000)) as realtime:
        batch_id = (await create_batch(realtime, 2)).json["id"]
        answer = await fill_batch(realtime, batch_id, body)
        assert answer.status == status
        assert message in answer.error
        assert await count_runs(realtime, "tag:seen") == 0
        assert (await fill_batch(realtime, batch_id, lines(GOOD, item(1, 1)))).status == 200


async def test_a_batch_with_missing_items_is_not_sealed_and_nothing_starts() -> None:
    async with with_tasks() as realtime:
        batch_id = (await create_batch(realtime, 2)).json["id"]
        for body in (b"", b"\n", lines(GOOD), lines(GOOD, GOOD)):
            answer = await fill_batch(realtime, batch_id, body)
            assert (answer.status, answer.json) == (
                200,
                {
                    "id": batch_id,
                    "itemsAccepted": 0,
                    "itemsDeduplicated": 0,
                    "sealed": False,
                    "enqueuedCount": 0,
                    "expectedCount": 2,
                },
            )
        assert await count_runs(realtime, "tag:seen") == 0


async def test_a_repeated_line_is_one_item() -> None:
    async with with_tasks() as realtime:
        batch_id = (await create_batch(realtime, 2)).json["id"]
        answer = await fill_batch(realtime, batch_id, lines(GOOD, item(1, 1), GOOD))
        assert (answer.status, answer.json["itemsAccepted"]) == (200, 2)


async def test_items_without_a_waiting_batch_are_404() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        for batch_id in ("batch_nope", "batch_nope:sealed", "x" * 300):
            answer = await fill_batch(realtime, batch_id, lines(GOOD))
            assert (answer.status, answer.json["code"]) == (404, "run_not_found")
        in_process = await realtime.batch_trigger([("echo", 1)])
        assert (await fill_batch(realtime, in_process.id, lines(GOOD))).status == 404
        batch_id = (await create_batch(realtime, 1)).json["id"]
        clock.seconds += 3601
        assert (await fill_batch(realtime, batch_id, lines(GOOD))).status == 404
        assert await count_runs(realtime, "tag:seen") == 0


async def test_a_cut_off_body_starts_nothing() -> None:
    async with with_tasks() as realtime:
        batch_id = (await create_batch(realtime, 1)).json["id"]
        assert await send_cut_off(realtime, f"{BATCHES}/{batch_id}/items", lines(GOOD)) == 408
        assert await count_runs(realtime, "tag:seen") == 0


# Authorization


async def test_a_batch_needs_a_scope_for_every_task() -> None:
    async with with_tasks() as realtime:
        token = realtime.create_public_token(scopes=["*:runs:run_1"])
        assert (await create_batch(realtime, 1, token=token)).status == 403
        assert (await create_batch(realtime, 1, token=token, taskIdentifiers=[])).status == 403
        assert (await AsgiClient(realtime).post(BATCHES)).status_code == 401
        assert (await AsgiClient(realtime).post(f"{BATCHES}/x/items")).status_code == 401
        for scope in ("trigger:tasks:echo", "read:runs", "write:runs"):
            token = realtime.create_public_token(scopes=[scope])
            assert (await create_batch(realtime, 1, token=token)).status == 403
            assert (await fill_batch(realtime, "batch_x", b"", token=token)).status == 403
        token = realtime.create_public_token(scopes=["batchTrigger:tasks:echo"])
        assert (await create_batch(realtime, 1, token=token, taskIdentifiers=["echo", "number"])).status == 403
        assert (await create_batch(realtime, 1, token=token)).status == 403, "the tasks are not named"
        created = await create_batch(realtime, 2, token=token, taskIdentifiers=["echo"])
        assert created.status == 202
        answer = await fill_batch(realtime, created.json["id"], lines(GOOD, item(1, 1, "number")), token=token)
        assert answer.status == 403
        assert "item 1: " in answer.error and "'batchTrigger:tasks:number'" in answer.error
        assert await count_runs(realtime, "tag:seen") == 0
        assert (await fill_batch(realtime, created.json["id"], lines(GOOD, item(1, 1)), token=token)).status == 200
        for scope in ("batchTrigger:tasks", "batchTrigger:all", "admin"):
            token = realtime.create_public_token(scopes=[scope])
            await batch_of(realtime, item(0, 1), item(1, 1, "number"), token=token)


async def test_the_runs_of_a_batch_can_have_a_parent() -> None:
    async with with_tasks() as realtime, realtime.open_run("parent") as parent:
        batch_id = await batch_of(realtime, item(0, 1), item(1, 2), parentRunId=parent.id)
        assert [(record.parent_id, record.depth) for record in await members(realtime, batch_id)] == [
            (parent.id, 1)
        ] * 2
        token = realtime.create_public_token(scopes=["batchTrigger:tasks"])
        answer = await create_batch(realtime, 1, token=token, parentRunId=parent.id)
        assert answer.status == 403
        assert f"'write:runs:{parent.id}'" in answer.error


def batch_token(realtime: Realtime, *scopes: str) -> str:
    """A token as from `auth.createBatchTriggerPublicToken`."""
    return realtime.tokens.mint(scopes or ["batchTrigger:tasks:echo"], expires_in_s=900, one_time=True)


async def test_a_one_time_token_creates_one_batch() -> None:
    async with with_tasks() as realtime:
        token = batch_token(realtime)
        rejected = await create_batch(realtime, 0, token=token, key="a", taskIdentifiers=["echo"])
        assert rejected.status == 422, "this does not spend the token"
        created = await create_batch(realtime, 1, token=token, key="a", taskIdentifiers=["echo"])
        assert created.status == 202
        again = await create_batch(realtime, 1, token=token, key="a", taskIdentifiers=["echo"])
        assert (again.status, again.json) == (202, created.json)
        for key in ("b", None):
            other = await create_batch(realtime, 1, token=token, key=key, taskIdentifiers=["echo"])
            assert (other.status, other.json["code"]) == (422, "token_spent")
        for _ in range(2):
            assert (await fill_batch(realtime, created.json["id"], lines(GOOD), token=token)).status == 200
        assert await count_runs(realtime, "tag:seen") == 1


async def test_the_items_of_a_batch_have_the_tags_that_the_token_allows() -> None:
    async with with_tasks() as realtime:
        token = realtime.create_batch_trigger_public_token("echo", multiple_use=True, tags="user:1")
        created = await create_batch(realtime, 2, token=token, taskIdentifiers=["echo"])
        for tag, status in (("user:2", 403), ("user:1", 200)):
            items = lines(item(0, 1, tags=["user:1"]), item(1, 1, tags=[tag]))
            answer = await fill_batch(realtime, created.json["id"], items, token=token)
            assert answer.status == status
            assert status == 200 or answer.error.startswith("item 1: the token does not allow the tag 'user:2'")


async def test_a_batch_is_filled_by_the_token_that_created_it() -> None:
    """Any token for the task could fill a batch whose id it knew, and its creator then saw it as complete."""
    async with with_tasks() as realtime:
        owner, other = (realtime.create_public_token(scopes=["batchTrigger:tasks:echo"]) for _ in range(2))
        spent = batch_token(realtime)
        await batch_of(realtime, item(0, 1), token=spent, taskIdentifiers=["echo"])
        batch_id = (await create_batch(realtime, 1, token=owner, taskIdentifiers=["echo"])).json["id"]
        for token in (other, spent, batch_token(realtime)):
            answer = await fill_batch(realtime, batch_id, lines(GOOD), token=token)
            assert (answer.status, answer.json["code"]) == (403, "forbidden")
        assert await count_runs(realtime, "tag:seen") == 0
        answer = await fill_batch(realtime, batch_id, lines(GOOD), token=owner)
        assert (answer.status, answer.json["itemsAccepted"]) == (200, 1)
        assert (await fill_batch(realtime, batch_id, lines(GOOD), token=SECRET)).status == 200


async def test_a_one_time_token_creates_a_batch_or_a_run_but_not_both() -> None:
    async with with_tasks() as realtime:
        for first, second in (("batch", "run"), ("run", "batch")):
            token = batch_token(realtime, "batchTrigger:tasks:echo", "trigger:tasks:echo")
            statuses: list[int] = []
            for what in (first, second):
                if what == "run":
                    path = "/api/v1/tasks/echo/trigger"
                    statuses.append((await call(realtime, "POST", path, {"payload": 1}, token=token, key="a")).status)
                else:
                    answer = await create_batch(realtime, 1, token=token, key="a", taskIdentifiers=["echo"])
                    statuses.append(answer.status)
            assert statuses[1] == 422 and statuses[0] in (200, 202)


# Repeated requests


async def test_repeated_items_create_no_run_twice() -> None:
    executions: list[int] = []
    realtime = with_tasks()

    @realtime.task("count")
    async def count(payload: int) -> None:
        executions.append(payload)

    async with realtime:
        batch_id = (await create_batch(realtime, 3)).json["id"]
        body = lines(*(item(index, index, "count") for index in range(3)))
        counts = [(await fill_batch(realtime, batch_id, body)).json for _ in range(3)]
        assert [(answer["itemsAccepted"], answer["itemsDeduplicated"]) for answer in counts] == [(3, 0), (0, 3), (0, 3)]
        for record in await members(realtime, batch_id):
            await ended(realtime, record.id)
            await realtime.broker.remove(record.id)
        assert (await fill_batch(realtime, batch_id, body)).json["sealed"]
        assert await count_runs(realtime, f"batch:{batch_id}") == 0
    assert sorted(executions) == [0, 1, 2]


class RejectsThirdOnce(MemoryBroker):
    """Accepts two runs, rejects the third once, then accepts all."""

    room = 2

    async def commit(self, record: StoredRecord, *, expect: int, **more: Any) -> int:
        if expect == 0:
            if self.room == 0:
                self.room = 100
                raise LimitExceeded("there is no room", status=503)
            self.room -= 1
        return await super().commit(record, expect=expect, **more)


@pytest.mark.parametrize(("anyio_backend", "keys"), [("asyncio", False), ("trio", True)])
async def test_a_repeated_request_completes_a_batch_that_failed_half_way(keys: bool) -> None:
    executions: list[int] = []
    broker = RejectsThirdOnce()
    realtime = with_tasks(broker=broker)

    @realtime.task("count")
    async def count(payload: int) -> None:
        executions.append(payload)

    async with realtime:
        batch_id = (await create_batch(realtime, 5)).json["id"]
        body = lines(*(item(n, n, "count", **({"idempotencyKey": f"k{n}"} if keys else {})) for n in range(5)))
        answer = await fill_batch(realtime, batch_id, body)
        assert (answer.status, answer.error) == (503, "there is no room")
        started = await members(realtime, batch_id)
        assert len(started) == 2
        assert (await retrieve(realtime, batch_id)).json["status"] == "PENDING"
        await ended(realtime, started[0].id)
        await broker.remove(started[0].id)  # a full memory broker removes ended runs
        answer = await fill_batch(realtime, batch_id, body)
        assert answer.json == {"id": batch_id, "itemsAccepted": 3, "itemsDeduplicated": 2, "sealed": True}
        records = await members(realtime, batch_id)
        assert [record.batch for record in records] == [BatchMember(batch_id, n, 5) for n in range(1, 5)]
        for record in records:
            await ended(realtime, record.id)
    assert sorted(executions) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("make_broker", [MemoryBroker, DistantBroker])
async def test_concurrent_repeats_of_items_create_no_run_twice(make_broker: Callable[[], Broker]) -> None:
    async with with_tasks(broker=make_broker()) as realtime:
        batch_id = (await create_batch(realtime, 4)).json["id"]
        body = lines(*(item(n, n, **({"idempotencyKey": f"k{n}"} if n % 2 else {})) for n in range(4)))
        accepted: list[int] = []

        async def fill() -> None:
            answer = await fill_batch(realtime, batch_id, body)
            assert answer.status == 200
            accepted.append(answer.json["itemsAccepted"])

        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(fill)
        assert sum(accepted) == 4
        assert [record.payload for record in await members(realtime, batch_id)] == [0, 1, 2, 3]


@on_one_loop
async def test_two_processes_on_redis_create_no_run_twice(redis_url: str) -> None:
    async with with_tasks(broker=redis_url) as one, with_tasks(broker=redis_url) as other:
        created = await create_batch(one, 10)
        batch_id = created.json["id"]
        body = lines(*(item(n, n) for n in range(10)))
        accepted: list[int] = []

        async def fill(realtime: Realtime) -> None:
            accepted.append((await fill_batch(realtime, batch_id, body)).json["itemsAccepted"])

        async with anyio.create_task_group() as group:
            for realtime in (one, other, one, other):
                group.start_soon(fill, realtime)
        assert sum(accepted) == 10
        assert [record.batch for record in await members(other, batch_id)] == [
            BatchMember(batch_id, n, 10) for n in range(10)
        ]
        assert (await retrieve(other, batch_id, token=created.token)).json["runCount"] == 10


# Idempotency keys


async def test_a_batch_with_an_idempotency_key_is_cached_once_it_is_complete() -> None:
    async with with_tasks() as realtime:
        first = await create_batch(realtime, 2, idempotencyKey="key")
        again = await create_batch(realtime, 2, idempotencyKey="key")
        assert again.json == first.json, "the client would not send items of a cached batch"
        batch_id = first.json["id"]
        assert (await fill_batch(realtime, batch_id, lines(item(0, 1), item(1, 2)))).json["sealed"]
        cached = await create_batch(realtime, 2, idempotencyKey="key")
        assert cached.json == {"id": batch_id, "runCount": 2, "isCached": True}
        assert realtime.verify_token(cached.token).scopes == (f"read:batch:{batch_id}",)
        assert (await create_batch(realtime, 7, idempotencyKey="key")).json == cached.json
        assert (await create_batch(realtime, 2, idempotencyKey="other")).json["id"] != batch_id


async def test_an_open_batch_with_an_idempotency_key_keeps_its_run_count() -> None:
    async with with_tasks() as realtime:
        token = batch_token(realtime, "batchTrigger:tasks")
        await create_batch(realtime, 2, token=token, key="a", idempotencyKey="key")
        answer = await create_batch(realtime, 3, token=token, key="a", idempotencyKey="key")
        assert answer.status == 422
        assert "with 2 runs; this one has 3" in answer.error


async def test_an_idempotency_key_outlives_the_time_for_the_items() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        first = await create_batch(realtime, 1, idempotencyKey="key")
        clock.seconds += 3601
        again = await create_batch(realtime, 1, idempotencyKey="key")
        assert again.json == first.json
        assert (await fill_batch(realtime, first.json["id"], lines(item(0, 1)))).json["sealed"]


async def test_idempotency_keys_of_batches_are_separate_for_each_credential() -> None:
    """Guessing a key gave a token for a batch that another client then filled."""
    async with with_tasks() as realtime:
        tokens = [realtime.create_public_token(scopes=["batchTrigger:tasks"]) for _ in range(2)]
        ids = {
            (await create_batch(realtime, 1, token=token, idempotencyKey="key")).json["id"]
            for token in (*tokens, SECRET)
        }
        assert len(ids) == 3


async def test_an_item_whose_key_finds_a_run_is_that_run() -> None:
    async with with_tasks() as realtime:
        before = await realtime.trigger("echo", "before", idempotency_key="k1")
        items = [
            item(0, "a", idempotencyKey="k0"),
            item(1, "b", idempotencyKey="k1"),
            item(2, "c", idempotencyKey="k0"),
            item(3, "d"),
        ]
        batch_id = (await create_batch(realtime, 4)).json["id"]
        answer = await fill_batch(realtime, batch_id, lines(*items))
        assert answer.json == {"id": batch_id, "itemsAccepted": 2, "itemsDeduplicated": 2, "sealed": True}
        first, last = await members(realtime, batch_id)
        assert (first.payload, first.batch) == ("a", BatchMember(batch_id, 0, 2))
        assert (last.payload, last.batch) == ("d", BatchMember(batch_id, 1, 2)), "so that its feed ends"
        batch = (await retrieve(realtime, batch_id)).json
        assert batch["runs"] == [first.id, before.id, first.id, last.id]
        assert batch["runCount"] == 4
        again = await fill_batch(realtime, batch_id, lines(*items))
        assert again.json == {"id": batch_id, "itemsAccepted": 0, "itemsDeduplicated": 4, "sealed": True}


async def test_a_batch_of_completed_runs_is_complete() -> None:
    async with with_tasks() as realtime:
        before = await realtime.trigger("echo", 1, idempotency_key="k")
        batch_id = await batch_of(realtime, item(0, 1, idempotencyKey="k"))
        batch = (await retrieve(realtime, batch_id)).json
        assert (batch["status"], batch["runs"], batch["runCount"]) == ("COMPLETED", [before.id], 1)


# Retrieve


async def test_retrieve_shows_the_progress_of_a_batch() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        created = await create_batch(realtime, 2, idempotencyKey="key")
        batch_id = created.json["id"]
        batch = (await retrieve(realtime, batch_id, token=created.token)).json
        assert batch == {
            "id": batch_id,
            "status": "PENDING",
            "createdAt": "2023-11-14T22:13:20.000Z",
            "updatedAt": "2023-11-14T22:13:20.000Z",
            "runCount": 2,
            "runs": [],
            "processing": {"errors": []},
            "idempotencyKey": "key",
        }
        clock.seconds += 1
        await fill_batch(realtime, batch_id, lines(item(0, 1), item(1, 2, delay="1m")))
        first, second = await members(realtime, batch_id)
        await ended(realtime, first.id)
        batch = (await retrieve(realtime, batch_id)).json
        assert (batch["status"], batch["runs"]) == ("PROCESSING", [first.id, second.id])
        assert batch["createdAt"] == "2023-11-14T22:13:20.000Z"
        assert batch["processing"] == {"errors": [], "completedAt": "2023-11-14T22:13:21.000Z"}
        await realtime.cancel(second.id)
        clock.seconds += 3600
        batch = (await retrieve(realtime, batch_id)).json
        assert (batch["status"], batch["runCount"], batch["idempotencyKey"]) == ("COMPLETED", 2, "key")
        assert (batch["createdAt"], batch["updatedAt"]) == ("2023-11-14T22:13:20.000Z", "2023-11-14T22:13:21.000Z")


async def test_a_batch_triggered_in_process_is_retrieved() -> None:
    async with with_tasks() as realtime:
        batch = await realtime.batch_trigger([("echo", number) for number in range(3)])
        await batch.results(timeout=GUARD_S)
        body = (await retrieve(realtime, batch.id, token=batch.public_access_token)).json
        assert (body["status"], body["runs"], body["runCount"]) == ("COMPLETED", batch.runs, 3)


async def test_items_with_the_same_key_are_one_run_in_process() -> None:
    async with with_tasks() as realtime:
        items: list[Any] = [("echo", number, {"idempotency_key": "k"}) for number in range(2)]
        batch = await realtime.batch_trigger(items)
        body = (await retrieve(realtime, batch.id)).json
        assert (body["runs"], body["runCount"]) == (batch.runs, 2)
        assert len(set(batch.runs)) == 1
        assert len([record async for record in realtime.subscribe_to_batch(batch)]) >= 1


async def test_expired_runs_are_omitted() -> None:
    async with with_tasks(retention=Retention(after_end=3600)) as realtime:
        batch_id = await batch_of(realtime, item(0, 1), item(1, 2))
        first, second = await members(realtime, batch_id)
        for record in (first, second):
            assert (await ended(realtime, record.id)).status is Status.COMPLETED
        await realtime.broker.remove(first.id)
        batch = (await retrieve(realtime, batch_id)).json
        assert (batch["status"], batch["runs"], batch["runCount"]) == ("COMPLETED", [second.id], 2)


async def test_retrieve_needs_a_scope_for_the_batch() -> None:
    async with with_tasks() as realtime:
        batch_id = await batch_of(realtime, item(0, 1))
        assert (await AsgiClient(realtime).get(f"/api/v2/batches/{batch_id}")).status_code == 401
        for scope, status in (
            ("read:batch:x", 403),
            ("read:tags", 403),
            (f"read:batch:{batch_id}", 200),
            ("read:runs", 200),
        ):
            token = realtime.create_public_token(scopes=[scope])
            assert (await retrieve(realtime, batch_id, token=token)).status == status
        for missing in ("batch_nope", "batch_nope:sealed"):
            answer = await retrieve(realtime, missing)
            assert (answer.status, answer.json["code"]) == (404, "run_not_found")
