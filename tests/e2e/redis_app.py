"""The app that `test_redis_faults` serves, both as the web process and as the process that executes runs.

REDIS_URL locates Redis, or SENTINEL is the port of a sentinel. LOG is the log file.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from asgi_realtime import Realtime, Timeouts
from asgi_realtime.brokers.redis import RedisBroker

logging.basicConfig(filename=os.environ["LOG"], level=logging.INFO)

lease = float(os.environ.get("LEASE", "30"))
timeouts = Timeouts(tick=0.05, drain=0.05, broker=1.0, heartbeat=0.2, lease=lease)


def server() -> str | Redis:
    if "SENTINEL" not in os.environ:
        return os.environ["REDIS_URL"]
    sentinels = [("127.0.0.1", int(os.environ["SENTINEL"]))]
    client: Redis = Sentinel(sentinels).master_for("tests")  # type: ignore[no-untyped-call]
    return client


realtime = Realtime(
    secret_key="a key for tests, 32 bytes or more",
    broker=RedisBroker(server(), timeouts=timeouts),
    timeouts=timeouts,
)
enough: dict[str, asyncio.Event] = {}


async def numbers(padding: str, stop: asyncio.Event) -> AsyncIterator[str]:
    number = 0
    while not stop.is_set():
        yield f"{number} {padding}"
        number += 1
        await asyncio.sleep(0.002)


@realtime.task("count")
async def count(asked: dict[str, Any]) -> int:
    """Pipe numbers until `stop` is requested; return how many there were."""
    piped = 0
    async for _ in realtime.pipe(numbers("x" * asked["size"], enough[asked["name"]])):
        piped += 1
    return piped


async def start(request: Request) -> JSONResponse:
    name = request.path_params["name"]
    enough[name] = asyncio.Event()
    run = await realtime.trigger(count, {"name": name, "size": int(request.query_params["size"])})
    return JSONResponse({"id": run.id, "token": run.public_access_token})


async def stop(request: Request) -> JSONResponse:
    enough[request.path_params["name"]].set()
    return JSONResponse({})


app = Starlette(
    routes=[
        Route("/start/{name}", start, methods=["POST"]),
        Route("/stop/{name}", stop, methods=["POST"]),
        Mount("/realtime", realtime),
    ],
    lifespan=realtime.lifespan,
)
