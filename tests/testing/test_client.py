"""The client for tests of an app: start-up and shutdown, responses, live bodies, and failures."""

from __future__ import annotations

import itertools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from fastapi import BackgroundTasks, FastAPI, Request
from litestar import Litestar
from quart import Quart

from asgi_realtime.asgi.host import App
from asgi_realtime.testing import AsgiClient
from tests.inprocess import GUARD_S, run_without_anyio

pytestmark = pytest.mark.anyio


async def head(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})


async def chunk(send: Any, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def count(send: Any) -> None:
    await head(send)
    for number in itertools.count():
        await chunk(send, b"data: %d\n\n" % number)


def responding(*chunks: bytes, raises: Exception | None = None, ends: bool = True) -> App:
    """An app without a lifespan that sends these chunks and then ends, raises, or keeps the body open."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await receive()
        await head(send)
        for one in chunks:
            await chunk(send, one)
        if raises is not None:
            raise raises
        if ends:
            await chunk(send, b"", more=False)
        else:
            assert (await receive())["type"] == "http.disconnect"

    return app


def with_lifespan(log: list[str], *, fails_in: str = "") -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        log.append("start")
        if fails_in == "start":
            raise LookupError("no database")
        yield {"name": "from the start-up"}
        log.append("end")
        if fails_in == "end":
            raise LookupError("no shutdown")

    app = FastAPI(lifespan=lifespan)

    @app.post("/echo")
    async def echo(request: Request) -> dict[str, Any]:
        return {
            "json": await request.json(),
            "query": dict(request.query_params),
            "headers": {name: request.headers.get(name) for name in ("authorization", "x-a", "last-event-id", "host")},
            "state": request.state.name,
        }

    async def numbers(scope: Any, receive: Any, send: Any) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count, send)
            while (await receive())["type"] != "http.disconnect":
                pass
            log.append("left")
            tasks.cancel_scope.cancel()

    app.mount("/numbers", numbers)
    return app


async def test_it_starts_and_stops_the_app() -> None:
    log: list[str] = []
    async with AsgiClient(with_lifespan(log)) as client:
        assert log == ["start"]
        assert (await client.get("/nothing")).status_code == 404
    assert log == ["start", "end"]


async def test_a_request_has_the_options_of_the_client_and_the_call() -> None:
    async with AsgiClient(with_lifespan([]), token="one", headers={"X-A": "1"}) as client:
        first = await client.post("/echo?a=1%202", json={"b": [1]})
        assert first.status_code == 200
        assert first.json() == {
            "json": {"b": [1]},
            "query": {"a": "1 2"},
            "headers": {"authorization": "Bearer one", "x-a": "1", "last-event-id": None, "host": "localhost"},
            "state": "from the start-up",
        }
        options: dict[str, Any] = {"token": "two", "headers": {"x-a": "2"}, "last_event_id": "7", "query": {"c": "&"}}
        other = (await client.post("/echo", json=None, body=b"null", **options)).json()
        assert other["query"] == {"c": "&"}
        assert other["headers"] == {
            "authorization": "Bearer two",
            "x-a": "2",
            "last-event-id": "7",
            "host": "localhost",
        }


async def test_a_failing_start_up_raises_its_error() -> None:
    log: list[str] = []
    with pytest.raises(LookupError, match="no database"):
        async with AsgiClient(with_lifespan(log, fails_in="start")):
            raise AssertionError("not reached")
    assert log == ["start"]


def with_work(background: Callable[[], Awaitable[None]]) -> FastAPI:
    app = FastAPI()

    @app.post("/work")
    async def work(tasks: BackgroundTasks) -> str:
        tasks.add_task(background)
        return "accepted"

    return app


async def test_background_tasks_continue_after_the_response() -> None:
    """They were cancelled after two seconds, and the response came only then."""
    log: list[str] = []
    release = anyio.Event()

    async def background() -> None:
        log.append("started")
        await release.wait()
        await anyio.sleep(0.02)
        log.append("ended")

    async with AsgiClient(with_work(background)) as client:
        assert (await client.post("/work")).json() == "accepted"
        assert log == ["started"]
        release.set()
    assert log == ["started", "ended"]


async def test_a_late_failure_of_a_background_task_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    release = anyio.Event()

    async def background() -> None:
        await release.wait()
        raise LookupError("no mail server")

    async with AsgiClient(with_work(background)) as client:
        await client.post("/work")
        release.set()
    assert "no mail server" in caplog.text


async def test_a_start_up_that_exits_raises_system_exit() -> None:
    """The app was mistaken for one without a start-up."""

    async def exits(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        sys.exit("DATABASE_URL is missing")

    with pytest.raises(SystemExit, match="DATABASE_URL"):
        async with AsgiClient(exits):
            raise AssertionError("not reached")


async def test_a_failing_shutdown_raises_unless_the_test_failed_first() -> None:
    with pytest.raises(LookupError, match="no shutdown"):
        async with AsgiClient(with_lifespan([], fails_in="end")):
            pass
    with pytest.raises(KeyError, match="first"):
        async with AsgiClient(with_lifespan([], fails_in="end")):
            raise KeyError("first")


@pytest.mark.parametrize("when", ["startup", "shutdown"])
async def test_a_failure_that_the_app_reports_instead_of_raising(when: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if when == "startup":
            await send({"type": "lifespan.startup.failed", "message": "no disk"})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.failed", "message": "no disk"})

    with pytest.raises(RuntimeError, match="could not (start|shut down): no disk"):
        async with AsgiClient(app):
            assert when == "shutdown"


async def test_an_app_without_a_lifespan_can_be_used() -> None:
    async with AsgiClient(responding(b"hello")) as client:
        assert (await client.get("/")).text == "hello"


async def test_an_app_that_treats_its_lifespan_as_a_request_is_reported() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await head(send)

    with pytest.raises(AssertionError, match="responded to its lifespan with http.response.start; pass lifespan=False"):
        async with AsgiClient(app):
            raise AssertionError("not reached")
    async with AsgiClient(app, lifespan=False) as client, client.stream("/") as response:
        assert response.status_code == 200


async def test_an_app_that_never_starts_or_stops_times_out_and_is_cancelled() -> None:
    log: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            if scope.get("slow") != "start":
                await receive()
                await send({"type": "lifespan.startup.complete"})
            await anyio.sleep_forever()
        finally:
            log.append("cancelled")

    async def never_starts(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "slow": "start"}, receive, send)

    with pytest.raises(TimeoutError, match="did not start within 0.05 s"):
        await AsgiClient(never_starts, timeout=0.05).__aenter__()
    assert log == ["cancelled"]
    client = await AsgiClient(app).__aenter__()
    client.timeout = 0.05
    with pytest.raises(TimeoutError, match="did not shut down within 0.05 s"):
        await client.__aexit__(None, None, None)
    assert log == ["cancelled", "cancelled"]


async def test_cancelling_the_start_up_ends_it() -> None:
    ended = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    with anyio.move_on_after(0.05) as scope:
        await AsgiClient(app).__aenter__()
    assert scope.cancelled_caught and ended.is_set()


async def test_the_lifespan_can_end_in_another_task_than_it_started() -> None:
    """As with fixtures of pytest-asyncio."""
    log: list[str] = []
    client = AsgiClient(with_lifespan(log))
    for step in (client.__aenter__, lambda: client.__aexit__(None, None, None)):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(step)
    assert log == ["start", "end"]


def test_it_runs_on_a_loop_that_anyio_did_not_start(anyio_backend_name: str) -> None:
    async def main() -> None:
        async with AsgiClient(with_lifespan([])) as client, client.stream("/numbers/") as response:
            assert (await response.next_event()).json() == 0

    run_without_anyio(main, anyio_backend_name)


async def test_other_frameworks_start_and_respond(anyio_backend_name: str) -> None:
    log: list[str] = []

    async def on_startup() -> None:
        log.append("litestar")

    async with AsgiClient(Litestar(on_startup=[on_startup], logging_config=None)) as client:
        assert (await client.get("/nothing")).status_code == 404
    if anyio_backend_name == "asyncio":
        app = Quart("app")
        app.before_serving(lambda: log.append("quart"))
        async with AsgiClient(app) as client:
            assert (await client.get("/nothing")).status_code == 404
    assert log[:1] == ["litestar"] and (log[1:] == ["quart"]) == (anyio_backend_name == "asyncio")


async def test_events_arrive_one_by_one_and_leaving_early_ends_the_app() -> None:
    log: list[str] = []
    async with AsgiClient(with_lifespan(log)) as client:
        async with client.stream("/numbers/") as response:
            seen = []
            async for event in response.aiter_events(timeout=GUARD_S):
                seen.append(event.json())
                if event.json() == 2:
                    break
            assert seen == [0, 1, 2] == [event.json() for event in response.events]
            assert "left" not in log
        assert "left" in log


async def test_concurrent_streams_are_independent() -> None:
    async with AsgiClient(with_lifespan([])) as client:
        async with client.stream("/numbers/") as one, client.stream("/numbers/") as other:
            assert [(await one.next_event()).data for _ in range(3)] == ["0", "1", "2"]
            assert (await other.next_event()).data == "0"


async def test_further_events_of_a_chunk_are_saved() -> None:
    async with AsgiClient(responding(b"data: 1\n\ndata: 2\n\ndata: 3\n\nda", b"ta: 4\n\n")) as client:
        async with client.stream("/") as response:
            assert (await response.next_event()).data == "1"
            assert len(response.events) == 1
            assert [event.data for event in await response.read_events()] == ["2", "3"]
            assert [event.data async for event in response.aiter_events()] == ["4"]
            assert [event.data for event in response.events] == ["1", "2", "3", "4"]
            with pytest.raises(anyio.EndOfStream, match="the body ended; .*message '4'"):
                await response.next_event()


async def test_a_timeout_shows_what_was_read() -> None:
    events = b"".join(b"event: chunk\ndata: %d\n\n" % number for number in range(7))
    async with AsgiClient(responding(events, b":\n\n", ends=False)) as client:
        async with client.stream("/") as response:
            for _ in range(7):
                await response.next_event()
            with pytest.raises(TimeoutError) as caught:
                await response.next_event(timeout=0.05)
            message = str(caught.value)
            assert message.startswith(
                "no event came within 0.05 s; the app responded with 200; read so far: events 2 earlier ones, "
            )
            assert message.endswith("chunk '5', chunk '6'")
            with pytest.raises(TimeoutError, match="no event came within"):
                [event async for event in response.aiter_events(timeout=0.05)]


async def test_the_timeout_of_the_client_applies_to_every_wait() -> None:
    async with AsgiClient(responding(b"data: 1\n\n", ends=False), timeout=GUARD_S) as client:
        async with client.stream("/") as response:
            assert (await response.next_event()).data == "1"
            assert response.timeout == GUARD_S
            response.timeout = 0.05
            with pytest.raises(TimeoutError, match="no chunk came within 0.05 s"):
                await response.chunk()
            with pytest.raises(TimeoutError, match="no chunk came"):
                await response.read()
        for client.timeout in (0.05, 0.5, 5):
            with pytest.raises(TimeoutError) as caught:
                await client.get("/x")
            if "did not respond" not in str(caught.value):  # as on a machine that stalls
                break
        assert "GET /x: responded with 200, but the body did not end within" in str(caught.value)
        assert "it starts with b'data: 1" in str(caught.value)


async def test_an_app_that_does_not_respond_times_out() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        while (await receive())["type"] != "http.disconnect":
            pass

    async with AsgiClient(app) as client:
        with pytest.raises(TimeoutError, match="the app did not respond to GET /x within 0.05 s"):
            await client.get("/x", timeout=0.05)


async def test_an_error_of_the_app_in_a_stream_is_raised() -> None:
    async with AsgiClient(responding(b"data: 1\n\n", raises=LookupError("broken"))) as client:
        with pytest.raises(LookupError, match="broken"):
            async with client.stream("/") as response:
                assert [event.data async for event in response.aiter_events()] == ["1"]
                assert not response.ended
        with pytest.raises(LookupError, match="broken"):
            await client.get("/")


async def test_the_error_of_the_app_is_the_cause_of_the_failure_of_the_test() -> None:
    async with AsgiClient(responding(b"data: 1\n\n", raises=LookupError("broken"))) as client:
        with pytest.raises(anyio.EndOfStream, match="was cut off") as caught:
            async with client.stream("/") as response:
                await response.next_event()
                await response.next_event()
        assert isinstance(caught.value.__cause__, LookupError)


@pytest.mark.parametrize("leave", [pytest.skip, pytest.fail])
async def test_a_test_can_skip_or_fail_inside_a_stream(leave: Any) -> None:
    """Their exceptions are not `Exception`s, and pytest does not recognize them in a group."""
    async with AsgiClient(responding(b"data: 1\n\n")) as client:
        with pytest.raises(leave.Exception, match="reason"):
            async with client.stream("/"):
                leave("reason")
