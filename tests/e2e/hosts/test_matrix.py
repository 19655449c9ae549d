"""Hosts and servers: the mounted app is found, streams live, notices disconnects, and shuts down on request.

Pairs, not products. With the variable HOSTS_TABLE the whole matrix runs, and the measured times are written to that
file, for docs/deployment.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
import pytest
import pytest_asyncio

from asgi_realtime.testing import Event, EventParser
from tests.e2e.hosts.guest import SECRET
from tests.e2e.hosts.servers import GUARD_S, ROOT_PATH, SERVERS, Serving, serving

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]

STREAMS = 100


class Cell(NamedTuple):
    """One host in one server."""

    host: str
    server: str
    entry: str = "middleware"
    compress: bool = False

    def __str__(self) -> str:
        return f"{self.host}-{self.server}-{self.entry}" + ("-compressing" if self.compress else "")

    @property
    def environment(self) -> dict[str, str]:
        return {"HOST": self.host, "ENTRY": self.entry, **({"COMPRESS": "1"} if self.compress else {})}

    @property
    def redirects_the_bare_prefix(self) -> bool:
        """Starlette's own mounts redirect, before the library sees the request."""
        return self.host in ("starlette", "fastapi") and self.entry == "mount"

    @property
    def life(self) -> list[str]:
        """The events in its log, in this order. Django has no start-up of its own."""
        own = [] if self.host == "django" else ["the host started", "the host stopped"]
        return ["the guest started", *own, "the guest stopped"]


MOUNTABLE = ("starlette", "fastapi", "litestar", "blacksheep")
MATRIX = [
    *(Cell(host, "uvicorn", "mount") for host in MOUNTABLE),
    *(Cell(host, "uvicorn") for host in (*MOUNTABLE, "quart", "falcon", "django", "sanic")),
    *(
        Cell(host, server, "mount")
        for server in ("hypercorn", "granian")
        for host in ("starlette", "fastapi", "litestar")
    ),
    *(Cell(host, server) for server in ("hypercorn", "granian") for host in ("quart", "django")),
    *(Cell(host, "hypercorn-trio", "mount") for host in ("starlette", "fastapi", "litestar")),
    Cell("quart_trio", "hypercorn-trio"),
    *(Cell("fastapi", server, "mount") for server in ("gunicorn", "gunicorn-uvicorn")),
    *(Cell("django", server) for server in ("gunicorn", "gunicorn-uvicorn")),
]
PAIRS = [
    *(Cell(host, "uvicorn", "mount", compress=True) for host in ("starlette", "fastapi", "litestar")),
    Cell("blacksheep", "uvicorn", "mount"),
    *(Cell(host, "uvicorn") for host in ("quart", "falcon", "django", "sanic")),
    Cell("fastapi", "hypercorn", "mount"),
    Cell("django", "hypercorn"),
    Cell("litestar", "granian", "mount"),
    Cell("quart", "granian"),
    Cell("starlette", "hypercorn-trio", "mount"),
    Cell("quart_trio", "hypercorn-trio"),
    Cell("fastapi", "gunicorn", "mount"),
    Cell("django", "gunicorn-uvicorn"),
]
"""Each host, server and entry, at least once with and without the others."""
PREFIXED_PAIRS = [
    *(Cell(host, "uvicorn") for host in ("starlette", "blacksheep", "falcon", "sanic")),
    Cell("litestar", "uvicorn", "mount"),
    Cell("quart", "hypercorn"),
    Cell("litestar", "granian", "mount"),
    Cell("starlette", "hypercorn-trio", "mount"),
    Cell("fastapi", "gunicorn", "mount"),
]
EVERYTHING = "HOSTS_TABLE" in os.environ
CELLS = MATRIX if EVERYTHING else PAIRS
# BlackSheep's mount is not found behind uvicorn's --root-path; its middleware entry is.
NOT_FOUND = Cell("blacksheep", "uvicorn", "mount")
PREFIXED = [cell for cell in MATRIX if cell.server in ROOT_PATH and cell != NOT_FOUND] if EVERYTHING else PREFIXED_PAIRS


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=GUARD_S, limits=limits, headers={"accept-encoding": "gzip"}) as client:
        yield client


async def do(http: httpx.AsyncClient, server: Serving, **body: Any) -> dict[str, Any]:
    """Call the route of the host."""
    response = await http.post(f"{server.url}/do", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@dataclass
class Stream:
    """An open stream. It raises if the body is cut off, but not at its end."""

    response: httpx.Response
    events: AsyncIterator[Event]

    async def chunk(self) -> Any:
        return json.loads((await anext(self.events)).data)

    async def rest(self) -> list[Event]:
        return [event async for event in self.events]


async def _events(response: httpx.Response) -> AsyncIterator[Event]:
    parser = EventParser()
    async for data in response.aiter_bytes():
        for event in parser.feed(data):
            yield event


async def subscribe(
    stack: AsyncExitStack,
    http: httpx.AsyncClient,
    server: Serving,
    run: dict[str, Any],
    *,
    prefix: str = "/realtime",
    stream: str = "default",
) -> Stream:
    path = f"{prefix}/v1/streams/{run['id']}/{quote(stream, safe='')}"
    headers = {"authorization": f"Bearer {run['token']}"}
    response = await stack.enter_async_context(http.stream("GET", server.url + path, headers=headers))
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    return Stream(response, _events(response))


@pytest.mark.parametrize("cell", CELLS, ids=str)
async def test_guest(cell: Cell, http: httpx.AsyncClient, tmp_path: Path, seen: dict[Cell, str]) -> None:
    with serving(cell.server, tmp_path, cell.environment) as server:
        async with asyncio.timeout(GUARD_S):
            if cell.compress:
                compressed = await http.post(f"{server.url}/do", json={"do": "open"})
                assert compressed.headers["content-encoding"] == "gzip"
            await check_paths(cell, http, server)
            first_s = await check_a_stream_arrives_as_it_is_written(http, server)
            await check_disconnects_are_noticed(http, server)
            exit_s = await check_everything_ends_at_sigterm(cell, http, server)
        seen[cell] = f"| {cell.host} | {cell.server} | {cell.entry} | {first_s * 1000:.0f} ms | {exit_s:.2f} s |"


async def check_paths(cell: Cell, http: httpx.AsyncClient, server: Serving) -> None:
    await check_the_bare_prefix(cell, http, server.url + "/realtime")
    assert (await http.get(f"{server.url}/realtime/realtime/v1/health")).status_code == 200  # as clients can request
    for path in ("/realtimeX", "/realtimeX/v1/health", "/realtime.json"):
        response = await http.get(server.url + path)
        assert response.status_code == 404
        if cell.entry == "middleware":  # paths that only resemble our prefix belong to the host
            assert '"code"' not in response.text
    for run_id, status in (("%C3%A9", 401), ("%20%25", 401), ("a%2Fb", 404)):  # the last one has one more segment
        assert (await http.get(f"{server.url}/realtime/v1/runs/{run_id}")).status_code == status
    key = "caf\u00e9 100%"
    run = await do(http, server, do="open")
    await do(http, server, do="append", run=run["id"], chunk="of a name to be quoted", stream=key)
    async with AsyncExitStack() as stack:
        stream = await subscribe(stack, http, server, run, stream=key)
        assert await stream.chunk() == "of a name to be quoted"


async def check_the_bare_prefix(cell: Cell, http: httpx.AsyncClient, url: str) -> None:
    """The path works with and without a trailing slash, and we never redirect it."""
    for end in ("", "/"):
        response = await http.get(url + end)
        if cell.redirects_the_bare_prefix and not end:
            assert response.status_code == 307
        else:
            assert (response.status_code, response.json()["code"]) == (404, "not_found")


async def check_a_stream_arrives_as_it_is_written(http: httpx.AsyncClient, server: Serving) -> float:
    """Each chunk arrives before the next one is written. Return the seconds to the first."""
    run = await do(http, server, do="open")
    async with AsyncExitStack() as stack:
        stream = await subscribe(stack, http, server, run)  # its head arrives before the first chunk
        began = time.monotonic()
        await do(http, server, do="append", run=run["id"], chunk=0)
        assert await stream.chunk() == 0
        first_s = time.monotonic() - began
        for number in range(1, 5):
            await do(http, server, do="append", run=run["id"], chunk=number)
            assert await stream.chunk() == number
    return first_s


async def check_disconnects_are_noticed(http: httpx.AsyncClient, server: Serving) -> None:
    run = await do(http, server, do="open")
    async with AsyncExitStack() as stack:
        for _ in range(5):
            await subscribe(stack, http, server, run)
        while (await do(http, server, do="count"))["subscribers"] < 5:
            pass
    while (await do(http, server, do="count"))["subscribers"]:
        pass


async def check_everything_ends_at_sigterm(cell: Cell, http: httpx.AsyncClient, server: Serving) -> float:
    """Return the seconds from SIGTERM to the exit."""
    run = await do(http, server, do="open")
    await do(http, server, do="append", run=run["id"], chunk="first")
    async with AsyncExitStack() as stack:
        streams = [await subscribe(stack, http, server, run) for _ in range(STREAMS)]
        for stream in streams:
            assert await stream.chunk() == "first"
        began = time.monotonic()
        server.terminate()
        for stream in streams:
            assert [event.event for event in await stream.rest()][-1] == "end"  # the drain was too short for the run
        code = await asyncio.to_thread(server.wait)
        exit_s = time.monotonic() - began
    assert code in (0, -15)
    log = server.log.read_text()
    assert "Traceback" not in log and "was destroyed" not in log
    assert re.findall("the (?:host|guest) (?:started|stopped)", log) == cell.life
    assert "not started by the app" not in log
    assert "several workers" not in log
    return exit_s


@pytest.mark.parametrize("server", SERVERS)
async def test_an_answer_in_progress_survives_sigterm(server: str, http: httpx.AsyncClient, tmp_path: Path) -> None:
    """A deploy failed it after half a second. Others do not wait for it."""
    with serving(server, tmp_path, {"HOST": "starlette", "ENTRY": "mount", "DRAIN": "30"}) as running:
        async with asyncio.timeout(GUARD_S), AsyncExitStack() as stack:
            run = await do(http, running, do="answer")
            stream = await subscribe(stack, http, running, run)
            assert await stream.chunk() == 0
            running.terminate()
            rest = await stream.rest()
            await stack.aclose()
            await http.aclose()
            code = await asyncio.to_thread(running.wait)
    assert [json.loads(event.data) for event in rest] == [*range(1, 15), {"reason": "complete"}]
    assert code in (0, -15)
    log = running.log.read_text()
    assert "shutdown: 1 run finished, 0 cut" in log
    assert "Traceback" not in log
    assert re.findall("the (?:host|guest) stopped", log) == ["the host stopped", "the guest stopped"]


def loses_its_own_routes(cell: Cell) -> bool:
    """Falcon and Sanic keep the prefix that uvicorn adds; Quart refuses a path without the configured prefix."""
    if cell.server == "uvicorn":
        return cell.host in ("falcon", "sanic")
    return cell.host in ("quart", "quart_trio")


@pytest.mark.parametrize("cell", PREFIXED, ids=str)
async def test_behind_a_proxy_that_strips_a_prefix(cell: Cell, http: httpx.AsyncClient, tmp_path: Path) -> None:
    """The library is found under every path that can arrive, even where the routes of the host are not."""
    # The library has routes that start with /api. Litestar strips a root path wherever it occurs in a path.
    taken_off = "/outer" if (cell.host, cell.entry) == ("litestar", "mount") else "/api"
    with serving(cell.server, tmp_path, cell.environment, ROOT_PATH[cell.server], taken_off) as server:
        prefixes = ["/realtime"]
        if cell.server != "uvicorn":  # this assumes that the proxy has stripped it
            prefixes.append(f"{taken_off}/realtime")
        headers = {"authorization": f"Bearer {SECRET}"}
        async with asyncio.timeout(GUARD_S), AsyncExitStack() as stack:
            if not loses_its_own_routes(cell):
                await do(http, server, do="count")
            for prefix in prefixes:
                await check_the_bare_prefix(cell, http, server.url + prefix)
            for prefix in (*prefixes, "/realtime/realtime"):
                url = server.url + prefix
                answer = await http.post(f"{url}/api/v1/tasks/waits/trigger", json={}, headers=headers)
                run_id = answer.json()["id"]
                stream = await subscribe(stack, http, server, {"id": run_id, "token": SECRET}, prefix=prefix)
                append = f"{url}/v1/streams/{run_id}/self/default/append"
                assert (await http.post(append, content='"text"', headers=headers)).status_code == 200
                assert await stream.chunk() == '"text"'
                assert (await http.get(f"{url}/api/v3/runs/{run_id}", headers=headers)).json()["id"] == run_id
            assert (await http.get(f"{server.url}/realtimeX")).status_code == 404


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[Cell, str]]:
    rows: dict[Cell, str] = {}
    yield rows
    if path := os.environ.get("HOSTS_TABLE"):
        head = ["| host | server | entry | first chunk | SIGTERM with 100 streams to exit |", "|---|---|---|---|---|"]
        Path(path).write_text("\n".join([*head, *rows.values()]) + "\n")
