"""What every host of the matrix does with the library, however it defines routes and its lifespan.

The variable ENTRY selects how the library is embedded: `mount` or `middleware`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio

from asgi_realtime import Realtime, RealtimeMiddleware, Timeouts, hypercorn

SECRET = "a key for tests, 32 bytes or more"
realtime = Realtime(
    secret_key=SECRET,
    timeouts=Timeouts(
        tick=0.05,
        drain=float(os.environ.get("DRAIN", "0.05")),
        heartbeat=float(os.environ.get("HEARTBEAT", "15")),
    ),
)
hypercorn.watch(realtime)

# No server shows the INFO log of the library, which reports a start on first use.
logger = logging.getLogger("asgi_realtime")
logger.setLevel(logging.INFO)
logger.addHandler(logging.StreamHandler(sys.stdout))
logger.propagate = False

MIDDLEWARE = os.environ.get("ENTRY") == "middleware"
COMPRESSES = "COMPRESS" in os.environ


async def act(body: dict[str, Any]) -> dict[str, Any]:
    """The one route of each host, `POST /do`."""
    match body:
        case {"do": "open"}:
            handle = realtime.pipe(silence(), "silence").handle  # it ends with its source
            return {"id": handle.id, "token": handle.public_access_token}
        case {"do": "answer"}:
            handle = realtime.pipe(answer()).handle
            return {"id": handle.id, "token": handle.public_access_token}
        case {"do": "append", "run": str(run_id), "chunk": chunk}:
            await realtime.append(chunk, body.get("stream", "default"), run=run_id)
            return {}
        case {"do": "count"}:
            return {"subscribers": len(realtime.subscribers)}
    raise ValueError(body)


@realtime.task("waits")
async def waits() -> None:
    await anyio.sleep_forever()


async def silence() -> AsyncIterator[str]:
    await anyio.sleep_forever()
    yield ""


async def answer() -> AsyncIterator[int]:
    """Takes 1.5 s."""
    for number in range(15):
        yield number
        await anyio.sleep(0.1)


async def presence() -> None:
    """Logs the start and the stop of the library."""
    report("the guest started")
    try:
        await anyio.sleep_forever()
    finally:
        report("the guest stopped")


realtime.engine.companions.append(presence)


async def host_starts() -> None:
    """The start-up of the host: the library has already started."""
    await realtime.pipe(["started"]).wait_until_complete()
    report("the host started")


async def host_stops() -> None:
    """The shutdown of the host: the library still runs."""
    assert realtime.engine.supervisor is not None, "the guest left before its host"
    await realtime.pipe(["stopped"]).wait_until_complete()
    report("the host stopped")


def report(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def wrapped(app: Any) -> Any:
    """The app of a host without mounts, or one to be wrapped."""
    return RealtimeMiddleware(app, realtime)
