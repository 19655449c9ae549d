"""How a shutdown ends requests and subscriptions, wherever they wait."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import pytest

from asgi_realtime.asgi import subscription
from asgi_realtime.asgi.subscription import MIN_RECONNECT_MS, reconnect_response
from asgi_realtime.brokers.base import Broker
from asgi_realtime.core.config import Retention, Timeouts
from asgi_realtime.core.run_changes import TagsAdded
from asgi_realtime.testing import AsgiClient, EventParser
from asgi_realtime.testing.driver import make_scope
from tests.asgi.fake_host import FakeHost
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio

STREAM = "/v1/streams/run_1/default"
EVENTS = {"accept": "text/event-stream"}
OFFICIAL = {"trigger-version": "4.8.3"}


class UnresponsiveBroker:
    """A broker that stops answering the named call."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._blocked = ""
        self.is_waiting = anyio.Event()

    def block(self, call: str) -> None:
        self._blocked = call

    def __getattr__(self, name: str) -> Any:
        if name == self._blocked:
            return self._block_entering if name in ("live", "follow") else self._never
        if name == "follow":
            return self._follow
        return getattr(self._broker, name)

    async def _never(self, *args: Any, **options: Any) -> Any:
        self.is_waiting.set()
        await anyio.sleep_forever()

    @asynccontextmanager
    async def _block_entering(self, *args: Any) -> AsyncIterator[Any]:
        await self._never()
        yield

    @asynccontextmanager
    async def _follow(self, topic: str) -> AsyncIterator[Any]:
        async with self._broker.follow(topic) as live:
            yield UnresponsiveTopic(self, live)


class UnresponsiveTopic:
    def __init__(self, broker: UnresponsiveBroker, live: Any) -> None:
        self._broker = broker
        self._live = live
        self.waiting = live.waiting

    async def changes(self, *args: Any, **options: Any) -> Any:
        if self._broker._blocked == "changes":
            await self._broker._never()
        return await self._live.changes(*args, **options)


@pytest.fixture
async def broker(host: FakeHost) -> UnresponsiveBroker:
    await host.create()
    broker = UnresponsiveBroker(host.broker)
    host.broker = cast(Broker, broker)
    return broker


async def shut_down_when_waiting(host: FakeHost, broker: UnresponsiveBroker) -> None:
    await broker.is_waiting.wait()
    await anyio.wait_all_tasks_blocked()
    host.begin_shutdown()


@pytest.mark.parametrize(
    ("path", "headers", "call"),
    [
        pytest.param(STREAM, {"accept": "*/*"}, "load", id="stream-lookup"),
        pytest.param(STREAM, {"accept": "*/*"}, "live", id="stream-open"),
        pytest.param("/v1/streams/run_1/input/answer", {}, "live", id="input-open"),
        pytest.param("/v1/runs/run_1", EVENTS, "load", id="feed-lookup"),
        pytest.param("/v1/runs/run_1", EVENTS, "follow", id="feed-open"),
        pytest.param("/v1/runs/run_1", EVENTS, "changes", id="feed-prepare"),
    ],
)
async def test_a_shutdown_reaches_a_subscription_that_waits_for_the_broker(
    host: FakeHost, broker: UnresponsiveBroker, path: str, headers: dict[str, str], call: str
) -> None:
    """The server could not exit before the broker's own timeout of five seconds."""
    broker.block(call)
    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(shut_down_when_waiting, host, broker)
            async with AsgiClient(host).stream(path, headers={**host.headers(), **headers}) as response:
                assert response.status_code == 200
                assert [event.event for event in await response.read_all_events()] == ["reconnect"]
                assert response.ended
    assert not host.subscribers
    assert host.app.subscription_limits.open == 0


@pytest.mark.parametrize(
    ("method", "path", "headers", "call"),
    [
        pytest.param("GET", f"{STREAM}?protocol=ai-sdk", EVENTS, "load", id="chat-lookup"),
        pytest.param("GET", f"{STREAM}?protocol=ai-sdk", EVENTS, "live", id="chat-open"),
        pytest.param("GET", STREAM, OFFICIAL, "load", id="stream-lookup"),
        pytest.param("HEAD", "/v1/streams/run_1/self/default", {"x-client-id": "c"}, "produced", id="last-index"),
        pytest.param("GET", "/v1/runs/run_1?offset=-1", {}, "load", id="poll-lookup"),
        pytest.param("GET", "/v1/runs/run_1?offset=-1", {}, "follow", id="poll-open"),
        pytest.param("GET", "/api/v3/runs/run_1", {}, "load", id="retrieve"),
        pytest.param("GET", "/api/v1/runs/run_1/metadata", {}, "load", id="metadata"),
    ],
)
async def test_a_shutdown_reaches_a_request_that_waits_for_the_broker(
    host: FakeHost, broker: UnresponsiveBroker, method: str, path: str, headers: dict[str, str], call: str
) -> None:
    broker.block(call)
    secret = {"authorization": f"Bearer {host.secret}", **headers}
    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(shut_down_when_waiting, host, broker)
            response = await AsgiClient(host).request(method, path, headers=secret)
    assert response.status_code == 503
    assert method == "HEAD" or response.json()["code"] == "server_shutdown"
    assert not host.subscribers


@pytest.mark.parametrize("call", ["changes", "load"])
async def test_a_shutdown_reaches_a_feed_that_reads_a_change(
    host: FakeHost, broker: UnresponsiveBroker, call: str
) -> None:
    async with AsgiClient(host).stream("/v1/runs/run_1", headers=host.feed_headers()) as response:
        await response.read_until("ready")
        await anyio.wait_all_tasks_blocked()
        change = await host.prepare_change("run_1", TagsAdded(("a",)))
        broker.block(call)
        await change()
        await shut_down_when_waiting(host, broker)
        with anyio.fail_after(GUARD_S):
            assert [event.event for event in await response.read_all_events()] == ["reconnect"]


async def test_a_shutdown_reaches_a_stream_that_catches_up() -> None:
    host = FakeHost(retention=Retention(stream_bytes=200))
    await host.create()
    await host.append(*(f"{number:40}" for number in range(20)))
    broker = UnresponsiveBroker(host.broker)
    host.broker = cast(Broker, broker)
    broker.block("read")
    async with AsgiClient(host).stream(STREAM, headers=host.headers()) as response:
        await response.chunk()
        await shut_down_when_waiting(host, broker)
        with anyio.fail_after(GUARD_S):
            assert [event.event for event in await response.read_all_events()] == ["reconnect"]


async def test_a_subscription_that_opens_during_the_shutdown_waits_until_the_next_tick(
    host: FakeHost, broker: UnresponsiveBroker
) -> None:
    host.begin_shutdown()
    broker.block("live")

    async def tick() -> None:
        await broker.is_waiting.wait()
        await anyio.wait_all_tasks_blocked()
        host.tick()

    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tick)
            async with AsgiClient(host).stream(STREAM, headers=host.headers()) as response:
                assert [event.event for event in await response.read_all_events()] == ["reconnect"]


async def test_a_request_during_the_shutdown_can_still_be_served_for_a_moment(
    host: FakeHost, broker: UnresponsiveBroker
) -> None:
    host.begin_shutdown()
    headers = {"authorization": f"Bearer {host.secret}"}
    assert (await AsgiClient(host).get("/api/v3/runs/run_1", headers=headers)).status_code == 200
    broker.block("load")

    async def tick() -> None:
        await broker.is_waiting.wait()
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(0.9)
        await anyio.wait_all_tasks_blocked()
        assert host.subscribers
        host.tick(0.1)

    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tick)
            response = await AsgiClient(host).get("/api/v3/runs/run_1", headers=headers)
    assert (response.status_code, response.json()["code"]) == (503, "server_shutdown")


async def test_a_disconnect_ends_a_subscription_that_waits_for_the_broker(
    host: FakeHost, broker: UnresponsiveBroker
) -> None:
    broker.block("live")
    sent: list[Any] = []

    async def receive() -> Any:
        await broker.is_waiting.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    with anyio.fail_after(GUARD_S):
        await host(make_scope("GET", STREAM, headers=host.headers()), receive, send)
    assert sent == []
    assert not host.subscribers
    assert host.app.subscription_limits.open == 0


# The event `reconnect`


async def test_a_shutdown_ends_each_stream_with_reconnect_after_a_random_time(host: FakeHost) -> None:
    await host.create()
    await host.append("a")
    headers = host.headers()
    retries: list[int] = []
    for _ in range(40):
        host.closing = False
        async with AsgiClient(host).stream(STREAM, headers=headers) as response:
            await response.read_until("message")
            await anyio.wait_all_tasks_blocked()
            host.begin_shutdown()
            (event,) = await response.read_all_events()
            assert response.ended
        assert event.event == "reconnect"
        assert event.id == "0"  # the position stays
        assert event.retry is not None
        assert json.loads(event.data) == {"retry": event.retry}
        retries.append(event.retry)
    assert all(250 <= retry <= 3000 for retry in retries)
    assert len(set(retries)) > 10


async def test_reconnect_times_are_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription, "SHUTDOWN_RECONNECT_MS", 300)
    retries = [EventParser().feed(bytes(reconnect_response().body))[0].retry for _ in range(200)]
    assert set(retries) <= set(range(MIN_RECONNECT_MS, 301))
    assert retries.count(MIN_RECONNECT_MS) < 40  # 1 in 51 is expected: values are not clamped to the minimum


async def test_a_subscription_during_the_shutdown_ends_at_once(host: FakeHost) -> None:
    await host.create()
    await host.append(*["x" * 60_000] * 20)
    host.begin_shutdown()
    async with AsgiClient(host).stream(STREAM, headers=host.headers()) as response:
        assert response.status_code == 200
        assert [event.event for event in await response.read_all_events()] == ["reconnect"]


async def test_a_stream_that_was_read_to_its_end_gets_end_and_not_reconnect(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(STREAM, headers=host.headers()) as response:
        await response.chunk()
        await anyio.wait_all_tasks_blocked()
        await host.finish()
        host.begin_shutdown()
        assert [event.event for event in await response.read_all_events()] == ["end"]


async def test_a_shutdown_during_the_send_of_a_heartbeat_ends_the_stream() -> None:
    """The subscription waited for the next heartbeat, and the server could not exit."""
    host = FakeHost(timeouts=Timeouts(heartbeat=15))
    await host.create()
    async with AsgiClient(host).stream(STREAM, headers=host.headers()) as response:
        await response.chunk()
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(15)
        await anyio.wait_all_tasks_blocked()  # the heartbeat is being sent
        host.begin_shutdown()
        assert await response.chunk() == b": heartbeat\n"
        with anyio.fail_after(GUARD_S):
            (event,) = await response.read_all_events()
    assert event.event == "reconnect"


async def test_a_stalled_reader_does_not_delay_the_shutdown(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(STREAM, headers=host.headers()):
        await anyio.wait_all_tasks_blocked()
        host.begin_shutdown()
        host.tick()
        host.tick()
        host.tick()
        await anyio.wait_all_tasks_blocked()
        assert not host.subscribers
