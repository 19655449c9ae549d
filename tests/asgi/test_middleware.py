from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from fastapi import FastAPI
from litestar import Litestar
from litestar.middleware import DefineMiddleware
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from asgi_realtime.asgi import RealtimeMiddleware
from asgi_realtime.core.errors import InvalidConfiguration
from asgi_realtime.testing import AsgiClient
from tests.asgi.fake_host import FakeHost
from tests.asgi.official_sdk import on_one_loop

pytestmark = pytest.mark.anyio

App = Callable[[Any, Any, Any], Awaitable[None]]


class Wrapper:
    """Any ASGI middleware."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


async def host_app(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse(f"host {scope['path']} {scope.get('root_path')}")(scope, receive, send)


@on_one_loop
@pytest.mark.parametrize(
    ("path", "root_path", "status"),
    [
        ("/realtime/v1/health", "", 200),
        ("/realtime/v1/health", "/api", 200),  # hypercorn, granian: root_path is not in the path
        ("/api/realtime/v1/health", "/api", 200),  # uvicorn: it is
        ("/api/realtime/v1/health", "/api/", 200),
        ("/realtime/realtime/v1/health", "", 200),
        ("/realtime", "", 404),
        ("/realtime/", "", 404),
    ],
)
async def test_requests_under_the_path_reach_the_realtime(
    host: FakeHost, path: str, root_path: str, status: int
) -> None:
    app = RealtimeMiddleware(host_app, host)
    response = await AsgiClient(app, root_path=root_path).get(path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.scope["root_path"] == root_path  # the realtime gets a copy


@on_one_loop
@pytest.mark.parametrize("path", ["/", "/realtimeX", "/realtimeX/v1/health", "/v1/health", "/x/realtime/v1/health"])
async def test_other_requests_reach_the_host(host: FakeHost, path: str) -> None:
    response = await AsgiClient(RealtimeMiddleware(host_app, host)).get(path)
    assert response.body.decode() == f"host {path} "


async def test_the_path_can_be_changed(host: FakeHost) -> None:
    app = RealtimeMiddleware(host_app, host, path="/live/feed/")
    assert (await AsgiClient(app).get("/live/feed/v1/health")).status_code == 200
    assert (await AsgiClient(app, root_path="/api").get("/live/feed/v1/health")).status_code == 200
    assert (await AsgiClient(app).get("/realtime/v1/health")).body.startswith(b"host")


@pytest.mark.parametrize("path", ["", "/", "//", "realtime", "/a?b", "/a#b", "/a/*", "/{a}", "/a%20b"])
def test_a_malformed_path_is_rejected(host: FakeHost, path: str) -> None:
    with pytest.raises(InvalidConfiguration, match="path is"):
        RealtimeMiddleware(host_app, host, path=path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda host: (host, host_app), "realtime is a function"),
        (lambda host: (host_app, FakeHost), "realtime is the class FakeHost"),
        (lambda host: (host_app, None), "realtime is a NoneType"),
        (lambda host: (None, host), "app is a NoneType"),
        (lambda host: (FastAPI, host), "app is the class FastAPI"),
        (lambda host: (host, host), "app is a FakeHost"),
    ],
)
def test_wrong_arguments_are_rejected(
    host: FakeHost, make: Callable[[FakeHost], tuple[Any, Any]], message: str
) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        RealtimeMiddleware(*make(host))


def test_the_middleware_list_of_litestar_is_rejected(host: FakeHost) -> None:
    """It was accepted, and every request under the path got 404."""
    ours: Any = RealtimeMiddleware
    define, other = DefineMiddleware(ours, realtime=host), DefineMiddleware(cast(Any, Wrapper))
    lists: list[list[Any]] = [[define], [define, other]]
    for middleware in lists:
        with pytest.raises(InvalidConfiguration, match=r"wrap the app instead: RealtimeMiddleware\(Litestar"):
            Litestar(middleware=middleware, logging_config=None)
    RealtimeMiddleware(Litestar(logging_config=None), host)
    RealtimeMiddleware(Wrapper(Litestar(logging_config=None)), host)


async def test_the_outer_scope_is_redacted_and_the_token_works(host: FakeHost) -> None:
    await host.create()
    app = RealtimeMiddleware(host_app, host)
    query = f"access_token={host.token()}&x=1"
    async with AsgiClient(app).stream("/realtime/v1/streams/run_1/default", query=query) as response:
        assert response.status_code == 200
        assert response.scope["query_string"] == b"access_token=REDACTED&x=1"


async def test_queries_of_the_host_are_not_changed(host: FakeHost) -> None:
    response = await AsgiClient(RealtimeMiddleware(host_app, host)).get("/", query="access_token=abc")
    assert response.scope["query_string"] == b"access_token=abc"


async def test_a_websocket_under_the_path_is_rejected(host: FakeHost) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    app = RealtimeMiddleware(host_app, host)
    await app({"type": "websocket", "path": "/realtime/v1/health"}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1000}]


# Lifespan


async def run_lifespan(app: App, host: FakeHost) -> list[str]:
    """Run the server's side of the lifespan. Returns the calls of the host and the messages, in order."""
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Any:
        message = messages.pop(0)
        host.calls.append("<" + message["type"].removeprefix("lifespan."))
        return message

    async def send(message: Any) -> None:
        host.calls.append(">" + message["type"].removeprefix("lifespan."))

    await app({"type": "lifespan", "state": {}}, receive, send)
    return host.calls


def starlette(host: FakeHost, *, fail: str = "") -> Starlette:
    @asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        host.calls.append("host starts")
        if fail == "start":
            raise ValueError("start")
        yield
        host.calls.append("host stops")
        if fail == "stop":
            raise ValueError("stop")

    async def index(request: Request) -> PlainTextResponse:
        return PlainTextResponse("index")

    return Starlette(routes=[Route("/", index)], lifespan=lifespan)


ORDER = ["<startup", "start", "host starts", ">startup.complete", "<shutdown", "host stops", "stop"]


async def test_the_realtime_starts_before_the_host_and_stops_after_it(host: FakeHost) -> None:
    assert await run_lifespan(RealtimeMiddleware(starlette(host), host), host) == [*ORDER, ">shutdown.complete"]


async def test_the_order_is_the_same_with_add_middleware(host: FakeHost) -> None:
    app = starlette(host)
    app.add_middleware(RealtimeMiddleware, realtime=host)
    assert (await AsgiClient(app).get("/realtime/v1/health")).status_code == 200
    assert (await AsgiClient(app).get("/")).body == b"index"
    assert await run_lifespan(app, host) == [*ORDER, ">shutdown.complete"]


async def test_the_realtime_stops_if_the_host_fails_to_start(host: FakeHost) -> None:
    with pytest.raises(ValueError, match="start"):
        await run_lifespan(RealtimeMiddleware(starlette(host, fail="start"), host), host)
    assert host.calls == ["<startup", "start", "host starts", "stop", ">startup.failed"]


async def test_the_realtime_stops_if_the_host_fails_to_stop(host: FakeHost) -> None:
    with pytest.raises(ValueError, match="stop"):
        await run_lifespan(RealtimeMiddleware(starlette(host, fail="stop"), host), host)
    assert host.calls == [*ORDER, ">shutdown.failed"]


ALONE = ["<startup", "start", ">startup.complete", "<shutdown", "stop", ">shutdown.complete"]


async def test_the_middleware_replaces_the_lifespan_of_a_host_that_raises(host: FakeHost) -> None:
    async def django(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("Django can only handle ASGI/HTTP connections, not lifespan.")

    assert await run_lifespan(RealtimeMiddleware(django, host), host) == ALONE


async def test_the_middleware_replaces_the_lifespan_of_a_host_that_returns(host: FakeHost) -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        return None

    assert await run_lifespan(RealtimeMiddleware(silent, host), host) == ALONE


@pytest.mark.parametrize("sees_the_end", [False, True])
async def test_the_realtime_stops_if_the_host_returns_after_its_start(host: FakeHost, sees_the_end: bool) -> None:
    """Its runs stayed EXECUTING."""

    async def brief(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        if sees_the_end:
            await receive()

    assert await run_lifespan(RealtimeMiddleware(brief, host), host) == ALONE


async def test_a_host_that_responds_without_receiving_is_started_first(host: FakeHost) -> None:
    async def hasty(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})

    assert await run_lifespan(RealtimeMiddleware(hasty, host), host) == ALONE


async def test_the_middleware_replaces_the_lifespan_of_a_host_that_sends_http(host: FakeHost) -> None:
    """A single response as the whole host: it does not look at the scope's type. The Realtime was stopped at once."""
    assert await run_lifespan(RealtimeMiddleware(PlainTextResponse("not found", 404), host), host) == ALONE


async def test_a_host_that_raises_after_receiving_the_startup_is_logged(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    async def clumsy(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise ValueError("boom")

    assert await run_lifespan(RealtimeMiddleware(clumsy, host), host) == ALONE
    assert "without its start-up" in caplog.text


async def test_the_realtime_stops_if_the_host_raises_after_its_start(host: FakeHost) -> None:
    async def short(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        await run_lifespan(RealtimeMiddleware(short, host), host)
    assert host.calls == ["<startup", "start", ">startup.complete", "stop"]


async def test_a_failed_start_is_reported_and_the_host_does_not_start(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    host.start_error = InvalidConfiguration("no")
    assert await run_lifespan(RealtimeMiddleware(starlette(host), host), host) == [
        "<startup",
        "start",
        ">startup.failed",
    ]


async def test_a_failed_start_is_reported_if_the_host_has_no_lifespan(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    async def django(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("no lifespan")

    host.start_error = InvalidConfiguration("no")
    assert await run_lifespan(RealtimeMiddleware(django, host), host) == ["<startup", "start", ">startup.failed"]


async def test_a_host_cannot_report_success_after_a_failed_start(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    async def swallowing(scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
        except Exception:
            await send({"type": "lifespan.startup.complete"})

    host.start_error = InvalidConfiguration("no")
    assert await run_lifespan(RealtimeMiddleware(swallowing, host), host) == ["<startup", "start", ">startup.failed"]


async def test_a_failed_stop_does_not_fail_the_host(host: FakeHost, caplog: pytest.LogCaptureFixture) -> None:
    host.stop_error = ValueError("no")
    assert await run_lifespan(RealtimeMiddleware(starlette(host), host), host) == [*ORDER, ">shutdown.complete"]


# Mounts


@on_one_loop
@pytest.mark.parametrize(("prefix", "root_path"), [("/realtime", ""), ("/live", "/proxy"), ("/a/b", "")])
async def test_mounted_in_starlette_and_fastapi(host: FakeHost, prefix: str, root_path: str) -> None:
    fastapi = FastAPI()
    fastapi.mount(prefix, host)
    for app in (Starlette(routes=[Mount(prefix, host)]), fastapi):
        for path in ("/v1/health", "/realtime/v1/health"):
            response = await AsgiClient(app, root_path=root_path).get(root_path + prefix + path)
            assert response.status_code == 200, (path, root_path)
        response = await AsgiClient(app, root_path=root_path).get(prefix + "/v1/health")
        assert response.status_code == 200


async def test_a_query_token_is_redacted_through_a_mount(host: FakeHost) -> None:
    await host.create()
    app = Starlette(routes=[Mount("/realtime", host)])
    query = {"access_token": host.token()}
    async with AsgiClient(app).stream("/realtime/v1/streams/run_1/default", query=query) as response:
        assert response.status_code == 200
        assert response.scope["query_string"] == b"access_token=REDACTED"
