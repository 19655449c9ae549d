from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import msgspec
import pytest
from starlette.requests import Request as HostRequest

from asgi_realtime import Cors, InvalidConfiguration, Realtime, Retention, TaskError
from asgi_realtime.asgi.inspector import MAX_ROWS
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.runs.recent import MAX_RUNS
from asgi_realtime.testing import AsgiClient
from tests.inprocess import SECRET, FakeClock, ended, make_realtime

pytestmark = pytest.mark.anyio

KEY = {"authorization": f"Bearer {SECRET}"}
SAME_ORIGIN = {"sec-fetch-site": "same-origin", "cookie": "admin=1"}


def is_admin(request: HostRequest) -> bool:
    return request.cookies.get("admin") == "1"


@pytest.fixture
async def realtime() -> AsyncIterator[Realtime]:
    """One with three runs: `done`, `failed` and `open`."""
    clock = FakeClock()
    async with make_realtime(inspector=True, clock=clock) as realtime:

        @realtime.task("fails")
        async def fails() -> None:
            raise TaskError("no luck")

        async with realtime.open_run("chat", run_id="done", tags=["user:1"], metadata={"a": 1}) as run:
            await realtime.append("Hel")
            clock.seconds += 1
            await realtime.append("lo")
            run.set_output({"text": "Hello"})
        await ended(realtime, await realtime.trigger(fails, tags=["user:2"], run_id="failed"))
        async with realtime.open_run("chat", run_id="open", tags=["user:1"]):
            yield realtime


async def listed(realtime: Realtime, **query: str) -> list[str]:
    response = await AsgiClient(realtime, lifespan=False).get("/inspect/runs", query=query, headers=KEY)
    assert response.status_code == 200, response.text
    return [run["id"] for run in response.json()["runs"]]


# Off, and on


@pytest.mark.parametrize("path", ["/inspect", "/inspector.js", "/inspect/runs", "/inspect/runs/run_1"])
async def test_it_is_off_by_default(path: str) -> None:
    async with make_realtime() as realtime:
        assert realtime.recent is None and realtime.runs.on_stored is None
        assert (await AsgiClient(realtime, lifespan=False).get(path, headers=KEY)).status_code == 404


def test_a_function_turns_it_on() -> None:
    assert make_realtime(authorize_inspector=is_admin).inspector
    with pytest.raises(InvalidConfiguration, match="authorize_inspector is True; allowed is a function"):
        make_realtime(authorize_inspector=True)


async def test_the_page_allows_no_inline_script_and_no_html_from_strings(realtime: Realtime) -> None:
    client = AsgiClient(realtime, lifespan=False)
    page = await client.get("/inspect")
    policy = dict(part.strip().partition(" ")[::2] for part in page.headers["content-security-policy"].split(";"))
    assert (policy["default-src"], policy["script-src"], policy["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    assert policy["require-trusted-types-for"] == "'script'"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<script>" not in page.text and "style=" not in page.text and "onclick" not in page.text
    for folder in ("/", "/inspect/"):  # relative to the page with and without a final slash
        for name, kind in (("inspector.js", "text/javascript"), ("inspector.css", "text/css")):
            assert (await client.get(folder + name)).headers["content-type"] == f"{kind}; charset=utf-8"
    for word in ("innerHTML", "insertAdjacentHTML", "document.write", "localStorage", "sessionStorage"):
        assert word not in (await client.get("/inspector.js")).text


# Access


async def test_the_secret_key_gets_a_token_that_expires_soon(realtime: Realtime) -> None:
    client = AsgiClient(realtime, lifespan=False)
    token = (await client.post("/inspect/token", headers=KEY)).json()["token"]
    claims = realtime.verify_token(token)
    assert (claims.secret, claims.owner, claims.scopes) == (False, "inspector", ("inspect", "read:all", "write:runs"))
    assert claims.expires_at - realtime.clock() <= 15 * 60 + 1
    assert (await client.get("/inspect/runs", headers={"authorization": f"Bearer {token}"})).status_code == 200


async def test_nothing_else_has_access(realtime: Realtime) -> None:
    client = AsgiClient(realtime, lifespan=False)
    public = realtime.create_public_token(scopes=["admin", "read:all"])
    for token, status in ((public, 403), ("wrong", 401), ("", 401)):
        headers = {"authorization": f"Bearer {token}"} if token else SAME_ORIGIN
        for path in ("/inspect/runs", "/inspect/runs/done"):
            assert (await client.get(path, headers=headers)).status_code == status
        assert (await client.post("/inspect/token", headers=headers)).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (SAME_ORIGIN, 200),
        ({**SAME_ORIGIN, "cookie": "admin=0"}, 401),
        ({**SAME_ORIGIN, "sec-fetch-site": "cross-site", "origin": "https://evil.example"}, 403),
        ({"cookie": "admin=1"}, 403),
        ({**SAME_ORIGIN, "authorization": "Bearer wrong"}, 401),
        ({**KEY, "origin": "https://other.example"}, 200),
    ],
)
async def test_a_function_of_the_host_can_replace_the_secret_key(headers: dict[str, str], status: int) -> None:
    async with make_realtime(authorize_inspector=is_admin, cors=Cors()) as realtime:
        response = await AsgiClient(realtime, lifespan=False).post("/inspect/token", headers=headers)
        assert response.status_code == status, response.text
        assert ("token" in response.json()) is (status == 200)


async def test_a_session_that_authorize_allows_is_not_enough() -> None:
    async with make_realtime(inspector=True, authorize=lambda request, resource: True) as realtime:
        response = await AsgiClient(realtime, lifespan=False).get("/inspect/runs", headers=SAME_ORIGIN)
        assert response.status_code == 401


# The list


async def test_the_list_has_the_newest_runs_first(realtime: Realtime) -> None:
    assert await listed(realtime) == ["open", "failed", "done"]
    assert await listed(realtime, limit="1") == ["open"]


async def test_the_list_is_filtered_by_task_status_and_tag(realtime: Realtime) -> None:
    assert await listed(realtime, task="chat") == ["open", "done"]
    assert await listed(realtime, status="completed,FAILED") == ["failed", "done"]
    assert await listed(realtime, tag="user:1") == ["open", "done"]
    assert await listed(realtime, tag="user:1", status="EXECUTING") == ["open"]
    assert await listed(realtime, tag="nobody") == []


@pytest.mark.parametrize("query", [{"status": "DONE"}, {"limit": "0"}, {"limit": str(MAX_ROWS + 1)}, {"limit": "x"}])
async def test_a_wrong_filter_is_rejected(realtime: Realtime, query: dict[str, str]) -> None:
    response = await AsgiClient(realtime, lifespan=False).get("/inspect/runs", query=query, headers=KEY)
    assert (response.status_code, response.json()["code"]) == (400, "invalid_request")
    assert "allowed are" in response.json()["error"]


async def test_a_list_has_no_contents_of_runs(realtime: Realtime) -> None:
    response = await AsgiClient(realtime, lifespan=False).get("/inspect/runs", headers=KEY)
    failed = response.json()["runs"][1]
    assert failed["error"] == "TaskError"
    assert set(failed) == {
        *("id", "task", "status", "version", "tags", "error"),
        *("createdAtMs", "startedAtMs", "finishedAtMs", "updatedAtMs"),
    }
    assert "Hello" not in response.text and "no luck" not in response.text


async def test_a_full_list_says_that_it_is_a_sample(realtime: Realtime) -> None:
    client = AsgiClient(realtime, lifespan=False)
    assert realtime.recent is not None
    record = await realtime.runs.get("done")
    for number in range(MAX_RUNS):
        if number == MAX_RUNS - 10:
            assert (await client.get("/inspect/runs", headers=KEY)).json()["isSample"] is False
        changed_ms = round(realtime.clock() * 1000) - 2000
        realtime.recent.note(msgspec.structs.replace(record, id=f"run_{number}", updated_at_ms=changed_ms))
    state = (await client.get("/inspect/runs", headers=KEY)).json()
    assert (state["isSample"], len(state["runs"]), state["found"]) == (True, 100, MAX_RUNS + 1)
    assert state["perSecond"] == MAX_RUNS / 2, "without the one that is listed because it failed"
    for number in range(MAX_ROWS + 1):
        async with realtime.open_run("many", run_id=f"many_{number:03}", tags=["many"]):
            pass
    tagged = (await client.get("/inspect/runs", query={"tag": "many"}, headers=KEY)).json()
    assert (tagged["isSample"], tagged["found"], tagged["runs"][0]["id"]) == (True, MAX_ROWS, f"many_{MAX_ROWS}")
    tagged = (await client.get("/inspect/runs", query={"tag": "user:1"}, headers=KEY)).json()
    assert (tagged["isSample"], tagged["found"]) == (False, 2)


async def test_the_list_tells_how_the_broker_and_the_process_are(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_realtime(inspector=True) as realtime, realtime.open_run("chat", run_id="open"):
        client = AsgiClient(realtime, lifespan=False, headers=KEY)
        async with client.stream("/v1/streams/open/default"), client.stream("/v1/runs/open"):
            state = (await client.get("/inspect/runs")).json()
            assert state["process"]["subscriptions"] == {"stream": 1, "feed": 1}
            assert (await client.get("/inspect/runs/open")).json()["readers"] == 2
        assert state["broker"] == {"name": "MemoryBroker", "isShared": False, "status": "ok", "warnings": []}

        async def ping(self: MemoryBroker) -> None:
            raise BrokerUnavailable("it is down")

        monkeypatch.setattr(MemoryBroker, "ping", ping)
        assert (await client.get("/inspect/runs")).json()["broker"]["status"] == "it is down"


# One run


async def test_a_run_is_shown_with_its_streams(realtime: Realtime) -> None:
    client = AsgiClient(realtime, lifespan=False)
    shown = (await client.get("/inspect/runs/done", headers=KEY)).json()
    assert (shown["run"]["output"], shown["run"]["metadata"]) == ({"text": "Hello"}, {"a": 1})
    (stream,) = shown["streams"]
    first, last = stream.pop("firstAtMs"), stream.pop("lastAtMs")
    assert stream == {"key": "default", "chunks": 2, "removed": 0}
    assert shown["summary"]["startedAtMs"] <= first < last <= shown["summary"]["finishedAtMs"]
    assert (await client.get("/inspect/runs/gone", headers=KEY)).status_code == 404


async def test_the_first_chunk_that_is_left_tells_what_was_removed() -> None:
    async with make_realtime(inspector=True, retention=Retention(stream_bytes=10)) as realtime:
        async with realtime.open_run("chat", run_id="long"):
            for _ in range(5):
                await realtime.append("12345")
        response = await AsgiClient(realtime, lifespan=False).get("/inspect/runs/long", headers=KEY)
        (stream,) = response.json()["streams"]
        assert (stream["chunks"], stream["removed"] > 0) == (5, True)


async def test_a_run_is_canceled_also_without_the_api() -> None:
    async with make_realtime(inspector=True, api=False) as realtime:

        @realtime.task("forever")
        async def forever() -> None:
            await anyio.sleep_forever()

        handle = await realtime.trigger(forever)
        client = AsgiClient(realtime, lifespan=False)
        token = (await client.post("/inspect/token", headers=KEY)).json()["token"]
        path = f"/inspect/runs/{handle.id}/cancel"
        for credential, status in ((handle.public_access_token, 403), (token, 200)):
            response = await client.post(path, headers={"authorization": f"Bearer {credential}"})
            assert response.status_code == status
        assert (await ended(realtime, handle)).status == "CANCELED"
