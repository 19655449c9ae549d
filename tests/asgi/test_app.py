from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from asgi_realtime import Realtime
from asgi_realtime.asgi.host import Host
from asgi_realtime.core.config import Cors, Timeouts
from asgi_realtime.core.errors import BrokerUnavailable, InvalidConfiguration, ServerShutdown
from asgi_realtime.testing import AsgiClient
from asgi_realtime.testing.driver import make_scope
from tests.asgi.fake_host import SECRET, FakeHost
from tests.asgi.official_sdk import on_one_loop

pytestmark = pytest.mark.anyio

STREAM = "/v1/streams/run_1/default"


async def test_a_realtime_is_a_host() -> None:
    realtime = Realtime(secret_key=SECRET, signals=False, timeouts=Timeouts(drain=0.02))
    host: Host = realtime
    assert host.limits is realtime.limits

    async def source() -> AsyncIterator[str]:
        yield "a"
        await anyio.sleep_forever()

    async with realtime:
        run = realtime.pipe(source()).handle
        headers = {"authorization": f"Bearer {run.public_access_token}"}
        async with AsgiClient(realtime).stream(f"/v1/streams/{run.id}/default", headers=headers) as response:
            assert response.status_code == 200
            (event,) = await response.read_until("message")
            assert event.data == '"a"'
            realtime.begin_shutdown()
            assert [event.event for event in await response.read_all_events()] == ["end"]


async def test_a_token_of_a_websocket_handshake_is_redacted(host: FakeHost) -> None:
    """The server logged the token with the rejected handshake."""
    scope = {"type": "websocket", "path": "/v1/runs/run_1", "query_string": b"access_token=abc"}
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await host(scope, receive, send)
    assert scope["query_string"] == b"access_token=REDACTED"
    assert [message["type"] for message in sent] == ["websocket.close"]


# Headers of every response


@pytest.mark.parametrize(
    "path",
    [
        STREAM,
        "/v1/runs/run_1",
        "/v1/runs/run_1?offset=-1",
        "/api/v3/runs/run_1",
        "/api/v1/runs/run_1/metadata",
        "/v1/streams/run_none/default",
        "/v1/health",
        "/nothing",
    ],
)
async def test_no_cache_stores_a_response_and_no_browser_guesses_its_type(host: FakeHost, path: str) -> None:
    """A cache stored the response to a request with its token in the query."""
    await host.create()
    await host.finish()
    path += f"{'&' if '?' in path else '?'}access_token={host.token('read:runs')}"
    response = await AsgiClient(host).get(path)
    assert response.headers["cache-control"].startswith("private, no-store")
    assert response.headers["x-content-type-options"] == "nosniff"


# Routing and errors


@on_one_loop
@pytest.mark.parametrize("path", ["/", "/realtime", "/v2/runs/run_1", "/favicon.ico", "/v1/streams/run_1/a/b/c"])
async def test_an_unknown_path_is_404(host: FakeHost, path: str) -> None:
    response = await AsgiClient(host).get(path)
    assert response.status_code == 404
    body = json.loads(response.body)
    assert body["code"] == "not_found"
    assert body["error"].startswith(f"nothing is served at '{path}'; below the mount there are v1/streams/{{run}}/")
    assert response.headers["content-type"] == "application/json"
    assert response.headers["access-control-allow-origin"] == "*"


@on_one_loop
@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", STREAM, "GET"),
        ("HEAD", STREAM, "GET"),
        ("DELETE", "/v1/streams/run_1/input/approval", "GET, POST"),
        ("GET", "/api/v2/runs/run_1/cancel", "POST"),
        ("OPTIONS", "/v1/health", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_405_and_lists_the_allowed_ones(
    host: FakeHost, method: str, path: str, allow: str
) -> None:
    response = await AsgiClient(host).request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allow
    assert response.headers["access-control-allow-origin"] == "*"


async def test_without_the_api_its_routes_are_404() -> None:
    host = FakeHost(api=False)
    await host.create()
    assert (await AsgiClient(host).get("/api/v3/runs/run_1", headers=host.headers())).status_code == 404
    assert (await AsgiClient(host).post("/api/v2/runs/run_1/cancel", headers=host.headers("admin"))).status_code == 404
    assert (await AsgiClient(host).get("/v1/health")).status_code == 200


async def test_an_unexpected_error_is_a_500_without_its_message(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def get(run_id: str) -> Any:
        raise ValueError("password=1234")

    monkeypatch.setattr(host, "get", get)
    response = await AsgiClient(host).get(STREAM, headers=host.headers())
    assert response.status_code == 500
    assert json.loads(response.body) == {"error": "internal error", "code": "internal"}
    assert response.headers["access-control-allow-origin"] == "*"
    assert "password=1234" in caplog.text
    host.debug = True
    response = await AsgiClient(host).get(STREAM, headers=host.headers())
    assert "password=1234" in json.loads(response.body)["error"]


async def test_an_unavailable_broker_is_503_and_not_logged(host: FakeHost, caplog: pytest.LogCaptureFixture) -> None:
    host.start_error = BrokerUnavailable("the broker does not answer")
    response = await AsgiClient(host).get(STREAM, headers=host.headers())
    assert response.status_code == 503
    assert json.loads(response.body)["code"] == "broker_unavailable"
    assert not caplog.records


@pytest.mark.parametrize("path", [STREAM, "/v1/runs/run_1"])
async def test_an_event_source_reconnects_while_the_broker_is_unavailable(host: FakeHost, path: str) -> None:
    """After a 503 it never did, and the page stayed frozen when the broker was back."""
    host.start_error = BrokerUnavailable("the broker does not answer")
    async with AsgiClient(host).stream(path, headers=host.feed_headers()) as response:
        assert response.status_code == 200
        assert [event.event for event in await response.read_all_events()] == ["reconnect"]
    official = {**host.feed_headers(), "trigger-version": "4.8.3"}  # takes a body that ends for a complete stream
    assert (await AsgiClient(host).get(path, headers=official)).status_code == 503


async def test_a_failed_start_is_503_without_its_message(host: FakeHost, caplog: pytest.LogCaptureFixture) -> None:
    """It was 500, so clients took it for a bug and did not retry."""
    host.start_error = OSError("no route to 10.0.0.1")
    response = await AsgiClient(host).get(STREAM, headers=host.headers())
    assert response.status_code == 503
    assert json.loads(response.body) == {"error": "the server could not start; try later", "code": "broker_unavailable"}
    assert "10.0.0.1" in caplog.text


async def test_an_error_from_send_does_not_reach_the_host(host: FakeHost) -> None:
    async def never() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        raise OSError("gone")

    await host(make_scope("GET", "/v1/health"), never, send)
    await host(make_scope("GET", STREAM), never, send)


async def test_a_204_that_cannot_be_sent_is_not_followed_by_a_second_response(host: FakeHost) -> None:
    """The server got a second head, which it logs as a bug in the app."""
    await host.create()
    await host.finish()
    sent: list[Any] = []

    async def never() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        sent.append(message)
        raise RuntimeError("the server refuses")

    await host(make_scope("GET", STREAM, headers=host.headers(last_event_id="0")), never, send)
    assert [message.get("status") for message in sent] == [204]


LONG = "x" * 60_000


@on_one_loop
@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("GET", f"/{LONG}", {}),
        (LONG, "/v1/health", {}),
        ("GET", f"/v1/streams/{LONG}/default", {}),
        ("GET", f"/v1/streams/run_1/{LONG}", {}),
        ("GET", "/v1/streams/run_1/default", {"last_event_id": LONG}),
        ("GET", f"/v1/runs/{LONG}", {}),
        ("GET", "/v1/runs", {"tags": LONG}),
        ("GET", "/v1/runs", {"tags": "a", "createdAt": LONG}),
        ("GET", "/v1/runs", {"tags": "a", "createdAt": f"{'9' * 60_000}d"}),
        ("GET", f"/v1/batches/{LONG}", {}),
        ("GET", f"/api/v3/runs/{LONG}", {}),
        ("POST", f"/v1/streams/{LONG}/input/approval", {}),
    ],
)
async def test_an_error_does_not_quote_a_long_request_in_full(
    host: FakeHost, method: str, path: str, query: dict[str, str]
) -> None:
    """A run id of 60 KB was quoted in full, and so reached logs and pages."""
    host.runs.get = Realtime(secret_key=SECRET).runs.get  # type: ignore[method-assign]  # with the real message
    response = await AsgiClient(host).request(method, path, query=query, headers=host.feed_headers("read:runs:run_1"))
    assert response.status_code >= 400
    assert len(response.body) < 300


# The credential


async def test_a_token_in_the_query_of_a_get_is_accepted_and_redacted_in_place(host: FakeHost) -> None:
    await host.create()
    token = host.token()
    query = f"a=1&access_token={token}&last_event_id=0"
    async with AsgiClient(host).stream(STREAM, query=query) as response:
        assert response.status_code == 200
        assert response.scope["query_string"] == b"a=1&access_token=REDACTED&last_event_id=0"


async def test_a_token_is_redacted_in_rejected_requests_too(host: FakeHost) -> None:
    for method, path in (("GET", STREAM), ("POST", STREAM), ("GET", "/nowhere"), ("OPTIONS", STREAM)):
        response = await AsgiClient(host).request(method, path, query="access_token=abc")
        assert response.scope["query_string"] == b"access_token=REDACTED"
        assert b"abc" not in response.body


async def test_a_token_in_the_query_of_a_post_is_ignored(host: FakeHost) -> None:
    await host.create()
    query = {"access_token": host.token("write:all")}
    response = await AsgiClient(host).post("/v1/streams/run_1/input/a", query=query, body=b'{"data":1}')
    assert response.status_code == 401


async def test_the_header_takes_precedence_over_the_query(host: FakeHost) -> None:
    await host.create()
    good, bad = host.token(), host.token("read:runs:run_2")
    headers = {"authorization": f"Bearer {bad}"}
    response = await AsgiClient(host).get(STREAM, headers=headers, query={"access_token": good})
    assert response.status_code == 403


@on_one_loop
@pytest.mark.parametrize("credential", ["", "Bearer", "Bearer ", "Bearer abc", "Basic abc", "Bearer a.b.c", "Bearer ä"])
async def test_a_malformed_credential_is_401(host: FakeHost, credential: str) -> None:
    await host.create()
    response = await AsgiClient(host).get(STREAM, headers={"authorization": credential})
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == "*"


@on_one_loop
@pytest.mark.parametrize("path", [STREAM, "/v1/runs/run_1", "/v1/runs?tags=a", "/v1/batches/batch_1"])
async def test_an_event_source_learns_that_its_token_has_expired(host: FakeHost, path: str) -> None:
    """A page cannot see a 401, so the answer stopped silently after the computer had slept."""
    await host.create()
    query = dict(pair.split("=") for pair in path.partition("?")[2].split("&") if pair)
    query["access_token"] = host.token("read:runs")
    path, events = path.partition("?")[0], {"accept": "text/event-stream"}
    host.now += 901
    response = await AsgiClient(host).get(path, headers=events, query=query)
    assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert response.body == b'retry: 60000\nevent: end\ndata: {"reason":"token_expired"}\n\n'
    for headers in ({}, {**events, "trigger-version": "4.4.0"}, {**events, "authorization": "Basic x"}):
        response = await AsgiClient(host).get(path, headers=headers, query=query)
        assert response.status_code == 401  # a client that sees it
    response = await AsgiClient(host).get(path, headers=events, query={**query, "access_token": "a.b.c"})
    assert response.status_code == 401


async def test_foreign_and_expired_tokens_are_401(host: FakeHost) -> None:
    await host.create()
    expired = host.headers()
    host.now += 901
    response = await AsgiClient(host).get(STREAM, headers=expired)
    assert (response.status_code, json.loads(response.body)["code"]) == (401, "token_expired")
    foreign = Realtime(secret_key="another secret, which is long enough").create_public_token(scopes=["read:runs"])
    response = await AsgiClient(host).get(STREAM, headers={"authorization": f"Bearer {foreign}"})
    assert (response.status_code, json.loads(response.body)["code"]) == (401, "invalid_token")


# CORS


async def test_a_preflight_is_answered_before_the_start_and_without_a_token(host: FakeHost) -> None:
    host.start_error = BrokerUnavailable("away")
    headers = {
        "origin": "https://app.example",
        "access-control-request-method": "GET",
        "access-control-request-headers": "authorization,last-event-id",
    }
    response = await AsgiClient(host).request("OPTIONS", STREAM, headers=headers)
    assert (response.status_code, response.body) == (204, b"")
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["access-control-allow-headers"] == "authorization,last-event-id"
    assert response.headers["access-control-allow-methods"] == "GET, HEAD, POST, PUT"
    assert response.headers["access-control-max-age"] == "300"
    assert "access-control-allow-credentials" not in response.headers


async def test_only_listed_origins_are_allowed() -> None:
    host = FakeHost(cors=Cors(["https://app.example", "https://b.example"]))
    await host.create()
    preflight = {"access-control-request-method": "GET", "access-control-request-headers": "authorization"}
    for origin, allowed in (("https://b.example", "https://b.example"), ("https://evil.example", None), ("null", None)):
        response = await AsgiClient(host).request("OPTIONS", STREAM, headers={"origin": origin, **preflight})
        assert response.headers.get("access-control-allow-origin") == allowed
        assert "Origin" in response.headers["vary"]
        async with AsgiClient(host).stream(STREAM, headers=host.headers(origin=origin)) as answer:
            assert answer.headers.get("access-control-allow-origin") == allowed
            assert answer.headers["vary"] == "Origin"
    response = await AsgiClient(host).get("/v1/health")
    assert response.headers["vary"] == "Origin"


async def test_without_cors_there_are_no_headers_and_no_preflight() -> None:
    host = FakeHost()
    headers = {"origin": "https://app.example", "access-control-request-method": "GET"}
    response = await AsgiClient(host).request("OPTIONS", STREAM, headers=headers)
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]


async def test_the_headers_that_clients_read_are_exposed(host: FakeHost) -> None:
    response = await AsgiClient(host).get("/v1/health")
    exposed = response.headers["access-control-expose-headers"].split(", ")
    assert {"electric-handle", "electric-offset", "electric-schema", "electric-cursor"} <= set(exposed)
    assert {"x-trigger-jwt", "x-stream-version", "x-ratelimit-reset", "retry-after", "x-should-retry"} <= set(exposed)


# Other protocols


async def test_a_websocket_is_rejected(host: FakeHost) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await host({"type": "websocket", "path": STREAM}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1000}]


async def lifespan(host: FakeHost) -> list[dict[str, Any]]:
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await host({"type": "lifespan"}, receive, send)
    return sent


async def test_the_root_app_is_started_and_stopped_by_the_server(host: FakeHost) -> None:
    assert await lifespan(host) == [{"type": "lifespan.startup.complete"}, {"type": "lifespan.shutdown.complete"}]
    assert host.calls == ["start", "stop"]


async def test_a_failed_start_is_reported_to_the_server(host: FakeHost, caplog: pytest.LogCaptureFixture) -> None:
    host.start_error = InvalidConfiguration("no")
    assert await lifespan(host) == [{"type": "lifespan.startup.failed", "message": "InvalidConfiguration: no"}]


async def test_a_failed_stop_is_reported_to_the_server(host: FakeHost, caplog: pytest.LogCaptureFixture) -> None:
    host.stop_error = ValueError("no")
    assert (await lifespan(host))[-1] == {"type": "lifespan.shutdown.failed", "message": "ValueError: no"}


async def test_a_secret_key_in_a_url_is_rejected(host: FakeHost) -> None:
    await host.create()
    response = await AsgiClient(host).get("/api/v3/runs/run_1", query={"access_token": SECRET})
    assert response.status_code == 401
    assert "must not be in a URL" in json.loads(response.body)["error"]
    assert SECRET not in response.body.decode()


async def test_a_response_to_head_has_no_body(host: FakeHost) -> None:
    for path, status in (("/v1/health", 200), ("/v1/streams/run_1/self/default", 401), ("/v1/runs", 405)):
        response = await AsgiClient(host).request("HEAD", path)
        assert (response.status_code, response.body) == (status, b"")
        assert int(response.headers["content-length"]) > 0


async def test_a_stop_during_a_request_is_503_and_not_logged_as_an_error(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    host.start_error = ServerShutdown("stopped")
    response = await AsgiClient(host).get("/v1/runs", headers=host.headers())
    assert response.status_code == 503
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_long_query_is_rejected_unread() -> None:
    app = Realtime(secret_key=SECRET, signals=False)
    response = await AsgiClient(app).get("/v1/health?" + "%61=1&" * 11_000)
    assert response.status_code == 414
    assert response.json()["error"] == "the query is 66000 bytes, limit 65536"
