"""The server of the soak: a `Realtime` with one task, and a route that shows what the process holds."""

from __future__ import annotations

import asyncio
import gc
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from asgi_realtime import Realtime, Retention, Run

SECRET = os.environ.get("SOAK_SECRET", "a secret of the soak, 32 bytes or more")
KEEP_S = 8.0
"""How long a run is retained after its end: long enough for readers that pause, and short, for memory to settle."""

realtime = Realtime(
    secret_key=SECRET, broker=os.environ.get("SOAK_BROKER", "memory://"), retention=Retention(after_end=KEEP_S)
)


@realtime.task("produce")
async def produce(payload: dict[str, Any], run: Run) -> int:
    """Wait for the input `go`, then publish `count` numbered chunks of `size` characters."""
    await run.input("go").get(timeout="1m")
    padding = "x" * payload["size"]

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        for number in range(payload["count"]):
            yield {"number": number, "padding": padding}
            await asyncio.sleep(payload["pause_s"])

    await realtime.pipe(chunks()).wait_until_complete()
    return int(payload["count"])


def memory_kib() -> int:
    resident = re.search(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(resident[1]) if resident else 0


async def inside(request: Request) -> JSONResponse:
    """What the process holds now."""
    gc.collect()
    return JSONResponse(
        {
            "tasks": len(asyncio.all_tasks()),
            "subscribers": len(realtime.subscribers),
            "files": len(os.listdir("/proc/self/fd")),
            "memory_mib": round(memory_kib() / 1024),
        }
    )


app = Starlette(routes=[Route("/inside", inside), Mount("/realtime", realtime)], lifespan=realtime.lifespan)
