"""Requests that trigger one run however often they come: repeated, with one-time tokens, or with idempotency keys."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime import Realtime, Retention
from asgi_realtime.brokers.base import Broker
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.runs.handles import run_scopes
from asgi_realtime.tasks import launch
from tests.asgi.official_sdk import KEY, REQUEST_KINDS, Answer, call, count_runs, on_one_loop, trigger, with_tasks
from tests.brokers.backends import DistantBroker
from tests.inprocess import GUARD_S, SECRET, FakeClock, ended

pytestmark = pytest.mark.anyio

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
