from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypedDict

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime import BrokerUnavailable, Limits, Realtime, Retention, Status
from asgi_realtime.brokers.base import Broker
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.runs.handles import run_scopes
from asgi_realtime.tasks import launch
from asgi_realtime.testing import AsgiClient
from tests.asgi.official_sdk import Answer, call, count_runs, on_one_loop, send_cut_off, trigger, with_tasks
from tests.brokers.backends import DistantBroker
from tests.inprocess import GUARD_S, SECRET, FakeClock, ended, until

pytestmark = pytest.mark.anyio

TRIGGER = "/api/v1/tasks/echo/trigger"
SUPERJSON = "application/super+json"

KEY = {"idempotencyKey": "k"}
REQUEST_KINDS = pytest.mark.parametrize(
    ("anyio_backend", "one_time", "options"),
    [("asyncio", True, {}), ("asyncio", False, KEY), ("trio", True, KEY), ("trio", False, {})],
)
"""Each pair of an event loop, a token kind, and a request with or without an idempotency key."""


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


# Repeated requests and one-time tokens


async def test_a_repeated_request_gets_the_same_run() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        first = await trigger(realtime, "echo", 1, key="a")
        again = await trigger(realtime, "echo", 1, key="a")
        assert again.json == first.json == {"id": first.json["id"], "isCached": False}
        assert (await trigger(realtime, "echo", 1, key="b")).json["id"] != first.json["id"]
        assert (await trigger(realtime, "number", 1, key="a")).json["id"] != first.json["id"]
        assert (await trigger(realtime, "echo", 1)).json["id"] != (await trigger(realtime, "echo", 1)).json["id"]
        clock.seconds += 601  # Retention.request_key
        assert (await trigger(realtime, "echo", 1, key="a")).json["id"] != first.json["id"]


async def test_request_keys_are_separate_for_each_credential() -> None:
    async with with_tasks() as realtime:
        tokens = [SECRET, *(realtime.create_public_token(scopes=["trigger:tasks", f"read:tags:{n}"]) for n in range(2))]
        answers = [await trigger(realtime, "echo", 1, token=token, key="a") for token in tokens]
        assert len({answer.json["id"] for answer in answers}) == 3


async def test_a_malformed_request_key_is_400() -> None:
    async with with_tasks() as realtime:
        for key in ("", "a b", "x" * 129, "ä"):
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


async def test_a_one_time_token_without_a_request_key_triggers_once() -> None:
    async with with_tasks() as realtime:
        token = realtime.create_trigger_public_token("echo")
        assert [(await trigger(realtime, "echo", 1, token=token)).status for _ in range(3)] == [200, 422, 422]


async def test_a_rejected_request_does_not_spend_its_token() -> None:
    async with with_tasks() as realtime:
        token = realtime.create_trigger_public_token(["number", "gone"])
        rejected = [
            await trigger(realtime, "number", "text", token=token, key="a"),
            await trigger(realtime, "number", 1, token=token, key="a", tags=1),
            await trigger(realtime, "number", 1, token=token, key="a", parentRunId="run_x"),
            await trigger(realtime, "gone", 1, token=token, key="a"),
            await trigger(realtime, "echo", 1, token=token, key="a"),
            await call(realtime, "POST", "/api/v1/tasks/number/trigger", b"{", token=token, key="a"),
        ]
        assert [answer.status for answer in rejected] == [422, 422, 403, 404, 403, 400]
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


@REQUEST_KINDS
async def test_a_repeated_request_does_not_create_a_removed_run_again(
    options: dict[str, Any], one_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full memory broker removes ended runs, and retention can be shorter than the time in which a client repeats its
    request. The task was then executed again, by another process or after many other runs."""
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


async def test_a_repeated_request_finds_its_run_after_its_idempotency_key_was_reused() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        options = {"idempotencyKey": "k", "idempotencyKeyTTL": "1m"}
        first = await trigger(realtime, "echo", 1, key="a", **options)
        clock.seconds += 61
        second = await trigger(realtime, "echo", 1, key="b", **options)
        assert second.json["id"] != first.json["id"]
        assert (await trigger(realtime, "echo", 1, key="a", **options)).json == first.json
        assert (await trigger(realtime, "echo", 1, key="b", **options)).json == second.json


async def test_one_time_tokens_with_a_distant_expiry_are_remembered() -> None:
    async with with_tasks() as realtime:
        for exp in (10**12, 10**400, 1e300):
            token = signed({"exp": exp, "otu": True, "scopes": ["trigger:tasks:echo"], "n": str(exp)})
            assert [(await trigger(realtime, "echo", 1, token=token)).status for _ in range(2)] == [200, 422]


def signed(claims: dict[str, Any]) -> str:
    """A token as the official SDK signs it, without an id."""
    import jwt

    base = {"iss": "https://id.trigger.dev", "aud": "https://api.trigger.dev", "pub": True, "sub": "x"}
    return jwt.encode({**base, **claims}, SECRET, algorithm="HS256")


class Dying(MemoryBroker):
    """Its process dies `deaths` times before a run is stored."""

    deaths = 0

    async def commit(self, *args: Any, **kwargs: Any) -> int:
        if self.deaths:
            self.deaths -= 1
            raise SystemError("the process died here")
        return await super().commit(*args, **kwargs)


@REQUEST_KINDS
async def test_a_retry_creates_the_run_of_a_process_that_died(options: dict[str, Any], one_time: bool) -> None:
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


@pytest.mark.parametrize(
    ("anyio_backend", "make_broker", "one_time", "options"),
    [
        ("asyncio", MemoryBroker, True, {}),
        ("asyncio", DistantBroker, False, KEY),
        ("trio", MemoryBroker, False, KEY),
        ("trio", DistantBroker, True, KEY),
        ("trio", DistantBroker, False, {}),
    ],
)
async def test_concurrent_repeats_of_a_request_create_one_run(
    make_broker: Callable[[], Broker], options: dict[str, Any], one_time: bool
) -> None:
    async with with_tasks(broker=make_broker()) as realtime:
        token = realtime.create_trigger_public_token("echo", multiple_use=not one_time)
        answers = await gather(5, lambda _: trigger(realtime, "echo", 1, token=token, key="a", tags="x", **options))
        assert {answer.status for answer in answers} == {200}
        assert len({answer.json["id"] for answer in answers}) == 1
        assert not any(answer.json["isCached"] for answer in answers), "this request created the run"
        assert await count_runs(realtime, "tag:x") == 1


async def test_a_repeat_before_the_first_response_is_not_cached() -> None:
    """The first request had claimed the idempotency key, so the repeat responded as if another request had."""
    for delay in range(12):
        broker = DistantBroker()
        async with with_tasks(broker=broker) as one, with_tasks(broker=broker) as other:
            answers: list[Answer] = []

            async def send(realtime: Realtime, delay: int, answers: list[Answer]) -> None:
                for _ in range(delay):
                    await anyio.lowlevel.checkpoint()
                answers.append(await trigger(realtime, "echo", 1, key="a", idempotencyKey="k"))

            async with anyio.create_task_group() as group:
                group.start_soon(send, one, 0, answers)
                group.start_soon(send, other, delay, answers)
            assert answers[0].json == answers[1].json
            assert not answers[0].json["isCached"]
            assert (await trigger(other, "echo", 1, key="b", idempotencyKey="k")).json["isCached"]


@pytest.mark.parametrize(
    ("anyio_backend", "make_broker", "options"),
    [
        ("asyncio", MemoryBroker, {}),
        ("asyncio", DistantBroker, KEY),
        ("trio", MemoryBroker, KEY),
        ("trio", DistantBroker, {}),
    ],
)
async def test_concurrent_uses_of_a_one_time_token_create_one_run(
    make_broker: Callable[[], Broker], options: dict[str, Any]
) -> None:
    async with with_tasks(broker=make_broker()) as realtime:
        token = realtime.create_trigger_public_token("echo")
        answers = await gather(5, lambda n: trigger(realtime, "echo", n, token=token, key=str(n), tags="x", **options))
        assert await count_runs(realtime, "tag:x") == 1
        rejected = [answer for answer in answers if answer.status == 422]
        assert {answer.json["code"] for answer in rejected} == {"token_spent"}
        accepted = [answer for answer in answers if answer.status == 200]
        assert len({answer.json["id"] for answer in accepted}) == 1
        if not options:  # with an idempotency key, the other requests find the run
            assert len(accepted) == 1


async def gather(times: int, make: Callable[[int], Awaitable[Answer]]) -> list[Answer]:
    answers: list[Answer] = []

    async def run(number: int) -> None:
        answers.append(await make(number))

    async with anyio.create_task_group() as group:
        for number in range(times):
            group.start_soon(run, number)
    return answers


@on_one_loop
async def test_two_processes_on_redis_spend_a_token_once(redis_url: str) -> None:
    async with with_tasks(broker=redis_url) as one, with_tasks(broker=redis_url) as other:
        for number in range(10):
            token = one.create_trigger_public_token("echo", skip_columns=["ttl"])
            tag = f"spent:{number}"
            answers = await gather(
                4,
                lambda n, token=token, tag=tag: trigger((one, other)[n % 2], "echo", n, token=token, tags=tag),  # type: ignore[misc]
            )
            assert sorted(answer.status for answer in answers) == [200, 422, 422, 422]
            assert await count_runs(one, f"tag:{tag}") == 1


@on_one_loop
async def test_two_processes_on_redis_create_one_run_for_one_request(redis_url: str) -> None:
    async with with_tasks(broker=redis_url) as one, with_tasks(broker=redis_url) as other:
        for number in range(10):
            key, tag = f"request-{number}", f"requested:{number}"
            answers = await gather(
                4,
                lambda n, key=key, tag=tag: trigger((one, other)[n % 2], "echo", 1, key=key, tags=tag),  # type: ignore[misc]
            )
            assert {answer.status for answer in answers} == {200}
            assert len({answer.json["id"] for answer in answers}) == 1
            assert await count_runs(one, f"tag:{tag}") == 1


# Idempotency keys


async def test_an_idempotency_key_used_in_process_finds_the_run_over_http() -> None:
    async with with_tasks() as realtime:
        handle = await realtime.trigger("echo", 1, idempotency_key="key")
        answer = await trigger(realtime, "echo", 2, idempotencyKey="key", key="a")
        assert answer.json == {"id": handle.id, "isCached": True}
        assert realtime.verify_token(answer.token).scopes[0] == f"read:runs:{handle.id}"


async def test_an_idempotency_key_expires_after_its_ttl() -> None:
    clock = FakeClock()
    async with with_tasks(clock=clock) as realtime:
        options = {"idempotencyKey": "key", "idempotencyKeyTTL": "5m"}
        first = await trigger(realtime, "echo", 1, **options)
        clock.seconds += 299
        assert (await trigger(realtime, "echo", 1, **options)).json == {"id": first.json["id"], "isCached": True}
        clock.seconds += 2
        assert (await trigger(realtime, "echo", 1, **options)).json["id"] != first.json["id"]


async def test_a_repeated_request_with_an_idempotency_key_is_not_cached() -> None:
    async with with_tasks() as realtime:
        token = realtime.create_trigger_public_token("echo", multiple_use=True)
        for credential in (SECRET, token, realtime.create_trigger_public_token("echo")):
            answers = [
                await trigger(realtime, "echo", 1, token=credential, key="a", idempotencyKey=f"k{credential[-5:]}")
                for _ in range(2)
            ]
            assert answers[0].json == answers[1].json
            assert not answers[0].json["isCached"]


async def test_an_idempotency_key_that_finds_a_run_spends_no_token() -> None:
    async with with_tasks() as realtime:
        earlier, token = (realtime.create_trigger_public_token("echo", owner="user:1") for _ in range(2))
        await trigger(realtime, "echo", 1, token=earlier, idempotencyKey="key")
        assert (await trigger(realtime, "echo", 1, token=token, idempotencyKey="key")).json["isCached"]
        assert not (await trigger(realtime, "echo", 1, token=token, idempotencyKey="new")).json["isCached"]
        assert (await trigger(realtime, "echo", 1, token=token, idempotencyKey="key")).status == 422


async def test_idempotency_keys_of_different_owners_do_not_meet() -> None:
    """An attacker took the key of an invoice first, and the host got the run of the attacker."""
    async with with_tasks() as realtime:
        tokens = [
            realtime.create_trigger_public_token("echo", multiple_use=True, owner=owner)
            for owner in ("user:1", "user:1", "user:2", None, None)
        ]
        answers = [
            await trigger(realtime, "echo", number, token=token, idempotencyKey="invoice-42")
            for number, token in enumerate(tokens)
        ]
        of_host = await realtime.trigger("echo", "of the host", idempotency_key="invoice-42")
        assert [answer.json["isCached"] for answer in answers] == [False, True, False, False, False]
        assert answers[1].json["id"] == answers[0].json["id"]
        assert realtime.verify_token(answers[1].token).scopes == tuple(run_scopes(answers[0].json["id"]))
        assert not of_host.is_cached
        assert await of_host.result(timeout=GUARD_S) == "of the host"


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


@on_one_loop
async def test_a_removed_run_releases_the_key_of_its_owner() -> None:
    async with with_tasks() as realtime:
        token = realtime.create_trigger_public_token("echo", multiple_use=True)
        first = await trigger(realtime, "echo", 1, token=token, idempotencyKey="k")
        await ended(realtime, first.json["id"])
        await realtime.broker.remove(first.json["id"])
        second = await trigger(realtime, "echo", 2, token=token, idempotencyKey="k")
        assert not second.json["isCached"]
        assert (await ended(realtime, second.json["id"])).output == 2


async def test_idempotency_keys_of_different_tasks_do_not_collide() -> None:
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
