"""The host of the tests with chat frontends: the app of `clients_app`, and routes as a host writes them for a frontend.

A test says what an answer consists of, and how it ends, with the input `answer` of its run. PAGE is the folder with the
pages of `tests/frontends`.
"""

from __future__ import annotations

import os
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from asgi_realtime import RealtimeError, Run, TaskError
from tests.e2e.clients_app import app, realtime


@realtime.task("answer")
async def answer(run: Run) -> None:
    async for step in run.input("answer"):
        if "chunks" in step:
            for chunk in step["chunks"]:
                await realtime.append(chunk)
        elif step["end"] == "completed":
            return
        else:
            raise TaskError(step["end"])


async def active(request: Request) -> JSONResponse:
    """The id of the active run of a thread, or null."""
    run = await realtime.active_run((await request.json())["thread"])
    return JSONResponse({"run": run and run.id})


async def cancel(request: Request) -> JSONResponse:
    await realtime.cancel((await request.json())["run"])
    return JSONResponse({})


async def explain(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RealtimeError)
    return PlainTextResponse(str(exc), exc.status)


# useChat


async def send(request: Request) -> Response:
    chat = await request.json()
    run = await realtime.trigger(answer, thread=chat["id"], max_duration=chat.get("maxDuration"))
    return realtime.response(run, protocol="ai-sdk")


async def resume(request: Request) -> Response:
    run = await realtime.active_run(request.path_params["chat"])
    return realtime.response(run, protocol="ai-sdk", request=request) if run else Response(status_code=204)


async def stop(request: Request) -> Response:
    if run := await realtime.active_run(request.path_params["chat"]):
        await realtime.cancel(run)
    return Response(status_code=204)


# AG-UI


async def run_agent(request: Request) -> Response:
    """A repeated request, with the same run, continues after `Last-Event-ID`."""
    asked: dict[str, Any] = await request.json()
    run = await realtime.trigger(answer, thread=asked["threadId"], idempotency_key=asked["runId"])
    return realtime.response(run, protocol="ag-ui", request=request)


async def join_or_load(request: Request) -> Response:
    """TanStack AI: a page that opens loads its thread, and then joins the run."""
    if run_id := request.query_params.get("runId"):
        return realtime.response(run_id, protocol="ag-ui", request=request)
    run = await realtime.active_run(request.query_params["threadId"])
    return JSONResponse({"messages": [], "activeRun": run and {"runId": run.id}, "interrupts": None})


app.add_exception_handler(RealtimeError, explain)
app.router.routes[:0] = [
    Route("/host/active", active, methods=["POST"]),
    Route("/host/cancel", cancel, methods=["POST"]),
    Route("/api/chat", send, methods=["POST"]),
    Route("/api/chat/{chat}/stream", resume),
    Route("/api/chat/{chat}/stop", stop, methods=["POST"]),
    Route("/ag-ui", run_agent, methods=["POST"]),
    Route("/ag-ui", join_or_load),
    Mount("/page", StaticFiles(directory=os.environ.get("PAGE", "."), html=True)),
]
