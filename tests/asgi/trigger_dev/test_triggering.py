from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypedDict

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime import BrokerUnavailable, Limits, Realtime, Retention, RunRecord, Status
from asgi_realtime.brokers.base import Broker
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.scopes import admits
from asgi_realtime.tasks import launch
from asgi_realtime.testing import AsgiClient
from asgi_realtime.testing.driver import make_scope
from tests.asgi.official import Answer, call, count_runs, trigger, with_tasks
from tests.brokers.backends import DistantBroker
from tests.inprocess import GUARD_S, SECRET, FakeClock, ended, until

pytestmark = pytest.mark.anyio

TRIGGER = "/api/v1/tasks/echo/trigger"
SUPERJSON = "application/super+json"


async def started(realtime: Realtime, answer: Answer) -> RunRecord:
    assert answer.status == 200, answer.json
    return await realtime.get_run(answer.json["id"])


# What is answered


async def test_the_answer_is_a_handle() -> None:
    async with with_tasks() as realtime:
        answer = await trigger(realtime, "echo", {"a": 1}, tags=["x"])
        assert answer.status == 200
        assert answer.json == {"id": answer.json["id"], "isCached": False}
        assert answer.json["id"].startswith("run_")
        assert (await ended(realtime, answer.json["id"])).output == {"a": 1}


async def test_the_token_of_the_handle_reads_the_run_and_sends_into_it_for_an_hour() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        answer = await trigger(realtime, "echo")
        claims = realtime.verify_token(answer.token)
        run_id = answer.json["id"]
        assert claims.scopes == (f"read:runs:{run_id}", f"write:inputStreams:{run_id}")
        assert claims.expires_at == clock.seconds + 3600
        assert not claims.one_time
        assert (await call(realtime, "GET", f"/api/v3/runs/{run_id}", token=answer.token)).status == 200


async def test_what_a_token_keeps_from_its_holder_the_token_of_the_handle_does_too() -> None:
    async with with_tasks() as realtime:
        token = realtime.create_trigger_public_token("echo", skip_columns=["payload", "error"])
        answer = await trigger(realtime, "echo", "secret", token=token)
        assert realtime.verify_token(answer.token).skip_columns == ("payload", "error")
        run = (await call(realtime, "GET", f"/api/v3/runs/{answer.json['id']}", token=answer.token)).json
        assert "payload" not in run


# Who may


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


async def test_which_tasks_there_are_is_told_to_the_host_only() -> None:
    async with with_tasks() as realtime:
        answer = await trigger(realtime, "ecko")
        assert (answer.status, answer.json["code"]) == (404, "unknown_task")
        assert answer.error == "no task 'ecko' is registered; registered: echo, nothing, number"
        answer = await trigger(realtime, "ecko", token=realtime.create_trigger_public_token("ecko"))
        assert (answer.status, answer.error) == (404, "no task 'ecko' is registered")
        answer = await trigger(realtime, "ecko", token=realtime.create_trigger_public_token("echo"))
        assert answer.status == 403


async def test_without_the_api_there_is_no_trigger() -> None:
    async with with_tasks(api=False) as realtime:
        assert (await trigger(realtime, "echo")).status == 404


# The payload


@pytest.mark.parametrize(
    ("body", "payload"),
    [
        ({"payload": {"a": [1, None]}}, {"a": [1, None]}),
        ({"payload": "text"}, "text"),
        ({"payload": '{"a":1}', "options": {"payloadType": "application/json"}}, '{"a":1}'),
        ({"payload": None}, None),
        ({"payload": 'te"xt', "options": {"payloadType": "text/plain"}}, 'te"xt'),
        ({"payload": "", "options": {"payloadType": "text/plain"}}, ""),
        ({"payload": '{"json":{"a":1}}', "options": {"payloadType": SUPERJSON}}, {"a": 1}),
        ({"payload": '{"json":null}', "options": {"payloadType": SUPERJSON}}, None),
        ({"options": {"payloadType": "application/json"}}, None),
        ({}, None),
        ({"options": None}, None),
        ({"payload": 1, "context": {}, "options": {"payloadType": None}}, 1),
    ],
)
async def test_a_payload_is_read_by_its_type(body: Any, payload: Any) -> None:
    async with with_tasks() as realtime:
        record = await started(realtime, await call(realtime, "POST", TRIGGER, body))
        assert record.payload == payload
        assert record.payload_meta_json is None
        assert (record.payload_json is None) == ("payload" not in body)
        assert (await ended(realtime, record.id)).output == payload


async def test_a_payload_is_kept_as_it_came() -> None:
    async with with_tasks() as realtime:
        body = b'{"payload": {"n": 1.0, "big": 12345678901234567890123,\n "s": "\\ud800"}}'
        record = await started(realtime, await call(realtime, "POST", TRIGGER, body))
        assert record.payload_json == b'{"n": 1.0, "big": 12345678901234567890123,  "s": "\\ufffd"}'


class Meeting(TypedDict):
    when: datetime


async def test_a_task_gets_plain_json_and_clients_get_what_was_sent() -> None:
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


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body is malformed: not valid JSON"),
        (b"{", 400, "the body is malformed: not valid JSON"),
        (b"[]", 400, "the body does not fit: Expected `object`, got `array`"),
        (b"1", 400, "the body does not fit: Expected `object`, got `int`"),
        (b'{"payload": NaN}', 400, "malformed"),
        (b"\xff", 400, "malformed"),
        (b"[" * 100_000, 400, "Expected `object`, got `array`"),
        (b'{"payload": %b}' % (b"[" * 100_000), 400, "nested too deeply"),
        (b'{"options": []}', 400, "the field options does not fit; it must be an object"),
        (
            b'{"payload": {}, "options": {"payloadType": "text/plain"}}',
            400,
            "type text/plain, so it must be a string",
        ),
        (b'{"payload": 1, "options": {"payloadType": "application/super+json"}}', 400, "so it must be a string"),
        (b'{"payload": "{", "options": {"payloadType": "application/super+json"}}', 400, "the payload is malformed"),
        (
            b'{"payload": "{\\"json\\":1,\\"meta\\":{\\"values\\":[\\"Date\\"]}}",'
            b' "options": {"payloadType": "application/super+json"}}',
            400,
            "the payload is malformed: superjson's annotation of the payload does not fit: 'Date'",
        ),
        (b'{"payload": "x", "options": {"payloadType": "text/html"}}', 422, "payloadType is 'text/html'; allowed are"),
        (
            b'{"payload": "x", "options": {"payloadType": 1}}',
            422,
            "Expected `str | null`, got `int` - at `$.payloadType`",
        ),
        (b'{"payload": "x", "options": {"payloadType": "application/store"}}', 413, "the limit is 131071 bytes"),
    ],
)
async def test_a_payload_that_cannot_be_read_is_refused(body: bytes, status: int, message: str) -> None:
    async with with_tasks() as realtime:
        answer = await call(realtime, "POST", TRIGGER, body)
        assert answer.status == status
        assert message in answer.error


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


async def test_a_payload_may_be_as_long_as_the_limit() -> None:
    async with with_tasks(limits=Limits(payload_bytes=100_000)) as realtime:
        fits = '"' * 49_999  # two bytes each, as JSON
        assert (await trigger(realtime, "echo", fits, payloadType="text/plain")).status == 200
        answer = await trigger(realtime, "echo", fits + "xx", payloadType="text/plain")
        assert (answer.status, answer.json["code"]) == (413, "limit_exceeded")
        assert answer.error == "the payload is 100002 bytes, limit 100000"
        answer = await call(realtime, "POST", TRIGGER, b" " * 1_000_000)
        assert answer.status == 413
        assert "limit 789824" in answer.error


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"payload": [[]] * 5000}, "the payload is 15001 bytes, limit 10000"),
        ({"payload": "x" * 9999}, "the payload is 10001 bytes, limit 10000"),
        (
            {"payload": '"' * 10_000, "options": {"payloadType": "application/super+json"}},
            "the payload is 20002 bytes, limit 20000",
        ),
        (
            {"payload": "x" * 10_001, "options": {"payloadType": "application/super+json"}},
            "the payload, with the types of its values, is 10001 bytes, limit 10000",
        ),
        ({"options": {"metadata": [[]] * 22_000}}, "the options are 66014 bytes, limit 65936"),
        ({"options": {"tags": ["a"] * 20_000}}, "the options are 80010 bytes, limit 65936"),
    ],
)
async def test_what_is_too_long_is_not_decoded(body: Any, message: str) -> None:
    """A body of 7 MB was made into millions of values, and the loop stood still, before it was refused."""
    async with with_tasks(limits=Limits(payload_bytes=10_000, metadata_bytes=200)) as realtime:
        answer = await call(realtime, "POST", TRIGGER, json.dumps(body, separators=(",", ":")).encode())
        assert (answer.status, answer.json["code"]) == (413, "limit_exceeded")
        assert answer.error == message


async def test_a_body_that_is_cut_off_starts_nothing() -> None:
    async with with_tasks() as realtime:
        messages: list[Any] = [
            {"type": "http.request", "body": b'{"payload": 1, "options": {"tags": "x"}}', "more_body": True},
            {"type": "http.disconnect"},
        ]
        sent: list[Any] = []

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = make_scope("POST", TRIGGER, headers={"authorization": f"Bearer {SECRET}"})
        await realtime(scope, receive, send)
        assert sent[0]["status"] == 408
        assert await count_runs(realtime, "tag:x") == 0


@pytest.mark.parametrize("path", [TRIGGER, "/api/v3/batches"])
async def test_a_request_that_waits_for_its_body_does_not_keep_the_server_up(path: str) -> None:
    async with with_tasks() as realtime:
        waits = anyio.Event()
        sent: list[Any] = []

        async def receive() -> Any:
            waits.set()
            await anyio.sleep_forever()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = make_scope("POST", path, headers={"authorization": f"Bearer {SECRET}"})
        with anyio.fail_after(GUARD_S):
            async with anyio.create_task_group() as group:
                group.start_soon(realtime, scope, receive, send)
                await waits.wait()
                realtime.begin_shutdown()
        assert sent[0]["status"] == 503, "with which the official client comes again"


# Options


async def test_options_hold() -> None:
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


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"tags": "one"}, "tags", ("one",)),
        ({"tags": []}, "tags", ()),
        ({"tags": None, "delay": None, "ttl": None, "metadata": None, "idempotencyKey": None}, "tags", ()),
        ({"ttl": 90}, "ttl_s", 90.0),
        ({"ttl": 0}, "ttl_s", None),
        ({"ttl": "1h30m"}, "ttl_s", 5400.0),
        ({"maxDuration": 2147483647}, "max_duration_s", None),
        ({"maxDuration": 0.5}, "max_duration_s", 0.5),
        ({"metadata": '{"a":1}', "metadataType": "application/json"}, "metadata", {"a": 1}),
        (
            {"metadata": '{"json":{"a":"x"},"meta":{"values":{"a":["Date"]}}}', "metadataType": SUPERJSON},
            "metadata",
            {"a": "x"},
        ),
        ({"delay": "2030-01-01T00:00:00.000Z"}, "delay_until_ms", 1_893_456_000_000),
        ({"delay": "2030-01-01T01:00:00+01:00"}, "delay_until_ms", 1_893_456_000_000),
        ({"delay": "2020-01-01T00:00:00.000Z"}, "delay_until_ms", None),
    ],
)
async def test_an_option_may_have_several_forms(options: Any, field: str, value: Any) -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        record = await started(realtime, await trigger(realtime, "echo", 1, **options))
        assert getattr(record, field) == value


async def test_options_of_no_meaning_here_are_taken() -> None:
    options: dict[str, Any] = {
        "queue": {"name": "q"},
        "concurrencyKey": "k",
        "machine": "large-1x",
        "priority": 10,
        "maxAttempts": 3,
        "lockToVersion": "20260101.1",
        "externalDeploymentId": "abc",
        "region": "eu",
        "test": True,
        "debounce": {"key": "d", "delay": "1s"},
        "idempotencyKeyOptions": {"key": "k", "scope": "run"},
        "resumeParentOnCompletion": False,
        "of a later version": object.__name__,
    }
    async with with_tasks() as realtime:
        assert (await trigger(realtime, "echo", 1, **options)).status == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tags": 1}, "Expected `str | array | null`, got `int` - at `$.tags`"),
        ({"tags": {"a": 1}}, "Expected `str | array | null`, got `object` - at `$.tags`"),
        ({"tags": [1]}, "Expected `str`, got `int` - at `$.tags[0]`"),
        ({"tags": ["a,b"]}, "a comma"),
        ({"tags": ["x" * 129]}, "tag is 129 characters, limit 128"),
        ({"tags": [str(number) for number in range(11)]}, "a run has 11 tags, limit 10"),
        ({"metadata": [1]}, "Expected `str | object | null`, got `array` - at `$.metadata`"),
        ({"metadata": "text"}, "metadata is malformed"),
        ({"metadata": "1"}, "metadata is not an object; allowed are"),
        ({"metadata": "{}", "metadataType": "text/plain"}, "metadata is not an object; allowed are"),
        ({"metadata": {"x" * 129: 1}}, "metadata key is 129 characters"),
        ({"metadata": {"a": "x" * 300_000}}, "limit 262144"),
        ({"idempotencyKey": 1}, "Expected `str | null`, got `int` - at `$.idempotencyKey`"),
        ({"idempotencyKey": ""}, "idempotency_key is ''; allowed is a non-empty str"),
        ({"idempotencyKey": "x" * 513}, "idempotency_key is 513 characters, limit 512"),
        ({"idempotencyKey": "x", "idempotencyKeyTTL": "soon"}, "idempotencyKeyTTL is 'soon'"),
        ({"idempotencyKeyTTL": 60}, "Expected `str | null`, got `int` - at `$.idempotencyKeyTTL`"),
        ({"ttl": "soon"}, "ttl is 'soon'"),
        ({"ttl": -1}, "ttl is -1; it must be more than zero"),
        ({"ttl": True}, "Expected `int | str | null`, got `bool` - at `$.ttl`"),
        ({"ttl": 1.5}, "Expected `int | str | null`, got `float` - at `$.ttl`"),
        ({"delay": 60}, "Expected `str | null`, got `int` - at `$.delay`"),
        ({"delay": "tomorrow"}, "delay is 'tomorrow'; allowed are spans like '90s'"),
        ({"delay": "2030-01-01T00:00:00"}, "with a time zone"),
        ({"delay": "9999-12-31T23:59:59Z"}, "it must be less than ten years from now"),
        ({"delay": "600w"}, "delay is '600w'"),
        ({"maxDuration": "1h"}, "Expected `int | float | null`, got `str` - at `$.maxDuration`"),
        ({"maxDuration": 0}, "maxDuration is 0; it must be more than zero"),
        ({"parentRunId": 1}, "Expected `str | null`, got `int` - at `$.parentRunId`"),
    ],
)
async def test_an_option_with_a_wrong_value_is_422_and_starts_nothing(options: Any, message: str) -> None:
    async with with_tasks() as realtime:
        answer = await trigger(realtime, "echo", 1, **{"tags": "seen"} | options)
        assert answer.status == 422
        assert message in answer.error
        assert await count_runs(realtime, "tag:seen") == 0


async def test_a_run_takes_no_longer_than_its_trigger_and_its_task_allow() -> None:
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


async def test_a_run_may_be_the_child_of_another() -> None:
    async with with_tasks() as realtime, realtime.open_run("parent") as parent:
        record = await started(realtime, await trigger(realtime, "echo", parentRunId=parent.id))
        assert (record.parent_id, record.root_id, record.depth) == (parent.id, parent.id, 1)
        assert (await trigger(realtime, "echo", parentRunId="run_nope")).status == 404
        plain = await started(realtime, await trigger(realtime, "echo"))
        assert plain.parent_id is None, "the current run of whoever serves the request is not meant"


async def test_a_token_names_a_parent_only_if_it_may_write_to_it() -> None:
    """The task of a child may change the metadata of its parent, which may be another user's run."""
    async with with_tasks() as realtime, realtime.open_run("parent") as parent:
        token = realtime.create_trigger_public_token("echo", multiple_use=True)
        for run_id in (parent.id, "run_nope"):
            answer = await trigger(realtime, "echo", token=token, parentRunId=run_id)
            assert answer.status == 403
            assert f"'write:runs:{run_id}'" in answer.error
        token = realtime.create_public_token(scopes=["trigger:tasks:echo", f"write:runs:{parent.id}"])
        record = await started(realtime, await trigger(realtime, "echo", token=token, parentRunId=parent.id))
        assert record.parent_id == parent.id


# Once


async def test_a_request_that_is_sent_again_gets_the_run_that_it_made() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        first = await trigger(realtime, "echo", 1, key="a")
        again = await trigger(realtime, "echo", 1, key="a")
        assert again.json == first.json == {"id": first.json["id"], "isCached": False}
        assert (await trigger(realtime, "echo", 1, key="b")).json["id"] != first.json["id"]
        assert (await trigger(realtime, "number", 1, key="a")).json["id"] != first.json["id"]
        assert (await trigger(realtime, "echo", 1)).json["id"] != (await trigger(realtime, "echo", 1)).json["id"]
        clock.seconds += 601  # it is not kept for ever
        assert (await trigger(realtime, "echo", 1, key="a")).json["id"] != first.json["id"]


async def test_a_request_of_another_credential_is_another() -> None:
    async with with_tasks() as realtime:
        tokens = [SECRET, *(realtime.create_public_token(scopes=["trigger:tasks", f"read:tags:{n}"]) for n in range(2))]
        answers = [await trigger(realtime, "echo", 1, token=token, key="a") for token in tokens]
        assert len({answer.json["id"] for answer in answers}) == 3


@pytest.mark.parametrize("key", ["", "a b", "x" * 129, "ä"])
async def test_a_malformed_request_key_is_400(key: str) -> None:
    async with with_tasks() as realtime:
        answer = await trigger(realtime, "echo", 1, key=key)
        assert answer.status == 400
        assert "X-Trigger-Request-Idempotency-Key is" in answer.error


async def test_a_one_time_token_triggers_once() -> None:
    async with with_tasks() as realtime:
        token = realtime.create_trigger_public_token(["echo", "number"])
        first = await trigger(realtime, "echo", 1, token=token, key="a")
        assert first.status == 200
        for task, key in (("echo", "b"), ("number", "b"), ("number", "a"), ("echo", None)):
            answer = await trigger(realtime, task, 1, token=token, key=key, tags="again")
            assert (answer.status, answer.json["code"]) == (422, "token_spent")
            assert answer.error == "the one-time token was used before; request a new one"
        assert await count_runs(realtime, "tag:again") == 0
        again = await trigger(realtime, "echo", 1, token=token, key="a")
        assert again.json == first.json
        assert realtime.verify_token(again.token).scopes == realtime.verify_token(first.token).scopes


async def test_a_one_time_token_without_a_request_key_triggers_once_too() -> None:
    async with with_tasks() as realtime:
        token = realtime.create_trigger_public_token("echo")
        assert [(await trigger(realtime, "echo", 1, token=token)).status for _ in range(3)] == [200, 422, 422]


async def test_a_request_that_is_refused_spends_nothing() -> None:
    async with with_tasks() as realtime:
        token = realtime.create_trigger_public_token(["number", "gone"])
        refused = [
            await trigger(realtime, "number", "text", token=token, key="a"),
            await trigger(realtime, "number", 1, token=token, key="a", tags=1),
            await trigger(realtime, "number", 1, token=token, key="a", parentRunId="run_x"),
            await trigger(realtime, "gone", 1, token=token, key="a"),
            await trigger(realtime, "echo", 1, token=token, key="a"),
            await call(realtime, "POST", "/api/v1/tasks/number/trigger", b"{", token=token, key="a"),
        ]
        assert [answer.status for answer in refused] == [422, 422, 403, 404, 403, 400]
        assert (await trigger(realtime, "number", 1, token=token, key="b")).status == 200


async def test_a_one_time_token_stays_spent_until_it_expires() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock, retention=Retention(after_end=60)) as realtime:
        token = realtime.create_trigger_public_token("echo", expires_in="7d")
        run_id = (await trigger(realtime, "echo", 1, token=token, key="a")).json["id"]
        await ended(realtime, run_id)
        clock.seconds += 3 * 86400
        assert (await trigger(realtime, "echo", 1, token=token, key="b")).status == 422
        await realtime.broker.remove(run_id)
        answer = await trigger(realtime, "echo", 1, token=token, key="a")
        assert (answer.status, answer.json["code"]) == (422, "token_spent")
        assert "what it made has expired" in answer.error
        clock.seconds += 4 * 86400
        assert (await trigger(realtime, "echo", 1, token=token, key="b")).status == 401


@pytest.mark.parametrize("options", [{}, {"idempotencyKey": "k"}])
@pytest.mark.parametrize("one_time", [True, False])
async def test_a_run_that_is_gone_early_is_not_made_again(
    options: dict[str, Any], one_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full memory broker drops what has ended, and a run may be kept for less time than a client repeats its request:
    the task was then executed a second time, by another process or after many other runs."""
    monkeypatch.setattr(launch, "MAX_REMEMBERED_RUNS", 1)
    broker = MemoryBroker()
    async with with_tasks(broker=broker) as realtime, with_tasks(broker=broker) as other:
        token = realtime.create_trigger_public_token("echo", multiple_use=not one_time)
        run_id = (await trigger(realtime, "echo", 1, token=token, key="a", tags="x", **options)).json["id"]
        await ended(realtime, run_id)
        await ended(realtime, (await trigger(realtime, "echo", 1)).json["id"])
        await realtime.broker.remove(run_id)
        for process in (realtime, other):
            answer = await trigger(process, "echo", 1, token=token, key="a", tags="x", **options)
            assert (answer.status, answer.json["code"]) == (404, "run_not_found")
        assert await count_runs(realtime, "tag:x") == 0


async def test_a_request_finds_its_run_though_its_key_stands_for_another_by_now() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        options = {"idempotencyKey": "k", "idempotencyKeyTTL": "1m"}
        first = await trigger(realtime, "echo", 1, key="a", **options)
        clock.seconds += 61
        second = await trigger(realtime, "echo", 1, key="b", **options)
        assert second.json["id"] != first.json["id"]
        assert (await trigger(realtime, "echo", 1, key="a", **options)).json == first.json
        assert (await trigger(realtime, "echo", 1, key="b", **options)).json == second.json


async def test_tokens_with_a_far_expiry_are_remembered_too() -> None:
    async with with_tasks() as realtime:
        for exp in (10**12, 10**400, 1e300):
            token = signed({"exp": exp, "otu": True, "scopes": ["trigger:tasks:echo"], "n": str(exp)})
            assert [(await trigger(realtime, "echo", 1, token=token)).status for _ in range(2)] == [200, 422]


def signed(claims: dict[str, Any]) -> str:
    """A token as the official SDK signs it, without an id of its own."""
    import jwt

    base = {"iss": "https://id.trigger.dev", "aud": "https://api.trigger.dev", "pub": True, "sub": "x"}
    return jwt.encode({**base, **claims}, SECRET, algorithm="HS256")


class Dying(MemoryBroker):
    """Its process dies before the run is stored, as often as it is said."""

    deaths = 0

    async def commit(self, *args: Any, **kwargs: Any) -> int:
        if self.deaths:
            self.deaths -= 1
            raise SystemError("the process died here")
        return await super().commit(*args, **kwargs)


@pytest.mark.parametrize("options", [{}, {"idempotencyKey": "k"}])
@pytest.mark.parametrize("one_time", [True, False])
async def test_the_retry_makes_the_run_whose_process_died(options: dict[str, Any], one_time: bool) -> None:
    broker = Dying()
    async with with_tasks(broker=broker) as realtime:
        token = realtime.create_trigger_public_token("echo", multiple_use=not one_time)
        broker.deaths = 1
        answer = await trigger(realtime, "echo", 1, token=token, key="a", tags="x", **options)
        assert answer.status == 500
        (claimed,) = {value.split(" ")[0] for value, _ in broker._claims.values()}
        answer = await trigger(realtime, "echo", 1, token=token, key="a", tags="x", **options)
        assert (answer.status, answer.json) == (200, {"id": claimed, "isCached": False})
        record = await ended(realtime, claimed)
        assert record.output == 1 and record.root_id == claimed
        assert await count_runs(realtime, "tag:x") == 1


@pytest.mark.parametrize("make_broker", [MemoryBroker, DistantBroker])
@pytest.mark.parametrize("options", [{}, {"idempotencyKey": "k"}])
@pytest.mark.parametrize("one_time", [True, False])
async def test_the_same_request_many_times_at_once_makes_one_run(
    make_broker: Callable[[], Broker], options: dict[str, Any], one_time: bool
) -> None:
    async with with_tasks(broker=make_broker()) as realtime:
        token = realtime.create_trigger_public_token("echo", multiple_use=not one_time)
        answers = await at_once(5, lambda _: trigger(realtime, "echo", 1, token=token, key="a", tags="x", **options))
        assert {answer.status for answer in answers} == {200}
        assert len({answer.json["id"] for answer in answers}) == 1
        assert not any(answer.json["isCached"] for answer in answers), "it was this request that made it"
        assert await count_runs(realtime, "tag:x") == 1


@pytest.mark.parametrize("late", range(12))
async def test_a_request_that_is_sent_again_before_it_is_answered_is_not_cached(late: int) -> None:
    """The key of the first stood for a run already, and the second was told that another request had made it."""
    broker = DistantBroker()
    async with with_tasks(broker=broker) as one, with_tasks(broker=broker) as other:
        answers: list[Answer] = []

        async def send(realtime: Realtime, turns: int) -> None:
            for _ in range(turns):
                await anyio.lowlevel.checkpoint()
            answers.append(await trigger(realtime, "echo", 1, key="a", idempotencyKey="k"))

        async with anyio.create_task_group() as group:
            group.start_soon(send, one, 0)
            group.start_soon(send, other, late)
        assert answers[0].json == answers[1].json
        assert not answers[0].json["isCached"]
        assert (await trigger(other, "echo", 1, key="b", idempotencyKey="k")).json["isCached"]


@pytest.mark.parametrize("make_broker", [MemoryBroker, DistantBroker])
@pytest.mark.parametrize("options", [{}, {"idempotencyKey": "k"}])
async def test_a_one_time_token_used_by_many_at_once_makes_one_run(
    make_broker: Callable[[], Broker], options: dict[str, Any]
) -> None:
    async with with_tasks(broker=make_broker()) as realtime:
        token = realtime.create_trigger_public_token("echo")
        answers = await at_once(5, lambda n: trigger(realtime, "echo", n, token=token, key=str(n), tags="x", **options))
        assert await count_runs(realtime, "tag:x") == 1
        refused = [answer for answer in answers if answer.status == 422]
        assert {answer.json["code"] for answer in refused} == {"token_spent"}
        made = [answer for answer in answers if answer.status == 200]
        assert len({answer.json["id"] for answer in made}) == 1
        if not options:  # others with the same idempotency key find its run
            assert len(made) == 1


async def at_once(times: int, make: Callable[[int], Awaitable[Answer]]) -> list[Answer]:
    answers: list[Answer] = []

    async def run(number: int) -> None:
        answers.append(await make(number))

    async with anyio.create_task_group() as group:
        for number in range(times):
            group.start_soon(run, number)
    return answers


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_two_processes_on_redis_spend_a_token_once(redis_url: str) -> None:
    async with with_tasks(broker=redis_url) as one, with_tasks(broker=redis_url) as other:
        for number in range(10):
            token = one.create_trigger_public_token("echo", skip_columns=["ttl"])
            tag = f"spent:{number}"
            answers = await at_once(
                4,
                lambda n, token=token, tag=tag: trigger((one, other)[n % 2], "echo", n, token=token, tags=tag),  # type: ignore[misc]
            )
            assert sorted(answer.status for answer in answers) == [200, 422, 422, 422]
            assert await count_runs(one, f"tag:{tag}") == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_two_processes_on_redis_make_one_run_of_one_request(redis_url: str) -> None:
    async with with_tasks(broker=redis_url) as one, with_tasks(broker=redis_url) as other:
        for number in range(10):
            key, tag = f"request-{number}", f"requested:{number}"
            answers = await at_once(
                4,
                lambda n, key=key, tag=tag: trigger((one, other)[n % 2], "echo", 1, key=key, tags=tag),  # type: ignore[misc]
            )
            assert {answer.status for answer in answers} == {200}
            assert len({answer.json["id"] for answer in answers}) == 1
            assert await count_runs(one, f"tag:{tag}") == 1


# Idempotency keys


async def test_an_idempotency_key_gives_the_same_run_as_in_process() -> None:
    async with with_tasks() as realtime:
        handle = await realtime.trigger("echo", 1, idempotency_key="key")
        answer = await trigger(realtime, "echo", 2, idempotencyKey="key", key="a")
        assert answer.json == {"id": handle.id, "isCached": True}
        assert realtime.verify_token(answer.token).scopes[0] == f"read:runs:{handle.id}"


async def test_an_idempotency_key_lasts_as_long_as_it_says() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        options = {"idempotencyKey": "key", "idempotencyKeyTTL": "5m"}
        first = await trigger(realtime, "echo", 1, **options)
        clock.seconds += 299
        assert (await trigger(realtime, "echo", 1, **options)).json == {"id": first.json["id"], "isCached": True}
        clock.seconds += 2
        assert (await trigger(realtime, "echo", 1, **options)).json["id"] != first.json["id"]


async def test_a_request_with_a_key_that_is_sent_again_is_not_told_that_its_run_was_there() -> None:
    async with with_tasks() as realtime:
        token = realtime.create_trigger_public_token("echo", multiple_use=True)
        for credential in (SECRET, token, realtime.create_trigger_public_token("echo")):
            answers = [
                await trigger(realtime, "echo", 1, token=credential, key="a", idempotencyKey=f"k{credential[-5:]}")
                for _ in range(2)
            ]
            assert answers[0].json == answers[1].json
            assert not answers[0].json["isCached"]


async def test_a_key_that_stands_for_a_run_spends_no_token() -> None:
    async with with_tasks() as realtime:
        await realtime.trigger("echo", 1, idempotency_key="key")
        token = realtime.create_trigger_public_token("echo")
        assert (await trigger(realtime, "echo", 1, token=token, idempotencyKey="key")).json["isCached"]
        assert not (await trigger(realtime, "echo", 1, token=token, idempotencyKey="new")).json["isCached"]
        assert (await trigger(realtime, "echo", 1, token=token, idempotencyKey="key")).status == 422


async def test_who_guesses_a_key_may_not_read_the_run() -> None:
    """A browser that may trigger a task could read the runs of others, by the keys that they were likely to have."""
    async with with_tasks() as realtime:
        mine = realtime.create_trigger_public_token("echo", multiple_use=True)
        first = await trigger(realtime, "echo", "secret", token=mine, idempotencyKey="order-1", tags="user:1")
        again = await trigger(realtime, "echo", "secret", token=mine, idempotencyKey="order-1")
        run_id = first.json["id"]
        assert again.json == {"id": run_id, "isCached": True}
        assert len(realtime.verify_token(again.token).scopes) == 2

        other = realtime.create_public_token(scopes=["trigger:tasks:echo"])
        guessed = await trigger(realtime, "echo", 1, token=other, idempotencyKey="order-1")
        assert guessed.json == {"id": run_id, "isCached": True}
        assert realtime.verify_token(guessed.token).scopes == ()
        assert (await call(realtime, "GET", f"/api/v3/runs/{run_id}", token=guessed.token)).status == 403

        reader = realtime.create_public_token(scopes=["trigger:tasks:echo", "read:tags:user:1"])
        found = await trigger(realtime, "echo", 1, token=reader, idempotencyKey="order-1")
        claims = realtime.verify_token(found.token)
        assert admits(claims.scopes, "read", [("runs", run_id)])
        assert not admits(claims.scopes, "write", [("inputStreams", run_id)])


async def test_keys_of_tasks_do_not_meet() -> None:
    """The task `a:b` with the key `c` was the task `a` with the key `b:c`."""
    realtime = with_tasks()

    @realtime.task("a")
    async def a() -> None: ...

    @realtime.task("a:b")
    async def b() -> None: ...

    async with realtime:
        first = await trigger(realtime, "a:b", idempotencyKey="c")
        second = await trigger(realtime, "a", idempotencyKey="b:c")
        assert not second.json["isCached"] and second.json["id"] != first.json["id"]


# What may be away


class Queue:
    """A queue of jobs that is down."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.away = True

    async def enqueue(self, run_id: str, task_id: str) -> None:
        if self.away:
            raise ConnectionError("redis://user:password@10.0.0.1 does not answer")
        self.sent.append(run_id)


@pytest.mark.parametrize("one_time", [True, False])
@pytest.mark.parametrize("options", [{}, {"idempotencyKey": "k"}])
async def test_a_run_is_made_though_the_queue_is_away(
    one_time: bool, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It was failed and 503; asked again, as the client does, it was 200 with the run that had failed."""
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
        queue.away = False
        clock.seconds += realtime.timeouts.lease + 1
        await until(lambda: queue.sent == [answer.json["id"]])


async def test_a_broker_that_is_away_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    async with with_tasks() as realtime:

        async def away(*args: Any, **kwargs: Any) -> str:
            raise BrokerUnavailable("redis at 10.0.0.1 does not answer")

        monkeypatch.setattr(realtime.runs, "claim", away)
        answer = await trigger(realtime, "echo", 1, key="a")
        assert (answer.status, answer.json["code"]) == (503, "broker_unavailable")


# Packets


@pytest.mark.parametrize("path", ["/api/v2/packets/trigger/packet_x/payload.json", "/api/v1/packets/x"])
async def test_payloads_are_not_taken_elsewhere(path: str) -> None:
    async with with_tasks() as realtime:
        assert (await AsgiClient(realtime).request("PUT", path)).status_code == 401
        answer = await call(realtime, "PUT", path)
        assert (answer.status, answer.json["code"]) == (413, "limit_exceeded")
        assert "the limit is 131071 bytes" in answer.error
        assert (await call(realtime, "GET", path)).status == 404
        assert (await call(realtime, "POST", path)).status == 405


@pytest.mark.parametrize(
    ("method", "path"),
    [
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
    ],
)
async def test_all_of_the_api_can_be_left_out(method: str, path: str) -> None:
    async with with_tasks(api=False) as realtime:
        answer = await call(realtime, method, path, {})
        assert (answer.status, answer.json["code"]) == (404, "not_found")
    async with with_tasks() as realtime:
        assert (await AsgiClient(realtime).request(method, path)).status_code == 401
