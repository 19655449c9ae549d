"""`Realtime.response` in routes of a host, as an ASGI app and as an iterator."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asgi_realtime import (
    BrokerUnavailable,
    Limits,
    Realtime,
    RealtimeMiddleware,
    RunNotFound,
    Status,
    TaskError,
    UsageError,
)
from asgi_realtime.asgi.connection import CutOff
from asgi_realtime.core.errors import InvalidRequest, LimitExceeded, ServerShutdown
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.testing import AsgiClient
from tests.inprocess import make_realtime, until

pytestmark = pytest.mark.anyio

collected_on_trio = pytest.mark.filterwarnings(
    "ignore:Async generator 'starlette.requests.Request.stream':ResourceWarning"
)
"""Older versions of Starlette's `BaseHTTPMiddleware` do not close it."""

Respond = Callable[[Realtime, Request], Any]


def make_app(realtime: Realtime, respond: Respond | None = None, middleware: list[Middleware] | None = None) -> Any:
    async def chat(request: Request) -> Response:
        if respond is not None:
            response: Response = respond(realtime, request)
            return response
        protocol: Any = request.query_params.get("protocol", "ai-sdk")
        return realtime.response(request.query_params["run"], protocol=protocol, request=request)

    routes = [Route("/chat", chat, methods=["GET", "POST"])]
    return Starlette(routes=routes, lifespan=realtime.lifespan, middleware=middleware)


@pytest.fixture
async def realtime() -> AsyncIterator[Realtime]:
    async with make_realtime() as realtime:
        yield realtime


async def answer(realtime: Realtime, *chunks: Any, run_id: str = "run_1", fail: bool = False) -> None:
    """A run that is over."""
    try:
        async with realtime.open_run("chat", run_id=run_id):
            for chunk in chunks:
                await realtime.append(chunk)
            if fail:
                raise TaskError("no credit")
    except TaskError:
        pass


async def executes_elsewhere(realtime: Realtime) -> None:
    """A run for which a shutdown does not wait."""
    record = StoredRecord(id="run_1", task="chat", status=Status.EXECUTING, created_at_ms=0, updated_at_ms=0)
    await realtime.runs.create(record)


def types(body: bytes) -> list[str]:
    frames = [line for line in body.decode().split("\n") if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: "))["type"] for line in frames]


WHOLE = ["start", "text-start", "text-delta", "text-end", "finish"]


async def test_a_route_responds_with_a_run(realtime: Realtime) -> None:
    await answer(realtime, "Hel", "lo")
    response = await AsgiClient(make_app(realtime)).post("/chat?run=run_1")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-vercel-ai-ui-message-stream"] == "v1"
    assert "content-length" not in response.headers
    assert types(response.body) == WHOLE


async def test_the_native_protocol_is_the_default(realtime: Realtime) -> None:
    await answer(realtime, "a")
    app = make_app(realtime, lambda realtime, request: realtime.response("run_1"))
    body = (await AsgiClient(app).get("/chat")).body
    assert b'id: 0\ndata: "a"\n\n' in body and b"event: end" in body


async def test_a_header_has_the_url_of_the_rest_and_of_nothing_else(realtime: Realtime) -> None:
    await answer(realtime, {"type": "data-step", "data": 1}, "Hello")
    first = await AsgiClient(make_app(realtime)).post("/chat?run=run_1")
    url = f"/{first.headers['x-realtime-resume']}"
    mount = AsgiClient(realtime)
    rest = await mount.get(url, headers={"last-event-id": "0"})
    assert first.body.endswith(rest.body[rest.body.index(b"data: ") :])
    assert types(rest.body) == WHOLE[1:]
    for other in ("v1/streams/run_1/other", "v1/runs/run_1", "api/v3/runs/run_1"):
        refused = await mount.get(
            url.replace("v1/streams/run_1/default", other), headers={"accept": "text/event-stream"}
        )
        assert refused.status_code == 403

    native = make_app(realtime, lambda realtime, request: realtime.response("run_1"))
    assert "x-realtime-resume" not in (await AsgiClient(native).get("/chat")).headers


async def test_a_pipe_that_has_not_started_is_followed(realtime: Realtime) -> None:
    async def model() -> AsyncIterator[str]:
        yield "Hello"

    def respond(realtime: Realtime, request: Request) -> Response:
        return realtime.response(realtime.pipe(model()).handle, protocol="ai-sdk")

    assert types((await AsgiClient(make_app(realtime, respond)).post("/chat")).body) == WHOLE


async def test_it_resumes_after_the_header_of_the_request_or_an_argument(realtime: Realtime) -> None:
    await answer(realtime, "a", "b")
    client = AsgiClient(make_app(realtime))
    tail = ["text-delta", "text-end", "finish"]
    assert types((await client.post("/chat?run=run_1", last_event_id="0")).body) == tail
    app = make_app(realtime, lambda realtime, request: realtime.response("run_1", protocol="ai-sdk", last_event_id="0"))
    assert types((await AsgiClient(app).post("/chat")).body) == tail
    assert (await client.post("/chat?run=run_1", last_event_id="2")).status_code == 204


@pytest.mark.parametrize(
    ("query", "last_event_id", "status", "code"),
    [
        ("run=other", None, 404, "run_not_found"),
        ("run=run_1", "7", 400, "invalid_request"),
        ("run=run_1", "x", 400, "invalid_request"),
        ("run=run_1&protocol=sse", "x", 400, "invalid_request"),
    ],
)
async def test_an_error_is_a_response(
    realtime: Realtime, query: str, last_event_id: str | None, status: int, code: str
) -> None:
    await answer(realtime, "a")
    response = await AsgiClient(make_app(realtime)).post(f"/chat?{query}", last_event_id=last_event_id)
    assert (response.status_code, response.json()["code"]) == (status, code)


async def test_the_thread_of_ag_ui_is_that_of_the_run(realtime: Realtime) -> None:
    async with realtime.open_run("chat", run_id="run_1", thread="chat:1"):
        pass
    body = (await AsgiClient(make_app(realtime)).get("/chat?run=run_1&protocol=ag-ui")).body
    assert body.count(b'"threadId":"chat:1","runId":"run_1"') == 2


async def test_a_mistake_of_the_host_is_raised(realtime: Realtime) -> None:
    with pytest.raises(UsageError, match="allowed are sse, ai-sdk, ag-ui"):
        realtime.response("run_1", protocol="mcp")  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        realtime.response(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        realtime.response("run_1", "")


async def test_headers_cookies_and_background_tasks_of_the_host(realtime: Realtime) -> None:
    await answer(realtime, "a")
    done: list[str] = []

    def respond(realtime: Realtime, request: Request) -> Response:
        response = realtime.response("run_1", protocol="ai-sdk")
        response.headers["x-run"] = "run_1"
        response.set_cookie("seen", "1")
        response.background = BackgroundTask(done.append, "background")
        return response

    response = await AsgiClient(make_app(realtime, respond)).post("/chat")
    assert response.headers["x-run"] == "run_1" and response.headers["set-cookie"].startswith("seen=1")
    assert types(response.body) == WHOLE
    assert done == ["background"]


async def pass_on(request: Request, call_next: Any) -> Response:
    response: Response = await call_next(request)
    return response


@collected_on_trio
@pytest.mark.parametrize(
    "middleware", [Middleware(BaseHTTPMiddleware, dispatch=pass_on), Middleware(GZipMiddleware, minimum_size=1)]
)
async def test_middlewares_of_the_host(realtime: Realtime, middleware: Middleware) -> None:
    await answer(realtime, "a")
    client = AsgiClient(make_app(realtime, middleware=[middleware]))
    assert types((await client.post("/chat?run=run_1")).body) == WHOLE


async def test_a_head_request_has_no_body(realtime: Realtime) -> None:
    async with realtime.open_run("chat", run_id="run_1"):
        response = await AsgiClient(make_app(realtime)).request("HEAD", "/chat?run=run_1")
    assert (response.status_code, response.body) == (200, b"")
    assert response.headers["x-vercel-ai-ui-message-stream"] == "v1"


async def test_it_is_counted_and_limited() -> None:
    async with make_realtime(limits=Limits(subscribers_per_run=1)) as realtime:
        client = AsgiClient(make_app(realtime))
        async with realtime.open_run("chat", run_id="run_1"), client.stream("/chat?run=run_1") as response:
            await response.chunk()
            assert len(realtime.subscribers) == 1
            refused = await client.get("/chat?run=run_1")
            assert (refused.status_code, refused.json()["code"]) == (429, "limit_exceeded")
            assert "retry-after" in refused.headers
            with pytest.raises(LimitExceeded):
                await anext(aiter(realtime.response("run_1")))
        await until(lambda: not realtime.subscribers)


async def test_it_is_charged_to_its_owner() -> None:
    async with make_realtime(limits=Limits(subscribers_per_owner=1)) as realtime, realtime.open_run("chat") as run:

        async def chat(request: Request) -> Response:
            owner = request.query_params.get("owner")
            return realtime.response(run, protocol="ai-sdk", owner=owner)

        app = Starlette(routes=[Route("/chat", chat)])
        app.mount("/realtime", realtime)
        client = AsgiClient(app)
        await realtime.append("a", run=run)
        async with client.stream("/chat?owner=u:1") as response:
            await response.chunk()
            resume = f"/realtime/{response.headers['x-realtime-resume']}"
            for path in ("/chat?owner=u:1", resume):
                assert (await client.get(path)).status_code == 429
            for path in ("/chat?owner=u:2", "/chat"):
                async with client.stream(path) as other:
                    assert other.status_code == 200


@pytest.mark.parametrize("protocol", ["ai-sdk", "ag-ui"])
async def test_a_shutdown_breaks_the_connection(protocol: str) -> None:
    realtime = make_realtime()
    async with realtime:
        client = AsgiClient(make_app(realtime))
        await executes_elsewhere(realtime)
        async with client.stream(f"/chat?run=run_1&protocol={protocol}") as response:
            await response.chunk()
            realtime.begin_shutdown()
            assert await response.read() == b""
            assert not response.ended
        refused = await client.post(f"/chat?run=run_1&protocol={protocol}")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")


@collected_on_trio
@pytest.mark.parametrize(("protocol", "last"), [("ai-sdk", "error"), ("ag-ui", "RUN_ERROR")])
async def test_a_body_that_a_middleware_completes_ends_with_an_error(protocol: str, last: str) -> None:
    """It would look finished to the frontend."""
    async with make_realtime() as realtime:
        client = AsgiClient(make_app(realtime, middleware=[Middleware(BaseHTTPMiddleware, dispatch=pass_on)]))
        await executes_elsewhere(realtime)
        async with client.stream(f"/chat?run=run_1&protocol={protocol}") as response:
            await response.chunk()
            realtime.begin_shutdown()
            assert types(await response.read())[-1] == last
            assert response.ended


async def test_an_event_source_reconnects_during_a_shutdown() -> None:
    realtime = make_realtime()
    async with realtime:
        await executes_elsewhere(realtime)
        realtime.begin_shutdown()
        async with AsgiClient(make_app(realtime)).stream("/chat?run=run_1&protocol=sse") as response:
            assert [event.event for event in await response.read_all_events()] == ["reconnect"]


# As an iterator


async def test_the_iterator_has_the_same_bytes(realtime: Realtime) -> None:
    await answer(realtime, "a", "b", {"type": "data-x", "data": 1}, fail=True)
    for protocol in ("sse", "ai-sdk", "ag-ui"):
        response = await AsgiClient(make_app(realtime)).post(f"/chat?run=run_1&protocol={protocol}")
        bodies = [body async for body in realtime.response("run_1", protocol=protocol)]
        assert b"".join(bodies) == response.body


async def test_the_iterator_is_live_and_leaves(realtime: Realtime) -> None:
    async with realtime.open_run("chat", run_id="run_1"):
        async with aclosing(aiter(realtime.response("run_1"))) as bodies:
            await anext(bodies)
            for letter in "abc":
                await realtime.append(letter)
                assert await anext(bodies) == f'id: {"abc".index(letter)}\ndata: "{letter}"\n\n'.encode()
            assert len(realtime.subscribers) == 1
        await until(lambda: not realtime.subscribers)


@pytest.mark.parametrize(
    ("run", "last_event_id", "error"), [("other", None, RunNotFound), ("run_1", "9", InvalidRequest)]
)
async def test_the_iterator_raises_errors(
    realtime: Realtime, run: str, last_event_id: str | None, error: type[Exception]
) -> None:
    await answer(realtime, "a")
    with pytest.raises(error):
        await anext(aiter(realtime.response(run, protocol="ai-sdk", last_event_id=last_event_id)))


@pytest.mark.parametrize("protocol", ["ai-sdk", "ag-ui"])
async def test_the_iterator_breaks_at_a_shutdown(protocol: Any) -> None:
    """It must not just end: the host would complete the body."""
    async with make_realtime() as realtime:
        await executes_elsewhere(realtime)
        bodies = aiter(realtime.response("run_1", protocol=protocol))
        await anext(bodies)
        realtime.begin_shutdown()
        with pytest.raises(CutOff):
            await anext(bodies)
        with pytest.raises((ServerShutdown, BrokerUnavailable)):
            await anext(aiter(realtime.response("run_1", protocol=protocol)))


@pytest.mark.parametrize("protocol", ["ai-sdk", "ag-ui"])
async def test_the_iterator_of_a_reader_that_a_stop_leaves_behind_breaks(protocol: Any) -> None:
    """The client does not accept data, so the stop cuts the subscription before the rest of the answer."""
    async with make_realtime() as realtime:
        await executes_elsewhere(realtime)
        bodies = aiter(realtime.response("run_1", protocol=protocol))
        await anext(bodies)
        await realtime.append("a", run="run_1")
        await anyio.wait_all_tasks_blocked()
    with pytest.raises(CutOff):
        async for _ in bodies:
            pass


@pytest.mark.parametrize("protocol", ["ai-sdk", "ag-ui"])
async def test_the_middleware_breaks_the_connection_of_a_host_that_iterates(protocol: Any) -> None:
    realtime = make_realtime()

    async def host(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async for body in realtime.response("run_1", protocol=protocol):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async with realtime:
        await executes_elsewhere(realtime)
        async with AsgiClient(RealtimeMiddleware(host, realtime)).stream("/") as response:
            await response.chunk()
            realtime.begin_shutdown()
            assert await response.read() == b"" and not response.ended


async def test_a_cancelled_iterator_leaves(realtime: Realtime) -> None:
    async with realtime.open_run("chat", run_id="run_1"):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                async def read() -> None:
                    async for _ in realtime.response("run_1"):
                        pass

                tasks.start_soon(read)
                await until(lambda: realtime.subscribers)
                scope.cancel()
        await until(lambda: not realtime.subscribers)
