"""The app behind the proxies. HEARTBEAT are seconds, PREFIX is where the library is served."""

from __future__ import annotations

import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from asgi_realtime import Realtime, RealtimeMiddleware, Run, Timeouts

HEARTBEAT = float(os.environ.get("HEARTBEAT", "15"))
PREFIX = os.environ.get("PREFIX", "/realtime")

timeouts = Timeouts(tick=0.05, drain=0.05, heartbeat=HEARTBEAT)
realtime = Realtime(secret_key="a key for tests, 32 bytes or more", timeouts=timeouts)
opened: dict[str, Run] = {}


async def open_run(request: Request) -> JSONResponse:
    run = await realtime.open_run("proxied").__aenter__()
    opened[run.id] = run
    scopes = {"read": {"runs": [run.id]}, "write": {"inputStreams": [run.id], "runs": [run.id]}}
    return JSONResponse({"id": run.id, "token": realtime.create_public_token(scopes=scopes)})


async def append(request: Request) -> JSONResponse:
    body = await request.json()
    await realtime.append(body["chunk"], run=body["run"])
    return JSONResponse({})


async def cancel(request: Request) -> JSONResponse:
    await realtime.cancel((await request.json())["run"])
    return JSONResponse({})


async def count(request: Request) -> JSONResponse:
    return JSONResponse({"subscribers": len(realtime.subscribers)})


async def page(request: Request) -> HTMLResponse:
    return HTMLResponse("<!doctype html><title>Behind a proxy</title><link rel=icon href='data:,'>")


host = Starlette(
    routes=[
        Route("/", page),
        Route("/open", open_run, methods=["POST"]),
        Route("/append", append, methods=["POST"]),
        Route("/cancel", cancel, methods=["POST"]),
        Route("/count", count),
    ]
)
app = RealtimeMiddleware(host, realtime, PREFIX)
