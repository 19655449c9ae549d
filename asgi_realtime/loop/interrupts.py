"""Cancelling a block of code from outside, and only that block.

An `Interrupt` does so when called; a `Guard` also when a watcher ends, such as one that waits for a disconnect.

`anyio.CancelScope` does this, but on asyncio each scope holds several sets and callbacks. One interrupt exists for
each open subscription, so on asyncio it is an object of six slots that calls `Task.cancel` and `Task.uncancel`.

The difficulty on asyncio is that a task knows only how many cancellations were requested, not by what. An interrupt
counts the requests that were pending when the body began (a shielded body can run in a task that is being cancelled),
adds its own at most once, takes it back at the end, and swallows the `CancelledError` only if no other is pending.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Self

import anyio

from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.waiting import asyncio_loop

Watcher = Callable[..., Coroutine[Any, Any, None]]


class _AsyncioInterrupt:
    __slots__ = ("_called", "_delivered", "_earlier", "_left", "_owner", "interrupted")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        owner = asyncio.current_task(loop)
        assert owner is not None
        self._owner = owner
        self._earlier = owner.cancelling()
        self._called = self._delivered = self._left = False
        self.interrupted = False

    def __enter__(self) -> Self:
        return self

    @property
    def reachable(self) -> bool:
        """Whether the task that entered the body still exists, so that `interrupt` has an effect."""
        return not self._owner.done()

    def interrupt(self) -> None:
        if self._called:
            return
        self._called = True
        if asyncio.current_task(self._owner.get_loop()) is self._owner:
            # Before Python 3.13, `uncancel` cannot take back a request that the task has not received yet. The task
            # itself can leave the body before that; so the request waits until the task is suspended or has left.
            asyncio.get_running_loop().call_soon(self._deliver)
        else:
            self._deliver()

    def _deliver(self) -> None:
        if not self._left:
            self._delivered = True
            self._owner.cancel()

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> bool:
        self._called = self._left = True
        if not self._delivered:
            return False
        others = self._owner.uncancel() > self._earlier
        self.interrupted = exc_type is asyncio.CancelledError and not others
        return self.interrupted


class _AnyioInterrupt:
    __slots__ = ("_scope", "interrupted")

    def __init__(self) -> None:
        self._scope = anyio.CancelScope()
        self.interrupted = False

    def __enter__(self) -> Self:
        self._scope.__enter__()
        return self

    @property
    def reachable(self) -> bool:
        return True  # a scope is left before its task ends

    def interrupt(self) -> None:
        self._scope.cancel()

    def __exit__(self, *exc_info: Any) -> bool:
        swallowed = bool(self._scope.__exit__(*exc_info))
        self.interrupted = self._scope.cancelled_caught
        return swallowed


Interrupt = _AsyncioInterrupt | _AnyioInterrupt
"""A context manager; `interrupt` cancels its body, and nothing beyond it.

The `with` swallows that cancellation and sets `interrupted`; any other passes through. On asyncio a task other than the
one that entered can leave the body; `interrupt` cancels the one that entered.
"""


def make_interrupt() -> Interrupt:
    """An interrupt of the current task."""
    loop = asyncio_loop()
    return _AnyioInterrupt() if loop is None else _AsyncioInterrupt(loop)


class _AsyncioGuard(_AsyncioInterrupt):
    __slots__ = ("_task",)

    def __init__(self, loop: asyncio.AbstractEventLoop, watcher: Watcher, *args: Any) -> None:
        super().__init__(loop)
        # A callback of the task instead of a coroutine around the watcher, which would take 200 bytes while it waits.
        self._task = loop.create_task(watcher(*args), name="asgi_realtime watcher")
        self._task.add_done_callback(self._watched)

    def _watched(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            _log_failure(failure)
        self.interrupt()

    def cancel(self) -> None:
        self.interrupt()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: Any) -> bool:
        self._task.cancel()
        return self.__exit__(*exc_info)


class _AnyioGuard:
    __slots__ = ("_args", "_group", "_watcher")

    def __init__(self, watcher: Watcher, *args: Any) -> None:
        self._watcher = watcher
        self._args = args
        self._group = anyio.create_task_group()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._group.start_soon(self._watch)
        return self

    async def _watch(self) -> None:
        try:
            await self._watcher(*self._args)
        except Exception as exc:
            _log_failure(exc)
        finally:
            self.cancel()

    def cancel(self) -> None:
        self._group.cancel_scope.cancel()

    async def __aexit__(self, *exc_info: Any) -> bool | None:
        self._group.cancel_scope.cancel()
        try:
            return await self._group.__aexit__(*exc_info)
        except BaseExceptionGroup as group:
            if group.exceptions == exc_info[1:2]:
                return None  # the body's own error is raised without the group
            raise


def _log_failure(failure: BaseException) -> None:
    logger.debug("the connection cannot be watched anymore", exc_info=failure)


Guard = _AsyncioGuard | _AnyioGuard
"""An async context manager that runs a watcher concurrently with its body. Enter it as soon as it is made.

The end of the watcher cancels the body, and so does `cancel`; the `async with` swallows that cancellation, and any
other passes through. The end of the body cancels the watcher. A watcher that fails ends like one that returns, because
a connection that cannot be watched is lost.
"""


def make_guard(watcher: Watcher, *args: Any) -> Guard:
    """A guard of the current task. The watcher is called with the arguments."""
    loop = asyncio_loop()
    return _AnyioGuard(watcher, *args) if loop is None else _AsyncioGuard(loop, watcher, *args)
