from __future__ import annotations

from typing import Any

import anyio
import pytest

from asgi_realtime.testing import AsgiClient, driver

pytestmark = pytest.mark.anyio


async def echo(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    headers = [(b"x-method", scope["method"].encode()), (b"Vary", b"a"), (b"vary", b"b")]
    await send({"type": "http.response.start", "status": 201, "headers": headers})
    await send({"type": "http.response.body", "body": message["body"] + b"|" + scope["query_string"]})


class Endless:
    """Sends numbers until the client disconnects, and counts what it sent."""

    def __init__(self) -> None:
        self.sent = 0
        self.left = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.count, send)
            assert (await receive())["type"] == "http.disconnect"
            self.left = True
            tasks.cancel_scope.cancel()

    async def count(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        while True:
            await send({"type": "http.response.body", "body": b"id: %d\ndata: x\n\n" % self.sent, "more_body": True})
            self.sent += 1


async def test_a_complete_response() -> None:
    response = await AsgiClient(echo).post("/a b", query={"q": "1 2"}, body=b"hello")
    assert (response.status_code, response.body) == (201, b"hello|q=1+2")
    assert response.headers == {"x-method": "POST", "vary": "a, b"}
    assert response.scope["raw_path"] == b"/a%20b"


async def test_a_live_body_has_backpressure_and_leaving_is_a_disconnect() -> None:
    app = Endless()
    async with AsgiClient(app).stream("/") as response:
        assert await response.chunk() == b"id: 0\ndata: x\n\n"
        assert [event.id for event in await response.read_events()] == ["1"]
        await anyio.wait_all_tasks_blocked()
        assert app.sent == 2
        assert response.last_event_id == "1"
    assert app.left


async def test_iteration_yields_the_chunks_as_sent() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        for body in (b"a", b"", b"bc"):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body"})
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"  # after the end of the response, as on a server

    async with AsgiClient(app).stream("/") as response:
        assert [chunk async for chunk in response] == [b"a", b"bc"]
        assert response.ended


async def test_an_error_of_the_app_is_raised() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200})
        raise LookupError("broken")

    for path in ("/early", "/late"):
        with pytest.raises(LookupError, match="broken"):
            await AsgiClient(broken).get(path)


async def test_an_app_without_a_response_is_an_error() -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        return None

    with pytest.raises(AssertionError, match="without a response"):
        await AsgiClient(silent).get("/")


async def test_an_error_of_the_caller_is_not_wrapped() -> None:
    app = Endless()
    with pytest.raises(KeyError, match="mine"):
        async with AsgiClient(app).stream("/"):
            raise KeyError("mine")
    assert app.left


async def test_an_app_that_ignores_the_disconnect_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LEAVE_S", 0.01)

    async def deaf(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await anyio.sleep_forever()

    async with AsgiClient(deaf).stream("/") as response:
        assert response.status_code == 200


async def test_read_until_shows_the_events_found_instead() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b": hi\n\nevent: a\ndata: 1\n\n"})

    async with AsgiClient(app).stream("/") as response:
        with pytest.raises(AssertionError, match="event='a'"):
            await response.read_until("b")
        assert response.comments == ["hi"]
        assert [event.event for event in response.events] == ["a"]


async def test_a_response_shows_that_it_was_cut_off() -> None:
    async def unfinished(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    response = await AsgiClient(unfinished).get("/")
    assert (response.ended, repr(response)) == (False, "<Response 200 b'half' cut off>")
