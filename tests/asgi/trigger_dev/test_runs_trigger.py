"""Triggering a run as the official clients do: the request, its checks, and the response."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, TypedDict

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime import BrokerUnavailable, Limits, Realtime, Status
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.testing import AsgiClient
from tests.asgi.official_sdk import (
    REQUEST_KINDS,
    Answer,
    call,
    count_runs,
    on_one_loop,
    send_cut_off,
    trigger,
    with_tasks,
)
from tests.inprocess import FakeClock, ended, until

pytestmark = pytest.mark.anyio

TRIGGER = "/api/v1/tasks/echo/trigger"
SUPERJSON = "application/super+json"


async def started(realtime: Realtime, answer: Answer) -> StoredRecord:
    assert answer.status == 200, answer.json
    return await realtime.runs.get(answer.json["id"])


# The response


async def test_the_response_is_a_handle() -> None:
    async with with_tasks() as realtime:
        answer = await trigger(realtime, "echo", {"a": 1}, tags=["x"])
        assert answer.status == 200
        assert answer.json == {"id": answer.json["id"], "isCached": False}
        assert answer.json["id"].startswith("run_")
        assert (await ended(realtime, answer.json["id"])).output == {"a": 1}


async def test_the_handle_token_reads_the_run_and_sends_inputs_for_an_hour() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        answer = await trigger(realtime, "echo")
        claims = realtime.verify_token(answer.token)
        run_id = answer.json["id"]
        assert claims.scopes == (f"read:runs:{run_id}", f"write:inputStreams:{run_id}")
        assert claims.expires_at == clock.seconds + 3600
        assert not claims.one_time
        assert (await call(realtime, "GET", f"/api/v3/runs/{run_id}", token=answer.token)).status == 200


async def test_the_handle_token_hides_the_columns_that_the_request_token_hides() -> None:
    async with with_tasks() as realtime:
        token = realtime.create_trigger_public_token("echo", skip_columns=["payload", "error"])
        answer = await trigger(realtime, "echo", "secret", token=token)
        assert realtime.verify_token(answer.token).skip_columns == ("payload", "error")
        run = (await call(realtime, "GET", f"/api/v3/runs/{answer.json['id']}", token=answer.token)).json
        assert "payload" not in run


# Authorization


async def test_a_run_and_its_handle_have_the_owner_of_the_token() -> None:
    async with with_tasks() as realtime:
        token = realtime.create_trigger_public_token("echo", owner="user:1")
        answer = await trigger(realtime, "echo", token=token)
        assert realtime.verify_token(answer.token).owner == "user:1"
        assert (await started(realtime, answer)).token_owner == "user:1"
        anonymous = realtime.create_trigger_public_token("echo")
        answer = await trigger(realtime, "echo", token=anonymous)
        token_id = realtime.verify_token(anonymous).token_id
        assert realtime.verify_token(answer.token).owner == token_id
        assert (await started(realtime, answer)).token_owner == token_id
        assert (await started(realtime, await trigger(realtime, "echo"))).token_owner is None


async def test_a_trigger_needs_the_secret_key_or_a_scope_for_the_task() -> None:
    async with with_tasks() as realtime:
        assert (await AsgiClient(realtime).post(TRIGGER)).status_code == 401
        for scopes in (["read:tasks:echo"], ["trigger:tasks:number"], ["batchTrigger:tasks:echo"], ["write:runs"]):
            token = realtime.create_public_token(scopes=scopes)
            answer = await trigger(realtime, "echo", token=token)
            assert answer.status == 403
            assert "'trigger:tasks:echo'" in answer.error
        for scope in ("trigger:tasks:echo", "trigger:tasks", "trigger:all", "admin"):
            token = realtime.create_public_token(scopes=[scope])
            assert (await trigger(realtime, "echo", token=token)).status == 200


async def test_only_the_secret_key_gets_the_list_of_tasks() -> None:
    async with with_tasks() as realtime:
        answer = await trigger(realtime, "ecko")
        assert (answer.status, answer.json["code"]) == (404, "unknown_task")
        assert answer.error == "no task 'ecko' is registered; registered: echo, nothing, number"
        answer = await trigger(realtime, "ecko", token=realtime.create_trigger_public_token("ecko"))
        assert (answer.status, answer.error) == (404, "no task 'ecko' is registered")
        answer = await trigger(realtime, "ecko", token=realtime.create_trigger_public_token("echo"))
        assert answer.status == 403


@on_one_loop
async def test_a_token_can_allow_certain_tags_only() -> None:
    """A browser could put its runs into the list of another user by their tag."""
    async with with_tasks() as realtime:
        token = realtime.create_trigger_public_token("echo", multiple_use=True, tags=["user:1", "draft"])
        run = await started(realtime, await trigger(realtime, "echo", token=token, tags=[" user:1"]))
        assert run.tags == ("user:1",)
        assert (await started(realtime, await trigger(realtime, "echo", token=token))).tags == ()
        answer = await trigger(realtime, "echo", token=token, tags=["draft", "user:2"])
        assert (answer.status, answer.json["code"]) == (403, "forbidden")
        assert answer.error == "the token does not allow the tag 'user:2'; it allows 'user:1', 'draft'"
        none = realtime.create_trigger_public_token("echo", tags=[])
        answer = await trigger(realtime, "echo", token=none, tags="user:1")
        assert (answer.status, answer.error) == (403, "the token does not allow the tag 'user:1'; it allows none")
        assert (await trigger(realtime, "echo", token=none)).status == 200, "the token is not spent"
        anything = realtime.create_trigger_public_token("echo")
        assert (await trigger(realtime, "echo", token=anything, tags="user:2")).status == 200


# The payload


class Meeting(TypedDict):
    when: datetime


async def test_a_task_receives_plain_json_and_the_types_are_stored() -> None:
    realtime = with_tasks()

    @realtime.task("meet")
    async def meet(payload: Meeting) -> str:
        return payload["when"].astimezone(UTC).isoformat()

    async with realtime:
        text = '{"json":{"when":"2026-01-02T03:04:05.678Z"},"meta":{"values":{"when":["Date"]}}}'
        answer = await trigger(realtime, "meet", text, payloadType=SUPERJSON, payloadSize=len(text))
        record = await ended(realtime, (await started(realtime, answer)).id)
        assert record.output == "2026-01-02T03:04:05.678000+00:00"
        assert record.payload_json == b'{"when":"2026-01-02T03:04:05.678Z"}'
        assert record.payload_meta_json == b'{"values":{"when":["Date"]}}'
        run = (await call(realtime, "GET", f"/api/v3/runs/{record.id}")).json
        assert run["payload"] == {"when": "2026-01-02T03:04:05.678Z"}


async def test_a_payload_that_does_not_fit_the_task_is_422() -> None:
    async with with_tasks() as realtime:
        for payload in ("text", None, 1.5):
            answer = await trigger(realtime, "number", payload, tags="seen")
            assert (answer.status, answer.json["code"]) == (422, "invalid_payload")
            assert "the payload of task 'number' does not fit int" in answer.error
        answer = await call(realtime, "POST", "/api/v1/tasks/number/trigger", {})
        assert (answer.status, answer.json["code"]) == (422, "invalid_payload")
        assert (await call(realtime, "POST", "/api/v1/tasks/nothing/trigger", {})).status == 200
        assert await count_runs(realtime, "tag:seen") == 0


async def test_the_payload_limit_is_exact() -> None:
    async with with_tasks(limits=Limits(payload_bytes=100_000)) as realtime:
        fits = '"' * 49_999  # each takes two bytes as JSON
        assert (await trigger(realtime, "echo", fits, payloadType="text/plain")).status == 200
        answer = await trigger(realtime, "echo", fits + "xx", payloadType="text/plain")
        assert (answer.status, answer.json["code"]) == (413, "limit_exceeded")
        assert answer.error == "the payload is 100002 bytes, limit 100000"
        answer = await call(realtime, "POST", TRIGGER, b" " * 1_000_000)
        assert answer.status == 413
        assert "limit 789824" in answer.error


async def test_a_cut_off_body_starts_nothing() -> None:
    async with with_tasks() as realtime:
        assert await send_cut_off(realtime, TRIGGER, b'{"payload": 1, "options": {"tags": "x"}}') == 408
        assert await count_runs(realtime, "tag:x") == 0


# Options


async def test_options_apply_to_the_run() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        record = await started(
            realtime,
            await trigger(
                realtime,
                "echo",
                1,
                tags=["a", "b", "a"],
                metadata={"n": 1},
                delay="1h",
                ttl="10m",
                maxDuration=7,
                idempotencyKey="key",
            ),
        )
        assert (record.tags, record.metadata, record.idempotency_key) == (("a", "b"), {"n": 1}, "key")
        assert (record.status, record.delay_until_ms) == (Status.DELAYED, record.created_at_ms + 3_600_000)
        assert (record.ttl_s, record.max_duration_s) == (600, 7)


@on_one_loop
@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        (b"{", 400, "invalid_request", "the body is malformed"),
        ({"options": []}, 400, "invalid_request", "the field options does not fit"),
        ({"options": {"tags": 1}}, 422, "invalid", "got `int` - at `$.tags`"),
        ({"options": {"tags": ["a,b"]}}, 422, "invalid", "a comma"),
        ({"options": {"tags": ["x" * 129]}}, 422, "limit_exceeded", "tag is 129 characters, limit 128"),
        ({"options": {"metadata": {"a": "x" * 300_000}}}, 422, "limit_exceeded", "limit 262144"),
        ({"options": {"idempotencyKey": ""}}, 422, "invalid", "idempotency_key is ''"),
        ({"options": {"delay": "9999-12-31T23:59:59Z"}}, 422, "invalid", "it must be less than ten years from now"),
        ({"payload": "x", "options": {"payloadType": "application/store"}}, 413, "limit_exceeded", "limit is 131071"),
    ],
)
async def test_an_invalid_request_starts_nothing(body: Any, status: int, code: str, message: str) -> None:
    async with with_tasks() as realtime:
        if isinstance(body, dict) and isinstance(body.get("options"), dict):
            body["options"] = {"tags": "seen"} | body["options"]
        answer = await call(realtime, "POST", TRIGGER, body)
        assert (answer.status, answer.json["code"]) == (status, code)
        assert message in answer.error
        assert await count_runs(realtime, "tag:seen") == 0


async def test_a_run_is_limited_by_its_own_and_its_task_duration() -> None:
    realtime = with_tasks()

    @realtime.task("endless", max_duration=60)
    async def endless() -> None:
        await anyio.sleep_forever()

    async with realtime:
        record = await started(realtime, await trigger(realtime, "endless", maxDuration=0.01))
        assert (await ended(realtime, record.id)).status is Status.TIMED_OUT
        longer = await started(realtime, await trigger(realtime, "endless", maxDuration=3600, delay="1h"))
        assert longer.max_duration_s == 60


# Parents


async def test_a_run_can_be_the_child_of_another() -> None:
    async with with_tasks() as realtime, realtime.open_run("parent") as parent:
        record = await started(realtime, await trigger(realtime, "echo", parentRunId=parent.id))
        assert (record.parent_id, record.root_id, record.depth) == (parent.id, parent.id, 1)
        assert (await trigger(realtime, "echo", parentRunId="run_nope")).status == 404
        plain = await started(realtime, await trigger(realtime, "echo"))
        assert plain.parent_id is None, "the current run of the serving process is not the parent"


async def test_naming_a_parent_needs_a_scope_to_write_to_it() -> None:
    """The task of a child can change the metadata of its parent, which can be the run of another user."""
    async with with_tasks() as realtime, realtime.open_run("parent") as parent:
        token = realtime.create_trigger_public_token("echo", multiple_use=True)
        for run_id in (parent.id, "run_nope"):
            answer = await trigger(realtime, "echo", token=token, parentRunId=run_id)
            assert answer.status == 403
            assert f"'write:runs:{run_id}'" in answer.error
        token = realtime.create_public_token(scopes=["trigger:tasks:echo", f"write:runs:{parent.id}"])
        record = await started(realtime, await trigger(realtime, "echo", token=token, parentRunId=parent.id))
        assert record.parent_id == parent.id


# Unavailable services


class Queue:
    """A job queue that is down until `is_down` is cleared."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.is_down = True

    async def enqueue(self, run_id: str, task_id: str) -> None:
        if self.is_down:
            raise ConnectionError("redis://user:password@10.0.0.1 does not answer")
        self.sent.append(run_id)


@REQUEST_KINDS
async def test_a_run_is_created_while_the_queue_is_down(
    one_time: bool, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The run failed and the response was 503; the retry of the client then got 200 with the failed run."""
    clock = FakeClock()
    queue = Queue()
    async with with_tasks(executor=queue, clock=clock) as realtime:
        token = realtime.create_trigger_public_token("echo", multiple_use=not one_time)
        answer = await trigger(realtime, "echo", 1, key="a", token=token, **options)
        assert answer.status == 200
        assert "password" in caplog.text
        again = await trigger(realtime, "echo", 1, key="a", token=token, **options)
        assert again.json == answer.json
        assert (await started(realtime, again)).status is Status.QUEUED
        queue.is_down = False
        clock.seconds += realtime.timeouts.lease + 1
        await until(lambda: queue.sent == [answer.json["id"]])


async def test_an_unavailable_broker_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    async with with_tasks() as realtime:

        async def unavailable(*args: Any, **kwargs: Any) -> str:
            raise BrokerUnavailable("redis at 10.0.0.1 does not answer")

        monkeypatch.setattr(realtime.runs, "claim", unavailable)
        answer = await trigger(realtime, "echo", 1, key="a")
        assert (answer.status, answer.json["code"]) == (503, "broker_unavailable")


# Packets


async def test_packets_name_the_payload_limit() -> None:
    async with with_tasks() as realtime:
        for path in ("/api/v2/packets/trigger/packet_x/payload.json", "/api/v1/packets/x"):
            assert (await AsgiClient(realtime).request("PUT", path)).status_code == 401
            answer = await call(realtime, "PUT", path)
            assert (answer.status, answer.json["code"]) == (413, "limit_exceeded")
            assert "the limit is 131071 bytes" in answer.error
            assert (await call(realtime, "GET", path)).status == 404
            assert (await call(realtime, "POST", path)).status == 405


@on_one_loop
async def test_the_api_can_be_turned_off() -> None:
    endpoints = [
        ("POST", TRIGGER),
        ("POST", "/api/v3/batches"),
        ("POST", "/api/v3/batches/batch_x/items"),
        ("GET", "/api/v2/batches/batch_x"),
        ("GET", "/api/v3/runs/run_x"),
        ("POST", "/api/v2/runs/run_x/cancel"),
        ("PUT", "/api/v1/runs/run_x/metadata"),
        ("POST", "/api/v1/runs/run_x/tags"),
        ("POST", "/api/v1/auth/jwt/claims"),
        ("POST", "/api/v1/auth/public-tokens"),
        ("PUT", "/api/v2/packets/x"),
    ]
    async with with_tasks(api=False) as off, with_tasks() as on:
        for method, path in endpoints:
            answer = await call(off, method, path, {})
            assert (answer.status, answer.json["code"]) == (404, "not_found")
            assert (await AsgiClient(on).request(method, path)).status_code == 401
