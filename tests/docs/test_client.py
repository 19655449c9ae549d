"""The blocks of docs/client.md, run against a server on a real socket."""

from __future__ import annotations

import ast
import inspect
import secrets
import ssl
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

import asgi_realtime
import asgi_realtime.client
from asgi_realtime.client import RealtimeClient, SyncRealtimeClient
from asgi_realtime.client.asynchronous import CONNECT_TIMEOUT, GIVE_UP_AFTER, SILENCE_TIMEOUT
from tests.docs.blocks import ROOT, Block, blocks
from tests.e2e.site import Opened, Site, serving

FRAGMENTS = blocks("client")
DOCUMENT = (ROOT / "docs" / "client.md").read_text("utf-8")
NAMED = "https://api.example.com/realtime"

Names = dict[str, Any]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving("memory") as running:
        yield running


@pytest.fixture
def run(site: Site) -> Opened:
    run = site.open(tags=[f"user:{secrets.token_hex(4)}"])
    run.update(metadata={"progress": 1})
    run.append("Hel", "lo")
    run.end(output={"text": "Hello"})
    return run


async def execute(block: Block, names: Names, site: Site) -> None:
    """Run a block that can have `await` at the top level, with the address of the test server."""
    source = "\n" * (block.line - 1) + block.text.replace(NAMED, site.base_url)
    code = compile(source, str(block.document), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    result = eval(code, names)
    if inspect.isawaitable(result):
        await result


async def check_read(site: Site, run: Opened, names: Names, execute_block: Callable[[], Awaitable[str]]) -> None:
    assert await execute_block() == "Hel\nlo\nCOMPLETED {'text': 'Hello'}\n"


async def check_sync(site: Site, run: Opened, names: Names, execute_block: Callable[[], Awaitable[str]]) -> None:
    assert await execute_block() == "COMPLETED {'progress': 1}\n"


async def check_indexed(site: Site, run: Opened, names: Names, execute_block: Callable[[], Awaitable[str]]) -> None:
    handled: list[Any] = []
    async with RealtimeClient(site.base_url, run.token) as client:
        names |= {"client": client, "last_index": 0, "handle": handled.append}
        await execute_block()
    assert (handled, names["last_index"]) == (["lo"], 1)


async def check_leave(site: Site, run: Opened, names: Names, execute_block: Callable[[], Awaitable[str]]) -> None:
    failed = site.open(tags=["user:1"])
    failed.end(error="no luck")
    async with RealtimeClient(site.base_url, site.token("read:tags:user:1")) as client:
        names["client"] = client
        await execute_block()
        assert names["run"].is_failed
        site.until(lambda: not any(request["open"] for request in site.requests("/v1/runs")), "the feed is closed")


async def check_token(site: Site, run: Opened, names: Names, execute_block: Callable[[], Awaitable[str]]) -> None:
    batch = site.post("batch_trigger", items=[["echo", 1]])

    def respond(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.host) == ("POST", "api.example.com")
        return httpx.Response(200, json={"token": site.token(f"read:batch:{batch['id']}")})

    async with httpx.AsyncClient(transport=httpx.MockTransport(respond)) as http:
        names |= {"http": http, "batch_id": batch["id"]}
        printed = await execute_block()
    assert printed.splitlines()[-1] == f"{batch['runs'][0]} COMPLETED"


async def check_http(site: Site, run: Opened, names: Names, execute_block: Callable[[], Awaitable[str]]) -> None:
    await execute_block()
    async with names["http"]:
        assert (await names["client"].get_run(run.id)).is_success


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def test_every_block_has_a_check() -> None:
    assert set(CHECKS) == set(FRAGMENTS)
    assert {block.document.name for block in FRAGMENTS.values()} == {"client.md"}


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("name", CHECKS)
async def test_a_block(name: str, site: Site, run: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    names: Names = {"run_id": run.id, "access_token": run.token, "RealtimeClient": RealtimeClient}
    names |= {"httpx": httpx, "ssl": ssl}

    async def execute_block() -> str:
        capsys.readouterr()
        await execute(FRAGMENTS[name], names, site)
        return capsys.readouterr().out

    await CHECKS[name](site, run, names, execute_block)


def test_documented_calls_and_errors_exist() -> None:
    rows = [line.split("|")[1] for line in DOCUMENT.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in row.replace("await ", "").split("`")[1::2]}
    calls = {name.partition("(")[0] for name in named if "(" in name}
    assert calls == {
        name for name in dir(SyncRealtimeClient) if not name.startswith("_") and name not in ("close", "base_url")
    }
    for error in {name for name in named if name[0].isupper()}:
        assert hasattr(asgi_realtime, error) or hasattr(asgi_realtime.client, error)


def test_documented_times_are_the_defaults() -> None:
    assert f"{SILENCE_TIMEOUT:g} s without a byte (`silence_timeout`" in " ".join(DOCUMENT.split())
    assert f"within {CONNECT_TIMEOUT:g} s (`connect_timeout`)" in DOCUMENT
    assert f"After {GIVE_UP_AFTER / 60:g} minutes without progress" in DOCUMENT
