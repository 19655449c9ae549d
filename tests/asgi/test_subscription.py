"""What every subscription has in common, shown with streams: heartbeats, disconnects, expiry and limits."""

from __future__ import annotations

import json
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime.asgi.subscription import AGE_RECONNECT_MS, MIN_RECONNECT_MS, SubscriptionResponse
from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.config import Limits, Timeouts
from asgi_realtime.metrics import Metrics
from asgi_realtime.runs.reporter import Reporter
from asgi_realtime.testing import AsgiClient, Event
from asgi_realtime.testing.driver import make_scope
from tests.asgi.fake_host import SECRET, FakeHost
from tests.asgi.reading import chunks

pytestmark = pytest.mark.anyio

PATH = "/v1/streams/run_1/default"


# Heartbeats and stalled readers


async def test_a_heartbeat_interrupts_silence() -> None:
    host = FakeHost(timeouts=Timeouts(heartbeat=15))
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.chunk()
        await anyio.wait_all_tasks_blocked()
        host.tick()  # finds the new phase
        host.tick(14)
        await anyio.wait_all_tasks_blocked()
        host.tick(1)
        assert await response.chunk() == b": heartbeat\n"
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(14.9)
        await host.append("a")
        assert chunks(await response.read_events()) == ["a"]  # no heartbeat before it


async def test_a_stalled_reader_is_disconnected_and_does_not_delay_the_producer() -> None:
    host = FakeHost(timeouts=Timeouts(send=30))
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await anyio.wait_all_tasks_blocked()  # the preamble is being sent
        host.tick()
        for _ in range(50):
            await host.append("x" * 10_000)  # returns at once
        host.tick(29)
        await anyio.wait_all_tasks_blocked()
        assert host.subscribers
        host.tick(1)
        await anyio.wait_all_tasks_blocked()
        assert not host.subscribers
        assert host.app.subscription_limits.open == 0
        assert not response.ended  # the body is cut off, so the client resumes
    await check_released(host)


async def test_a_stalled_send_that_cannot_be_cancelled_no_longer_counts() -> None:
    host = FakeHost(timeouts=Timeouts(send=30))
    await host.create()
    release = anyio.Event()

    async def shielding(scope: Any, receive: Any, send: Any) -> None:
        async def shielded(message: Any) -> None:
            with anyio.CancelScope(shield=True):
                await release.wait()

        await host(scope, receive, shielded)

    async def never() -> Any:
        await anyio.sleep_forever()

    scope = make_scope("GET", PATH, headers=host.headers())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(shielding, scope, never, None)
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(30)
        assert host.app.subscription_limits.open == 0
        release.set()
        await anyio.wait_all_tasks_blocked()
        assert not host.subscribers
        assert host.app.subscription_limits.open == 0
        tasks.cancel_scope.cancel()


@pytest.mark.slow
async def test_a_slow_reader_is_not_disconnected() -> None:
    host = FakeHost(timeouts=Timeouts(send=30))
    await host.create()
    await host.append(*["x" * 60_000] * 5)
    await host.finish()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        events: list[Event] = []
        while not response.ended:
            await anyio.wait_all_tasks_blocked()
            host.tick()
            host.tick(29)
            events += await response.read_events()
    assert [event.event for event in events] == ["message"] * 5 + ["end"]


async def test_one_stalled_reader_does_not_delay_another(host: FakeHost) -> None:
    await host.create()
    headers = host.headers()
    async with AsgiClient(host).stream(PATH, headers=headers):
        async with AsgiClient(host).stream(PATH, headers=headers) as reader:
            await reader.chunk()
            for number in range(20):
                await host.append(number)
                assert chunks(await reader.read_events()) == [number]


# Disconnects


async def check_released(host: FakeHost) -> None:
    """Check that nothing follows the stream any more, once cancelled watchers have ended."""
    await anyio.wait_all_tasks_blocked()
    async with host.broker.live(StreamKey("run_1", "default")) as live:
        assert live.readers == 1
        assert len(live.waiting) == 0
    assert not host.subscribers
    assert host.app.subscription_limits.open == 0


async def test_a_disconnect_releases_everything(host: FakeHost) -> None:
    await host.create()
    await host.append("a")
    await anyio.wait_all_tasks_blocked()
    before = len(anyio.get_running_tasks())
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.read_until("message")
        await anyio.wait_all_tasks_blocked()
        assert len(host.subscribers) == 1
    await check_released(host)
    assert len(anyio.get_running_tasks()) == before


async def test_a_disconnect_during_a_send_releases_everything(host: FakeHost) -> None:
    await host.create()
    await host.append("a")
    async with AsgiClient(host).stream(PATH, headers=host.headers()):
        await anyio.wait_all_tasks_blocked()
    await check_released(host)


@pytest.mark.slow
async def test_a_thousand_connections_release_everything(host: FakeHost) -> None:
    await host.create()
    await host.append("a")
    headers = host.headers()
    await anyio.wait_all_tasks_blocked()
    before = len(anyio.get_running_tasks())
    for number in range(1000):
        async with AsgiClient(host).stream(PATH, headers=headers) as response:
            for _ in range(number % 3):
                await response.chunk() if number % 3 < 2 else await anyio.lowlevel.checkpoint()
    await check_released(host)
    assert len(anyio.get_running_tasks()) == before


@pytest.mark.parametrize("reporter", [Reporter, Metrics])
@pytest.mark.parametrize("error", [OSError("gone"), BrokenPipeError(), RuntimeError("the handler is closed")])
async def test_an_error_of_send_is_a_disconnect(
    host: FakeHost, error: Exception, reporter: type[Reporter], caplog: pytest.LogCaptureFixture
) -> None:
    """uvicorn on uvloop raises `RuntimeError`, and each client that vanished was logged with a traceback."""
    host.reporter = reporter()
    await host.create()
    await host.append("a")

    async def never() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        if message.get("body"):
            raise error

    await host(make_scope("GET", PATH, headers=host.headers()), never, send)
    await check_released(host)
    assert not caplog.records


async def test_an_error_of_the_library_during_a_send_is_logged(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await host.create()
    await host.append("a")
    monkeypatch.setattr(SubscriptionResponse, "_write", lambda *args: None)  # `await None` fails in our own frame
    response = await AsgiClient(host).get(PATH, headers=host.headers())
    assert response.ended
    assert [record.message for record in caplog.records] == ["a subscription failed; its client will resume"]


async def test_a_cancellation_by_the_host_passes_through_and_releases_everything(host: FakeHost) -> None:
    await host.create()
    with anyio.CancelScope() as scope:
        async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
            await response.chunk()
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    await check_released(host)


# Expired tokens and old connections


async def test_an_expired_token_ends_the_stream_at_its_position() -> None:
    host = FakeHost()
    await host.create()
    await host.append("a")
    headers = {"authorization": f"Bearer {host.token(expires_in_s=60)}"}
    async with AsgiClient(host).stream(PATH, headers=headers) as response:
        await response.read_until("message")
        host.tick(59)
        host.tick(1)
        (*_, end) = await response.read_all_events()
        assert response.last_event_id == "0"  # a new token resumes here
    assert (end.event, json.loads(end.data)) == ("end", {"reason": "token_expired"})
    assert (await AsgiClient(host).get(PATH, headers=headers)).status_code == 401


async def test_an_expired_token_ends_a_subscription_that_never_catches_up() -> None:
    host = FakeHost()
    await host.create()
    await host.append(*["x" * 60_000] * 20)
    headers = {"authorization": f"Bearer {host.token(expires_in_s=60)}"}
    async with AsgiClient(host).stream(PATH, headers=headers) as response:
        await response.read_until("message")
        host.tick(61)
        events = await response.read_all_events()
    assert len(events) < 10
    assert events[-1].event == "end"


async def test_a_connection_that_is_too_old_ends_with_reconnect() -> None:
    host = FakeHost(timeouts=Timeouts(stream_age=100))
    await host.create()
    await host.append("a")
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.read_until("message")
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(84)
        await host.append("b")
        assert [event.data for event in await response.read_events()] == ['"b"']
        host.tick(16)
        (event,) = await response.read_all_events()
        assert (event.event, event.id) == ("reconnect", "1")
        assert event.retry is not None and MIN_RECONNECT_MS <= event.retry <= AGE_RECONNECT_MS
        assert response.ended
    async with AsgiClient(host).stream(PATH, headers=host.headers(last_event_id="1")) as response:
        await host.append("c")
        assert [event.data for event in await response.read_events()] == ['"c"']


async def test_connections_opened_together_do_not_end_together() -> None:
    async def read(host: FakeHost) -> None:
        async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
            await response.read_all_events()

    host = FakeHost(timeouts=Timeouts(stream_age=100, heartbeat=100))
    await host.create()
    async with anyio.create_task_group() as readers:
        for _ in range(40):
            readers.start_soon(read, host)
        await anyio.wait_all_tasks_blocked()
        assert len(host.subscribers) == 40
        host.tick()
        host.tick(92)
        await anyio.wait_all_tasks_blocked()
        assert 0 < len(host.subscribers) < 40
        host.tick(8)
        await anyio.wait_all_tasks_blocked()
        assert not host.subscribers


# Limits


async def limited(host: FakeHost, headers: dict[str, str] | None = None, path: str = PATH) -> dict[str, Any]:
    response = await AsgiClient(host).get(path, headers=headers or host.headers())
    assert response.status_code == 429
    assert response.headers["retry-after"] == "5"
    assert int(response.headers["x-ratelimit-reset"]) == (host.clock() + 5) * 1000
    body: dict[str, Any] = json.loads(response.body)
    assert body["code"] == "limit_exceeded"
    return body


async def test_subscriptions_are_limited_per_process() -> None:
    host = FakeHost(limits=Limits(subscribers=1))
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()):
        assert "limit 1" in (await limited(host))["error"]
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        assert response.status_code == 200


async def test_subscriptions_are_limited_per_run() -> None:
    host = FakeHost(limits=Limits(subscribers_per_run=1))
    await host.create()
    await host.create("run_2")
    headers = host.headers("read:runs")
    async with AsgiClient(host).stream(PATH, headers=headers):
        assert "this run" in (await limited(host, headers))["error"]
        async with AsgiClient(host).stream("/v1/streams/run_2/default", headers=headers) as response:
            assert response.status_code == 200


async def test_subscriptions_are_limited_per_owner_but_not_for_the_secret_key() -> None:
    host = FakeHost(limits=Limits(subscribers_per_owner=1))
    await host.create()
    headers = host.headers()
    secret = {"authorization": f"Bearer {SECRET}"}
    async with AsgiClient(host).stream(PATH, headers=headers):
        assert "this owner" in (await limited(host, headers))["error"]
        async with AsgiClient(host).stream(PATH, headers=host.headers("read:all")) as response:
            assert response.status_code == 200
        async with AsgiClient(host).stream(PATH, headers=secret):
            async with AsgiClient(host).stream(PATH, headers=secret) as response:
                assert response.status_code == 200


# Messages


async def test_each_send_gets_a_new_message(host: FakeHost) -> None:
    """A host's compression middleware writes into the message. Other subscribers must not see that."""
    await host.create()
    await host.append("a")
    await host.finish()

    async def compressing(scope: Any, receive: Any, send: Any) -> None:
        async def spoil(message: Any) -> None:
            await send(dict(message))
            message["body"] = b"spoilt"
            if "headers" in message:
                message["headers"].append((b"spoilt", b"yes"))

        await host(scope, receive, spoil)

    for _ in range(2):
        async with AsgiClient(compressing).stream(PATH, headers=host.headers()) as response:
            assert "spoilt" not in response.headers
            assert b"spoilt" not in await response.read()
