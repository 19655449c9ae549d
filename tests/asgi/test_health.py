from __future__ import annotations

import json

import anyio
import pytest

from asgi_realtime.asgi import health, limits
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.testing import AsgiClient
from tests.asgi.fake_host import FakeHost

pytestmark = pytest.mark.anyio

PATH = "/v1/health"
HEADERS = {"accept": "text/event-stream"}


@pytest.fixture(autouse=True)
def short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PROBE_INTERVAL_S", 0.01)


async def test_a_probe_sends_its_events_one_by_one_with_their_times(host: FakeHost) -> None:
    async with AsgiClient(host).stream(PATH, headers=HEADERS) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        for number in range(health.PROBE_EVENTS):
            host.now += 1
            (event,) = await response.read_events()
            assert event.event == "probe"
            assert json.loads(event.data)["n"] == number
        (end,) = await response.read_all_events()
        assert (end.event, json.loads(end.data)) == ("end", {"reason": "complete"})
    assert not host.subscribers


async def test_a_shutdown_ends_a_probe(host: FakeHost) -> None:
    async with AsgiClient(host).stream(PATH, headers=HEADERS) as response:
        await response.read_events()
        host.begin_shutdown()
        assert (await response.read_all_events())[-1].event == "reconnect"


async def test_a_disconnect_ends_a_probe(host: FakeHost) -> None:
    async with AsgiClient(host).stream(PATH, headers=HEADERS) as response:
        await response.read_events()
    assert not host.subscribers


async def test_open_probes_are_limited(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PROBES", 1)
    async with AsgiClient(host).stream(PATH, headers=HEADERS) as response:
        rejected = await AsgiClient(host).get(PATH, headers=HEADERS)
        assert rejected.status_code == 429
        assert rejected.json()["error"].startswith("/v1/health has 1 open subscriptions, limit 1")
        await response.read_all_events()
    await anyio.wait_all_tasks_blocked()
    assert (await AsgiClient(host).get(PATH, headers=HEADERS)).status_code == 200


async def test_head_is_never_answered_with_a_probe(host: FakeHost) -> None:
    assert (await AsgiClient(host).request("HEAD", PATH, headers=HEADERS)).body == b""


async def test_the_status_needs_no_token(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    response = await AsgiClient(host).get("/v1/health")
    assert (response.status_code, json.loads(response.body)) == (200, {"status": "ok", "broker": "ok"})

    async def away() -> None:
        raise BrokerUnavailable("redis at 10.0.0.1 does not answer")

    monkeypatch.setattr(host.broker, "ping", away)
    response = await AsgiClient(host).get("/v1/health")
    assert (response.status_code, response.json()) == (503, {"status": "unavailable", "broker": "unavailable"})


async def test_the_status_has_the_warnings_of_the_broker(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ping() -> None:
        host.broker.warnings = ["maxmemory-policy is allkeys-lru"]

    monkeypatch.setattr(host.broker, "ping", ping)
    response = await AsgiClient(host).get(PATH)
    assert response.json() == {"status": "ok", "broker": "ok", "warnings": ["maxmemory-policy is allkeys-lru"]}


async def test_an_unexpected_error_is_unavailable_without_its_message(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The response was 500, which means nothing to a load balancer."""
    down = (503, {"status": "unavailable", "broker": "unavailable"})
    host.start_error = OSError("no route to 10.0.0.1")
    response = await AsgiClient(host).get("/v1/health")
    assert (response.status_code, json.loads(response.body)) == down
    host.start_error = None

    async def away() -> None:
        raise OSError("10.0.0.1 went away")

    monkeypatch.setattr(host.broker, "ping", away)
    response = await AsgiClient(host).get("/v1/health")
    assert (response.status_code, json.loads(response.body)) == down
    assert "10.0.0.1 went away" in caplog.text


async def test_head_returns_the_status_without_a_body(host: FakeHost) -> None:
    """It was 405, which load balancers took for a dead process."""
    response = await AsgiClient(host).request("HEAD", "/v1/health")
    assert (response.status_code, response.body) == (200, b"")
    assert response.headers["content-length"] == str(len((await AsgiClient(host).get("/v1/health")).body))
    host.begin_shutdown()
    assert (await AsgiClient(host).request("HEAD", "/v1/health")).status_code == 503


async def test_the_status_is_closing_during_the_shutdown(host: FakeHost) -> None:
    host.begin_shutdown()
    response = await AsgiClient(host).get("/v1/health")
    assert (response.status_code, json.loads(response.body)) == (503, {"status": "closing", "broker": "ok"})
