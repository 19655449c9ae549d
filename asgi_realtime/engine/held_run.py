"""A run that a thread holds open while a job on the event loop runs its context manager."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import anyio

from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.engine.run import Run
from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.loop.waiting import WaitList


class HeldRun:
    """An open run whose body is in a thread. `enter` and `leave` are coroutine functions for `ThreadCall`.

    One job on the loop enters and leaves the context manager, because a cancel scope must be left in the task that
    entered it, and each `ThreadCall` is another task.
    """

    def __init__(self, supervisor: Supervisor, opened: AbstractAsyncContextManager[Run]) -> None:
        self._supervisor = supervisor
        self._opened = opened
        self._run: Run | None = None
        self._error: BaseException | None = None
        self._scope: anyio.CancelScope | None = None
        self._is_abandoned = False
        self._is_left = False
        self._is_over = False
        self._changed = WaitList()

    async def enter(self) -> Run:
        """Open the run. Raises what `open_run` raises."""
        self._supervisor.spawn(self._hold)
        while self._run is None and not self._is_over:
            await self._changed.wait()
        if self._run is None:
            raise self._error or ServerShutdown()  # the job was cancelled before the run was open
        return self._run

    async def leave(self, error: BaseException | None) -> BaseException | None:
        """Leave the run with the exception of its body, if any, and return the exception that the run ended with."""
        self._is_left = True
        if self._is_over:  # the run was canceled, or the server was shut down
            return self._error
        if isinstance(error, Exception):
            self._error = error
        elif error is not None:
            self.abandon()
        self._changed.wake()
        while not self._is_over:
            await self._changed.wait()
        return self._error

    def abandon(self) -> None:
        """Cancel the run: the thread was interrupted. While it opens the run, this is the only way to leave it."""
        self._is_abandoned = True
        if self._scope is not None:
            self._scope.cancel()

    async def _hold(self) -> None:
        try:
            with anyio.CancelScope() as self._scope:
                if self._is_abandoned:
                    self._scope.cancel()
                async with self._opened as run:
                    self._run = run
                    self._changed.wake()
                    while not self._is_left:
                        await self._changed.wait()
                    if self._error is not None:
                        raise self._error
        except Exception as exc:
            self._error = exc
        finally:
            self._is_over = True
            self._changed.wake()
