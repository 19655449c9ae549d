"""The routes of docs/chat.md, in each framework and for both protocols, under uvicorn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.docs.blocks import blocks
from tests.docs.programs import GUARD_S, served

BLOCKS = blocks("chat")
SERVED = [
    ("fastapi", "ai-sdk"),
    ("fastapi", "ag-ui"),
    ("starlette", "ag-ui"),
    ("litestar", "ai-sdk"),
    ("quart", "ag-ui"),
    ("django", "ai-sdk"),
]
SECRET = "a secret that is long enough for the tests"

MODEL = """
import asyncio

async def model(messages):
    yield "Hel"
    while messages == ["wait"]:
        await asyncio.sleep(0.01)
    yield "lo"
"""

STARLETTE = """
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
"""

DJANGO = """
import django
from django.conf import settings

settings.configure(ROOT_URLCONF=__name__, SECRET_KEY="x", ALLOWED_HOSTS=["*"])
django.setup()
"""

DJANGO_APP = """
from django.core.asgi import get_asgi_application
from django.urls import path

from asgi_realtime import RealtimeMiddleware

urlpatterns = [
    path("api/chat", chat),
    path("api/chat/<id>/stream", resume),
    path("api/chat/<id>/stop", stop),
]
app = RealtimeMiddleware(get_asgi_application(), realtime)
"""


BEFORE = {"starlette": STARLETTE, "django": DJANGO}
AFTER = {"django": DJANGO_APP}


def program(framework: str, protocol: str) -> str:
    setup = BLOCKS[f"{framework}_app"].text if f"{framework}_app" in BLOCKS else ""
    texts = [BLOCKS["shared"].text, MODEL, BEFORE.get(framework, ""), setup]
    texts += [BLOCKS[framework].text, AFTER.get(framework, "")]
    return "".join(texts).replace("ai-sdk", protocol)


def types(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))["type"]


ENDS = {"ai-sdk": ["text-end", "abort"], "ag-ui": ["TEXT_MESSAGE_END", "RUN_FINISHED"]}


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "protocol"), SERVED)
def test_the_routes_send_resume_and_stop(framework: str, protocol: str, tmp_path: Path) -> None:
    with (
        served(program(framework, protocol), tmp_path, {"REALTIME_SECRET_KEY": SECRET}) as url,
        httpx.Client(base_url=url, timeout=GUARD_S) as client,
    ):
        check(client, protocol)


def check(client: httpx.Client, protocol: str) -> None:
    assert client.get("/api/chat/c1/stream").status_code == 204
    done = client.post("/api/chat", json={"id": "c1", "messages": []})
    assert "delta" in done.text and list(types(iter(done.text.splitlines())))[-1] in ("finish", "RUN_FINISHED")
    assert (done.headers.get("x-vercel-ai-ui-message-stream") == "v1") is (protocol == "ai-sdk")
    assert client.get("/api/chat/c1/stream").status_code == 204

    with (
        client.stream("POST", "/api/chat", json={"id": "c1", "messages": ["wait"]}) as answer,
        client.stream("GET", "/api/chat/c1/stream") as other_tab,
    ):
        readers = [types(answer.iter_lines()), types(other_tab.iter_lines())]
        assert other_tab.status_code == 200
        for reader in readers:
            assert any("delta" in type or "CONTENT" in type for type in reader)
        assert client.post("/api/chat/c1/stop").status_code in (200, 201, 204)
        for reader in readers:
            assert list(reader) == ENDS[protocol]


def test_the_examples_are_as_short_as_the_page_says() -> None:
    lines = {name: [line for line in block.text.splitlines() if line] for name, block in BLOCKS.items()}
    assert {name for name, found in lines.items() if len(found) > 15} == set()
    assert len(lines["fastapi"][lines["fastapi"].index('@app.post("/api/chat")') :]) <= 12
    assert {framework for framework, _ in SERVED} == {name for name in BLOCKS if "_" not in name} - {"shared"}


def test_the_table_of_costs_names_every_protocol() -> None:
    table = (BLOCKS["shared"].document).read_text("utf-8").partition("## What a late reader costs")[2]
    assert re.findall(r"^\| `([\w-]+)` \|", table, flags=re.MULTILINE) == ["sse", "ai-sdk", "ag-ui"]
