from __future__ import annotations

import functools
import logging
import threading
from typing import Any

import anyio
import pytest
from starlette.exceptions import HTTPException
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request as HostRequest

from asgi_realtime import (
    Cors,
    Grant,
    InvalidConfiguration,
    InvalidToken,
    Limits,
    Realtime,
    RealtimeError,
    Resource,
    Timeouts,
)
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.routes import ROUTES
from asgi_realtime.asgi.sessions import RESOURCES, check_origin
from asgi_realtime.core.access import Authorize
from asgi_realtime.core.errors import LimitExceeded, ScopeDenied
from asgi_realtime.testing import AsgiClient
from tests.asgi.fake_host import FakeHost
from tests.inprocess import SECRET, ended, make_realtime

pytestmark = pytest.mark.anyio

STREAM = "/v1/streams/run_1/default"
SAME_ORIGIN = {"sec-fetch-site": "same-origin", "cookie": "user=1"}


def by_cookie(request: HostRequest, resource: Resource) -> list[str]:
    """Each user reads the runs with their tag."""
    user = request.cookies.get("user")
    return [f"read:tags:user:{user}"] if user else []


async def host_with_run(authorize: Authorize, **settings: Any) -> FakeHost:
    host = FakeHost(authorize=authorize, **settings)
    await host.create(tags=["user:1"])
    await host.append("a")
    return host


# What is granted


async def test_a_session_reads_what_its_scopes_grant() -> None:
    host = await host_with_run(by_cookie)
    await host.create("run_2", tags=["user:2"])
    await host.finish()
    client = AsgiClient(host, headers=SAME_ORIGIN)
    assert '"a"' in (await client.get(STREAM)).text
    assert (await client.get("/api/v3/runs/run_2")).json()["error"] == (
        "access is not granted; it needs the scope 'read:runs:run_2'"
    )
    assert (await client.get("/api/v3/runs/run_2", headers={"cookie": "user=2"})).status_code == 200
    assert (await client.get("/api/v3/runs/run_none")).status_code == 404


@pytest.mark.parametrize("nothing", [False, None, [], {}])
async def test_a_denied_request_is_a_401(nothing: Any) -> None:
    host = await host_with_run(lambda request, resource: nothing)
    response = await AsgiClient(host).get(STREAM)
    assert response.status_code == 401
    assert response.json() == {
        "error": "no token, and the app's authorize= denied the request; log in, or pass a token as"
        " `Authorization: Bearer …`",
        "code": "invalid_token",
    }
    assert response.headers["www-authenticate"] == "Bearer"


ASKED = [
    ("GET", STREAM, Resource(action="read", kind="stream", run_id="run_1", key="default")),
    ("GET", "/v1/streams/run_1/input/go", Resource(action="read", kind="input", run_id="run_1", key="go")),
    ("POST", "/v1/streams/run_1/input/go", Resource(action="write", kind="input", run_id="run_1", key="go")),
    ("GET", "/v1/runs?tags=a,b", Resource(action="read", kind="runs", tags=("a", "b"))),
    ("GET", "/v1/runs", Resource(action="read", kind="runs")),
    ("GET", "/v1/runs/run_1", Resource(action="read", kind="run", run_id="run_1")),
    ("GET", "/api/v3/runs/run_1", Resource(action="read", kind="run", run_id="run_1")),
    ("GET", "/api/v1/runs/run_1/metadata", Resource(action="read", kind="run", run_id="run_1")),
    ("POST", "/api/v2/runs/run_1/cancel", Resource(action="write", kind="run", run_id="run_1")),
    ("GET", "/v1/batches/batch_1", Resource(action="read", kind="batch", batch_id="batch_1")),
    ("GET", "/api/v2/batches/batch_1", Resource(action="read", kind="batch", batch_id="batch_1")),
    ("POST", "/api/v3/batches", Resource(action="batchTrigger", kind="batch")),
    ("POST", "/api/v3/batches/batch_1/items", Resource(action="batchTrigger", kind="batch", batch_id="batch_1")),
    ("POST", "/api/v1/tasks/chat/trigger", Resource(action="trigger", kind="task", task="chat")),
]


@pytest.mark.parametrize(("method", "path", "resource"), ASKED)
async def test_the_host_is_asked_for_what_the_request_wants(method: str, path: str, resource: Resource) -> None:
    asked: list[Resource] = []
    host = FakeHost(authorize=lambda request, resource: asked.append(resource))
    assert (await AsgiClient(host).request(method, path, headers=SAME_ORIGIN)).status_code == 401
    assert asked == [resource]


def test_every_route_asks_the_host_or_needs_the_secret_key() -> None:
    only_secret = {
        ("PUT", "v1/streams/{run_id}/{target}/{key}"),
        ("POST", "v1/streams/{run_id}/{target}/{key}"),
        ("HEAD", "v1/streams/{run_id}/{target}/{key}"),
        ("POST", "v1/streams/{run_id}/{target}/{key}/append"),
        ("PUT", "api/v1/runs/{run_id}/metadata"),
        ("POST", "api/v1/runs/{run_id}/tags"),
        ("POST", "api/v1/auth/jwt/claims"),
        ("POST", "api/v1/auth/public-tokens"),
    }
    inspector = {
        ("GET", "inspect/runs"),
        ("GET", "inspect/runs/{run_id}"),
        ("POST", "inspect/runs/{run_id}/cancel"),
    }
    packets = {(method, f"api/{version}/packets/*") for version in ("v1", "v2") for method in ("GET", "PUT")}
    routes = {(route.method, route.pattern) for route in ROUTES if route.needs_token}
    assert routes == set(RESOURCES) | only_secret | inspector | packets


async def test_true_grants_what_the_request_asks_for_and_no_more() -> None:
    async with make_realtime(authorize=lambda request, resource: resource.kind != "batch") as realtime:
        client = AsgiClient(realtime, headers=SAME_ORIGIN, lifespan=False)
        async with realtime.open_run("one", tags=["a"]) as run:
            await realtime.append("x")
            sent = await client.post(f"/v1/streams/{run.id}/input/go", json={"data": 1})
            assert sent.status_code == 200, sent.text
            assert await run.input("go").get() == 1
            for path in (f"/v1/streams/{run.id}/default", f"/v1/runs/{run.id}", "/v1/runs?tags=a,b"):
                async with client.stream(path) as response:
                    assert response.status_code == 200
            assert (await client.get("/v1/batches/batch_1")).status_code == 401


async def test_a_session_cancels_a_run() -> None:
    async with make_realtime(authorize=lambda request, resource: True) as realtime:

        @realtime.task("forever")
        async def forever() -> None:
            await anyio.sleep_forever()

        handle = await realtime.trigger(forever)
        client = AsgiClient(realtime, headers=SAME_ORIGIN, lifespan=False)
        assert (await client.post(f"/api/v2/runs/{handle.id}/cancel")).status_code == 200
        assert (await ended(realtime, handle)).status == "CANCELED"


async def test_a_grant_has_an_owner_and_the_options_of_a_token() -> None:
    def authorize(request: HostRequest, resource: Resource) -> Grant:
        user = f"user:{request.cookies['user']}"
        return Grant({"trigger": {"tasks": True}}, owner=user, skip_columns=["payload"], tags=user)

    async with make_realtime(authorize=authorize, limits=Limits(runs_per_minute_per_owner=2)) as realtime:

        @realtime.task("chat")
        async def chat(payload: Any) -> None: ...

        async def trigger(user: int, *tags: str) -> Any:
            body = {"payload": {}, "options": {"tags": list(tags), "idempotencyKey": "the same for all users"}}
            headers = {**SAME_ORIGIN, "cookie": f"user={user}"}
            return await AsgiClient(realtime, lifespan=False).post(
                "/api/v1/tasks/chat/trigger", json=body, headers=headers
            )

        first, second = await trigger(1, "user:1"), await trigger(2, "user:2")
        assert (first.status_code, second.status_code) == (200, 200)
        assert first.json()["id"] != second.json()["id"], "idempotency keys are those of the owner"
        claims = realtime.verify_token(first.headers["x-trigger-jwt"])
        assert (claims.owner, claims.skip_columns) == ("user:1", ("payload",))
        assert (await trigger(1, "user:2")).json()["code"] == "forbidden"


async def test_a_trigger_without_an_owner_is_a_mistake_of_the_host(caplog: pytest.LogCaptureFixture) -> None:
    """Users without an owner would share idempotency keys, and so get the runs of others."""
    async with make_realtime(authorize=lambda request, resource: True) as realtime:
        client = AsgiClient(realtime, headers=SAME_ORIGIN, lifespan=False)
        response = await client.post("/api/v1/tasks/chat/trigger", json={"payload": 1})
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert "return Grant(owner='user:1')" in caplog.text


async def test_the_owner_is_charged_for_subscriptions() -> None:
    limits = Limits(subscribers_per_owner=1)
    host = await host_with_run(lambda request, resource: Grant(owner=request.cookies["user"]), limits=limits)
    client = AsgiClient(host)
    async with client.stream(STREAM, headers={"cookie": "user=1"}):
        assert (await client.get(STREAM, headers={"cookie": "user=1"})).status_code == 429
        async with client.stream(STREAM, headers={"cookie": "user=2"}) as response:
            assert response.status_code == 200


async def test_without_an_owner_requests_with_the_same_scopes_share_one() -> None:
    """A cookie can change with each request, so it does not tell whose request this is."""
    host = await host_with_run(by_cookie, limits=Limits(subscribers_per_owner=1))
    async with AsgiClient(host).stream(STREAM, headers={"cookie": "user=1; a=1"}):
        assert (await AsgiClient(host).get(STREAM, headers={"cookie": "user=1; a=2"})).status_code == 429


async def test_the_token_of_a_request_comes_first() -> None:
    host = await host_with_run(lambda request, resource: True)
    await host.finish()
    client = AsgiClient(host, headers=SAME_ORIGIN)
    assert (await client.get(STREAM)).status_code == 200
    for headers, path in (
        ({"authorization": "Bearer wrong"}, STREAM),
        ({}, f"{STREAM}?access_token=wrong"),
        ({}, f"{STREAM}?access_token={host.token('read:runs:run_2')}"),
    ):
        assert (await client.get(path, headers=headers)).status_code in (401, 403), path
    foreign = {"origin": "https://evil.example", "sec-fetch-site": "cross-site", **host.headers()}
    assert (await client.get(STREAM, headers=foreign)).status_code == 200


# How the host is asked


async def test_a_function_is_called_in_a_thread_and_a_coroutine_function_on_the_loop() -> None:
    threads: list[threading.Thread] = []

    def sync(request: HostRequest, resource: Resource) -> bool:
        threads.append(threading.current_thread())
        return False

    async def on_loop(request: HostRequest, resource: Resource) -> bool:
        return sync(request, resource)

    class Callable_:
        async def __call__(self, request: HostRequest, resource: Resource) -> bool:
            return sync(request, resource)

    functions: list[Authorize] = [on_loop, Callable_(), functools.partial(on_loop), sync, lambda *both: on_loop(*both)]
    for authorize in functions:
        assert (await AsgiClient(await host_with_run(authorize)).get(STREAM)).status_code == 401
    here = threading.current_thread()
    assert [thread is here for thread in threads] == [True, True, True, False, True]


async def test_the_host_sees_the_request_without_its_body() -> None:
    seen: list[Any] = []

    async def authorize(request: HostRequest, resource: Resource) -> bool:
        seen.extend((request.method, request.url.path, request.cookies, request.scope["session"]["user"]))
        with pytest.raises(RuntimeError):
            await request.body()
        return False

    host = FakeHost(authorize=authorize)

    async def with_session(scope: Any, receive: Any, send: Any) -> None:
        await host({**scope, "session": {"user": 7}}, receive, send)

    await AsgiClient(with_session).post("/v1/streams/run_1/input/go", json=1, headers=SAME_ORIGIN)
    assert seen == ["POST", "/v1/streams/run_1/input/go", {"user": "1"}, 7]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a secret of the host"), 503),
        (HTTPException(401, "log in"), 401),
        (HTTPException(403, "not yours"), 403),
        (HTTPException(418, "a secret of the host"), 503),
        (RealtimeError("a secret of the host"), 503),
        (InvalidToken("log in"), 401),
        (ScopeDenied("not yours"), 403),
        (LimitExceeded("slow down", status=429, retry_after_s=3), 429),
    ],
)
async def test_what_the_function_raises(error: Exception, status: int, caplog: pytest.LogCaptureFixture) -> None:
    def authorize(request: HostRequest, resource: Resource) -> bool:
        raise error

    response = await AsgiClient(await host_with_run(authorize)).get(STREAM)
    assert response.status_code == status
    message = response.json()["error"]
    if status == 503:
        assert message == "the server could not check the session; try again"
        assert (response.json()["code"], response.headers["retry-after"]) == ("authorize_failed", "1")
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        assert "a secret of the host" in caplog.text
    else:
        assert message in ("log in", "not yours", "slow down")
        assert all(record.levelno < logging.ERROR for record in caplog.records)


@pytest.mark.parametrize("wrong", [7, "read:runs", ["read"], {"read": True}, Grant(owner=""), Grant(tags="a\n")])
async def test_a_wrong_answer_is_logged_and_not_shown(wrong: Any, caplog: pytest.LogCaptureFixture) -> None:
    response = await AsgiClient(await host_with_run(lambda request, resource: wrong)).get(STREAM)
    assert (response.status_code, response.json()["error"]) == (500, "internal error")
    assert "RuntimeError: authorize= returned" in caplog.text


async def test_a_function_that_takes_too_long_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    async def authorize(request: HostRequest, resource: Resource) -> bool:
        await anyio.sleep_forever()
        raise AssertionError

    host = await host_with_run(authorize, timeouts=Timeouts(authorize=0.01))
    assert (await AsgiClient(host).get(STREAM)).status_code == 503
    assert "authorize= did not return within 0.01 s (Timeouts.authorize)" in caplog.text
    assert not host.subscribers


async def test_an_event_source_reconnects_after_the_function_has_failed() -> None:
    """It does not after a status of 500 or 503, so a page stayed silent after a short outage of the host's database."""

    def authorize(request: HostRequest, resource: Resource) -> bool:
        raise OSError("the database is down")

    response = await AsgiClient(await host_with_run(authorize)).get(STREAM, headers={"accept": "text/event-stream"})
    assert (response.status_code, "event: reconnect\n" in response.text) == (200, True)


async def test_the_log_names_the_function_that_failed_and_the_path(caplog: pytest.LogCaptureFixture) -> None:
    def authorize(request: HostRequest, resource: Resource) -> bool:
        raise OSError("the database is down")

    client = AsgiClient(await host_with_run(authorize))
    for _ in range(30):
        await client.get(f"{STREAM}?secret=1")
    assert len(caplog.records) == 10, "of similar messages, 10 are logged in 10 seconds"
    assert all(record.exc_info for record in caplog.records)
    assert f"authorize= failed for GET '{STREAM}'; the client will try again" in caplog.text
    assert "secret" not in caplog.text


async def test_a_shutdown_interrupts_the_function() -> None:
    async def authorize(request: HostRequest, resource: Resource) -> bool:
        host.begin_shutdown()
        await anyio.sleep_forever()
        raise AssertionError

    host = await host_with_run(authorize)
    async with AsgiClient(host).stream(STREAM) as response:
        assert [event.event for event in await response.read_all_events()] == ["reconnect"]


def test_what_cannot_be_called_is_rejected() -> None:
    with pytest.raises(InvalidConfiguration, match="authorize is 'me'; allowed is a function, which gets the request"):
        Realtime(secret_key=SECRET, authorize="me")  # type: ignore[arg-type]


async def test_a_stream_reconnects_from_time_to_time_so_that_the_host_is_asked_again() -> None:
    """The user may have logged out. With a token, the stream ends when the token expires."""
    users = {"1"}
    host = await host_with_run(lambda request, resource: request.cookies["user"] in users)
    client = AsgiClient(host, headers=SAME_ORIGIN)
    async with client.stream(STREAM) as response:
        await response.read_until("message")
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(15 * 60)
        (*_, last) = await response.read_all_events()
        assert (last.event, response.last_event_id) == ("reconnect", "0")
    users.clear()
    assert (await client.get(STREAM, headers={"last-event-id": "0"})).status_code == 401


async def test_the_age_of_streams_can_be_shorter() -> None:
    host = await host_with_run(lambda request, resource: True, timeouts=Timeouts(stream_age=100))
    async with AsgiClient(host).stream(STREAM) as response:
        await response.read_until("message")
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(100)
        assert (await response.read_all_events())[-1].event == "reconnect"


# Other origins


LISTED = Cors(["https://app.example"])


@pytest.mark.parametrize(
    ("method", "headers", "cors", "allowed"),
    [
        ("GET", {}, Cors(), True),
        ("GET", {"sec-fetch-site": "same-origin"}, Cors(), True),
        ("GET", {"sec-fetch-site": "none"}, Cors(), True),
        ("GET", {"sec-fetch-site": "same-site"}, Cors(), False),
        ("GET", {"sec-fetch-site": "cross-site"}, Cors(), False),
        ("GET", {"sec-fetch-site": "cross-site", "origin": "https://app.example"}, Cors(), False),
        ("GET", {"sec-fetch-site": "cross-site", "origin": "https://app.example"}, None, False),
        ("GET", {"sec-fetch-site": "cross-site", "origin": "https://app.example"}, LISTED, True),
        ("GET", {"sec-fetch-site": "cross-site", "origin": "https://evil.example"}, LISTED, False),
        ("GET", {"sec-fetch-site": "cross-site", "origin": "null"}, LISTED, False),
        ("GET", {"origin": "https://evil.example"}, Cors(), False),
        ("GET", {"sec-fetch-site": "cross-site", "origin": "*"}, Cors(), False),
        ("POST", {"sec-fetch-site": "same-origin", "origin": "https://here.example"}, Cors(), True),
        ("POST", {"sec-fetch-site": "cross-site", "origin": "https://evil.example"}, Cors(), False),
        ("POST", {"origin": "https://here.example"}, Cors(), True),
        ("POST", {"origin": "HTTPS://HERE.example"}, Cors(), True),
        ("POST", {"origin": "https://here.example:8443"}, Cors(), False),
        ("POST", {"origin": "https://here.example.evil.example"}, Cors(), False),
        ("POST", {"origin": "https://app.example"}, LISTED, True),
        ("POST", {"origin": "null"}, Cors(), False),
        ("POST", {"origin": "null", "host": ""}, Cors(), False),
        ("POST", {}, Cors(), False),
        ("POST", {"content-type": "text/plain"}, Cors(), False),
        ("POST", {"content-type": "application/x-www-form-urlencoded"}, Cors(), False),
        ("POST", {"content-type": "Application/JSON; charset=utf-8"}, Cors(), True),
        ("POST", {"content-type": "application/json", "origin": "https://evil.example"}, Cors(), False),
    ],
)
def test_pages_of_other_origins_are_rejected(
    method: str, headers: dict[str, str], cors: Cors | None, allowed: bool
) -> None:
    """A browser attaches the cookie of the user to them as well (CSRF)."""
    host = FakeHost(cors=cors)
    sent = {"host": "here.example", **headers}
    scope = {
        "type": "http",
        "method": method,
        "headers": [(name.encode(), value.encode()) for name, value in sent.items() if value],
    }

    async def receive() -> Any: ...

    request = Request(host, host.app.subscription_limits, host.app._run_cache, scope, receive)
    if allowed:
        return check_origin(request, cors)
    with pytest.raises(ScopeDenied, match="without a token, allowed are pages of this server's own origin"):
        check_origin(request, cors)


async def test_a_page_of_another_origin_cannot_cancel_with_the_cookie_of_the_user() -> None:
    asked: list[Resource] = []

    def authorize(request: HostRequest, resource: Resource) -> bool:
        asked.append(resource)
        return True

    host = await host_with_run(authorize, cors=Cors())
    evil = {"cookie": "user=1", "origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    response = await AsgiClient(host).post("/api/v2/runs/run_1/cancel", headers=evil)
    assert response.status_code == 403
    assert response.json()["error"].startswith("the request comes from a page of 'https://evil.example'; without")
    assert asked == []
    assert (await host.get("run_1")).status == "EXECUTING"


@pytest.mark.parametrize(
    ("cors", "origin", "allowed"),
    [
        (Cors(), "https://app.example", None),
        (LISTED, "https://app.example", "true"),
        (LISTED, "https://evil.example", None),
        (LISTED, None, None),
        (None, "https://app.example", None),
    ],
)
async def test_only_listed_origins_can_send_cookies(cors: Cors | None, origin: str | None, allowed: str | None) -> None:
    headers = {} if origin is None else {"origin": origin, "access-control-request-method": "GET"}
    for authorize, expected in ((by_cookie, allowed), (None, None)):
        host = FakeHost(authorize=authorize, cors=cors)
        for method in ("OPTIONS", "GET"):
            response = await AsgiClient(host).request(method, STREAM, headers=headers)
            assert response.headers.get("access-control-allow-credentials") == expected
            assert response.headers.get("access-control-allow-origin") != "*" or expected is None


async def test_no_cache_shares_the_responses() -> None:
    host = await host_with_run(by_cookie, cors=LISTED)
    await host.finish()
    for path, headers in ((STREAM, SAME_ORIGIN), (STREAM, {}), ("/v1/runs/run_1", SAME_ORIGIN), ("/v1/health", {})):
        response = await AsgiClient(host).get(path, headers=headers)
        assert response.headers["vary"] == "Origin"
        assert response.headers["cache-control"].startswith("private, no-store")


async def test_vary_names_the_cookie_at_most_once_behind_a_session_middleware() -> None:
    """It appends the value without a look at ours, so the header was `Cookie, Cookie`."""
    host = await host_with_run(lambda request, resource: request.session.get("user", True))
    await host.finish()
    app = SessionMiddleware(host, secret_key="a secret of the host")
    response = await AsgiClient(app, headers=SAME_ORIGIN).get(STREAM)
    assert response.headers.get("vary", "") in ("Cookie", ""), "older versions of the middleware add nothing"


async def test_without_the_setting_a_cookie_is_nothing() -> None:
    host = await host_with_run(None)  # type: ignore[arg-type]
    response = await AsgiClient(host).get(STREAM, headers=SAME_ORIGIN)
    assert (response.status_code, response.headers.get("vary")) == (401, None)
