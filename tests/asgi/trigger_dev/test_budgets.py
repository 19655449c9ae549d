"""What one owner of public tokens can start and store, over HTTP."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from asgi_realtime import BrokerUnavailable, Limits, Realtime, Run
from asgi_realtime.asgi.routes import ROUTES
from asgi_realtime.tasks import budgets
from tests.asgi.official_sdk import (
    Answer,
    call,
    create_batch,
    fill_batch,
    item,
    lines,
    trigger,
    with_tasks,
)
from tests.inprocess import SECRET, FakeClock, ended, make_realtime

pytestmark = pytest.mark.anyio


def make_app(clock: FakeClock | None = None, **limits: Any) -> Realtime:
    realtime = with_tasks(limits=Limits(**limits), **({} if clock is None else {"clock": clock}))

    @realtime.task("hold")
    async def hold(payload: Any, run: Run) -> Any:
        return await run.input("go").get()

    return realtime


def token_of(realtime: Realtime, owner: str | None = "user:1", *tasks: str) -> str:
    return realtime.create_trigger_public_token(tasks or ("echo", "hold"), multiple_use=True, owner=owner)


def refused(answer: Answer, message: str, *, retry_after: str | None = "5", status: int = 429) -> bool:
    assert (answer.status, answer.json["code"]) == (status, "limit_exceeded"), answer.json
    assert message in answer.error
    assert answer.headers.get("retry-after") == retry_after
    return True


async def listed(realtime: Realtime, owner: str = "user:1") -> list[str]:
    return [change.run_id for change in (await realtime.broker.changes(f"owner:{owner}")).items]


async def test_open_runs_are_limited_per_owner() -> None:
    async with make_app(open_runs_per_owner=2) as realtime:
        runs = [await trigger(realtime, "hold", token=token_of(realtime)) for _ in range(2)]
        answer = await trigger(realtime, "echo", token=token_of(realtime))
        assert refused(answer, "has 2 open runs, and this request adds 1; limit 2 (Limits.open_runs_per_owner)")
        for other in (token_of(realtime, "user:2"), token_of(realtime, None), token_of(realtime, None), SECRET):
            assert (await trigger(realtime, "echo", token=other)).status == 200
        assert not (await realtime.trigger("echo")).is_cached
        await realtime.cancel(runs[0].json["id"])
        await ended(realtime, runs[0].json["id"])
        assert (await trigger(realtime, "echo", token=token_of(realtime))).status == 200


async def test_concurrent_requests_do_not_exceed_a_budget_together() -> None:
    async with make_app(open_runs_per_owner=3) as realtime:
        statuses: list[int] = []

        async def send() -> None:
            statuses.append((await trigger(realtime, "hold", token=token_of(realtime))).status)

        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(send)
        assert sorted(statuses) == [200] * 3 + [429] * 5


async def test_a_run_that_is_created_while_the_account_is_read_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of runs that the second request read was older than the run of the first one."""
    async with make_app(open_runs_per_owner=1) as realtime:
        broker, created, may_create = realtime.broker, anyio.Event(), anyio.Event()
        commit, changes, statuses = broker.commit, broker.changes, []

        async def delayed_commit(*args: Any, **kwargs: Any) -> int:
            await may_create.wait()
            return await commit(*args, **kwargs)

        async def outdated_changes(*args: Any, **kwargs: Any) -> Any:
            read = await changes(*args, **kwargs)
            may_create.set()
            await created.wait()
            return read

        async def first() -> None:
            statuses.append((await trigger(realtime, "hold", token=token_of(realtime))).status)
            created.set()

        with monkeypatch.context() as patched:
            patched.setattr(broker, "commit", delayed_commit)
            async with anyio.create_task_group() as group:
                group.start_soon(first)
                await anyio.wait_all_tasks_blocked()
                patched.setattr(broker, "changes", outdated_changes)
                statuses.append((await trigger(realtime, "hold", token=token_of(realtime))).status)
        assert statuses == [200, 429]


async def test_runs_per_minute_are_limited_and_the_response_says_when_to_retry() -> None:
    clock = FakeClock()
    async with make_app(clock, runs_per_minute_per_owner=2) as realtime:
        token = token_of(realtime)
        assert (await trigger(realtime, "echo", token=token)).status == 200
        clock.seconds += 20
        assert (await trigger(realtime, "echo", token=token)).status == 200
        clock.seconds += 10
        answer = await trigger(realtime, "echo", token=token)
        assert refused(answer, "2 runs within a minute", retry_after="30")
        assert answer.headers["x-ratelimit-reset"] == str(round((clock.seconds + 30) * 1000))
        clock.seconds += 30
        assert (await trigger(realtime, "echo", token=token)).status == 200


async def test_removed_runs_still_count_for_the_minute() -> None:
    async with make_app(runs_per_minute_per_owner=3, runs_per_owner=1) as realtime:
        statuses = [(await trigger(realtime, "echo", token=token_of(realtime))).status for _ in range(4)]
        assert statuses == [200, 200, 200, 429]


async def test_an_owner_loses_its_own_oldest_ended_runs() -> None:
    async with make_app(runs_per_owner=3) as realtime:
        of_host = [(await realtime.trigger("echo", n)).id for n in range(3)]
        of_other = (await trigger(realtime, "echo", token=token_of(realtime, "user:2"))).json["id"]
        held = (await trigger(realtime, "hold", token=token_of(realtime))).json["id"]
        mine = []
        for _ in range(4):
            mine.append((await trigger(realtime, "echo", token=token_of(realtime))).json["id"])
            await ended(realtime, mine[-1])
        records = await realtime.runs.load([*of_host, of_other, held, *mine])
        assert [record is not None for record in records] == [True] * 5 + [False] * 2 + [True] * 2


async def test_of_runs_that_ended_in_the_same_millisecond_the_first_one_is_removed() -> None:
    async with make_app(FakeClock(), runs_per_owner=3) as realtime:
        mine = []
        for _ in range(12):
            mine.append((await trigger(realtime, "echo", token=token_of(realtime))).json["id"])
            await ended(realtime, mine[-1])
            assert await listed(realtime) == mine[-3:]


async def test_an_owner_holds_at_most_half_of_a_feed() -> None:
    """1,001 runs under the tag of another user pushed their own out of their list."""
    async with make_app(feed_runs=4) as realtime:
        victim = (await realtime.trigger("echo", tags=["user:victim"])).id
        for _ in range(8):
            run = await trigger(realtime, "echo", token=token_of(realtime), tags="user:victim")
            await ended(realtime, run.json["id"])
        changes = await realtime.broker.changes("tag:user:victim", limit=4)
        assert victim in [change.run_id for change in changes.items]


async def test_stored_bytes_are_limited_per_owner() -> None:
    async with make_app(bytes_per_owner=60_000) as realtime:

        async def store(task: str, size: int) -> Answer:
            return await trigger(realtime, task, "x" * size, token=token_of(realtime))

        first, *held = [(await store(task, 10_000)).json["id"] for task in ("echo", "hold", "hold")]
        await ended(realtime, first)
        answer = await store("hold", 32_000)
        assert refused(answer, "bytes in open runs, and this request adds ")
        assert "limit 60000 (Limits.bytes_per_owner)" in answer.error
        last = await store("hold", 20_000)
        assert last.status == 200
        assert await listed(realtime) == [*held, last.json["id"]], "the ended run made room"
        assert refused(await store("echo", 60_000), "limit 60000", status=422, retry_after=None)


async def test_inputs_count_as_stored_bytes() -> None:
    async with make_app(bytes_per_owner=20_000) as realtime:
        host_run = await realtime.trigger("hold")
        token = realtime.create_public_token(scopes=["write:inputStreams"], owner="user:1")
        path = f"/realtime/v1/streams/{host_run.id}/input/other"
        statuses = []
        for _ in range(12):
            answer = await call(realtime, "POST", path, {"data": "x" * 1500}, token=token)
            statuses.append(answer.status)
        assert statuses == [200] * 9 + [429] * 3
        assert (await call(realtime, "POST", path, {"data": 1}, token=SECRET)).status == 200
        await realtime.cancel(host_run.id)
        await ended(realtime, host_run.id)
        await realtime.broker.remove(host_run.id)
        assert (await trigger(realtime, "echo", "x" * 10_000, token=token_of(realtime))).status == 429
        again = await realtime.trigger("hold")
        path = f"/realtime/v1/streams/{again.id}/input/other"
        assert (await call(realtime, "POST", path, {"data": 1}, token=token)).status == 200


async def test_inputs_that_are_not_stored_cost_nothing() -> None:
    async with make_app(bytes_per_owner=20_000) as realtime:
        run = await realtime.trigger("echo")
        await ended(realtime, run.id)
        token = realtime.create_public_token(scopes=["write:inputStreams"], owner="user:1")
        for _ in range(20):
            path = f"/realtime/v1/streams/{run.id}/input/other"
            assert (await call(realtime, "POST", path, {"data": "x" * 1500}, token=token)).status == 400


async def test_open_batches_count_as_runs_of_the_minute() -> None:
    """An open batch is stored for a day, so a token could fill the broker with them."""
    async with make_app(runs_per_minute_per_owner=2) as realtime:
        token = realtime.create_batch_trigger_public_token(["hold"], multiple_use=True, owner="user:1")
        for _ in range(2):
            await open_batch(realtime, 1, token)
        answer = await create_batch(realtime, 1, token=token, taskIdentifiers=["hold"])
        assert refused(answer, "runs within a minute", retry_after=answer.headers["retry-after"])
        assert (await create_batch(realtime, 1)).status == 202


async def test_an_account_has_what_other_processes_did() -> None:
    """A second `Realtime` on the same broker is another process, or the same one after a restart."""
    limits = Limits(open_runs_per_owner=2, runs_per_minute_per_owner=5)
    async with make_app() as one, make_realtime(broker=one.broker, limits=limits) as other:

        @other.task("hold")
        async def hold() -> None: ...

        runs = [(await trigger(one, "hold", token=token_of(one))).json["id"] for _ in range(2)]
        assert refused(await trigger(other, "hold", token=token_of(one)), "has 2 open runs")
        await one.cancel(runs[0])
        await ended(one, runs[0])
        third = await trigger(other, "hold", token=token_of(one))
        assert third.status == 200
        await ended(other, third.json["id"])
        for number in range(2):
            assert (await trigger(one, "echo", number, token=token_of(one))).status == 200
        assert refused(await trigger(other, "hold", token=token_of(one)), "5 runs within a minute", retry_after="60")


async def test_a_run_that_was_lost_does_not_stay_open() -> None:
    """Redis can lose a run, and no change announces that."""
    async with make_app(open_runs_per_owner=1) as realtime:
        run = (await trigger(realtime, "hold", token=token_of(realtime))).json["id"]
        assert (await trigger(realtime, "hold", token=token_of(realtime))).status == 429
        await realtime.broker.remove(run)
        assert (await trigger(realtime, "hold", token=token_of(realtime))).status == 200


async def test_accounts_that_are_not_used_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "MAX_ACCOUNTS", 2)
    async with make_app(open_runs_per_owner=1) as realtime:
        for owner in ("user:1", "user:2", "user:3"):
            assert (await trigger(realtime, "hold", token=token_of(realtime, owner))).status == 200
        assert list(realtime.tasks.budgets._accounts) == ["user:2", "user:3"]
        assert (await trigger(realtime, "hold", token=token_of(realtime))).status == 429


async def test_a_run_that_cannot_be_removed_does_not_fail_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest run could not be removed, but the new one has been created."""
    async with make_app(runs_per_owner=1) as realtime:
        await ended(realtime, (await trigger(realtime, "echo", token=token_of(realtime))).json["id"])

        async def fail(run_id: str) -> None:
            raise BrokerUnavailable("no answer")

        monkeypatch.setattr(realtime.broker, "remove", fail)
        assert (await trigger(realtime, "echo", token=token_of(realtime))).status == 200


async def test_the_delay_is_limited_for_public_tokens_only() -> None:
    async with make_app() as realtime:
        answer = await trigger(realtime, "echo", token=token_of(realtime), delay="3000d")
        message = "delay is 259200000 seconds, limit 2592000 for a public token (Limits.delay_per_owner)"
        assert refused(answer, message, status=422, retry_after=None)
        assert (await trigger(realtime, "echo", token=token_of(realtime), delay="30d")).status == 200
        assert (await trigger(realtime, "echo", delay="3000d")).status == 200


async def test_a_repeated_request_costs_nothing() -> None:
    async with make_app(open_runs_per_owner=1) as realtime:
        once = realtime.create_trigger_public_token("hold", owner="user:1")
        made = await trigger(realtime, "hold", token=once, key="call-1", idempotencyKey="k")
        for _ in range(2):
            again = await trigger(realtime, "hold", token=once, key="call-1", idempotencyKey="k")
            assert (again.status, again.json) == (200, {"id": made.json["id"], "isCached": False})
        cached = await trigger(realtime, "hold", token=token_of(realtime), idempotencyKey="k")
        assert cached.json == {"id": made.json["id"], "isCached": True}
        assert (await trigger(realtime, "hold", token=token_of(realtime))).status == 429
        spent = await trigger(realtime, "hold", token=once, key="call-2")
        assert (spent.status, spent.json["code"]) == (422, "token_spent")


async def test_a_request_beyond_a_budget_does_not_spend_its_token() -> None:
    async with make_app(open_runs_per_owner=1) as realtime:
        held = await trigger(realtime, "hold", token=token_of(realtime))
        once = realtime.create_trigger_public_token("hold", owner="user:1")
        assert (await trigger(realtime, "hold", token=once)).status == 429
        await realtime.cancel(held.json["id"])
        await ended(realtime, held.json["id"])
        assert (await trigger(realtime, "hold", token=once)).status == 200


async def test_a_failed_trigger_releases_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_app(open_runs_per_owner=1) as realtime:

        async def fail(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError

        with monkeypatch.context() as patched:
            patched.setattr(realtime.broker, "commit", fail)
            assert (await trigger(realtime, "hold", token=token_of(realtime))).status == 500
        assert (await trigger(realtime, "hold", token=token_of(realtime))).status == 200


async def test_a_batch_is_within_the_budgets_or_starts_nothing() -> None:
    async with make_app(open_runs_per_owner=3) as realtime:
        token = realtime.create_batch_trigger_public_token(["hold"], multiple_use=True, owner="user:1")
        held = await trigger(realtime, "hold", token=token_of(realtime))
        too_many = lines(*(item(n, n, "hold") for n in range(4)))
        answer = await fill_batch(realtime, await open_batch(realtime, 4, token), too_many, token=token)
        assert refused(answer, "adds 4; limit 3", status=422, retry_after=None)
        batch_id, items = await open_batch(realtime, 3, token), lines(*(item(n, n, "hold") for n in range(3)))
        assert refused(await fill_batch(realtime, batch_id, items, token=token), "has 1 open runs")
        assert len(await listed(realtime)) == 1
        await realtime.cancel(held.json["id"])
        await ended(realtime, held.json["id"])
        for accepted in (3, 0):
            answer = await fill_batch(realtime, batch_id, items, token=token)
            assert (answer.status, answer.json["itemsAccepted"]) == (200, accepted), answer.json
        assert len(await listed(realtime)) == 4


async def open_batch(realtime: Realtime, count: int, token: str) -> str:
    answer = await create_batch(realtime, count, token=token, taskIdentifiers=["hold"])
    assert answer.status == 202, answer.json
    return str(answer.json["id"])


async def test_no_route_reads_the_topic_of_an_owner() -> None:
    """The topic lists all runs of a user. Only the accounts read it."""
    async with make_app() as realtime:
        run = (await trigger(realtime, "echo", token=token_of(realtime, "user:1"))).json["id"]
        await ended(realtime, run)
        assert await listed(realtime) == [run]
        token = realtime.create_public_token(scopes=["read:tags:owner:user:1", "read:batch:owner:user:1"])
        for name in ("owner:user:1", "user:1"):
            for path in (f"/realtime/v1/batches/{name}", f"/realtime/v1/runs/{name}", f"/api/v2/batches/{name}"):
                assert (await call(realtime, "GET", path, token=token)).status != 200
        answer = await call(realtime, "GET", "/realtime/v1/runs?tags=owner:user:1", token=token)
        assert run not in str(answer.json)
        assert not any("owner" in route.pattern for route in ROUTES)


async def test_the_waiting_runs_of_an_owner_delay_the_run_of_another_by_one() -> None:
    started: list[str] = []
    realtime, go = make_app(), anyio.Event()

    @realtime.task("one", concurrency_limit=1)
    async def one(run: Run) -> None:
        started.append(run.record.token_owner or "host")
        await go.wait()

    async with realtime:
        for owner in ("user:1",) * 5 + ("user:2",):
            assert (await trigger(realtime, "one", token=token_of(realtime, owner, "one"))).status == 200
        await realtime.trigger("one")
        go.set()
        for run_id in await listed(realtime):
            await ended(realtime, run_id)
    assert started == ["user:1", "user:1", "user:2", "host", "user:1", "user:1", "user:1"]
