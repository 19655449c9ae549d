"""Waiting for a condition: with asyncio futures on asyncio, with events on trio.

A condition is some state that a reader checks, such as "the log has a chunk after my cursor". Code that changes the
state wakes a `WaitList`, which wakes every `Waiter` in it; the readers check again. A wake-up carries no value and can
be spurious.

The rule that prevents lost wake-ups: no `await` between the check that fails and the `arm()` and `add()` of the waiter,
or else these come before the check:

    while True:
        woken = waiter.arm()
        waiting.add(waiter)
        if condition():
            break
        await woken

All of this belongs to one event loop and its thread. From another thread, post the wake-up (`Supervisor.post`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Generator
from typing import Any

import anyio
import anyio.abc

logger = logging.getLogger("asgi_realtime")


class _AsyncioWaiter:
    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] | None = None

    def arm(self) -> Awaitable[None]:
        """Return an awaitable of the next `wake`. It need not be awaited."""
        future = self._future = self._loop.create_future()
        return future

    def wake(self) -> None:
        """End the current wait, if any. Never raises, so that the other waiters of a list are woken too."""
        future = self._future
        if future is not None and not future.done():
            try:
                future.set_result(None)
            except RuntimeError:  # the loop was closed while this waited, so no task is left to wake
                if not self._loop.is_closed():
                    raise


class _EventWait:
    """Creates the coroutine that waits only when awaited: one that is never awaited causes a warning."""

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


Waiter = _AsyncioWaiter | _TrioWaiter
"""One task that waits, reusable. Any number of wake-ups, from any code on its loop, are allowed."""


def on_asyncio() -> bool:
    """Whether the calling code runs on an asyncio loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def make_waiter() -> Waiter:
    """A waiter for the running loop."""
    return _AsyncioWaiter() if on_asyncio() else _TrioWaiter()


class WaitList:
    """The waiters of one condition, in the order of arrival. `wake` wakes and removes all of them."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: dict[Waiter, None] = {}

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, waiter: Waiter) -> None:
        self._waiters[waiter] = None

    def discard(self, waiter: Waiter) -> None:
        self._waiters.pop(waiter, None)

    def wake(self) -> None:
        if self._waiters:
            woken, self._waiters = self._waiters, {}
            for waiter in woken:
                waiter.wake()

    async def wait(self) -> None:
        """Wait for the next `wake`."""
        waiter = make_waiter()
        self.add(waiter)
        try:
            await waiter.arm()
        finally:
            self.discard(waiter)


class WakeSoon:
    """Wakes wait lists on the next loop iteration, each once, however often `wake` was called for it.

    So all chunks that are appended in one iteration reach a reader together. On an idle loop the iteration ends at
    once; on a busy one this batches chunks without a timer. Trio has no cheap way to schedule a call for the next
    iteration, so there the lists are woken at once.
    """

    __slots__ = ("_loop", "_lists")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lists: dict[WaitList, None] = {}

    def wake(self, waiting: WaitList) -> None:
        """Schedule a wake-up on the next loop iteration. Waiters added before then may wake spuriously."""
        if not waiting:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # trio
            waiting.wake()
            return
        if self._loop is not loop:  # the other loop was closed before its next iteration
            self._loop = loop
            self._lists.clear()
        if not self._lists:
            loop.call_soon(self._flush)
        self._lists[waiting] = None

    def _flush(self) -> None:
        lists, self._lists = self._lists, {}
        for waiting in lists:
            waiting.wake()
