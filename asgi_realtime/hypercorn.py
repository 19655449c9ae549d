"""Hearing of a shutdown under hypercorn's command line, where no signal reaches the app.

`hypercorn app:app` runs the app in a child process, also with one worker, and tells it to stop by an event of
`multiprocessing` that only its own server looks at: after that, open streams have three seconds and are cut. So the
child looks at that event too. (`hypercorn --workers 0` and `hypercorn.asyncio.serve` run the app in the process that
gets the signals, and need none of this.)

The event is found among the arguments of the child process, which is an attribute that Python does not promise. Where
it is not found nothing happens, and streams are cut as without this.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import anyio

if TYPE_CHECKING:
    from asgi_realtime.realtime import Realtime

logger = logging.getLogger("asgi_realtime")

PERIOD_S = 0.1
"""How often the event is looked at, which takes a microsecond. Waiting for it would need a thread, and a child that is
killed while one waits would leave hypercorn's main process waiting for it."""


def watch(realtime: Realtime) -> bool:
    """End the subscriptions of a `Realtime` as soon as hypercorn tells this process to stop.

    One line in the module of the app; call it before the start. Does nothing in any process but a child of hypercorn's
    command line. Returns whether this is one.
    """
    is_set = _shutdown_event()
    if is_set is None:
        return False

    async def look() -> None:
        while not is_set():  # noqa: ASYNC110 - of another process
            await anyio.sleep(PERIOD_S)
        realtime.engine.subscribers.announce_shutdown()

    realtime.engine.companions.append(look)
    return True


def _shutdown_event() -> Callable[[], bool] | None:
    process: Any = multiprocessing.current_process()
    if not str(getattr(getattr(process, "_target", None), "__module__", "")).startswith("hypercorn."):
        return None
    event: Any = getattr(process, "_kwargs", {}).get("shutdown_event")
    if not callable(getattr(event, "is_set", None)):
        logger.warning("hypercorn's shutdown event is not where it was: at a shutdown it will cut open streams")
        return None
    return cast("Callable[[], bool]", event.is_set)
