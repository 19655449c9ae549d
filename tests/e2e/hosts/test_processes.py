"""Servers with more than one process: workers, and a reload."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from asgi_realtime.engine.siblings import WARNING
from tests.e2e.hosts.servers import GUARD_S, serving
from tests.e2e.hosts.test_matrix import Stream, do, subscribe

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]

HOST = {"HOST": "starlette", "ENTRY": "mount"}


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A new connection per request, so that each request can reach another worker."""
    async with httpx.AsyncClient(timeout=GUARD_S, headers={"connection": "close"}) as client:
        yield client


def starts(log: str) -> int:
    return log.count("the host started")


@pytest.mark.parametrize("server", ["uvicorn", "hypercorn", "granian", "gunicorn"])
async def test_workers_on_the_memory_broker(server: str, http: httpx.AsyncClient, tmp_path: Path) -> None:
    """One of two workers warns, streams of both end at shutdown, and a request to the wrong worker gets an error that
    explains why it does not have the run."""
    with serving(server, tmp_path, HOST, workers=2) as running:
        async with asyncio.timeout(GUARD_S), AsyncExitStack() as stack:
            while starts(running.log.read_text()) < 2:  # noqa: ASYNC110 - of other processes
                await asyncio.sleep(0.01)
            answers: set[int] = set()
            while answers != {200, 404}:
                run = await do(http, running, do="open")
                headers = {"authorization": f"Bearer {run['token']}"}
                response = await http.get(f"{running.url}/realtime/api/v3/runs/{run['id']}", headers=headers)
                answers.add(response.status_code)
                if response.status_code == 404:
                    assert response.json()["code"] == "run_kept_elsewhere"
            streams: list[Stream] = []
            while len(streams) < 4:
                try:
                    streams.append(await subscribe(stack, http, running, await do(http, running, do="open")))
                except AssertionError:
                    continue  # the other worker answered
            running.terminate()
            for stream in streams:
                assert [event.event for event in await stream.rest()] == ["end"]
            await asyncio.to_thread(running.wait)
        log = running.log.read_text()
        assert log.count(WARNING) == 1
        assert log.count("the host stopped") == 2
        assert "Traceback" not in log


@pytest.mark.parametrize(
    ("server", "option"), [("uvicorn", "--limit-max-requests"), ("gunicorn-uvicorn", "--max-requests")]
)
async def test_a_replaced_worker_ends_its_streams(
    server: str, option: str, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    """uvicorn waited for them, and accepted no connection until the last reader had disconnected."""
    with serving(server, tmp_path, HOST, option, "5") as running:
        async with asyncio.timeout(GUARD_S), AsyncExitStack() as stack:
            stream = await subscribe(stack, http, running, await do(http, running, do="open"))
            while "the host stopped" not in running.log.read_text():
                with suppress(httpx.TransportError):
                    await do(http, running, do="count")
            assert [event.event for event in await stream.rest()] == ["end"]


APP = """
from tests.e2e.hosts.apps import app
"""


async def test_a_reload_ends_open_streams_and_restarts_the_app(http: httpx.AsyncClient, tmp_path: Path) -> None:
    """uvicorn waited for them, and the change took effect only after the browser was closed."""
    module = tmp_path / "reloaded.py"
    module.write_text(APP)
    options = ("--reload", "--reload-dir", str(tmp_path), "--app-dir", str(tmp_path))
    with serving("uvicorn", tmp_path, HOST, *options, app="reloaded:app", cwd=tmp_path) as running:
        async with asyncio.timeout(GUARD_S), AsyncExitStack() as stack:
            stream = await subscribe(stack, http, running, await do(http, running, do="open"))
            rest = asyncio.create_task(stream.rest())
            while not rest.done():  # on a busy machine uvicorn can serve before it watches, and miss the first change
                module.write_text(f"{module.read_text()}# changed\n")
                await asyncio.wait([rest], timeout=5)
            assert [event.event for event in await rest] == ["end"]
            while starts(running.log.read_text()) < 2:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.01)
            await do(http, running, do="open")
        running.terminate()
        await asyncio.to_thread(running.wait)
        log = running.log.read_text()
        assert re.search("Reloading|reload", log) and "several workers" not in log
