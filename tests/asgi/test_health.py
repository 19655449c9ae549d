from __future__ import annotations

import json

import anyio
import pytest

from asgi_realtime.asgi import health, limits
from asgi_realtime.testing import AsgiClient
from tests.asgi.standin import StandIn

pytestmark = pytest.mark.anyio

PATH = "/v1/health"
HEADERS = {"accept": "text/event-stream"}


async def test_events_come_one_by_one_with_their_times(host: StandIn) -> None:
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


async def test_a_shutdown_ends_it(host: StandIn) -> None:
    async with AsgiClient(host).stream(PATH, headers=HEADERS) as response:
        await response.read_events()
        host.begin_shutdown()
        assert (await response.read_all_events())[-1].event == "reconnect"


async def test_who_leaves_is_forgotten(host: StandIn) -> None:
    async with AsgiClient(host).stream(PATH, headers=HEADERS) as response:
        await response.read_events()
    assert not host.subscribers


async def test_few_are_open_at_once(host: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PROBES", 1)
    async with AsgiClient(host).stream(PATH, headers=HEADERS) as response:
        refused = await AsgiClient(host).get(PATH, headers=HEADERS)
        assert refused.status_code == 429
        assert json.loads(refused.body)["error"].startswith(
            "the health of this server has 1 open subscriptions, limit 1"
        )
        await response.read_all_events()
    await anyio.wait_all_tasks_blocked()
    assert (await AsgiClient(host).get(PATH, headers=HEADERS)).status_code == 200


async def test_head_and_get_are_answered_as_before(host: StandIn) -> None:
    assert json.loads((await AsgiClient(host).get(PATH)).body) == {"status": "ok", "broker": "ok"}
    assert (await AsgiClient(host).request("HEAD", PATH, headers=HEADERS)).body == b""
