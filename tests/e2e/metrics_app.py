"""The app that `test_metrics_workers` serves in several processes."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from asgi_realtime import Realtime

SECRET = "a key for tests, 32 bytes or more"
realtime = Realtime(secret_key=SECRET, metrics=True)


async def words() -> AsyncIterator[str]:
    for word in ("a", "b"):
        yield word


async def run(request: Request) -> JSONResponse:
    """Complete a run, open another one, and return its stream. Occupies the process, so that others get requests."""
    await realtime.pipe(words(), task="words").wait_until_complete()
    left_open = await realtime.open_run("open").__aenter__()
    time.sleep(0.02)  # noqa: ASYNC251
    token = realtime.create_public_token(scopes={"read": {"runs": [left_open.id]}})
    return JSONResponse({"pid": os.getpid(), "path": f"/realtime/v1/streams/{left_open.id}/default", "token": token})


app = Starlette(routes=[Route("/run", run, methods=["POST"]), Mount("/realtime", realtime)], lifespan=realtime.lifespan)
