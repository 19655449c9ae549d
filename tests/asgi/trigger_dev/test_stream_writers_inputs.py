from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.config import Limits
from asgi_realtime.core.log import HIDDEN_STREAM
from asgi_realtime.testing import AsgiClient
from asgi_realtime.testing.driver import make_scope
from tests.asgi.fake_host import FakeHost
from tests.asgi.official_sdk import on_one_loop
from tests.inprocess import SECRET, make_realtime

pytestmark = pytest.mark.anyio

PATH = "/v1/streams/run_1/input/approval"
KEY = StreamKey("run_1", "$trigger.input:approval")
SCOPE = "write:inputStreams:run_1"


async def send(host: FakeHost, body: bytes, *, scope: str = SCOPE, key: str | None = None) -> tuple[int, Any]:
    """Send to the input; returns the status and the JSON. `key` is the idempotency key of the request."""
    headers = host.headers(scope)
    if key is not None:
        headers["x-trigger-request-idempotency-key"] = key
    response = await AsgiClient(host).post(PATH, headers=headers, body=body)
    return response.status_code, json.loads(response.body)


async def stored(host: FakeHost) -> list[bytes]:
    return [entry.data for entry in (await host.broker.read(KEY)).entries]


async def post(host: FakeHost, messages: list[dict[str, Any]]) -> int:
    """Send a body in parts; returns the status."""
    sent: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await anyio.sleep_forever()

    async def respond(message: Any) -> None:
        sent.append(message)

    await host(make_scope("POST", PATH, headers=host.headers(SCOPE)), receive, respond)
    return int(sent[0]["status"])


async def test_a_run_receives_its_inputs_from_the_host_and_over_http() -> None:
    async with make_realtime() as realtime, realtime.open_run("chat") as run:
        path, headers = f"/v1/streams/{run.id}/input/approval", {"authorization": f"Bearer {SECRET}"}
        received: list[Any] = []

        async def receive() -> None:
            received.append(await run.input("approval").get())

        async with anyio.create_task_group() as group:
            group.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            await AsgiClient(realtime).post(path, headers=headers, body=b'{"data": {"yes": [1.5, null]}}')
        assert received == [{"yes": [1.5, None]}]
        await realtime.send_input(run, "approval", "from the host")
        await AsgiClient(realtime).post(path, headers=headers, body=b'{"data": "over HTTP"}')
        inputs = run.input("approval")
        assert [await inputs.get(), await inputs.get()] == ["from the host", "over HTTP"]


async def test_an_input_is_read_like_a_stream(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        assert response.status_code == 200
        assert await response.chunk() == b"retry: 1000\n: connected\n"
        await send(host, b'{"data": "yes"}')
        assert await response.chunk() == b'id: 0\ndata: "yes"\n\n'
        await host.finish()
        assert [event.event for event in await response.read_all_events()] == ["end"]


@on_one_loop
@pytest.mark.parametrize(
    ("body", "data"),
    [
        (b'{"data": {"ok":true}}', b'{"ok":true}'),
        (b'{"data": 0.10000000000000000555}', b"0.10000000000000000555"),
        (b'{"other": 1, "data":\r\n{"b": 1,\r\n"a": "\\ud800"}}', b'{"b": 1,  "a": "\\ud800"}'),
        (b'{"data": null}', b"null"),
        (b'{"data": false}', b"false"),
        (b'{"data": ""}', b'""'),
        (b"{}", b"null"),
        (b'\xef\xbb\xbf{"data": 1}', b"1"),  # PowerShell and .NET send a byte order mark; this was a 400
    ],
)
async def test_an_input_is_stored_as_it_was_sent(host: FakeHost, body: bytes, data: bytes) -> None:
    await host.create()
    assert await send(host, body) == (200, {"ok": True})
    assert await stored(host) == [data]


@on_one_loop
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"1", b"null", b'{"Data": 1}', b"\xff", b'{"data": NaN}', b"[" * 100_000]
)
async def test_a_malformed_input_is_400(host: FakeHost, body: bytes) -> None:
    await host.create()
    status, answer = await send(host, body)
    assert (status, answer["code"]) == (400, "invalid_request")


async def test_a_retried_input_is_stored_once(host: FakeHost) -> None:
    await host.create()
    assert KEY.hidden and KEY.name.startswith(HIDDEN_STREAM)
    for body in (b'{"data": 1}', b'{"data": 1}', b'{"data": 2}'):
        assert await send(host, body, key="k") == (200, {"ok": True})
    await send(host, b'{"data": 3}')
    assert await stored(host) == [b"1", b"3"]
    assert (await host.get("run_1")).inputs == (KEY.name,)


async def test_a_run_that_is_over_accepts_no_input(host: FakeHost) -> None:
    await host.create()
    await host.finish()
    status, answer = await send(host, b'{"data": 1}')
    assert status == 400
    assert "COMPLETED" in answer["error"]


async def test_inputs_need_a_scope_for_the_run(host: FakeHost) -> None:
    body = b'{"data": 1}'
    assert (await AsgiClient(host).post(PATH, body=body)).status_code == 401
    assert (await send(host, body))[0] == 404
    await host.create()
    for scope in ("read:runs:run_1", "write:runs:run_1", "write:inputStreams:run_2"):
        assert (await send(host, body, scope=scope))[0] == 403


async def test_the_length_of_an_input_id_is_limited(host: FakeHost) -> None:
    await host.create()
    path = f"/v1/streams/run_1/input/{'i' * 129}"
    response = await AsgiClient(host).post(path, headers=host.headers(SCOPE), body=b'{"data": 1}')
    assert response.status_code == 422
    assert "limit 128" in json.loads(response.body)["error"]
    assert (await AsgiClient(host).get(path, headers=host.headers())).status_code == 422


async def test_the_size_of_one_input_is_limited() -> None:
    host = FakeHost(limits=Limits(input_bytes=100))
    await host.create()
    fits = b'{"data": "%b"}' % (b"x" * 88)
    assert len(fits) == 100
    assert (await send(host, fits))[0] == 200
    status, answer = await send(host, fits + b" ")
    assert status == 413
    assert "limit 100" in answer["error"]


async def test_the_inputs_of_a_run_are_limited() -> None:
    host = FakeHost(limits=Limits(inputs_bytes=10 + 256))
    await host.create()
    body = b'{"data": "123456"}'
    for _ in range(2):
        assert (await send(host, body, key="k"))[0] == 200
    status, answer = await send(host, body)
    assert status == 429 and "limit 266" in answer["error"]


# The body


async def test_a_declared_length_over_the_limit_is_rejected_unread() -> None:
    host = FakeHost(limits=Limits(input_bytes=100))
    await host.create()
    headers = {**host.headers(SCOPE), "content-length": "101"}
    assert (await AsgiClient(host).post(PATH, headers=headers, body=b"")).status_code == 413


async def test_a_body_can_arrive_in_parts(host: FakeHost) -> None:
    await host.create()
    parts = [b'{"da', b"", b'ta": 1}']
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    assert await post(host, [*messages, {"type": "http.request"}]) == 200


async def test_an_endless_body_is_rejected_at_the_limit() -> None:
    host = FakeHost(limits=Limits(input_bytes=100))
    await host.create()
    part = {"type": "http.request", "body": b" " * 60, "more_body": True}
    assert await post(host, [part, part]) == 413


async def test_a_body_that_cannot_be_received_is_cut_off(host: FakeHost, caplog: pytest.LogCaptureFixture) -> None:
    """Some servers raise when the client disconnects, and that was logged with a traceback."""
    await host.create()

    async def receive() -> Any:
        raise RuntimeError("the connection is closed")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await host(make_scope("POST", PATH, headers=host.headers(SCOPE)), receive, send)
    assert sent[0]["status"] == 408
    assert not caplog.records


async def test_a_cut_off_body_is_not_stored(host: FakeHost) -> None:
    await host.create()
    part = {"type": "http.request", "body": b'{"data": 1}', "more_body": True}
    assert await post(host, [part, {"type": "http.disconnect"}]) == 408
    assert await stored(host) == []
