"""A real uvicorn and real sockets: streams end at shutdown, resume, and do not wait for each other."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import pytest
import pytest_asyncio

ROOT = Path(__file__).parent.parent.parent
GUARD_S = 60.0
pytestmark = [pytest.mark.slow, pytest.mark.asyncio]

LAST_CHUNK = b"0\r\n\r\n"
"""The end of a complete body (RFC 9112, section 7.1)."""


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def served(
    start: str = "lifespan", *options: str, app: str = "tests.e2e.served:app", log: IO[bytes] | None = None
) -> Iterator[Served]:
    """Run uvicorn on a socket that listens before it starts. `log` receives its access log."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    command = [sys.executable, "-m", "uvicorn", app, "--fd", str(listener.fileno()), *options]
    environment = {**os.environ, "START": start, "OPENAI_API_KEY": "none"}
    with listener:
        listener.set_inheritable(True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, pass_fds=[listener.fileno()], stdout=log, stderr=subprocess.DEVNULL
        )
        try:
            yield Served(process, listener.getsockname()[1])
        finally:
            process.kill()
            process.wait()


@contextmanager
def many_files() -> Iterator[None]:
    """Raise the limit of open files for this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=GUARD_S) as client:
        yield client


async def subscribe(
    server: Served, run: dict[str, str], last_event_id: int | None = None, *, receive_buffer: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a stream and read its head."""
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", server.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024 * 1024)
    resume = "" if last_event_id is None else f"Last-Event-ID: {last_event_id}\r\n"
    writer.write(
        f"GET /realtime/v1/streams/{run['id']}/default HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {run['token']}\r\n{resume}\r\n".encode()
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0]
    return reader, writer


def ids(body: bytes) -> list[int]:
    return [int(number) for number in re.findall(rb"^id: (\d+)$", body, re.MULTILINE)]


@pytest.mark.parametrize(("start", "streams"), [("lifespan", 50), ("middleware", 1000), ("lazy", 50)])
async def test_sigterm_ends_every_stream_cleanly_and_the_server(
    http: httpx.AsyncClient, start: str, streams: int
) -> None:
    with many_files(), served(start) as server:
        run = (await http.post(f"{server.url}/open")).json()
        await http.post(f"{server.url}/publish", json={"run": run["id"], "count": 3, "size": 10})
        connections = [await subscribe(server, run) for _ in range(streams)]
        for reader, _ in connections:
            await reader.readuntil(b"id: 2\n")
        await http.aclose()
        server.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(GUARD_S):
            rests = await asyncio.gather(*(reader.read() for reader, _ in connections))
            await asyncio.to_thread(server.process.wait)
        for (_, writer), rest in zip(connections, rests, strict=True):
            writer.close()
            assert b"event: end\n" in rest  # the drain was too short for the run
            assert rest.endswith(LAST_CHUNK)
        assert server.process.returncode in (0, -signal.SIGTERM)


@pytest.mark.parametrize("protocol", ["httptools", "h11"])
async def test_a_dropped_reader_resumes_without_a_gap_or_a_double(http: httpx.AsyncClient, protocol: str) -> None:
    with served("lifespan", "--http", protocol) as server:
        run = (await http.post(f"{server.url}/open")).json()
        received: list[int] = []
        for round_ in range(5):
            reader, writer = await subscribe(server, run, received[-1] if received else None)
            await http.post(f"{server.url}/publish", json={"run": run["id"], "count": 200, "size": 100})
            async with asyncio.timeout(GUARD_S):
                body = await reader.readuntil(f"id: {round_ * 200 + 150}\n".encode())
            writer.transport.abort()
            received += ids(body)
        assert received == list(range(4 * 200 + 151))


async def test_a_reader_that_never_reads_slows_no_other(http: httpx.AsyncClient) -> None:
    with served() as server:
        run = (await http.post(f"{server.url}/open")).json()
        _, stalled = await subscribe(server, run, receive_buffer=4096)
        stalled.transport.pause_reading()  # type: ignore[attr-defined]
        reader, writer = await subscribe(server, run)
        memory = _resident_kib(server.process.pid)
        received: list[int] = []
        async with asyncio.timeout(GUARD_S):
            for round_ in range(30):  # read before the next round, or the reader could fall behind the retention
                await http.post(f"{server.url}/publish", json={"run": run["id"], "count": 1000, "size": 1000})
                while len(received) < (round_ + 1) * 1000:
                    received += ids(await reader.readuntil(b"\n\n"))
        assert received == list(range(30_000))
        # Of 30 MB, the stream retains 8 MiB and the stalled reader one body.
        assert _resident_kib(server.process.pid) - memory < 24 * 1024
        writer.close()
        stalled.close()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("protocol", ["httptools", "h11"])
async def test_sigterm_ends_the_server_although_readers_do_not_read(
    http: httpx.AsyncClient, loop: str, protocol: str
) -> None:
    with served("lifespan", "--loop", loop, "--http", protocol) as server:
        run = (await http.post(f"{server.url}/open")).json()
        await http.post(f"{server.url}/publish", json={"run": run["id"], "count": 5, "size": 1_000_000})
        writers = []
        for _ in range(20):
            _, writer = await subscribe(server, run, receive_buffer=4096)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writers.append(writer)
        server.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(GUARD_S):
            await asyncio.to_thread(server.process.wait)
        assert server.process.returncode in (0, -signal.SIGTERM)
        for writer in writers:
            writer.close()


@pytest.mark.parametrize("protocol", ["httptools", "h11"])
async def test_a_second_request_on_the_connection_does_not_hide_a_disconnect(
    http: httpx.AsyncClient, protocol: str
) -> None:
    with served("lifespan", "--http", protocol) as server:
        run = (await http.post(f"{server.url}/open")).json()
        for _ in range(20):
            _, writer = await subscribe(server, run)
            writer.write(b"GET /subscribers HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await writer.drain()
            writer.close()
        async with asyncio.timeout(GUARD_S):
            while (await http.get(f"{server.url}/subscribers")).json() != {"subscribers": 0}:
                pass


async def test_a_disconnected_reader_is_removed(http: httpx.AsyncClient) -> None:
    with served() as server:
        run = (await http.post(f"{server.url}/open")).json()
        for _ in range(200):
            _, writer = await subscribe(server, run)
            writer.transport.abort()
        async with asyncio.timeout(GUARD_S):
            while (await http.get(f"{server.url}/subscribers")).json() != {"subscribers": 0}:
                pass


@pytest.fixture(scope="module", params=["fastapi_app", "litestar_app"])
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URL of an example, and its access log."""
    path = tmp_path_factory.mktemp("example") / "access.log"
    with path.open("wb") as log, served(app=f"examples.{request.param}.app:app", log=log) as server:
        yield server.url, path


async def test_the_access_log_of_an_example_shows_no_token(http: httpx.AsyncClient, example: tuple[str, Path]) -> None:
    """Litestar gives a mount a copy of the scope, so uvicorn's access log contained the token."""
    url, log = example
    session = (await http.post(f"{url}/session")).json()
    query = {"tags": session["tag"], "access_token": session["token"]}
    headers = {"accept": "text/event-stream"}
    async with http.stream("GET", f"{url}/realtime/v1/runs", params=query, headers=headers) as response:
        assert response.status_code == 200
        await anext(response.aiter_bytes())
    async with asyncio.timeout(GUARD_S):
        while "GET /realtime/v1/runs" not in log.read_text():  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.01)
    assert "access_token=REDACTED" in log.read_text()
    assert session["token"] not in log.read_text()


async def test_stopping_a_run_that_does_not_exist_is_404_in_the_examples(
    http: httpx.AsyncClient, example: tuple[str, Path]
) -> None:
    """The Stop button of a page that was left open for a day got a 500."""
    url, _ = example
    assert (await http.post(f"{url}/chat/run_gone/stop")).status_code == 404


def _resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1])
