"""The app that the programs in `tests/clients` talk to, and routes of its host, under `/host`.

The environment that `tests.e2e.site.Site` sets configures it. It is mounted in every way that the official clients use:
at `/realtime` and `/api`, for both forms of `baseURL`, and at `/only/realtime` alone.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any, TypedDict

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_realtime import Realtime, Retention, Run, TaskError, Timeouts
from asgi_realtime.brokers import Broker
from asgi_realtime.brokers.redis import RedisBroker

ahead_s = 0.0
"""How far the clock of this process is ahead of the system clock."""


def clock() -> float:
    return time.time() + ahead_s


timeouts = Timeouts(poll=float(os.environ["POLL"]), find=0.5, tick=0.05, drain=0.05)
retention = Retention(stream_bytes=int(os.environ["STREAM_BYTES"]))


def make_broker(url: str, prefix: str) -> Broker | str:
    if url == "memory":
        return "memory://"
    return RedisBroker(url, prefix=prefix, timeouts=timeouts, retention=retention)


realtime = Realtime(
    secret_key=os.environ["SECRET"],
    broker=make_broker(os.environ["BROKER"], os.environ["PREFIX"]),
    timeouts=timeouts,
    retention=retention,
    clock=clock,
)


# Tasks


@realtime.task("echo")
async def echo(payload: Any) -> Any:
    return payload


@realtime.task("steps")
async def steps(payload: dict[str, Any], run: Run) -> dict[str, Any]:
    """Takes one step per input `next`, and returns the inputs."""
    received = []
    inputs = run.input("next")
    for step in range(payload["count"]):
        run.metadata.set("step", step)
        await run.metadata.flush()
        received.append(await inputs.get())
        await realtime.append({"step": step})
    return {"received": received}


class Meeting(TypedDict):
    when: datetime


@realtime.task("typed")
async def typed(payload: Meeting) -> dict[str, Any]:
    """Its payload is decoded by the annotation."""
    return {"weekday": payload["when"].strftime("%A"), "when": payload["when"]}


@realtime.task("unlucky")
async def unlucky() -> None:
    raise TaskError("no luck")


@realtime.task("endless")
async def endless(run: Run) -> None:
    await run.input("never").get()


# Requests seen by the server


class Seen(TypedDict):
    """A request: `open` until its response ends, which took `held` seconds."""

    method: str
    path: str
    query: str
    last_event_id: str | None
    status: int | None
    open: bool
    began: float
    held: float


class Watched:
    """Records requests. The next response at a path in `gates` waits for its event."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.requests: list[Seen] = []
        self.gates: dict[str, anyio.Event] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        began = time.monotonic()
        seen = Seen(
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"].decode(),
            last_event_id=headers[b"last-event-id"].decode() if b"last-event-id" in headers else None,
            status=None,
            open=True,
            began=began,
            held=0.0,
        )
        self.requests.append(seen)

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                if gate := self.gates.pop(scope["path"], None):
                    await gate.wait()
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            seen["open"] = False
            seen["held"] = time.monotonic() - began


watched = Watched(realtime)


# The host's own routes

opened: dict[str, tuple[AbstractAsyncContextManager[Run], Run]] = {}


async def open_run(request: Request) -> JSONResponse:
    """Open a run, until `end`."""
    scope = realtime.open_run(**await request.json())
    run = await scope.__aenter__()
    opened[run.id] = (scope, run)
    token = realtime.create_public_token(scopes=[f"read:runs:{run.id}", f"write:inputStreams:{run.id}"])
    return JSONResponse({"id": run.id, "token": token})


async def append(request: Request) -> JSONResponse:
    """Append chunks, one at a time."""
    body = await request.json()
    for chunk in body["chunks"]:
        await realtime.append(chunk, body.get("stream", "default"), run=body["run"])
    return JSONResponse({})


async def update(request: Request) -> JSONResponse:
    """Change metadata and tags of an open run."""
    body = await request.json()
    _, run = opened[body["run"]]
    for key, value in body.get("metadata", {}).items():
        run.metadata.set(key, value)
    if tags := body.get("tags"):
        run.tags.add(*tags)
    await run.metadata.flush()
    return JSONResponse({})


async def end(request: Request) -> JSONResponse:
    """Complete an open run with an output, or fail it with an error."""
    body = await request.json()
    scope, run = opened.pop(body["run"])
    error = TaskError(body["error"]) if "error" in body else None
    if error is None:
        run.set_output(body.get("output"))
    await scope.__aexit__(type(error) if error else None, error, None)
    return JSONResponse({})


async def trigger(request: Request) -> JSONResponse:
    body = await request.json()
    return JSONResponse(await realtime.trigger(body.pop("task"), body.pop("payload", None), **body))


async def batch_trigger(request: Request) -> JSONResponse:
    body = await request.json()
    return JSONResponse(await realtime.batch_trigger([tuple(item) for item in body["items"]]))


async def send_input(request: Request) -> JSONResponse:
    body = await request.json()
    await realtime.send_input(body["run"], body["input"], body["data"])
    return JSONResponse({})


async def set_ahead(request: Request) -> JSONResponse:
    """Move the clock of this process."""
    global ahead_s
    ahead_s = (await request.json())["seconds"]
    return JSONResponse({})


gates: dict[str, anyio.Event] = {}


async def hold(request: Request) -> JSONResponse:
    """Hold the next response at a path, after the work is done, until `let_go`."""
    path = (await request.json())["path"]
    gates[path] = watched.gates[path] = anyio.Event()
    return JSONResponse({})


async def let_go(request: Request) -> JSONResponse:
    gates.pop((await request.json())["path"]).set()
    return JSONResponse({})


async def requests(request: Request) -> JSONResponse:
    """The requests to the mounted app so far, in order of arrival."""
    return JSONResponse(watched.requests)


host = Mount(
    "/host",
    routes=[
        Route("/open", open_run, methods=["POST"]),
        Route("/append", append, methods=["POST"]),
        Route("/update", update, methods=["POST"]),
        Route("/end", end, methods=["POST"]),
        Route("/trigger", trigger, methods=["POST"]),
        Route("/batch_trigger", batch_trigger, methods=["POST"]),
        Route("/input", send_input, methods=["POST"]),
        Route("/set_ahead", set_ahead, methods=["POST"]),
        Route("/hold", hold, methods=["POST"]),
        Route("/let_go", let_go, methods=["POST"]),
        Route("/requests", requests),
    ],
)
only = Mount("/only", routes=[Mount("/realtime", watched)])
app = Starlette(routes=[host, only, Mount("/realtime", watched), Mount("/api", watched)], lifespan=realtime.lifespan)
