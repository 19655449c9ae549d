"""Threads for `def` tasks. They are daemons, so a thread that blocks does not delay the exit of its process.

(anyio's worker threads on asyncio are not daemons, so Python waits for them before it exits.)
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.loop.waiting import WaitList


def without_loop(context: contextvars.Context) -> contextvars.Context:
    """The context without sniffio's variable for the running loop, so that the thread can run a loop itself."""
    for variable in context:
        if variable.name == "current_async_library_cvar":
            context.run(variable.set, None)
    return context


class TaskThreads:
    """Up to `limit` threads; further calls wait. Belongs to one start of a `Realtime`."""

    def __init__(self, limit: int, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self._limit = limit
        self._used = 0
        self._ended = WaitList()

    async def run(self, function: Callable[[], Any]) -> Any:
        """Call a function in a thread, in a copy of the caller's context.

        Cancelling the caller abandons the thread, which counts toward the limit until it ends.
        """
        while self._used >= self._limit:
            await self._ended.wait()
        call: Future[Any] = Future()
        context = without_loop(contextvars.copy_context())
        thread = threading.Thread(
            target=context.run, args=(self._work, function, call), name="asgi_realtime task", daemon=True
        )
        thread.start()
        self._used += 1
        while not call.done():
            await self._ended.wait()
        return call.result()

    def _work(self, function: Callable[[], Any], call: Future[Any]) -> None:
        """Runs in the thread."""
        try:
            call.set_result(function())
        except BaseException as exc:
            call.set_exception(exc)
        try:
            self.supervisor.post(self._end)
        except RuntimeError:
            pass  # the loop is closed, so no task waits for the call

    def _end(self) -> None:
        self._used -= 1
        self._ended.wake()
