"""What a stalled reader holds, and what happens to its connection. The server is played by a `send` that blocks."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from asgi_realtime.asgi.connection import PIECE_BYTES, WHOLE_BYTES, find_transport, pieces
from asgi_realtime.asgi.host import App, Message, Send
from asgi_realtime.core.config import Timeouts
from asgi_realtime.testing.driver import make_scope
from tests.asgi.fake_host import FakeHost
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio

LARGE = "x" * 1_000_000


class FakeTransport:
    """The part of an asyncio transport that is used."""

    def __init__(self) -> None:
        self.aborted = self.closing = False
        self.reading = True
        self.unread = 0

    def abort(self) -> None:
        self.aborted = self.closing = True
        self.unread = 0

    def is_closing(self) -> bool:
        return self.closing

    def is_reading(self) -> bool:
        return self.reading

    def get_write_buffer_size(self) -> int:
        return self.unread


class Server:
    """One request on a server that, like uvicorn, has a bound method `send` next to `transport`."""

    def __init__(self, app: App, path: str, headers: dict[str, str]) -> None:
        self.transport = FakeTransport()
        self.sent: list[Message] = []
        self.readable = anyio.Semaphore(0)
        self.returned = anyio.Event()
        self._app = app
        self._scope = make_scope("GET", path, headers=headers)

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        await self.readable.acquire()

    async def run(self) -> None:
        async def receive() -> Message:
            await anyio.sleep_forever()
            raise AssertionError

        await self._app(self._scope, receive, self.send)
        self.returned.set()

    def read(self, messages: int = 1) -> None:
        for _ in range(messages):
            self.readable.release()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def large_run(host: FakeHost) -> None:
    await host.create(payload=LARGE)
    await host.append(LARGE)
    await host.send_input("run_1", "approval", LARGE)
    await host.finish()


OFFICIAL = {"trigger-version": "4.8.3"}
EVENTS = {"accept": "text/event-stream"}
LARGE_RESPONSES = [
    ("/v1/streams/run_1/default", EVENTS),
    ("/v1/streams/run_1/default", OFFICIAL),
    ("/v1/streams/run_1/input/approval", EVENTS),
    ("/v1/streams/run_1/input/approval", OFFICIAL),
    ("/v1/runs/run_1", EVENTS),
    ("/v1/runs/run_1?offset=-1", {}),
    ("/api/v3/runs/run_1", {}),
]


@pytest.mark.parametrize(("path", "more"), LARGE_RESPONSES)
async def test_large_items_are_sent_in_pieces(host: FakeHost, path: str, more: dict[str, str]) -> None:
    await large_run(host)
    path, _, query = path.partition("?")
    server = Server(host, path, {**host.headers(), **more})
    server._scope["query_string"] = query.encode()
    server.read(1000)
    with anyio.fail_after(GUARD_S):
        await server.run()
    assert max(len(message.get("body", b"")) for message in server.sent) <= PIECE_BYTES
    assert LARGE.encode() in server.body
    lengths = [int(value) for name, value in server.sent[0]["headers"] if name == b"content-length"]
    assert lengths in ([], [len(server.body)])
    if not lengths:
        assert b"event: " in server.body
    else:
        json.loads(server.body)


@pytest.mark.parametrize(("path", "more"), LARGE_RESPONSES[-3:])
async def test_readers_share_what_is_not_sent_yet(host: FakeHost, path: str, more: dict[str, str]) -> None:
    """The JSON of a run is encoded once, and no reader copies more of it than a piece."""
    await large_run(host)
    encoded: list[bytes] = []
    original = host.app._run_cache.encoded

    def encode(*args: Any) -> bytes:
        encoded.append(original(*args))
        return encoded[-1]

    host.app._run_cache.encoded = encode  # type: ignore[method-assign, assignment]
    path, _, query = path.partition("?")
    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            server = Server(host, path, {**host.headers(), **more})
            server._scope["query_string"] = query.encode()
            server.read(3)
            tasks.start_soon(server.run)
        await anyio.wait_all_tasks_blocked()
        assert encoded[0] is encoded[1]
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(("path", "more"), [LARGE_RESPONSES[0], LARGE_RESPONSES[-1]])
async def test_a_reader_that_stalls_within_an_item_is_aborted(path: str, more: dict[str, str]) -> None:
    host = FakeHost(timeouts=Timeouts(send=30))
    await large_run(host)
    server = Server(host, path, {**host.headers(), **more})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.run)
        for _ in range(3):  # each piece is progress
            server.read()
            await anyio.wait_all_tasks_blocked()
            host.tick()
            host.tick(29)
        assert not server.transport.aborted
        host.tick(1)
        assert server.transport.aborted
        with anyio.fail_after(GUARD_S):
            await server.returned.wait()
    assert not host.subscribers


@pytest.mark.parametrize(("path", "more"), [LARGE_RESPONSES[0], LARGE_RESPONSES[-1]])
async def test_a_shutdown_does_not_wait_for_the_pieces_of_a_slow_reader(path: str, more: dict[str, str]) -> None:
    host = FakeHost(timeouts=Timeouts(send=30))
    await large_run(host)
    server = Server(host, path, {**host.headers(), **more})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.run)
        server.read(3)
        await anyio.wait_all_tasks_blocked()
        host.begin_shutdown()
        for _ in range(4):
            server.read()
            await anyio.wait_all_tasks_blocked()
            host.tick(0.5)
        with anyio.fail_after(GUARD_S):
            await server.returned.wait()
    assert server.transport.aborted


async def test_the_unread_end_of_a_response_is_aborted() -> None:
    host = FakeHost(timeouts=Timeouts(send=30))
    await host.create()
    server = Server(host, "/api/v3/runs/run_1", host.headers())
    server.transport.unread = 100
    server.read(2)
    with anyio.fail_after(GUARD_S):
        await server.run()
    host.tick()
    host.tick(29)
    server.transport.unread = 50  # progress
    host.tick()
    host.tick(29)
    assert not server.transport.aborted
    host.tick(1)
    assert server.transport.aborted
    assert not host.subscribers


async def test_the_read_end_of_a_response_is_forgotten(host: FakeHost) -> None:
    await host.create()
    server = Server(host, "/api/v3/runs/run_1", host.headers())
    server.transport.unread = 100
    server.read(2)
    with anyio.fail_after(GUARD_S):
        await server.run()
    server.transport.unread = 0
    host.tick()
    assert not host.subscribers
    assert not server.transport.aborted


@pytest.mark.parametrize("change", [{"closing": True}, {"reading": False}])
async def test_a_subscription_ends_with_its_connection(host: FakeHost, change: dict[str, bool]) -> None:
    """Without a disconnect: uvicorn reports none after a second request on the connection."""
    await host.create()
    server = Server(host, "/v1/streams/run_1/default", host.headers())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.run)
        server.read(2)
        await anyio.wait_all_tasks_blocked()
        host.tick()
        assert host.app.subscription_limits.open == 1
        vars(server.transport).update(change)
        host.tick()
        assert host.app.subscription_limits.open == 0
        with anyio.fail_after(GUARD_S):
            await server.returned.wait()
    assert server.transport.aborted


def test_a_transport_is_found_behind_the_functions_of_middleware() -> None:
    server = Server(FakeHost(), "/", {})

    def wrap(send: Send) -> Send:
        state = object()

        async def wrapped(message: Message) -> None:
            assert state
            await send(message)

        return wrapped

    found: object = find_transport("1.1", wrap(wrap(server.send)))
    assert found is server.transport
    assert find_transport("2", server.send) is None, "a connection of HTTP/2 has other requests"

    async def plain(message: Message) -> None: ...

    assert find_transport("1.1", plain) is None


def test_pieces_are_the_parts_in_order() -> None:
    parts = [b"a" * 10, b"b" * (3 * PIECE_BYTES), b"", b"c" * PIECE_BYTES, b"d"]
    assert b"".join(pieces(parts)) == b"".join(parts)
    assert {len(piece) for piece in pieces(parts)} == {PIECE_BYTES, 11}
    assert list(pieces([])) == []
    assert PIECE_BYTES <= WHOLE_BYTES
