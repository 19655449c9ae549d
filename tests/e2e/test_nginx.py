"""Behind a real nginx, with the configuration that docs/deployment.md prints."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
import trustme

from tests.docs.blocks import blocks
from tests.e2e.hosts.servers import GUARD_S, Serving, serving
from tests.e2e.hosts.test_matrix import Stream, check_a_stream_arrives_as_it_is_written, do, subscribe
from tests.e2e.proxies import nginx, passing_on_to

pytestmark = [pytest.mark.slow, pytest.mark.asyncio, pytest.mark.timeout(60)]

HOST = {"HOST": "starlette", "ENTRY": "mount"}
PRINTED = blocks("nginx")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Serving]:
    with serving("uvicorn", tmp_path, HOST) as running:
        yield running


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=GUARD_S, limits=limits, headers={"accept-encoding": "gzip"}) as client:
        yield client


def behind(server: Serving, address: str, scheme: str = "http") -> Serving:
    """The server as it is seen through the proxy."""
    return Serving(server.process, f"{scheme}://{address}", server.log)


def printed(name: str, server: Serving) -> str:
    """A configuration of the document, for this server."""
    text = PRINTED[name].text
    assert "http://127.0.0.1:8000" in text
    return text.replace("http://127.0.0.1:8000", server.url) + f"location = /do {{ proxy_pass {server.url}; }}"


async def check_all(
    http: httpx.AsyncClient, server: Serving, proxied: Serving, make: Callable[[], httpx.AsyncClient]
) -> None:
    """Chunks come as they are written, a client that leaves is forgotten, and a shutdown is told: 20 streams each."""
    run = await do(http, server, do="open")
    async with make() as client, AsyncExitStack() as stack:
        streams: list[Stream] = [await subscribe(stack, client, proxied, run) for _ in range(20)]
        for number in range(3):
            await do(http, server, do="append", run=run["id"], chunk=number)
            for stream in streams:
                assert await stream.chunk() == number
    while (await do(http, server, do="count"))["subscribers"]:
        pass
    async with make() as client, AsyncExitStack() as stack:
        streams = [await subscribe(stack, client, proxied, run) for _ in range(20)]
        server.terminate()
        for stream in streams:
            assert [event.event for event in await stream.rest()][-1] == "reconnect"


def client_of(verify: ssl.SSLContext | bool = True, *, http2: bool = False) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=1 if http2 else None)
    return httpx.AsyncClient(timeout=GUARD_S, limits=limits, http2=http2, verify=verify)


async def test_as_printed(server: Serving, http: httpx.AsyncClient, tmp_path: Path) -> None:
    with nginx(tmp_path / "nginx", printed("location", server)) as address:
        async with asyncio.timeout(GUARD_S):
            await check_all(http, server, behind(server, address), client_of)


async def test_as_printed_over_http_2(server: Serving, http: httpx.AsyncClient, tmp_path: Path) -> None:
    """All streams of a client in one connection."""
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert.pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    certificate = f"ssl_certificate {tmp_path}/cert.pem; ssl_certificate_key {tmp_path}/cert.pem;"
    with nginx(tmp_path / "nginx", certificate + printed("location", server), listen="ssl http2") as address:
        async with asyncio.timeout(GUARD_S):
            secured = behind(server, address, "https")
            async with client_of(context, http2=True) as client:
                assert (await client.get(f"{secured.url}/realtime/v1/health")).http_version == "HTTP/2"
            await check_all(http, server, secured, partial(client_of, context, http2=True))


async def test_a_prefix_that_nginx_takes_off(server: Serving, http: httpx.AsyncClient, tmp_path: Path) -> None:
    with nginx(tmp_path / "nginx", printed("prefix", server)) as address:
        async with asyncio.timeout(GUARD_S), AsyncExitStack() as stack:
            run = await do(http, server, do="open")
            proxied = behind(server, address)
            stream = await subscribe(stack, http, proxied, run, prefix="/app/realtime")
            await do(http, server, do="append", run=run["id"], chunk="a")
            assert await stream.chunk() == "a"


async def test_gzip_of_nginx_leaves_streams_alone(server: Serving, http: httpx.AsyncClient, tmp_path: Path) -> None:
    lines = "gzip on; gzip_proxied any; gzip_min_length 0; proxy_buffering on;"
    with nginx(tmp_path / "nginx", passing_on_to(server.url, lines)) as address:
        async with asyncio.timeout(GUARD_S):
            await check_a_stream_arrives_as_it_is_written(http, behind(server, address))


@pytest.mark.parametrize(("heartbeat", "cut"), [("0.1", False), ("15", True)])
async def test_nginx_cuts_what_is_silent_for_longer_than_its_time_out(
    http: httpx.AsyncClient, tmp_path: Path, heartbeat: str, cut: bool
) -> None:
    with (
        serving("uvicorn", tmp_path, {**HOST, "HEARTBEAT": heartbeat}) as server,
        nginx(tmp_path / "nginx", passing_on_to(server.url, "proxy_read_timeout 1s;")) as address,
    ):
        run = await do(http, server, do="open")
        async with asyncio.timeout(GUARD_S), AsyncExitStack() as stack:
            stream = await subscribe(stack, http, behind(server, address), run)
            if cut:
                with pytest.raises(httpx.RemoteProtocolError):
                    await stream.rest()
                return
            await asyncio.sleep(1.5)  # longer than nginx waits: that is what the test is about
            await do(http, server, do="append", run=run["id"], chunk="still here")
            assert await stream.chunk() == "still here"
