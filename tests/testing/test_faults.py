"""Planned faults: in process, and under a real server with a real client."""

from __future__ import annotations

import asyncio
import itertools
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
import uvicorn

from asgi_realtime import Realtime, Timeouts
from asgi_realtime.testing import AsgiClient, FakeClock, Faults, StreamedResponse
from tests.inprocess import GUARD_S, SECRET, make_realtime

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def an_app_has_time_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_realtime.testing.faults.LEAVE_S", GUARD_S)


class Numbers:
    """Sends numbers, `per_chunk` events per chunk, until its client disconnects. `how` is the way it ended."""

    def __init__(self, *, per_chunk: int = 1, watches: bool = True, ends_after: float = math.inf) -> None:
        self.per_chunk = per_chunk
        self.watches = watches
        self.ends_after = ends_after
        self.sent = 0
        self.how = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await receive()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._count, send, tasks.cancel_scope)
                if self.watches:
                    assert (await receive())["type"] == "http.disconnect"
                    self.how = self.how or "left"
                    tasks.cancel_scope.cancel()
        except BaseException:
            self.how = "cancelled"
            raise

    async def _count(self, send: Any, running: anyio.CancelScope) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        numbers = itertools.count()
        while self.sent < self.ends_after:
            body = b"".join(b"data: %d\r\n\r\n" % next(numbers) for _ in range(self.per_chunk))
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self.sent += 1
            await anyio.lowlevel.checkpoint()
        await send({"type": "http.response.body", "body": b"data: end\n\n"})
        self.how = "ended"
        running.cancel()


async def data_of(response: StreamedResponse) -> list[str]:
    return [event.data async for event in response.aiter_events()]


@pytest.mark.parametrize("per_chunk", [1, 3, 5])
@pytest.mark.parametrize("after", [0, 1, 4])
async def test_a_cut_comes_after_exactly_the_planned_events(per_chunk: int, after: int) -> None:
    app = Numbers(per_chunk=per_chunk)
    faults = Faults(app)
    faults.cut(after=after)
    async with AsgiClient(faults) as client:
        async with client.stream("/x") as response:
            assert await data_of(response) == [str(number) for number in range(after)]
            assert not response.ended and app.how == "left"
        assert faults.happened == [f"GET /x cut after {after} events"]
        async with client.stream("/x") as response:  # only the first request is cut
            assert (await response.next_event()).data == "0"


@pytest.mark.parametrize("per_chunk", [1, 3])
@pytest.mark.parametrize("after", [0, 2, 3])
async def test_a_cut_in_the_middle_of_an_event(per_chunk: int, after: int) -> None:
    faults = Faults(Numbers(per_chunk=per_chunk))
    faults.cut(after=after, mid_event=True)
    async with AsgiClient(faults) as client, client.stream("/x") as response:
        body = await response.read()
        whole = b"".join(b"data: %d\r\n\r\n" % number for number in range(after))
        assert body == whole + b"data:"
        assert faults.happened == [f"GET /x cut after {after} events and half of one"]


async def test_a_body_that_ends_earlier_is_not_cut() -> None:
    faults = Faults(Numbers(ends_after=2))
    faults.cut(after=5)
    async with AsgiClient(faults) as client, client.stream("/x") as response:
        assert await data_of(response) == ["0", "1", "end"]
        assert response.ended and not faults.happened


async def test_an_app_that_ignores_a_cut_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_realtime.testing.faults.LEAVE_S", 0.1)
    app = Numbers(watches=False)
    faults = Faults(app)
    faults.cut(after=1)
    async with AsgiClient(faults) as client, client.stream("/x") as response:
        assert await data_of(response) == ["0"]
        assert app.how == "cancelled" and app.sent > 1


async def test_a_stall_blocks_send_until_its_release() -> None:
    app = Numbers()
    faults = Faults(app)
    stall = faults.stall(after=2)
    async with AsgiClient(faults) as client, client.stream("/x") as response:
        assert [(await response.next_event()).data for _ in range(2)] == ["0", "1"]
        with pytest.raises(TimeoutError):
            await response.next_event(timeout=0.05)
        await anyio.wait_all_tasks_blocked()
        assert app.sent == 2 and app.how == "" and faults.happened == ["GET /x stalled after 2 events"]
        stall.release()
        assert [(await response.next_event()).data for _ in range(2)] == ["2", "3"]


async def test_a_stall_in_the_middle_of_a_chunk_loses_nothing() -> None:
    app = Numbers(per_chunk=3, ends_after=2)
    faults = Faults(app)
    stall = faults.stall(after=4)
    async with AsgiClient(faults) as client, client.stream("/x") as response:
        assert [(await response.next_event()).data for _ in range(4)] == ["0", "1", "2", "3"]
        stall.release()
        assert await data_of(response) == ["4", "5", "end"] and response.ended


@pytest.mark.parametrize("watches", [True, False])
async def test_a_stall_ends_with_its_client(watches: bool) -> None:
    app = Numbers(watches=watches, ends_after=3)
    faults = Faults(app)
    faults.stall(after=1)
    async with AsgiClient(faults) as client:
        async with client.stream("/x") as response:
            assert (await response.next_event()).data == "0"
        assert app.how == ("left" if watches else "ended")


async def test_a_stall_saves_the_request_body_for_an_app_that_reads_it_late() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": (await receive())["body"]})

    faults = Faults(app)
    stall = faults.stall()
    async with AsgiClient(faults) as client, client.stream("/", method="POST", body=b"data: 2\n\n") as response:
        await anyio.wait_all_tasks_blocked()
        stall.release()
        assert await data_of(response) == ["1", "2"]


async def test_the_library_drops_a_subscriber_that_does_not_read() -> None:
    clock = FakeClock()
    realtime = make_realtime(clock=clock, timeouts=Timeouts(tick=3600.0, drain=0.02))
    faults = Faults(realtime)
    faults.stall(after=1)
    async with realtime, realtime.open_run("sample") as run:
        async with AsgiClient(faults, lifespan=False, token=SECRET) as client:
            async with client.stream(f"/v1/runs/{run.id}") as response:
                await response.next_event()
                await anyio.wait_all_tasks_blocked()
                assert len(realtime.subscribers) == 1
                await clock.advance("31s")
                await anyio.wait_all_tasks_blocked()
                assert not realtime.subscribers and faults.happened


async def test_refusals_follow_their_times_and_path() -> None:
    app = Numbers(ends_after=1)
    faults = Faults(app)
    faults.refuse(times=2, path="/x", headers={"Retry-After": "1"})
    async with AsgiClient(faults) as client:
        assert (await client.get("/other")).status_code == 200
        assert (await client.request("OPTIONS", "/x")).status_code == 200
        for _ in range(2):
            refused = await client.get("/x")
            assert (refused.status_code, refused.headers["retry-after"], refused.text) == (
                503,
                "1",
                "refused by a test",
            )
        assert (await client.get("/x")).status_code == 200
        assert faults.happened == ["GET /x refused with 503"] * 2


async def test_faults_happen_in_planned_order_and_can_be_cleared() -> None:
    faults = Faults(Numbers(ends_after=2))
    faults.refuse(429)
    faults.cut(after=1)
    faults.refuse(500, times=math.inf)
    async with AsgiClient(faults) as client:
        assert (await client.get("/")).status_code == 429
        assert (await client.get("/")).text.count("data") == 1
        assert [(await client.get("/")).status_code for _ in range(3)] == [500, 500, 500]
        faults.clear()
        assert (await client.get("/")).status_code == 200


async def test_a_client_that_resumes_loses_nothing() -> None:
    realtime: Realtime = make_realtime()
    faults = Faults(realtime)
    faults.cut(after=2)
    faults.refuse()
    faults.cut(after=1, mid_event=True)
    async with realtime, realtime.open_run("sample") as run:
        for word in "one two three four".split():
            await realtime.append(word)
        run.set_output(None)
    async with realtime, AsgiClient(faults, lifespan=False, token=SECRET) as client:
        seen: list[str] = []
        last: str | None = None
        while "four" not in seen:
            async with client.stream(f"/v1/streams/{run.id}/default", last_event_id=last) as response:
                seen += [event.json() async for event in response.aiter_events() if event.event == "message"]
                last = response.last_event_id or last
    assert seen == ["one", "two", "three", "four"]
    assert len(faults.happened) == 3


# Under a real server


@contextmanager
def served(app: Any, http: Any) -> Iterator[str]:
    """Run uvicorn in a thread; yield its URL."""
    server = uvicorn.Server(uvicorn.Config(app, http=http, log_level="critical", timeout_graceful_shutdown=5))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(GUARD_S)


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_a_real_client_sees_a_refusal_and_a_connection_that_breaks(http: str) -> None:
    app = Numbers()
    faults = Faults(app)
    faults.refuse()
    faults.cut(after=2)
    with served(faults, http) as url:
        assert httpx.get(url).status_code == 503
        body = b""
        with pytest.raises(httpx.RemoteProtocolError), httpx.stream("GET", url, timeout=GUARD_S) as response:
            for part in response.iter_raw():
                body += part
        assert body == b"data: 0\r\n\r\ndata: 1\r\n\r\n"
        assert app.how == "left"


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_a_stall_under_a_server_ends_with_its_client(http: str) -> None:
    app = Numbers(watches=False, ends_after=3)
    faults = Faults(app)
    faults.stall(after=1)
    with served(faults, http) as url:
        with httpx.stream("GET", url, timeout=GUARD_S) as response:
            parts = response.iter_raw()
            assert next(parts) == b"data: 0\r\n\r\n"
            assert app.how == ""
        wait_until(lambda: app.how == "ended")


def wait_until(fact: Callable[[], bool]) -> None:
    """Wait in a thread without a loop."""
    give_up = time.monotonic() + GUARD_S
    while not fact():
        assert time.monotonic() < give_up
        time.sleep(0.001)
