"""`open_run`: a run around the host's own code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType

from asgi_realtime.core.errors import RealtimeError
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.engine.execution import Execution
from asgi_realtime.engine.run import Run, enter
from asgi_realtime.loop.interrupts import Interrupt, make_interrupt
from asgi_realtime.loop.logger import logger


class OpenRun:
    """An async context manager that yields a `Run`. Created by `Realtime.open_run`.

    Leaving it completes the run with what `run.set_output` received. An exception fails the run, a cancellation by the
    host cancels it, and both propagate. `cancel(run)` cancels the body, and the `async with` raises `RunCanceled`. When
    the `Realtime` stops it cancels the body too; the `async with` raises `ServerShutdown` and the run is FAILED.
    """

    def __init__(self, start: Callable[[], Awaitable[Execution]], on_ended: Callable[[Execution], None]) -> None:
        self._start = start
        self._on_ended = on_ended
        self._execution: Execution | None = None
        self._interrupt: Interrupt | None = None
        self._leave: Callable[[], None] | None = None

    async def __aenter__(self) -> Run:
        if self._execution is not None:
            raise RuntimeError("this run was opened before; call open_run() again for another one")
        execution = self._execution = await self._start()
        self._leave = enter(execution.run)
        interrupt = self._interrupt = make_interrupt()
        interrupt.__enter__()
        execution.interrupt = interrupt.interrupt
        execution.reachable = lambda: interrupt.reachable
        return execution.run

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        execution, interrupt, leave = self._execution, self._interrupt, self._leave
        assert execution is not None and interrupt is not None and leave is not None
        execution.interrupt = None
        rest: BaseException | None = None
        try:
            interrupt.__exit__(exc_type, exc, tb)
        except BaseException as left:  # trio: the body's exception group without the cancellation it contained
            exc = rest = left
        interrupted = interrupt.interrupted and rest is None
        try:
            leave()
        except ValueError:
            pass  # left in another task than it was entered in: this context never had the run
        try:
            await self._end(execution, exc, interrupted=interrupted)
        except RealtimeError as failure:
            if not isinstance(exc, Exception):
                raise
            logger.error("the end of run %s could not be stored: %s", execution.run.id, failure)  # `exc` propagates
        finally:
            self._on_ended(execution)
        if rest is not None:
            raise rest
        if execution.stopped_by is not None and (exc is None or interrupted):
            raise execution.stopped_by from None

    async def _end(self, execution: Execution, exc: BaseException | None, *, interrupted: bool) -> StoredRecord:
        if isinstance(exc, Exception) and not interrupted:
            return await execution.finish_failed(exc)
        if exc is not None or interrupted:
            return await execution.finish_stopped()
        try:
            return await execution.finish_returned()
        except BaseException:  # cancelled while waiting for a pipe
            await execution.finish_stopped()
            raise
