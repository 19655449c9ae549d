"""What the holder of one browser token does at worst, and what another user then still has.

Each attack is complete: real requests of one owner against an app with small limits, and the victim's own requests
afterwards. Tests of the single limits are beside the packages that enforce them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

from asgi_realtime import Limits, Realtime, Retention, Run
from asgi_realtime.testing import AsgiClient
from tests.asgi.official_sdk import call, trigger
from tests.inprocess import GUARD_S, ended, make_realtime

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

LIMITS = Limits(
    bytes_per_owner=512 * 1024,
    open_runs_per_owner=8,
    runs_per_minute_per_owner=1000,
    runs_per_owner=50,
    feed_runs=40,
    subscribers=20,
    task_concurrency=10,
)
TAG = "user:victim"


@pytest.fixture
async def app() -> AsyncIterator[Realtime]:
    realtime = make_realtime(limits=LIMITS, retention=Retention(total_bytes=4 * 1024 * 1024))

    @realtime.task("echo")
    async def echo(payload: Any) -> Any:
        return payload

    @realtime.task("hold")
    async def hold(payload: Any, run: Run) -> Any:
        return await run.input("go").get()

    async with realtime:
        yield realtime


def attacker(app: Realtime) -> str:
    return app.create_trigger_public_token(["echo", "hold"], multiple_use=True, owner="user:attacker")


async def feed(app: Realtime, tag: str = TAG) -> list[str]:
    """The ids of the runs in the snapshot of a tag, over server-sent events and as a shape; both must have the same."""
    token = app.create_public_token(scopes={"read": {"tags": [tag]}})
    rows = (await call(app, "GET", f"/v1/runs?tags={tag}&offset=-1", token=token)).json
    shape = [row["value"]["friendlyId"] for row in rows if "value" in row]
    found: list[str] = []
    async with AsgiClient(app, lifespan=False).stream(f"/v1/runs?tags={tag}", token=token) as response:
        assert response.status_code == 200
        while len(found) < len(shape):
            event = await response.next_event()
            if event.event == "run":
                found.append(json.loads(event.data)["id"])
    assert sorted(found) == sorted(shape)
    return found


async def test_it_cannot_evict_or_cut_what_others_have(app: Realtime) -> None:
    mine = await app.trigger("echo", "mine", tags=[TAG])
    await ended(app, mine)
    live = await app.trigger("hold", tags=[TAG])
    await app.append("first", run=live)

    token = attacker(app)
    statuses = set()
    for number in range(150):
        options = {"delay": "20d"} if number % 3 == 0 else {}
        answer = await trigger(
            app, "echo", "x" * 100_000, token=token, metadata='{"a":"%s"}' % ("y" * 20_000), **options
        )
        statuses.add(answer.status)
    assert 429 in statuses

    assert (await app.get_run(mine)).output == "mine"
    await app.append("second", run=live)
    reader = app.read(live, timeout=GUARD_S)
    assert [await anext(reader), await anext(reader)] == ["first", "second"]
    later = await trigger(app, "echo", "still", token=app.create_trigger_public_token("echo", owner=TAG))
    assert (await ended(app, later.json["id"])).output == "still"


async def test_it_cannot_delay_the_runs_of_others(app: Realtime) -> None:
    token = attacker(app)
    statuses = [(await trigger(app, "hold", token=token)).status for _ in range(30)]
    assert statuses.count(200) == LIMITS.open_runs_per_owner
    run = await app.trigger("hold")
    await app.send_input(run, "go", "now")
    assert (await ended(app, run)).output == "now"


async def test_it_cannot_crowd_others_out_of_their_feed(app: Realtime) -> None:
    mine = [(await app.trigger("echo", number, tags=[TAG])).id for number in range(5)]
    token = attacker(app)
    for _ in range(2 * LIMITS.feed_runs):
        await trigger(app, "echo", token=token, tags=TAG)
    assert set(mine) <= set(await feed(app))


async def test_it_cannot_take_the_idempotency_key_of_the_host(app: Realtime) -> None:
    answer = await trigger(app, "echo", "theirs", token=attacker(app), idempotencyKey="invoice-42")
    assert answer.status == 200
    run = await app.trigger("echo", "ours", idempotency_key="invoice-42")
    assert not run.is_cached
    assert (await ended(app, run)).output == "ours"


POISON = (
    *("[" * depth + "]" * depth for depth in (50, 99, 100, 101, 500, 959, 2000)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (99, 100, 101, 959)),
    '"\\ud800"',
    '{"\\ud800":1}',
    '"\\u0000\\u2028\\u0085"',
    "9" * 400,
    "1e400",
    "-0.0",
    '{"__proto__":{"a":1},"constructor":1}',
    "[" + "{}," * 5000 + "{}]",
)


async def test_it_cannot_break_the_feed_of_a_tag(app: Realtime) -> None:
    """What can be stored can also be read, by both kinds of clients and by the host."""
    stored = []
    for number, value in enumerate(POISON):
        token = app.create_trigger_public_token("echo", multiple_use=True, owner=f"user:{number}")
        bodies = (
            f'{{"payload":{value},"options":{{"tags":"{TAG}"}}}}',
            json.dumps({"payload": 1, "options": {"tags": TAG, "metadata": f'{{"m":{value}}}'}}),
            json.dumps({"payload": value, "options": {"tags": TAG, "payloadType": "application/super+json"}}),
        )
        for body in bodies:
            answer = await call(app, "POST", "/api/v1/tasks/echo/trigger", body.encode(), token=token)
            assert answer.status in (200, 400, 413, 422, 429), (body[:100], answer.json)
            if answer.status == 200:
                stored.append(answer.json["id"])
    assert len(stored) >= len(POISON) // 2
    for run_id in stored:
        record = await ended(app, run_id)
        assert (await call(app, "GET", f"/api/v3/runs/{run_id}")).status == 200
        assert record.is_success, record.end
    mine = await app.trigger("echo", tags=[TAG])
    assert mine.id in await feed(app)


async def handles_of_a_browser(app: Realtime) -> list[tuple[str, str]]:
    answers = [await trigger(app, "hold", token=attacker(app)) for _ in range(4)]
    return [(answer.json["id"], answer.token) for answer in answers * 5]


async def handles_of_a_route(app: Realtime) -> list[tuple[str, str]]:
    handles = [await app.trigger("hold", owner="user:attacker") for _ in range(25)]
    return [(handle.id, handle.public_access_token) for handle in handles]


@pytest.mark.parametrize("handles", [handles_of_a_browser, handles_of_a_route])
async def test_it_cannot_take_all_subscriptions(
    app: Realtime, handles: Callable[[Realtime], Awaitable[list[tuple[str, str]]]]
) -> None:
    found = await handles(app)
    client = AsgiClient(app, lifespan=False)
    mine = await app.trigger("hold")
    refused = anyio.Event()

    async def read(run_id: str, token: str) -> None:
        async with client.stream(f"/v1/streams/{run_id}/default", token=token) as response:
            if response.status_code == 429:
                refused.set()
            else:
                await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        for run_id, token in found:
            tasks.start_soon(read, run_id, token)
        await refused.wait()
        async with client.stream(f"/v1/streams/{mine.id}/default", token=mine.public_access_token) as response:
            assert response.status_code == 200
        tasks.cancel_scope.cancel()


async def test_it_cannot_read_write_or_cancel_what_it_does_not_name(app: Realtime) -> None:
    """Every route, with the token of another run and with a trigger token."""
    mine = await app.trigger("hold", tags=[TAG])
    own = await trigger(app, "hold", token=attacker(app))
    paths = (
        ("GET", f"/v1/streams/{mine.id}/default"),
        ("GET", f"/v1/streams/{mine.id}/input/go"),
        ("POST", f"/v1/streams/{mine.id}/input/go"),
        ("PUT", f"/v1/streams/{mine.id}/self/default"),
        ("POST", f"/v1/streams/{mine.id}/self/default"),
        ("POST", f"/v1/streams/{mine.id}/self/default/append"),
        ("GET", f"/v1/runs?tags={TAG}&offset=-1"),
        ("GET", f"/v1/runs/{mine.id}?offset=-1"),
        ("GET", f"/api/v3/runs/{mine.id}"),
        ("POST", f"/api/v2/runs/{mine.id}/cancel"),
        ("GET", f"/api/v1/runs/{mine.id}/metadata"),
        ("PUT", f"/api/v1/runs/{mine.id}/metadata"),
        ("POST", f"/api/v1/runs/{mine.id}/tags"),
        ("POST", "/api/v1/auth/public-tokens"),
        ("POST", "/api/v1/auth/jwt/claims"),
        ("POST", "/api/v3/batches"),
        ("POST", "/api/v1/tasks/missing/trigger"),
    )
    for token in (own.token, attacker(app)):
        for method, path in paths:
            answer = await call(app, method, path, {}, token=token)
            assert answer.status == 403, (method, path, answer.json)
    assert not (await app.get_run(mine)).is_completed
