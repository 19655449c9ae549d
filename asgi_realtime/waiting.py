"""Waiting, once for each loop library: asyncio futures, trio's own events.

A `Parker` is one waiter's seat: whoever has something for it calls `wake`. A `Parking` is a place where many wait for
the same thing. Between the check that finds nothing and `arm()` there must be no `await`; then no wake is lost.
A `Guard` runs a body beside a watcher of the connection and cancels the body from outside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Protocol

import anyio
import anyio.abc


class Parker(Protocol):
    """One waiter. It may be woken by anyone on its loop, any number of times."""

    def arm(self) -> Awaitable[None]:
        """Return what to await until the next `wake`."""

    def wake(self) -> None:
        """End the present wait, if there is one."""


class _AsyncioParker:
    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] | None = None

    def arm(self) -> Awaitable[None]:
        future = self._future = self._loop.create_future()
        return future

    def wake(self) -> None:
        future = self._future
        if future is not None and not future.done():
            future.set_result(None)


class _TrioParker:
    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: anyio.Event | None = None

    def arm(self) -> Awaitable[None]:
        event = self._event = anyio.Event()
        return event.wait()

    def wake(self) -> None:
        if self._event is not None:
            self._event.set()


def on_asyncio() -> bool:
    """Whether the running loop is asyncio's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def make_parker() -> Parker:
    """A parker for the running loop."""
    return _AsyncioParker() if on_asyncio() else _TrioParker()


class Parking:
    """Those who wait for one thing. `wake` wakes all and empties the place."""

    __slots__ = ("_parked",)

    def __init__(self) -> None:
        self._parked: set[Parker] = set()

    def __len__(self) -> int:
        return len(self._parked)

    def add(self, parker: Parker) -> None:
        self._parked.add(parker)

    def discard(self, parker: Parker) -> None:
        self._parked.discard(parker)

    def wake(self) -> None:
        if self._parked:
            parked, self._parked = self._parked, set()
            for parker in parked:
                parker.wake()

    async def wait(self) -> None:
        """Wait for one `wake`, without a parker of one's own."""
        parker = make_parker()
        self.add(parker)
        try:
            await parker.arm()
        finally:
            self.discard(parker)


class Guard(Protocol):
    """An async context manager that runs a watcher beside its body.

    The body is cancelled when the watcher returns or somebody calls `cancel`; that cancellation ends at the border of
    the `async with`. Any other passes through. The watcher is ended with the body. It must not raise.
    """

    def cancel(self) -> None: ...

    async def __aenter__(self) -> Guard: ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None: ...


Watcher = Callable[[], Coroutine[Any, Any, None]]


class _AsyncioGuard:
    """A task and no scope: this stands beside every subscriber, so its bytes count."""

    __slots__ = ("_cancelled", "_owner", "_task", "_watcher")

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._cancelled = False

    async def __aenter__(self) -> Guard:
        owner = asyncio.current_task()
        assert owner is not None
        self._owner = owner
        self._task = asyncio.get_running_loop().create_task(self._watch())
        return self

    async def _watch(self) -> None:
        await self._watcher()
        self.cancel()

    def cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            self._owner.cancel()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        ours, self._cancelled = self._cancelled, True
        self._task.cancel()
        if not ours:
            return None
        others = self._owner.uncancel()
        return exc_type is asyncio.CancelledError and others == 0


class _AnyioGuard:
    __slots__ = ("_group", "_watcher")

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._group = anyio.create_task_group()

    async def __aenter__(self) -> Guard:
        await self._group.__aenter__()
        self._group.start_soon(self._watch)
        return self

    async def _watch(self) -> None:
        await self._watcher()
        self.cancel()

    def cancel(self) -> None:
        self._group.cancel_scope.cancel()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        self._group.cancel_scope.cancel()
        return await self._group.__aexit__(exc_type, exc, tb)


def make_guard(watcher: Watcher) -> Guard:
    """A guard for the running loop."""
    return _AsyncioGuard(watcher) if on_asyncio() else _AnyioGuard(watcher)
