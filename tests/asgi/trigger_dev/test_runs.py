from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.config import Limits
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.runs import Status
from asgi_realtime.testing import AsgiClient
from asgi_realtime.testing.driver import make_scope
from tests.asgi.standin import SECRET, StandIn

pytestmark = pytest.mark.anyio

RETRIEVE = "/api/v3/runs/run_1"
CANCEL = "/api/v2/runs/run_1/cancel"
INPUT = "/v1/streams/run_1/input/approval"
WRITE = "write:inputStreams:run_1"


async def test_retrieve_gives_the_run(host: StandIn) -> None:
    await host.create(payload={"a": 1}, tags=["x"])
    response = await AsgiClient(host).get(RETRIEVE, headers=host.headers())
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    run = json.loads(response.body)
    assert (run["id"], run["status"], run["payload"], run["tags"]) == ("run_1", "EXECUTING", {"a": 1}, ["x"])


async def test_retrieve_leaves_out_what_the_token_forbids(host: StandIn) -> None:
    await host.create(payload=1)
    headers = {"authorization": f"Bearer {host.token(skip_columns=['payload'])}"}
    response = await AsgiClient(host).get(RETRIEVE, headers=headers)
    assert "payload" not in json.loads(response.body)


async def test_retrieve_authenticates_then_finds_then_authorises(host: StandIn) -> None:
    assert (await AsgiClient(host).get(RETRIEVE)).status_code == 401
    assert (await AsgiClient(host).get(RETRIEVE, headers=host.headers())).status_code == 404
    await host.create()
    assert (await AsgiClient(host).get(RETRIEVE, headers=host.headers("read:runs:run_2"))).status_code == 403


async def test_a_run_that_its_token_names_is_asked_for_again(host: StandIn) -> None:
    """A handle is often in the browser before its run is in the broker; other 404s are final for the client."""
    for scopes, again in ((("read:runs:run_1",), "true"), (("read:runs",), None), (("read:runs:run_2",), None)):
        response = await AsgiClient(host).get(RETRIEVE, headers=host.headers(*scopes))
        assert (response.status_code, response.headers.get("x-should-retry")) == (404, again)
        assert json.loads(response.body)["code"] == "run_not_found"
    response = await AsgiClient(host).get(RETRIEVE, headers={"authorization": f"Bearer {SECRET}"})
    assert (response.status_code, response.headers.get("x-should-retry")) == (404, None)


async def test_cancel_needs_the_secret_key_or_a_scope_for_it(host: StandIn) -> None:
    await host.create()
    assert (await AsgiClient(host).post(CANCEL)).status_code == 401
    for scope in ("read:runs:run_1", "write:runs:run_2", WRITE):
        assert (await AsgiClient(host).post(CANCEL, headers=host.headers(scope))).status_code == 403
    response = await AsgiClient(host).post(CANCEL, headers=host.headers("write:runs:run_1"))
    assert (response.status_code, json.loads(response.body)) == (200, {"id": "run_1"})
    assert (await host.get("run_1")).status is Status.CANCELED
    response = await AsgiClient(host).post(CANCEL, headers={"authorization": f"Bearer {SECRET}"})
    assert response.status_code == 200
    missing = await AsgiClient(host).post(CANCEL.replace("run_1", "run_2"), headers=host.headers("admin"))
    assert missing.status_code == 404


async def test_what_is_sent_to_an_input_is_in_its_stream(host: StandIn) -> None:
    await host.create()
    response = await AsgiClient(host).post(INPUT, headers=host.headers(WRITE), body=b'{"data": {"ok":true}}')
    assert (response.status_code, json.loads(response.body)) == (200, {"ok": True})
    page = await host.broker.read(StreamKey("run_1", "$trigger.input:approval"))
    assert [entry.data for entry in page.entries] == [b'{"ok":true}']


async def test_an_input_is_tailed_like_a_stream(host: StandIn) -> None:
    await host.create()
    async with AsgiClient(host).stream(INPUT, headers=host.headers()) as response:
        assert response.status_code == 200
        assert await response.chunk() == b"retry: 1000\n\n: connected\n\n"
        await AsgiClient(host).post(INPUT, headers=host.headers(WRITE), body=b'{"data": "yes"}')
        assert await response.chunk() == b'id: 0\ndata: "yes"\n\n'
        await host.finish()
        assert [event.event for event in await response.read_all_events()] == ["end"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"1", b"null", b'{"Data": 1}', b"\xff", b'{"data": NaN}', b"[" * 100_000]
)
async def test_a_malformed_input_is_400(host: StandIn, body: bytes) -> None:
    await host.create()
    response = await AsgiClient(host).post(INPUT, headers=host.headers(WRITE), body=body)
    assert response.status_code == 400
    assert json.loads(response.body)["code"] == "invalid_request"


@pytest.mark.parametrize("data", [None, False, 0, "", "text\n", [], {"a": [1, None]}])
async def test_any_json_is_an_input(host: StandIn, data: Any) -> None:
    await host.create()
    body = json.dumps({"data": data}).encode()
    assert (await AsgiClient(host).post(INPUT, headers=host.headers(WRITE), body=body)).status_code == 200


async def test_an_input_that_is_too_large_is_413() -> None:
    host = StandIn(limits=Limits(input_bytes=100))
    await host.create()
    headers = host.headers(WRITE)
    fits = b'{"data": "%b"}' % (b"x" * 88)
    assert len(fits) == 100
    assert (await AsgiClient(host).post(INPUT, headers=headers, body=fits)).status_code == 200
    response = await AsgiClient(host).post(INPUT, headers=headers, body=fits + b" ")
    assert response.status_code == 413
    assert "limit 100" in json.loads(response.body)["error"]


async def test_a_declared_length_that_is_too_large_is_refused_unread() -> None:
    host = StandIn(limits=Limits(input_bytes=100))
    await host.create()
    headers = {**host.headers(WRITE), "content-length": "101"}
    response = await AsgiClient(host).post(INPUT, headers=headers, body=b"")
    assert response.status_code == 413


async def call(host: StandIn, messages: list[dict[str, Any]]) -> list[Any]:
    sent: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        sent.append(message)

    await host(make_scope("POST", INPUT, headers=host.headers(WRITE)), receive, send)
    return sent


async def test_a_body_may_come_in_parts(host: StandIn) -> None:
    await host.create()
    parts = [b'{"da', b"", b'ta": 1}']
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    sent = await call(host, [*messages, {"type": "http.request"}])
    assert sent[0]["status"] == 200


async def test_a_body_that_never_ends_is_refused_at_the_limit() -> None:
    host = StandIn(limits=Limits(input_bytes=100))
    await host.create()
    part = {"type": "http.request", "body": b" " * 60, "more_body": True}
    sent = await call(host, [part, part])
    assert sent[0]["status"] == 413


async def test_a_body_that_is_cut_off_is_no_input(host: StandIn) -> None:
    await host.create()
    part = {"type": "http.request", "body": b'{"data": 1}', "more_body": True}
    await call(host, [part, {"type": "http.disconnect"}])
    assert not (await host.broker.read(StreamKey("run_1", "$trigger.input:approval"))).entries


async def test_who_may_send_an_input(host: StandIn) -> None:
    body = b'{"data": 1}'
    assert (await AsgiClient(host).post(INPUT, body=body)).status_code == 401
    assert (await AsgiClient(host).post(INPUT, headers=host.headers(WRITE), body=body)).status_code == 404
    await host.create()
    for scope in ("read:runs:run_1", "write:runs:run_1", "write:inputStreams:run_2"):
        assert (await AsgiClient(host).post(INPUT, headers=host.headers(scope), body=body)).status_code == 403
    long = f"/v1/streams/run_1/input/{'i' * 129}"
    response = await AsgiClient(host).post(long, headers=host.headers(WRITE), body=body)
    assert response.status_code == 422
    assert "limit 128" in json.loads(response.body)["error"]
    assert (await AsgiClient(host).get(long, headers=host.headers())).status_code == 422


async def test_health_needs_no_token(host: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    response = await AsgiClient(host).get("/v1/health")
    assert (response.status_code, json.loads(response.body)) == (200, {"status": "ok", "broker": "ok"})

    async def away() -> None:
        raise BrokerUnavailable("redis at 10.0.0.1 does not answer")

    monkeypatch.setattr(host.broker, "ping", away)
    response = await AsgiClient(host).get("/v1/health")
    assert (response.status_code, response.json()) == (503, {"status": "unavailable", "broker": "unavailable"})


async def test_health_tells_of_foreign_errors_without_their_words(
    host: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A broker that raised an exception of its driver's gave 500, which tells a load balancer nothing."""
    down = (503, {"status": "unavailable", "broker": "unavailable"})
    host.start_error = OSError("no route to 10.0.0.1")
    response = await AsgiClient(host).get("/v1/health")
    assert (response.status_code, json.loads(response.body)) == down
    host.start_error = None

    async def away() -> None:
        raise OSError("10.0.0.1 went away")

    monkeypatch.setattr(host.broker, "ping", away)
    response = await AsgiClient(host).get("/v1/health")
    assert (response.status_code, json.loads(response.body)) == down
    assert "10.0.0.1 went away" in caplog.text


async def test_health_answers_head_without_a_body(host: StandIn) -> None:
    """Load balancers that probe with HEAD took the 405 for a dead process."""
    response = await AsgiClient(host).request("HEAD", "/v1/health")
    assert (response.status_code, response.body) == (200, b"")
    assert response.headers["content-length"] == str(len((await AsgiClient(host).get("/v1/health")).body))
    host.begin_shutdown()
    assert (await AsgiClient(host).request("HEAD", "/v1/health")).status_code == 503


async def test_health_says_when_the_shutdown_began(host: StandIn) -> None:
    host.begin_shutdown()
    response = await AsgiClient(host).get("/v1/health")
    assert (response.status_code, json.loads(response.body)) == (503, {"status": "closing", "broker": "ok"})
