"""Running a block of code beside a watcher, such as one that waits until the client disconnects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Protocol

import anyio
import anyio.abc

from asgi_realtime.loop.interrupts import AsyncioInterrupt
from asgi_realtime.loop.waiting import on_asyncio

logger = logging.getLogger("asgi_realtime")

Watcher = Callable[[], Coroutine[Any, Any, None]]


class Guard(Protocol):
    """An async context manager that runs a watcher concurrently with its body.

    The end of the watcher cancels the body, and so does `cancel`; the `async with` swallows that cancellation, and any
    other passes through. The end of the body cancels the watcher. A watcher that fails ends like one that returns,
    because a connection that cannot be watched is lost.
    """

    def cancel(self) -> None: ...

    async def __aenter__(self) -> Guard: ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None: ...


async def _watch(watcher: Watcher, then: Callable[[], None]) -> None:
    try:
        await watcher()
    except Exception:
        logger.debug("the connection cannot be watched anymore", exc_info=True)
    finally:
        then()


class _AsyncioGuard(AsyncioInterrupt):
    __slots__ = ("_task", "_watcher")

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self._watcher = watcher

    async def __aenter__(self) -> Guard:
        self._task = asyncio.get_running_loop().create_task(_watch(self._watcher, self.interrupt))
        return self

    def cancel(self) -> None:
        self.interrupt()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        self._task.cancel()
        return self.__exit__(exc_type, exc, tb)


class _AnyioGuard:
    __slots__ = ("_group", "_watcher")

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._group = anyio.create_task_group()

    async def __aenter__(self) -> Guard:
        await self._group.__aenter__()
        self._group.start_soon(_watch, self._watcher, self.cancel)
        return self

    def cancel(self) -> None:
        self._group.cancel_scope.cancel()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        self._group.cancel_scope.cancel()
        try:
            return await self._group.__aexit__(exc_type, exc, tb)
        except BaseExceptionGroup as group:
            if exc is not None and group.exceptions == (exc,):
                return None  # the body's own error is raised without the group
            raise


def make_guard(watcher: Watcher) -> Guard:
    """A guard of the current task."""
    return _AsyncioGuard(watcher) if on_asyncio() else _AnyioGuard(watcher)
