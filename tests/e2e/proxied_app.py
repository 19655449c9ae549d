"""The app behind the proxies. HEARTBEAT is in seconds, PREFIX is the mount path of the library."""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from asgi_realtime import Realtime, RealtimeMiddleware, Run, Timeouts

HEARTBEAT = float(os.environ.get("HEARTBEAT", "15"))
PREFIX = os.environ.get("PREFIX", "/realtime")

timeouts = Timeouts(tick=0.05, drain=0.05, heartbeat=HEARTBEAT)
realtime = Realtime(secret_key="a key for tests, 32 bytes or more", timeouts=timeouts)
opened: dict[str, AbstractAsyncContextManager[Run]] = {}


async def open_run(request: Request) -> JSONResponse:
    around = realtime.open_run("proxied")
    run = await around.__aenter__()
    opened[run.id] = around
    scopes = {"read": {"runs": [run.id]}, "write": {"inputStreams": [run.id], "runs": [run.id]}}
    return JSONResponse({"id": run.id, "token": realtime.create_public_token(scopes=scopes)})


async def append(request: Request) -> JSONResponse:
    body = await request.json()
    await realtime.append(body["chunk"], run=body["run"])
    return JSONResponse({})


async def end(request: Request) -> JSONResponse:
    await opened.pop((await request.json())["run"]).__aexit__(None, None, None)
    return JSONResponse({})


async def count(request: Request) -> JSONResponse:
    return JSONResponse({"subscribers": len(realtime.subscribers)})


async def page(request: Request) -> HTMLResponse:
    words = "Large enough to be compressed. " * 100
    return HTMLResponse(f"<!doctype html><title>Behind a proxy</title><link rel=icon href='data:,'><p>{words}")


host = Starlette(
    routes=[
        Route("/", page),
        Route("/open", open_run, methods=["POST"]),
        Route("/append", append, methods=["POST"]),
        Route("/end", end, methods=["POST"]),
        Route("/count", count),
    ]
)
app = RealtimeMiddleware(host, realtime, PREFIX)
