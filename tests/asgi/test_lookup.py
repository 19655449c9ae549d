"""Lookups of runs and batches that do not exist yet."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from asgi_realtime.testing import AsgiClient, EventParser, Response
from asgi_realtime.testing.driver import make_scope
from tests.asgi.fake_host import FakeHost
from tests.asgi.reading import chunks, kinds

pytestmark = pytest.mark.anyio

PATH = "/v1/streams/run_1/default"
RUN = "/v1/runs/run_1"
BATCH = "/v1/batches/batch_1"
BATCH_SCOPE = "read:batch:batch_1"


async def test_an_unknown_run_that_the_token_does_not_name_is_404_at_once(host: FakeHost) -> None:
    response = await AsgiClient(host).get(PATH, headers=host.headers("read:runs"))
    assert response.status_code == 404
    assert json.loads(response.body)["code"] == "run_not_found"


async def test_a_lookup_waits_for_a_run_that_the_token_names(host: FakeHost) -> None:
    async with anyio.create_task_group() as tasks:

        async def appear() -> None:
            await host.wait_for_subscriber()
            await anyio.wait_all_tasks_blocked()
            await host.create()

        tasks.start_soon(appear)
        async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
            assert response.status_code == 200
            await response.chunk()
            await host.append("a")
            assert chunks(await response.read_events()) == ["a"]


async def test_a_lookup_is_404_after_its_timeout(host: FakeHost) -> None:
    async with anyio.create_task_group() as tasks:

        async def wait() -> None:
            await host.wait_for_subscriber()
            await anyio.wait_all_tasks_blocked()
            host.tick(0)
            host.tick(4.9)
            await anyio.wait_all_tasks_blocked()
            assert host.subscribers
            host.tick(0.1)

        tasks.start_soon(wait)
        response = await AsgiClient(host).get(PATH, headers=host.headers())
    assert response.status_code == 404
    assert not host.subscribers
    assert host.app.subscription_limits.open == 0


async def waited(host: FakeHost, headers: dict[str, str]) -> Response:
    """The response to a request that waits for its run for as long as a request can."""
    async with anyio.create_task_group() as tasks:

        async def pass_time() -> None:
            await host.wait_for_subscriber()
            await anyio.wait_all_tasks_blocked()
            host.tick()
            host.tick(5)

        tasks.start_soon(pass_time)
        response = await AsgiClient(host).get(PATH, headers=headers)
    return response


async def test_an_event_source_reconnects_until_its_run_leaves_the_queue(host: FakeHost) -> None:
    """After 5 s the response was 404, and an EventSource does not try again."""
    headers = {**host.headers(), "accept": "text/event-stream"}
    for _ in range(2):
        response = await waited(host, headers)
        assert response.status_code == 200
        (event,) = EventParser().feed(response.body)
        assert event.event == "reconnect"
        assert 250 <= (event.retry or 0) <= 1000
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=headers) as stream:
        await stream.chunk()
        await host.append("a")
        assert chunks(await stream.read_events()) == ["a"]


async def test_an_event_source_stops_waiting_for_a_run_that_has_probably_expired(host: FakeHost) -> None:
    headers = {**host.headers(), "accept": "text/event-stream"}
    host.now += host.timeouts.appear
    assert (await waited(host, headers)).status_code == 404


async def test_a_shutdown_ends_a_lookup_with_reconnect(host: FakeHost) -> None:
    """The response was 404, after which an EventSource never reconnects, although the run appeared soon after."""
    async with anyio.create_task_group() as tasks:

        async def shut_down() -> None:
            await host.wait_for_subscriber()
            await anyio.wait_all_tasks_blocked()
            host.begin_shutdown()

        tasks.start_soon(shut_down)
        async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
            assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            assert [event.event for event in await response.read_all_events()] == ["reconnect"]
    assert not host.subscribers


async def test_a_lookup_during_the_shutdown_ends_with_reconnect_at_once(host: FakeHost) -> None:
    host.begin_shutdown()
    response = await AsgiClient(host).get(PATH, headers=host.headers())
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, "*")
    assert response.body.startswith(b"retry: 1000\n: connected\nevent: reconnect\n")
    assert (await AsgiClient(host).get(PATH, headers=host.headers("read:runs"))).status_code == 404


async def test_a_disconnect_ends_a_lookup(host: FakeHost) -> None:
    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await host(make_scope("GET", PATH, headers=host.headers()), gone, send)
    assert not host.subscribers
    assert sent[0]["status"] == 404


async def test_a_run_feed_waits_for_the_run_that_its_token_names(host: FakeHost) -> None:
    async with anyio.create_task_group() as tasks:

        async def appear() -> None:
            await host.wait_for_subscriber()
            await anyio.wait_all_tasks_blocked()
            await host.create()

        tasks.start_soon(appear)
        async with AsgiClient(host).stream(RUN, headers=host.feed_headers()) as response:
            assert kinds(await response.read_until("ready")) == ["run", "ready"]


async def test_a_lookup_waits_for_an_unknown_batch_and_is_then_404(host: FakeHost) -> None:
    async with anyio.create_task_group() as tasks:

        async def pass_time() -> None:
            await host.wait_for_subscriber()
            await anyio.wait_all_tasks_blocked()
            host.tick()
            host.tick(5)

        tasks.start_soon(pass_time)
        response = await AsgiClient(host).get(BATCH, headers=host.feed_headers(BATCH_SCOPE))
    assert response.status_code == 404
    assert not host.subscribers


async def test_a_batch_lookup_during_the_shutdown_ends_with_reconnect(host: FakeHost) -> None:
    """The response was 404 although the batch existed."""
    await host.create_batch()
    host.begin_shutdown()
    response = await AsgiClient(host).get(BATCH, headers=host.feed_headers(BATCH_SCOPE))
    assert response.status_code == 200
    assert b"event: reconnect\n" in response.body
