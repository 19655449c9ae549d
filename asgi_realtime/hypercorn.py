"""Detecting a shutdown under hypercorn's command line, where no signal reaches the app.

`hypercorn app:app` runs the app in a child process, even with one worker. It asks the child to stop by an event of
`multiprocessing` that only hypercorn's own server checks; open streams then have three seconds and are cut. So this
module checks the event too. (`hypercorn --workers 0` and `hypercorn.asyncio.serve` run the app in the process that gets
the signals, and need none of this.)

The event is among the arguments of the child process, in an attribute that Python does not document. If it is not found
there, nothing happens, and streams are cut as they would be without this module.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import anyio

from asgi_realtime.loop.logger import logger

if TYPE_CHECKING:
    from asgi_realtime.realtime import Realtime


PERIOD_S = 0.1
"""How often the event is checked, which takes a microsecond. Waiting for it would need a thread, and if a child is
killed while a thread waits, hypercorn's main process waits for that child forever."""


def watch(realtime: Realtime) -> bool:
    """End the subscriptions of a `Realtime` as soon as hypercorn asks this process to stop.

    Call it once in the module of the app, before the start. It has an effect only in a child process of hypercorn's
    command line. Returns whether this is such a process.
    """
    is_set = _shutdown_event()
    if is_set is None:
        return False

    async def wait_for_shutdown() -> None:
        while not is_set():  # noqa: ASYNC110 - an event of another process
            await anyio.sleep(PERIOD_S)
        realtime.engine.shutdown.announce(quick="--reload" in sys.argv)

    realtime.engine.companions.append(wait_for_shutdown)
    return True


def _shutdown_event() -> Callable[[], bool] | None:
    process: Any = multiprocessing.current_process()
    if not str(getattr(getattr(process, "_target", None), "__module__", "")).startswith("hypercorn."):
        return None
    event: Any = getattr(process, "_kwargs", {}).get("shutdown_event")
    if not callable(getattr(event, "is_set", None)):
        logger.warning("hypercorn's shutdown event was not found; at a shutdown hypercorn will cut open streams")
        return None
    return cast("Callable[[], bool]", event.is_set)
