"""The app that `test_browser_module` serves: the page of docs/browser.md, and a producer that outlives the web process.

REDIS_URL and PREFIX name what both processes share. Only the producer executes runs: it appends when a test says so.
The web process gets its runs from PRODUCER.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route

from asgi_realtime import Realtime, Run, Timeouts
from asgi_realtime.brokers.redis import RedisBroker
from tests.docs.blocks import blocks

SCRIPT = blocks("browser")["page"].text
HTML = """<!doctype html>
<meta charset="utf-8" />
<p id="output"></p>
<script type="module" src="/page.js"></script>
"""
POLICY = "default-src 'none'; script-src 'self'; connect-src 'self'"
"""What docs/browser.md says that the module needs."""

timeouts = Timeouts(tick=0.05, drain=0.05)
realtime = Realtime(
    secret_key="a key for tests, 32 bytes or more",
    broker=RedisBroker(os.environ["REDIS_URL"], prefix=os.environ["PREFIX"], timeouts=timeouts),
    timeouts=timeouts,
)
opened: dict[str, tuple[AsyncExitStack, Run]] = {}


async def page(request: Request) -> Response:
    return HTMLResponse(HTML, headers={"content-security-policy": POLICY})


async def script(request: Request) -> Response:
    return Response(SCRIPT, media_type="text/javascript")


async def ask(request: Request) -> Response:
    async with httpx.AsyncClient() as http:
        return JSONResponse((await http.post(f"{os.environ['PRODUCER']}/open")).json())


async def token(request: Request) -> Response:
    scopes = {"read": {"runs": [request.path_params["run"]]}}
    return JSONResponse({"token": realtime.create_public_token(scopes=scopes, expires_in="1h")})


async def open_run(request: Request) -> Response:
    """A run that stays open, with a token that expires after a second."""
    stack = AsyncExitStack()
    run = await stack.enter_async_context(realtime.open_run("answer"))
    opened[run.id] = stack, run
    scopes = {"read": {"runs": [run.id]}}
    return JSONResponse(
        {"id": run.id, "publicAccessToken": realtime.create_public_token(scopes=scopes, expires_in="1s")}
    )


async def append(request: Request) -> Response:
    stack, run = opened[request.path_params["run"]]
    body = await request.json()
    for chunk in body["chunks"]:
        await realtime.append(chunk, run=run)
    if body["end"]:
        await stack.aclose()
    return Response(status_code=204)


app = Starlette(
    routes=[
        Route("/", page),
        Route("/page.js", script),
        Route("/other", page),
        Route("/answers", ask, methods=["POST"]),
        Route("/answers/{run}/token", token, methods=["POST"]),
        Route("/open", open_run, methods=["POST"]),
        Route("/append/{run}", append, methods=["POST"]),
        Mount("/realtime", realtime),
    ],
    lifespan=realtime.lifespan,
)
