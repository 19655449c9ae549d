"""HTTP writers under a real uvicorn, over real sockets, with each of its parsers."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from tests.e2e.test_uvicorn import GUARD_S, Served, served

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]

SECRET = "a key for tests, 32 bytes or more"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=GUARD_S) as client:
        yield client


async def open_writer(server: Served, run_id: str, client_id: str) -> Connection:
    """Start writing a stream, as the official client does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        f"POST /realtime/v1/streams/{run_id}/self/default HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {SECRET}\r\nContent-Type: application/json\r\nX-Client-Id: {client_id}\r\n"
        "X-Resume-From-Chunk: 0\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    )
    return reader, writer


def write(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(body), body))


async def last_index(http: httpx.AsyncClient, server: Served, run_id: str, client_id: str) -> int:
    headers = {"authorization": f"Bearer {SECRET}", "x-client-id": client_id}
    response = await http.head(f"{server.url}/realtime/v1/streams/{run_id}/self/default", headers=headers)
    assert response.status_code == 200
    return int(response.headers["x-last-chunk-index"])


@pytest.mark.parametrize("parser", ["h11", "httptools"])
async def test_sigterm_responds_to_every_writer_and_ends_the_server(http: httpx.AsyncClient, parser: str) -> None:
    with served("lifespan", "--http", parser) as server:
        run_id = (await http.post(f"{server.url}/open")).json()["id"]
        connections = [await open_writer(server, run_id, f"c{number}") for number in range(20)]
        async with asyncio.timeout(GUARD_S):
            for number, (_, writer) in enumerate(connections):
                if number % 2:  # the others are open but have sent nothing
                    write(writer, b'"whole"\n"ha')
                    while await last_index(http, server, run_id, f"c{number}") < 0:
                        pass
            while (await http.get(f"{server.url}/subscribers")).json()["subscribers"] < len(connections):
                pass
            await http.aclose()
            server.process.send_signal(signal.SIGTERM)
            answers = await asyncio.gather(*(reader.read() for reader, _ in connections))
            assert await asyncio.to_thread(server.process.wait) in (0, -signal.SIGTERM)
        for (_, writer), answer in zip(connections, answers, strict=True):
            writer.close()
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b" 503 " in head.splitlines()[0]
            assert json.loads(body)["code"] == "server_shutdown"


@pytest.mark.parametrize("parser", ["h11", "httptools"])
async def test_a_large_body_is_stored_unchanged_however_it_is_split(http: httpx.AsyncClient, parser: str) -> None:
    lines = [json.dumps({"number": number, "text": "ü" * (number % 700)}).encode() for number in range(3000)]
    body = b"".join(line + b"\n" for line in lines)
    with served("lifespan", "--http", parser) as server:
        run_id = (await http.post(f"{server.url}/open")).json()["id"]
        reader, writer = await open_writer(server, run_id, "c")
        async with asyncio.timeout(GUARD_S):
            place = 0
            for size in [1, 7, 100, 65_536, 3, 300_000, 11] * 100:
                if place >= len(body):
                    break
                write(writer, body[place : place + size])
                await writer.drain()
                place += size
            writer.write(b"0\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head.splitlines()[0]
        assert place >= len(body)
        assert await last_index(http, server, run_id, "c") == len(lines) - 1
        token = {"authorization": f"Bearer {SECRET}"}
        stored: list[bytes] = []
        async with http.stream("GET", f"{server.url}/realtime/v1/streams/{run_id}/default", headers=token) as response:
            async for line in response.aiter_lines():  # pragma: no branch - it never ends
                if line.startswith("data: "):
                    stored.append(line.removeprefix("data: ").encode())
                    if len(stored) == len(lines):
                        break
        assert stored == lines
        writer.close()
