"""Waiting, once for each loop library: asyncio futures, trio's own events.

A `Waiter` is one waiter's seat: whoever has something for it calls `wake`. A `WaitList` is a place where many wait for
the same thing. Between the check that finds nothing and `arm()` there must be no `await`; then no wake is lost.
A `Guard` runs a body beside a watcher of the connection and cancels the body from outside.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Protocol

import anyio
import anyio.abc

logger = logging.getLogger("asgi_realtime")


class Waiter(Protocol):
    """One waiter. It may be woken by anyone on its loop, any number of times."""

    def arm(self) -> Awaitable[None]:
        """Return what to await until the next `wake`."""

    def wake(self) -> None:
        """End the present wait, if there is one. Never raises: one waiter must not keep others from being woken."""


class _AsyncioWaiter:
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
            try:
                future.set_result(None)
            except RuntimeError:  # the loop was closed while this one waited, and nobody hears of it
                if not self._loop.is_closed():
                    raise


class _EventWait:
    """Waits for an event when it is awaited, and is nothing until then: what is armed need not be awaited."""

    __slots__ = ("_event",)

    def __init__(self, event: anyio.Event) -> None:
        self._event = event

    def __await__(self) -> Generator[Any, Any, None]:
        return self._event.wait().__await__()


class _TrioWaiter:
    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: anyio.Event | None = None

    def arm(self) -> Awaitable[None]:
        event = self._event = anyio.Event()
        return _EventWait(event)

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


def make_waiter() -> Waiter:
    """A waiter for the running loop."""
    return _AsyncioWaiter() if on_asyncio() else _TrioWaiter()


class WaitList:
    """Those who wait for one thing. `wake` wakes all and empties the place."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: dict[Waiter, None] = {}  # in the order of coming

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, waiter: Waiter) -> None:
        self._waiters[waiter] = None

    def discard(self, waiter: Waiter) -> None:
        self._waiters.pop(waiter, None)

    def wake(self) -> None:
        if self._waiters:
            parked, self._waiters = self._waiters, {}
            for waiter in parked:
                waiter.wake()

    async def wait(self) -> None:
        """Wait for one `wake`, without a waiter of one's own."""
        waiter = make_waiter()
        self.add(waiter)
        try:
            await waiter.arm()
        finally:
            self.discard(waiter)


class WakeSoon:
    """Wakes places at the next turn of the loop, each once, however often it was asked to meanwhile.

    What is appended in one turn then reaches a waiter in one piece. On a loop with little to do a turn is over at once;
    on a busy one this is what gathers chunks, without a timer. On trio, which has no cheap way to call something at the
    next turn, places are woken at once.
    """

    __slots__ = ("_loop", "_places")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._places: dict[WaitList, None] = {}

    def wake(self, place: WaitList) -> None:
        """Wake the place soon. Who parks meanwhile may be woken for nothing."""
        if not place:
            return
        if not on_asyncio():
            place.wake()
            return
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # the other one was closed before its next turn
            self._loop = loop
            self._places.clear()
        if not self._places:
            loop.call_soon(self._flush)
        self._places[place] = None

    def _flush(self) -> None:
        places, self._places = self._places, {}
        for place in places:
            place.wake()


class Interrupt(Protocol):
    """A context manager whose body can be cancelled from outside, by `interrupt`.

    That cancellation ends at the border of the `with`, where `interrupted` is true; any other passes through. On
    asyncio the body may be left in another task than it was entered in; the one that entered is interrupted.
    """

    interrupted: bool
    """The body was ended by `interrupt` and by nothing else."""

    @property
    def reachable(self) -> bool:
        """Whether the task that entered is still there to be interrupted."""
        ...

    def interrupt(self) -> None: ...

    def __enter__(self) -> Interrupt: ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool: ...


class _AsyncioInterrupt:
    """A task and no scope: one stands beside every subscriber, so its bytes count."""

    __slots__ = ("_called", "_delivered", "_earlier", "_left", "_owner", "interrupted")

    def __init__(self) -> None:
        owner = asyncio.current_task()
        assert owner is not None
        self._owner = owner
        self._earlier = owner.cancelling()  # a shielded body may run in a task that is being cancelled
        self._called = self._delivered = self._left = False
        self.interrupted = False

    def __enter__(self) -> Interrupt:
        return self

    @property
    def reachable(self) -> bool:
        return not self._owner.done()

    def interrupt(self) -> None:
        if self._called:
            return
        self._called = True
        if asyncio.current_task() is self._owner:
            # Before Python 3.13 `uncancel` cannot take back what the task has asked of itself and not met yet.
            asyncio.get_running_loop().call_soon(self._deliver)
        else:
            self._deliver()

    def _deliver(self) -> None:
        if not self._left:
            self._delivered = True
            self._owner.cancel()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
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

    def __enter__(self) -> Interrupt:
        self._scope.__enter__()
        return self

    @property
    def reachable(self) -> bool:
        return True  # a scope does not outlive its task

    def interrupt(self) -> None:
        self._scope.cancel()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        swallowed = bool(self._scope.__exit__(exc_type, exc, tb))
        self.interrupted = self._scope.cancelled_caught
        return swallowed


def make_interrupt() -> Interrupt:
    """An interrupt for the running loop and task."""
    return _AsyncioInterrupt() if on_asyncio() else _AnyioInterrupt()


class Guard(Protocol):
    """An async context manager that runs a watcher beside its body.

    The body is cancelled when the watcher ends or somebody calls `cancel`; that cancellation ends at the border of the
    `async with`. Any other passes through. The watcher is ended with the body. An error ends it as returning does: a
    connection that cannot be watched is gone.
    """

    def cancel(self) -> None: ...

    async def __aenter__(self) -> Guard: ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None: ...


Watcher = Callable[[], Coroutine[Any, Any, None]]


async def _watch(watcher: Watcher, then: Callable[[], None]) -> None:
    try:
        await watcher()
    except Exception:
        logger.debug("the connection cannot be watched any more", exc_info=True)
    finally:
        then()


class _AsyncioGuard(_AsyncioInterrupt):
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
                return None  # the body's own error, as it was raised
            raise


def make_guard(watcher: Watcher) -> Guard:
    """A guard for the running loop, made in the task that will be guarded."""
    return _AsyncioGuard(watcher) if on_asyncio() else _AnyioGuard(watcher)
