"""Threads for `def` tasks. They are daemons, so a thread that blocks does not delay the exit of its process.

(anyio's worker threads on asyncio are not daemons, so Python waits for them before it exits.)
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any

from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.loop.waiting import WaitList


def without_loop(context: contextvars.Context) -> contextvars.Context:
    """The context without sniffio's variable for the running loop, so that the thread can run a loop itself."""
    for variable in context:
        if variable.name == "current_async_library_cvar":
            context.run(variable.set, None)
    return context


class _Call:
    """One call in a thread, as the loop sees it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.output: Any = None
        self.error: BaseException | None = None
        self.over = False
        self.ended = WaitList()


class TaskThreads:
    """Up to `limit` threads; further calls wait. Belongs to one start of a `Realtime`."""

    def __init__(self, limit: int, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self._limit = limit
        self._used = 0
        self._freed = WaitList()

    async def run(self, function: Callable[[], Any]) -> Any:
        """Call a function in a thread, in a copy of the caller's context.

        Cancelling the caller abandons the thread, which counts toward the limit until it ends.
        """
        while self._used >= self._limit:
            await self._freed.wait()
        call = _Call(function)
        context = without_loop(contextvars.copy_context())
        thread = threading.Thread(target=context.run, args=(self._work, call), name="asgi_realtime task", daemon=True)
        thread.start()
        self._used += 1
        while not call.over:
            await call.ended.wait()
        if call.error is not None:
            raise call.error
        return call.output

    def _work(self, call: _Call) -> None:
        """Runs in the thread."""
        try:
            call.output = call.function()
        except BaseException as exc:
            call.error = exc
        try:
            self.supervisor.post(lambda: self._end(call))
        except RuntimeError:
            pass  # the loop is closed, so no task waits for the call

    def _end(self, call: _Call) -> None:
        self._used -= 1
        call.over = True
        call.ended.wake()
        self._freed.wake()
