"""`open_run`: a run around the host's own code."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType

from asgi_realtime.core.errors import RealtimeError
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.engine.execution import Execution
from asgi_realtime.engine.run import Run, current
from asgi_realtime.loop.waiting import Interrupt, make_interrupt

logger = logging.getLogger("asgi_realtime")

Begin = Callable[[], Awaitable[Execution]]


class OpenRun:
    """An async context manager that gives the `Run`. Made by `Realtime.open_run`.

    Leaving completes the run with what `run.set_output` was given. An exception fails it and goes on; cancellation by
    the host cancels it and goes on. `cancel(run)` cancels the body, and the `async with` raises `RunCanceled`; the stop
    of the `Realtime` does the same with `ServerShutdown`, and the run is FAILED.
    """

    def __init__(self, begin: Begin, ended: Callable[[Execution], None]) -> None:
        self._begin = begin
        self._on_ended = ended
        self._execution: Execution | None = None
        self._interrupt: Interrupt | None = None
        self._token: contextvars.Token[Run] | None = None

    async def __aenter__(self) -> Run:
        if self._execution is not None:
            raise RuntimeError("this run has been opened before; call open_run() again for another one")
        execution = self._execution = await self._begin()
        self._token = current.set(execution.run)
        interrupt = self._interrupt = make_interrupt()
        interrupt.__enter__()
        execution.interrupt = interrupt.interrupt
        execution.reachable = lambda: interrupt.reachable
        return execution.run

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        execution, interrupt, token = self._execution, self._interrupt, self._token
        assert execution is not None and interrupt is not None and token is not None
        execution.interrupt = None
        rest: BaseException | None = None
        try:
            interrupt.__exit__(exc_type, exc, tb)
        except BaseException as left:  # on trio: a group of exceptions, less the cancellation that was in it
            exc = rest = left
        interrupted = interrupt.interrupted and rest is None
        try:
            current.reset(token)
        except ValueError:
            pass  # left in another task than entered: that one has its own context, nothing is to be undone here
        try:
            await self._end(execution, exc, interrupted=interrupted)
        except RealtimeError as failure:
            if not isinstance(exc, Exception):
                raise
            logger.error("the end of run %s could not be stored: %s", execution.run.id, failure)  # `exc` goes on
        finally:
            self._on_ended(execution)
        if rest is not None:
            raise rest
        if execution.stopped_by is not None and (exc is None or interrupted):
            raise execution.stopped_by from None

    async def _end(self, execution: Execution, exc: BaseException | None, *, interrupted: bool) -> RunRecord:
        if interrupted:
            return await execution.finish_stopped()
        if isinstance(exc, Exception):
            return await execution.finish_failed(exc)
        if exc is not None:
            return await execution.finish_stopped()
        try:
            return await execution.finish_returned()
        except BaseException:  # cancelled while waiting for a pipe
            await execution.finish_stopped()
            raise
