"""A browser follows a run of another process while Redis fails: the answer is complete, or clearly lost.

Two real uvicorns share a Redis: one executes the runs, the other serves the browser. Only Redis restarts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from asgi_realtime.testing import Event, EventParser
from tests.e2e.test_uvicorn import GUARD_S, Served, served
from tests.redis_servers import RedisServer, ReplicaPair

pytestmark = [pytest.mark.slow, pytest.mark.redis, pytest.mark.asyncio]


@dataclass
class Browser:
    """An EventSource: reconnects with the last id when a body ends or breaks; a status other than 200 ends it."""

    http: httpx.AsyncClient
    url: str
    token: str
    events: list[Event] = field(default_factory=list)
    end: dict[str, Any] | None = None
    opened: int = 0
    last_event_id: str | None = None
    heartbeats: int = 0

    async def run(self) -> None:
        while self.end is None:
            try:
                await self._open()
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.02)  # a browser waits longer

    async def _open(self) -> None:
        headers = {"accept": "text/event-stream", "authorization": f"Bearer {self.token}"}
        if self.last_event_id is not None:
            headers["last-event-id"] = self.last_event_id
        parser = EventParser()
        async with self.http.stream("GET", self.url, headers=headers) as response:
            assert response.status_code == 200, f"{response.status_code}: an EventSource gives up"
            self.opened += 1
            async for data in response.aiter_bytes():
                for event in parser.feed(data):
                    self._take(event)
                self.heartbeats += len(parser.comments)
                parser.comments.clear()

    def _take(self, event: Event) -> None:
        if event.id is not None:
            self.last_event_id = event.id
        if event.event == "end":
            self.end = json.loads(event.data)
        elif event.event not in ("reconnect", "ready"):
            self.events.append(event)

    @property
    def numbers(self) -> list[int]:
        assert all(event.event == "message" for event in self.events), "a gap"
        return [int(json.loads(event.data).split()[0]) for event in self.events]


@dataclass
class Site:
    """The executing process, the serving process, and a run."""

    http: httpx.AsyncClient
    worker: Served
    web: Served
    logs: list[Path]
    run: dict[str, str]
    browser: Browser

    async def receives(self, numbers: int = 100) -> None:
        wanted = len(self.browser.events) + numbers
        async with asyncio.timeout(GUARD_S):
            while len(self.browser.events) < wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def next_heartbeat(self) -> None:
        seen = self.browser.heartbeats
        async with asyncio.timeout(GUARD_S):
            while self.browser.heartbeats == seen:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def until_healthy(self) -> None:
        async with asyncio.timeout(GUARD_S):
            while [await self.health(served) for served in (self.worker, self.web)] != [200, 200]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def health(self, served: Served) -> int:
        return (await self.http.get(f"{served.url}/realtime/v1/health")).status_code

    async def record(self) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self.run['token']}"}
        answer = await self.http.get(f"{self.web.url}/realtime/api/v3/runs/{self.run['id']}", headers=headers)
        assert answer.status_code == 200, answer.text
        record: dict[str, Any] = answer.json()
        return record

    async def until_logged(self, text: str, count: int) -> None:
        async with asyncio.timeout(GUARD_S):
            while len(self.logged(text)) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    def logged(self, text: str) -> list[str]:
        return [line for log in self.logs for line in log.read_text().splitlines() if text in line]


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=GUARD_S) as client:
        yield client


class Sites:
    """Makes sites."""

    def __init__(self, http: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._http = http
        self._tmp_path = tmp_path
        self._monkeypatch = monkeypatch
        self.logs: list[Path] = []

    @contextmanager
    def processes(self, environment: dict[str, str]) -> Iterator[tuple[Served, Served]]:
        with ExitStack() as stack:
            started: list[Served] = []
            for name in ("worker", "web"):
                log = self._tmp_path / f"{name}.log"
                for key, value in {"LOG": str(log), **environment}.items():
                    self._monkeypatch.setenv(key, value)
                started.append(stack.enter_context(served(app="tests.e2e.redis_app:app")))
                self.logs.append(log)
            yield started[0], started[1]

    async def begin(self, worker: Served, web: Served, *, size: int = 0) -> tuple[Site, asyncio.Task[None]]:
        """Start a run and follow it."""
        answer = await self._http.post(f"{worker.url}/start/one", params={"size": size})
        run = answer.json()
        browser = Browser(self._http, f"{web.url}/realtime/v1/streams/{run['id']}/default", run["token"])
        site = Site(self._http, worker, web, self.logs, run, browser)
        following = asyncio.create_task(browser.run())
        await site.receives(10)
        return site, following

    async def finish(self, site: Site, following: asyncio.Task[None]) -> None:
        """End the run, and check that the browser has all of it."""
        await self._http.post(f"{site.worker.url}/stop/one")
        async with asyncio.timeout(GUARD_S):
            await following
        assert site.browser.end is not None
        assert site.browser.end["reason"] == "complete"
        record = await site.record()
        assert record["status"] == "COMPLETED"
        assert site.browser.numbers == list(range(record["output"]))
        assert [int(event.id or -1) for event in site.browser.events] == list(range(record["output"]))


@pytest.fixture
def sites(http: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sites:
    return Sites(http, tmp_path, monkeypatch)


async def killed(server: RedisServer, site: Site) -> None:
    server.kill()
    assert (await site.health(site.web), await site.health(site.worker)) == (503, 503)
    await asyncio.to_thread(server.restart, keep_data=True)


async def killed_with_its_data(server: RedisServer, site: Site) -> None:
    server.kill()
    assert (await site.health(site.web), await site.health(site.worker)) == (503, 503)
    await asyncio.to_thread(server.restart, keep_data=False)


async def paused(server: RedisServer, site: Site) -> None:
    with server.paused():
        assert (await site.health(site.web), await site.health(site.worker)) == (503, 503)


async def cut(server: RedisServer, site: Site) -> None:
    for _ in range(10):
        await asyncio.to_thread(server.cut_clients)
        await site.receives(3)


async def full(server: RedisServer, site: Site) -> None:
    server.configure("maxmemory", 1)
    assert (await site.health(site.web), await site.health(site.worker)) == (503, 503)
    server.configure("maxmemory", 0)


async def without_scripts(server: RedisServer, site: Site) -> None:
    await asyncio.to_thread(server.command, "SCRIPT", "FLUSH")


@pytest.mark.parametrize("fault", [killed, killed_with_its_data, paused, cut, full, without_scripts])
async def test_the_answer_is_complete(
    sites: Sites, redis_server: RedisServer, fault: Callable[[RedisServer, Site], Awaitable[None]]
) -> None:
    with sites.processes({"REDIS_URL": redis_server.url}) as (worker, web):
        site, following = await sites.begin(worker, web)
        await fault(redis_server, site)
        await site.receives()
        await site.until_healthy()
        await sites.finish(site, following)
    assert len(site.logged("Redis is unavailable")) <= 2
    assert site.logged("ERROR") == []


async def test_more_is_lost_than_can_be_restored(sites: Sites, redis_server: RedisServer) -> None:
    with sites.processes({"REDIS_URL": redis_server.url}) as (worker, web):
        site, following = await sites.begin(worker, web, size=10_000)
        await site.receives()  # a megabyte
        await asyncio.to_thread(redis_server.restart, keep_data=False)
        async with asyncio.timeout(GUARD_S):
            await following
        assert site.browser.end is not None
        assert site.browser.end["reason"] == "lost"
        await site.until_healthy()
        async with asyncio.timeout(GUARD_S):
            while (record := await site.record())["status"] == "EXECUTING":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert record["status"] == "FAILED"
        assert record["error"]["name"] == "StreamLost"


async def test_an_absence_longer_than_a_lease(sites: Sites, redis_server: RedisServer) -> None:
    """No process marks the run CRASHED only because its lease could not be renewed."""
    lease_s = 4.0
    with sites.processes({"REDIS_URL": redis_server.url, "LEASE": str(lease_s)}) as (worker, web):
        site, following = await sites.begin(worker, web)
        redis_server.kill()
        await asyncio.sleep(1.2 * lease_s)
        await asyncio.to_thread(redis_server.restart, keep_data=True)
        await site.receives()
        await sites.finish(site, following)
    assert site.logged("ERROR") == []
    assert len(site.logged("leases cannot be renewed")) <= 1


async def test_redis_starts_after_the_processes(sites: Sites, redis_server: RedisServer) -> None:
    redis_server.kill()
    with sites.processes({"REDIS_URL": redis_server.url}) as (worker, web):
        for process in (worker, web):
            health = await sites._http.get(f"{process.url}/realtime/v1/health")
            assert (health.status_code, health.json()["broker"]) == (503, "unavailable")
        await asyncio.to_thread(redis_server.restart, keep_data=True)
        site, following = await sites.begin(worker, web)
        await site.until_healthy()
        await sites.finish(site, following)
        await site.until_logged("Redis is available again", 2)
    assert len(site.logged("Redis is unavailable")) == 2


@pytest.mark.parametrize("keep_data", [True, False])
async def test_feeds_survive_an_absence_and_log_nothing(
    sites: Sites, redis_server: RedisServer, keep_data: bool
) -> None:
    """Feeds check with each heartbeat whether their run still exists, which fails without Redis."""
    with sites.processes({"REDIS_URL": redis_server.url}) as (worker, web):
        site, following = await sites.begin(worker, web)
        url = f"{web.url}/realtime/v1/runs/{site.run['id']}"
        feeds = [Browser(site.http, url, site.run["token"]) for _ in range(20)]
        async with asyncio.TaskGroup() as group:
            for feed in feeds:
                group.create_task(feed.run())
            while not all(feed.events for feed in feeds):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            redis_server.kill()
            for _ in range(3):
                await site.next_heartbeat()
            await asyncio.to_thread(redis_server.restart, keep_data=keep_data)
            await sites.finish(site, following)
        assert {json.loads(feed.events[-1].data)["status"] for feed in feeds} == {"COMPLETED"}
    assert site.logged("ERROR") == []


@pytest.mark.parametrize("lost", ["nothing", "the last writes"])
async def test_a_failover(sites: Sites, redis_pair: ReplicaPair, lost: str) -> None:
    with sites.processes({"SENTINEL": str(redis_pair.sentinel.port)}) as (worker, web):
        site, following = await sites.begin(worker, web)
        if lost == "the last writes":
            await asyncio.to_thread(redis_pair.isolate_replica)
            await site.receives(20)
        await asyncio.to_thread(redis_pair.fail_over)
        await site.receives()
        await sites.finish(site, following)
    assert len(site.logged("Redis is unavailable")) <= 2
    assert site.logged("ERROR") == []
