from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime.asgi.host import Message
from asgi_realtime.asgi.open_request import Deadline
from asgi_realtime.asgi.trigger_dev import shape_polls, shape_requests, shapes
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.config import Limits, Timeouts
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.metadata import Set
from asgi_realtime.core.run_changes import MetadataChanged, RunChange, Started
from asgi_realtime.core.runs import BatchMember, Status
from asgi_realtime.testing import AsgiClient, Response
from asgi_realtime.testing.driver import make_scope
from tests.asgi.fake_host import FakeHost
from tests.asgi.official_sdk import on_one_loop
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio

RUN = "/v1/runs/run_1"
TAGS = "/v1/runs"
BATCH = "/v1/batches/batch_1"
UP_TO_DATE = {"headers": {"control": "up-to-date"}}
MUST_REFETCH = [{"headers": {"control": "must-refetch"}}]


class Client:
    """Polls like the official clients: first without a cursor, then with that of the last response."""

    def __init__(self, host: FakeHost, path: str = RUN, *scopes: str, **query: str) -> None:
        self.host = host
        self.path = path
        self.headers = {**host.headers(*scopes), "trigger-version": "4.8.3"}
        self.query = query
        self.handle = ""
        self.offset = "-1"
        self.cursor: str | None = None

    def next_query(self, *, live: bool) -> dict[str, str]:
        query = {**self.query, "log": "full", "offset": self.offset}
        if self.handle:
            query["handle"] = self.handle
        if live:
            query |= {"live": "true", "cursor": self.cursor or ""}
        return query

    async def get(self, *, live: bool = False) -> Response:
        """Poll once, and keep the cursor of the response."""
        answer = await AsgiClient(self.host).get(self.path, headers=self.headers, query=self.next_query(live=live))
        if answer.status_code == 200:
            self.handle, self.offset = answer.headers["electric-handle"], answer.headers["electric-offset"]
            self.cursor = answer.headers.get("electric-cursor")
        elif answer.status_code == 409:
            self.handle, self.offset = answer.headers["electric-handle"], "-1"
        return answer

    async def rows(self, *, live: bool = False) -> list[dict[str, Any]]:
        """The rows of one response, which must succeed."""
        answer = await self.get(live=live)
        assert answer.status_code == 200, answer.body
        messages = json.loads(answer.body)
        assert messages[-1] == UP_TO_DATE
        return [message["value"] for message in messages[:-1]]

    @asynccontextmanager
    async def pending(self, *, live: bool = True) -> AsyncIterator[list[Response]]:
        """A poll that runs during the block. The list has its response after the block."""
        answers: list[Response] = []

        async def poll() -> None:
            answers.append(await self.get(live=live))

        with anyio.fail_after(GUARD_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(poll)
                yield answers

    @asynccontextmanager
    async def polling(self) -> AsyncIterator[list[list[dict[str, Any]]]]:
        """A live poll that is held. The list has its rows after the block."""
        answers: list[list[dict[str, Any]]] = []

        async def poll() -> None:
            answers.append(await self.rows(live=True))

        with anyio.fail_after(GUARD_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(poll)
                await self.host.wait_for_subscriber()
                await anyio.wait_all_tasks_blocked()
                assert not answers, "the poll was not held"
                self.host.tick(0)
                yield answers


def progress(value: float) -> RunChange:
    return MetadataChanged((Set("progress", value),))


def statuses(rows: list[dict[str, Any]]) -> list[str]:
    return [row["status"] for row in rows]


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["friendlyId"] for row in rows]


# Snapshots


async def test_a_snapshot_on_the_wire(host: FakeHost) -> None:
    record = await host.create(tags=["a"])
    answer = await Client(host).get()
    assert answer.status_code == 200
    assert answer.body == b"[" + shapes.row(record) + b',\n{"headers":{"control":"up-to-date"}}]'
    headers = answer.headers
    assert headers["content-type"] == "application/json"
    assert headers["cache-control"] == "private, no-store"
    assert headers["electric-offset"] == "2_0"
    assert headers["electric-handle"].endswith(".0")
    assert headers["electric-up-to-date"]
    assert headers["electric-schema"] == shapes.schema()
    assert "electric-cursor" not in headers
    assert "electric-schema" in headers["access-control-expose-headers"]


async def test_a_run_that_is_over_has_its_final_state(host: FakeHost) -> None:
    await host.create()
    await host.finish(output={"text": "hi"})
    (row,) = await Client(host).rows()
    assert (row["status"], row["output"]) == ("COMPLETED_SUCCESSFULLY", '{"text":"hi"}')
    assert row["completedAt"]


# Live polls


async def test_a_poll_is_held_until_a_change(host: FakeHost) -> None:
    await host.create(executing=False)
    client = Client(host)
    assert statuses(await client.rows()) == ["PENDING"]
    async with client.polling() as answers:
        await host.change("run_1", Started("me"))
    assert statuses(answers[0]) == ["EXECUTING"]
    async with client.polling() as answers:
        await host.finish(output=1)
    (row,) = answers[0]
    assert row["output"] == "1" and row["completedAt"] and row["status"] == "COMPLETED_SUCCESSFULLY"


async def test_a_change_between_two_polls_is_in_the_next_response(host: FakeHost) -> None:
    await host.create()
    client = Client(host)
    await client.rows()
    await host.change("run_1", progress(1))
    (row,) = await client.rows(live=True)
    assert row["metadata"] == '{"progress":1}'


async def test_several_changes_are_sent_as_one_state(host: FakeHost) -> None:
    await host.create(executing=False)
    client = Client(host)
    await client.rows()
    await host.change("run_1", Started("me"))
    await host.change("run_1", progress(1))
    await host.finish()
    assert statuses(await client.rows(live=True)) == ["COMPLETED_SUCCESSFULLY"]


async def test_a_poll_without_changes_ends_after_its_time_and_the_next_url_differs(host: FakeHost) -> None:
    await host.create()
    client = Client(host)
    await client.rows()
    offset, seen = client.offset, set[str | None]()
    for _ in range(3):
        async with client.polling() as answers:
            host.tick(host.timeouts.poll * 0.8)
            await anyio.wait_all_tasks_blocked()
            assert not answers
            host.tick(host.timeouts.poll * 0.4)
        assert answers == [[]]
        assert client.offset == offset
        seen.add(client.cursor)
    assert len(seen) == 3
    assert not host.subscribers


async def test_the_cursor_differs_even_at_the_same_time(host: FakeHost) -> None:
    await host.create()
    client = Client(host)
    await client.rows()
    seen: list[str | None] = []
    for number in range(3):
        await host.change("run_1", progress(number))
        await client.rows(live=True)
        seen.append(client.cursor)
    assert seen[0] != seen[1] != seen[2]


async def test_responses_about_a_run_that_changes_continuously_are_spaced_out(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shape_polls, "SPACING_S", 0.01)
    await host.create()
    client = Client(host)
    await client.rows()
    for number in range(shape_requests.BURST + 1):
        await host.change("run_1", progress(number))
        assert len(await client.rows(live=True)) == 1
    async with client.polling() as answers:
        with pytest.MonkeyPatch.context() as patch:
            sleeping = anyio.Event()
            wake = anyio.Event()

            async def sleep(seconds: float) -> None:
                assert 0 < seconds <= 0.01
                sleeping.set()
                await wake.wait()

            patch.setattr(anyio, "sleep", sleep)
            await host.change("run_1", progress(100))
            await sleeping.wait()
            await host.change("run_1", progress(101))
            assert not answers
            wake.set()
            while not answers:
                await anyio.lowlevel.checkpoint()
    assert [row["metadata"] for row in answers[0]] == ['{"progress":101}']


async def test_the_end_of_a_run_is_never_delayed(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    async def sleep(seconds: float) -> None:
        raise AssertionError("the response was delayed")

    await host.create()
    client = Client(host)
    await client.rows()
    for number in range(shape_requests.BURST + 1):
        await host.change("run_1", progress(number))
        await client.rows(live=True)
    monkeypatch.setattr(anyio, "sleep", sleep)
    await host.finish()
    assert statuses(await client.rows(live=True)) == ["COMPLETED_SUCCESSFULLY"]


async def test_responses_about_a_list_are_spaced_out(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    client = Client(host, TAGS, "read:runs", tags="a")
    await client.rows()
    monkeypatch.setattr(anyio, "sleep", sleep)
    for number in range(shape_requests.BURST + 3):
        await host.create(f"run_{number}", tags=["a"])
        await host.finish(f"run_{number}")
        await client.rows(live=True)
    assert len(slept) == 2


async def test_after_a_pause_responses_are_immediate_again(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    async def sleep(seconds: float) -> None:
        raise AssertionError("the response was delayed")

    await host.create()
    client = Client(host)
    await client.rows()
    monkeypatch.setattr(anyio, "sleep", sleep)
    for number in range(20):
        if number % shape_requests.BURST == 0:
            host.tick(1)
        await host.change("run_1", progress(number))
        await client.rows(live=True)


@on_one_loop
@pytest.mark.parametrize("cursor", ["", "x", "5", "5-", "-5", "9" * 16 + "-9", "999999999999999-999"])
async def test_a_foreign_cursor_does_not_delay_a_response_for_long(
    host: FakeHost, cursor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shape_polls, "SPACING_S", 0.01)
    await host.create()
    client = Client(host)
    await client.rows()
    client.cursor = cursor
    await host.change("run_1", progress(1))
    assert len(await client.rows(live=True)) == 1


async def test_a_poll_that_is_not_live_is_not_held(host: FakeHost) -> None:
    await host.create()
    client = Client(host)
    await client.rows()
    assert await client.rows() == []
    await host.change("run_1", progress(1))
    assert len(await client.rows()) == 1


async def test_a_held_poll_ends_when_its_client_disconnects(host: FakeHost) -> None:
    await host.create()
    client = Client(host)
    await client.rows()
    scope = make_scope("GET", RUN, headers=client.headers, query=client.next_query(live=True))
    disconnected = anyio.Event()
    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(host, scope, receive, send)
            await host.wait_for_subscriber()
            disconnected.set()
    assert not host.subscribers
    assert not host.app.subscription_limits.open


async def test_held_polls_are_503_at_the_shutdown(host: FakeHost) -> None:
    await host.create()
    client = Client(host)
    await client.rows()
    async with client.pending() as answers:
        await host.wait_for_subscriber()
        host.begin_shutdown()
    (answer,) = answers
    assert (answer.status_code, json.loads(answer.body)["code"]) == (503, "server_shutdown")
    assert answer.headers["access-control-allow-origin"] == "*"
    assert (await client.get(live=True)).status_code == 503, "no poll is held any more"


async def test_changes_are_sent_during_the_shutdown(host: FakeHost) -> None:
    await host.create()
    client = Client(host)
    await client.rows()
    await host.finish()
    host.begin_shutdown()
    assert statuses(await client.rows(live=True)) == ["COMPLETED_SUCCESSFULLY"]


async def test_a_held_poll_ends_when_its_token_expires(host: FakeHost) -> None:
    await host.create()
    client = Client(host)
    client.headers["authorization"] = f"Bearer {host.token(expires_in_s=5)}"
    await client.rows()
    async with client.pending() as answers:
        await host.wait_for_subscriber()
        host.tick(5.1)
    assert (answers[0].status_code, json.loads(answers[0].body)["code"]) == (401, "token_expired")


async def test_polls_that_began_together_end_at_different_times(host: FakeHost) -> None:
    await host.create()
    ends = set[float]()
    for _ in range(20):
        client = Client(host)
        await client.rows()
        async with client.polling():
            deadline = await host.wait_for_subscriber(Deadline)
            ends.add(deadline._wait_s)
            await host.change("run_1", progress(len(ends)))
    poll_s = host.timeouts.poll
    assert len(ends) == 20
    assert all(0.85 * poll_s <= end <= 1.15 * poll_s for end in ends)


async def test_polls_count_as_subscriptions(host: FakeHost) -> None:
    host = FakeHost(limits=Limits(subscribers_per_run=1))
    await host.create()
    client, other = Client(host), Client(host)
    await client.rows()
    await other.rows()
    async with client.polling():
        assert (await other.get(live=True)).status_code == 429
        await host.finish()


# Invalid cursors


async def test_a_cursor_of_another_epoch_must_refetch(host: FakeHost) -> None:
    await host.create(tags=["a"])
    client = Client(host, TAGS, "read:runs", tags="a")
    await client.rows()
    host.broker = MemoryBroker(clock=host.clock)  # as after a restart
    await host.create("run_2", tags=["a"])
    old = client.handle
    answer = await client.get(live=True)
    assert (answer.status_code, json.loads(answer.body)) == (409, MUST_REFETCH)
    assert answer.headers["electric-handle"] not in ("", old)
    assert ids(await client.rows()) == ["run_2"]
    async with client.polling() as answers:
        await host.finish("run_2")
    assert ids(answers[0]) == ["run_2"]


@pytest.mark.parametrize(
    ("handle", "offset"),
    [("57129943-1767323045678", "1767323045678_3"), ("", "5_0"), ("deadbeef.0", "5_0"), ("same", "99999_0")],
)
async def test_a_foreign_cursor_must_refetch(host: FakeHost, handle: str, offset: str) -> None:
    await host.create()
    client = Client(host)
    await client.rows()
    if handle != "same":
        client.handle = handle
    client.offset = offset
    answer = await client.get(live=True)
    assert (answer.status_code, json.loads(answer.body)) == (409, MUST_REFETCH)
    assert len(await client.rows()) == 1


@on_one_loop
@pytest.mark.parametrize("offset", ["", "now", "-2", "5", "x_0", "1_0_0", "1" * 30 + "_0", "٣_٠"])
async def test_a_malformed_offset_is_400(host: FakeHost, offset: str) -> None:
    await host.create()
    client = Client(host)
    client.offset = offset
    answer = await client.get()
    assert answer.status_code == 400
    assert "offset" in json.loads(answer.body)["error"]


async def test_a_trimmed_position_must_refetch(host: FakeHost) -> None:
    host = FakeHost(limits=Limits(topic_runs=2))
    await host.create("run_0", tags=["a"])
    client = Client(host, TAGS, "read:runs", tags="a")
    await client.rows()
    for number in range(1, 4):
        await host.create(f"run_{number}", tags=["a"])
    assert (await client.get(live=True)).status_code == 409
    assert ids(await client.rows()) == ["run_2", "run_3"]


# Lists


async def test_a_tag_feed_has_the_existing_and_new_runs_with_all_tags(host: FakeHost) -> None:
    await host.create("run_1", tags=["a", "b"])
    await host.create("run_2", tags=["a"])
    client = Client(host, TAGS, "read:tags:b", tags="b,a")
    assert ids(await client.rows()) == ["run_1"]
    async with client.polling() as answers:
        await host.create("run_3", tags=["a"], executing=False)
        await anyio.wait_all_tasks_blocked()
        assert not answers
        await host.create("run_4", tags=["a", "b"], executing=False)
    assert ids(answers[0]) == ["run_4"]


async def test_a_tag_feed_waits_for_the_first_run(host: FakeHost) -> None:
    client = Client(host, TAGS, "read:tags:a", tags="a")
    for _ in range(2):
        assert await client.rows() == []
    async with client.polling() as answers:
        host.tick(host.timeouts.poll * 1.2)
    assert answers == [[]]
    await host.create("run_1", tags=["a"])
    assert ids(await client.rows(live=True)) == ["run_1"]
    async with client.polling() as answers:
        await host.finish("run_1")
    assert ids(answers[0]) == ["run_1"]


async def test_the_first_poll_fixes_the_window_of_a_list(host: FakeHost) -> None:
    await host.create("run_old", tags=["a"], created_ago_s=7200)
    await host.create("run_new", tags=["a"], created_ago_s=1800)
    client = Client(host, TAGS, "read:tags:a", tags="a", createdAt="1h")
    assert ids(await client.rows()) == ["run_new"]
    host.tick(3600)
    client.headers = Client(host, TAGS, "read:tags:a").headers  # the other token has expired
    await host.change("run_old", progress(1))
    await host.change("run_new", progress(1))
    assert ids(await client.rows(live=True)) == ["run_new"]
    assert ids(await Client(host, TAGS, "read:tags:a", tags="a", createdAt="1h").rows()) == []


async def test_a_batch_feed_has_its_runs(host: FakeHost) -> None:
    await host.create("run_1", batch=BatchMember("batch_1", 0, 2))
    await host.create("run_2", batch=BatchMember("batch_1", 1, 2))
    client = Client(host, BATCH, "read:batch:batch_1")
    assert ids(await client.rows()) == ["run_1", "run_2"]
    async with client.polling() as answers:
        await host.finish("run_2", Status.FAILED, error="no luck")
    ((row,),) = answers
    assert json.loads(row["error"])["message"] == "no luck"


async def test_a_snapshot_has_the_newest_runs_up_to_the_limit(host: FakeHost) -> None:
    host = FakeHost(limits=Limits(feed_runs=2))
    for number in range(4):
        await host.create(f"run_{number}", tags=["a"])
    client = Client(host, TAGS, "read:runs", tags="a")
    assert ids(await client.rows()) == ["run_2", "run_3"]
    assert await client.rows() == []


@pytest.mark.parametrize("what", ["rows", "bytes"])
async def test_rows_that_do_not_fit_follow_in_the_next_response(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "rows":
        monkeypatch.setattr(shape_polls, "MAX_ROWS", 2)
    else:
        monkeypatch.setattr(shape_polls, "MAX_BYTES", 2000)
    expected = [f"run_{number}" for number in range(5)]
    for run_id in expected:
        await host.create(run_id, tags=["a"], payload="x" * 500, executing=False)
    client = Client(host, TAGS, "read:runs", tags="a")
    found = [ids(await client.rows())]
    while rows := await client.rows():
        found.append(ids(rows))
    assert [len(part) for part in found] == [2, 2, 1]
    assert sum(found, []) == expected
    for run_id in expected:
        await host.change(run_id, progress(1))
    assert [len(await client.rows(live=True)) for _ in range(3)] == [2, 2, 1]


# Columns


async def test_the_query_skips_columns_unless_the_token_does(host: FakeHost) -> None:
    await host.create(payload={"secret": 1})
    client = Client(host, RUN, skipColumns="payload,id,updatedAt,nonsense")
    answer = await client.get()
    assert b"secret" not in answer.body
    (row, _) = json.loads(answer.body)
    assert row["value"].keys() == json.loads(answer.headers["electric-schema"]).keys()
    assert {"id", "updatedAt", "output"} <= row["value"].keys()
    client = Client(host, RUN, skipColumns="output")
    client.headers["authorization"] = f"Bearer {host.token(skip_columns=['payload'])}"
    (row,) = await client.rows()
    assert "payload" not in row and "output" in row


async def test_a_row_is_encoded_once_for_all_clients(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(record: Any, skip: Any) -> bytes:
        calls.append(record.version)
        return real(record, skip)

    real = shapes.row
    monkeypatch.setattr(shapes, "row", counting)
    await host.create()
    clients = [Client(host) for _ in range(3)]
    for client in clients:
        await client.rows()
    assert calls == [2]
    await host.finish()
    for client in clients:
        await client.rows(live=True)
    assert calls == [2, 3]


# Errors


async def test_errors_are_immediate(host: FakeHost) -> None:
    await host.create(tags=["a"])
    assert (await Client(host, RUN, "read:runs:run_2").get()).status_code == 403
    assert (await Client(host, "/v1/runs/run_9", "read:runs").get()).status_code == 404
    client = Client(host)
    client.headers["authorization"] = "Bearer forged"
    assert (await client.get()).status_code == 401
    for query in ({"tags": ""}, {"tags": 'a"'}, {"tags": "a,"}, {"tags": "a", "createdAt": "soon"}):
        answer = await Client(host, TAGS, "read:runs", **query).get()
        assert (answer.status_code, json.loads(answer.body)["code"]) == (400, "invalid_request")


async def test_a_poll_that_waits_for_a_run_is_503_at_the_shutdown(host: FakeHost) -> None:
    async with Client(host).pending(live=False) as answers:
        await host.wait_for_subscriber()
        host.begin_shutdown()
    assert answers[0].status_code == 503


async def test_a_token_that_names_the_run_does_not_load_its_record(host: FakeHost) -> None:
    await host.create(payload="x" * 1000)
    by_id, by_task = Client(host), Client(host, RUN, "read:tasks:chat")
    await by_id.rows()
    await by_task.rows()

    async def get(run_id: str) -> Any:
        raise AssertionError("the record was loaded")

    host.get = get  # type: ignore[method-assign]
    host.debug = True
    assert await by_id.rows() == []
    answer = await by_task.get()
    assert (answer.status_code, "the record was loaded" in json.loads(answer.body)["error"]) == (500, True)


async def test_a_poll_of_a_removed_run_must_refetch_and_gets_404(host: FakeHost) -> None:
    await host.create()
    client = Client(host)
    await client.rows()
    await host.finish()
    await host.broker.remove("run_1")
    assert (await client.get(live=True)).status_code == 409
    client.headers = Client(host, RUN, "read:runs").headers  # a token that does not name the run does not wait for it
    assert (await client.get()).status_code == 404


async def test_the_shutdown_ends_a_poll_that_waits_for_the_broker(host: FakeHost) -> None:
    await host.create()
    client = Client(host)
    await client.rows()
    entered = anyio.Event()

    @asynccontextmanager
    async def follow(topic: str) -> AsyncIterator[Any]:
        entered.set()
        await anyio.sleep_forever()
        yield

    host.broker.follow = follow  # type: ignore[method-assign]
    async with client.pending() as answers:
        await entered.wait()
        host.begin_shutdown()
    assert answers[0].status_code == 503


async def test_an_unavailable_broker_is_503(host: FakeHost) -> None:
    host = FakeHost(timeouts=Timeouts())
    host.start_error = BrokerUnavailable("unavailable")
    assert (await Client(host).get()).status_code == 503
