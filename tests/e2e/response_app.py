"""The app that `test_responses` serves: routes that respond with runs, and routes with which the test acts on a run."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from asgi_realtime import Realtime, Retention, Status, Timeouts
from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.log import End
from asgi_realtime.core.run_changes import Finished
from asgi_realtime.core.runs import RunError, StoredRecord

realtime = Realtime(
    secret_key="a key for tests, 32 bytes or more",
    timeouts=Timeouts(tick=0.05, drain=0.05),
    retention=Retention(stream_bytes=2000),
)


async def open_run(request: Request) -> JSONResponse:
    """A run that executes nowhere, so that a shutdown does not wait for it."""
    run_id: str = (await request.json())["id"]
    record = StoredRecord(id=run_id, task="chat", status=Status.EXECUTING, created_at_ms=0, updated_at_ms=0)
    await realtime.runs.create(record)
    token = realtime.create_public_token(scopes={"read": {"runs": [run_id]}}, expires_in=1)
    return JSONResponse({"token": token})


async def append(request: Request) -> JSONResponse:
    body = await request.json()
    for chunk in body["chunks"]:
        await realtime.append(chunk, run=body["id"])
    return JSONResponse({})


async def finish(request: Request) -> JSONResponse:
    body = await request.json()
    if body["status"] == "LOST":
        await realtime.broker.append(StreamKey(body["id"], "default"), [], end=End("lost", "two chunks were lost"))
    else:
        error = RunError("TaskError", "no credit") if body["status"] == "FAILED" else None
        await realtime.runs.update(body["id"], Finished(Status(body["status"]), None, error))
    return JSONResponse({})


async def chat(request: Request) -> Response:
    protocol: Any = request.query_params["protocol"]
    return realtime.response(request.query_params["id"], protocol=protocol, request=request)


async def pass_on(request: Request, call_next: Any) -> Response:
    response: Response = await call_next(request)
    return response


app = Starlette(
    routes=[
        Route("/open", open_run, methods=["POST"]),
        Route("/append", append, methods=["POST"]),
        Route("/finish", finish, methods=["POST"]),
        Route("/chat", chat, methods=["GET", "POST"]),
        Mount("/realtime", realtime),
    ],
    lifespan=realtime.lifespan,
    middleware=[Middleware(BaseHTTPMiddleware, dispatch=pass_on)],  # as `@app.middleware("http")` of FastAPI
)
