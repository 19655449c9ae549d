"""The app that `test_uvicorn` serves. START selects how the `Realtime` starts: lifespan, middleware or lazy."""

from __future__ import annotations

import os

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from asgi_realtime import Realtime, RealtimeMiddleware, Run, Timeouts

realtime = Realtime(secret_key="a key for tests, 32 bytes or more", timeouts=Timeouts(tick=0.05, drain=0.05))
opened: list[Run] = []


async def open_run(request: Request) -> JSONResponse:
    """Open a run and leave it open."""
    run = await realtime.open_run("served").__aenter__()
    opened.append(run)
    token = realtime.create_public_token(scopes={"read": {"runs": [run.id]}})
    return JSONResponse({"id": run.id, "token": token})


async def publish(request: Request) -> JSONResponse:
    """Append `count` chunks of `size` characters, one by one."""
    body = await request.json()
    for number in range(body["count"]):
        await realtime.append(f"{number:08d}" + "x" * body["size"], run=body["run"])
    return JSONResponse({"subscribers": len(realtime.subscribers)})


async def subscribers(request: Request) -> JSONResponse:
    return JSONResponse({"subscribers": len(realtime.subscribers)})


start = os.environ.get("START", "lifespan")
routes: list[Route | Mount] = [
    Route("/open", open_run, methods=["POST"]),
    Route("/publish", publish, methods=["POST"]),
    Route("/subscribers", subscribers),
]
if start == "middleware":
    app = Starlette(routes=routes, middleware=[Middleware(RealtimeMiddleware, realtime=realtime)])
else:
    mounted = [*routes, Mount("/realtime", realtime)]
    app = Starlette(routes=mounted, lifespan=realtime.lifespan if start == "lifespan" else None)
