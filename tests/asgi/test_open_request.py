"""Requests with an incomplete body, on every kind of route: shutdown, silence, and the limit per token."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from asgi_realtime import Limits, Realtime, Timeouts
from asgi_realtime.asgi.host import Message
from asgi_realtime.testing.driver import make_scope
from tests.asgi.fake_host import FakeHost
from tests.asgi.official_sdk import on_one_loop
from tests.faults import RemoteBroker
from tests.inprocess import GUARD_S, SECRET, make_realtime
from tests.security.exchange import exchange
from tests.security.mutations import Sent

pytestmark = pytest.mark.anyio


class Sender:
    """A client that sends a body in parts and records the response."""

    def __init__(self, app: Any, method: str, path: str, token: str) -> None:
        self._app = app
        self._scope = make_scope(method, path, headers={"authorization": f"Bearer {token}"})
        self._send, self._receive = anyio.create_memory_object_stream[Message](10)
        self._messages: list[Message] = []
        self.answered = anyio.Event()

    async def send(self, body: bytes, *, more: bool = True) -> None:
        await self._send.send({"type": "http.request", "body": body, "more_body": more})

    async def run(self) -> None:
        async def take(message: Message) -> None:
            self._messages.append(message)

        with self._send, self._receive:
            await self._app(self._scope, self._receive.receive, take)
        self.answered.set()

    @property
    def status(self) -> int:
        return int(self._messages[0]["status"])

    @property
    def code(self) -> str:
        return str(json.loads(self._messages[1]["body"])["code"])


BODIES = [
    ("POST", "/v1/streams/{run}/self/default"),
    ("POST", "/v1/streams/{run}/self/default/append"),
    ("POST", "/v1/streams/{run}/input/approval"),
    ("POST", "/api/v1/tasks/task/trigger"),
    ("POST", "/api/v3/batches"),
    ("PUT", "/api/v1/runs/{run}/metadata"),
    ("POST", "/api/v1/runs/{run}/tags"),
    ("POST", "/api/v1/auth/public-tokens"),
]


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[tuple[Realtime, str]]:
    realtime = make_realtime(**settings)

    @realtime.task("task")
    async def task(payload: Any) -> None: ...

    async with realtime, realtime.open_run("r") as run:
        yield realtime, run.id


@on_one_loop
@pytest.mark.parametrize(("method", "path"), BODIES)
async def test_a_shutdown_interrupts_a_request_whose_body_is_incomplete(method: str, path: str) -> None:
    async with serving() as (realtime, run_id):
        sender = Sender(realtime, method, path.format(run=run_id), SECRET)
        with anyio.fail_after(GUARD_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sender.run)
                await sender.send(b'"par')
                await anyio.wait_all_tasks_blocked()
                assert not sender.answered.is_set()
                realtime.begin_shutdown()
        assert (sender.status, sender.code) == (503, "server_shutdown")
        assert not realtime.subscribers


@on_one_loop
@pytest.mark.parametrize(("method", "path"), BODIES)
async def test_a_silent_client_gets_408(method: str, path: str) -> None:
    timeouts = Timeouts(tick=0.01, drain=0.02, receive=0.02, writer=0.02)
    async with serving(timeouts=timeouts) as (realtime, run_id):
        sender = Sender(realtime, method, path.format(run=run_id), SECRET)
        with anyio.fail_after(GUARD_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sender.run)
                await sender.send(b'"par')
        assert (sender.status, sender.code) == (408, "silent")


async def test_each_part_of_the_body_restarts_the_silence(host: FakeHost) -> None:
    await host.create()
    token = host.token("write:inputStreams:run_1")
    sender = Sender(host, "POST", "/v1/streams/run_1/input/approval", token)
    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sender.run)
            for part in (b'{"da', b'ta"', b": 1"):
                await anyio.wait_all_tasks_blocked()
                host.tick(0)
                host.tick(29)
                await sender.send(part)
            await anyio.wait_all_tasks_blocked()
            await sender.send(b"}", more=False)
    assert sender.status == 200


async def test_open_bodies_are_limited_per_owner_and_released() -> None:
    host = FakeHost(limits=Limits(bodies_per_owner=2))
    await host.create()
    token = host.token("write:inputStreams:run_1")
    senders = [Sender(host, "POST", "/v1/streams/run_1/input/approval", token) for _ in range(3)]
    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as tasks:
            for sender in senders:
                tasks.start_soon(sender.run)
                await anyio.wait_all_tasks_blocked()
            assert senders[2].status == 429
            for sender in senders[:2]:
                await sender.send(b'{"data": 1}', more=False)
    assert [sender.status for sender in senders] == [200, 200, 429]
    again = Sender(host, "POST", "/v1/streams/run_1/input/approval", token)
    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(again.run)
            await again.send(b'{"data": 1}', more=False)
    assert again.status == 200
    assert not host.app.subscription_limits._bodies


async def test_the_body_of_a_stream_writer_can_be_silent_for_longer(host: FakeHost) -> None:
    await host.create()
    sender = Sender(host, "POST", "/v1/streams/run_1/self/default", host.secret)
    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sender.run)
            await anyio.wait_all_tasks_blocked()
            host.tick(0)
            host.tick(host.timeouts.receive)
            host.tick(host.timeouts.writer - host.timeouts.receive - 1)
            await anyio.wait_all_tasks_blocked()
            assert not sender.answered.is_set()
            host.tick(1)
    assert (sender.status, sender.code) == (408, "silent")


@on_one_loop
async def test_a_body_that_never_ends_gets_408() -> None:
    """Also if it is never silent. The body of a writer lasts as long as its source."""
    host = FakeHost(timeouts=Timeouts(receive=30, body=60))
    await host.create()
    sender = Sender(host, "POST", "/v1/streams/run_1/input/approval", host.token("write:inputStreams:run_1"))
    writer = Sender(host, "POST", "/v1/streams/run_1/self/default", host.secret)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sender.run)
        tasks.start_soon(writer.run)
        for _ in range(3):
            await sender.send(b"1")
            await writer.send(b"1\n")
            await anyio.wait_all_tasks_blocked()
            assert not sender.answered.is_set()
            host.tick()
            host.tick(25)
        with anyio.fail_after(GUARD_S):
            await sender.answered.wait()
        assert not writer.answered.is_set()
        await writer.send(b"", more=False)
    assert (sender.status, sender.code) == (408, "silent")
    assert writer.status == 200


@on_one_loop
async def test_a_body_ends_when_its_token_expires() -> None:
    host = FakeHost()
    await host.create()
    token = host.tokens.mint(["write:inputStreams:run_1"], expires_in_s=60)
    sender = Sender(host, "POST", "/v1/streams/run_1/input/approval", token)
    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sender.run)
            await sender.send(b'{"data":')
            await anyio.wait_all_tasks_blocked()
            host.tick(61)
    assert (sender.status, sender.code) == (401, "token_expired")


@on_one_loop
@pytest.mark.parametrize("with_length", [True, False])
async def test_the_bytes_of_the_bodies_of_an_owner_are_limited(with_length: bool) -> None:
    host = FakeHost(limits=Limits(body_bytes_per_owner=1000))
    await host.create()
    path, token = "/v1/streams/run_1/input/approval", host.token("write:inputStreams:run_1")
    body = b'{"data":"' + b"x" * 589 + b'"}'

    def sender(token: str) -> Sender:
        made = Sender(host, "POST", path, token)
        if with_length:
            made._scope["headers"].append((b"content-length", b"600"))
        return made

    first, second, other = sender(token), sender(token), sender(host.token("write:inputStreams:run_1", "read:runs:x"))
    async with anyio.create_task_group() as tasks:
        for one in (first, second, other):
            await one.send(body[:-1])
            tasks.start_soon(one.run)
            await anyio.wait_all_tasks_blocked()
        assert (second.status, second.code) == (429, "limit_exceeded")
        assert not first.answered.is_set()
        assert not other.answered.is_set()
        await first.send(body[-1:], more=False)
        await other.send(body[-1:], more=False)
    assert first.status == other.status == 200
    assert not host.app.subscription_limits._bodies
    assert not host.app.subscription_limits._body_bytes


@on_one_loop
async def test_a_single_body_can_exceed_the_bytes_of_its_owner() -> None:
    host = FakeHost(limits=Limits(body_bytes_per_owner=1))
    await host.create()
    sender = Sender(host, "POST", "/v1/streams/run_1/input/approval", host.token("write:inputStreams:run_1"))
    await sender.send(b'{"data":1}', more=False)
    await sender.run()
    assert sender.status == 200


@pytest.mark.parametrize("accept", ["text/event-stream", "*/*"])
async def test_a_client_that_leaves_while_its_batch_is_looked_up_is_no_error(
    accept: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The response was a 500, and the log had a traceback: the lookup was interrupted before it had begun to wait."""
    headers = ((b"authorization", f"Bearer {SECRET}".encode()), (b"accept", accept.encode()))
    async with make_realtime(broker=RemoteBroker()) as realtime:
        received = await exchange(realtime, Sent("GET", "/v1/batches/batch_1", b"offset=-1", headers, cut=True))
    assert received.status in (404, 408)  # as the event loop orders its tasks
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
