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
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import anyio
import anyio.abc


class AsyncioWaiter:
    __slots__ = ("_loop", "future")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.future: asyncio.Future[None] | None = None
        """The newest wait."""

    def arm(self) -> Awaitable[None]:
        """Return an awaitable of the next `wake`. It need not be awaited."""
        future = self.future = self._loop.create_future()
        return future

    def wake(self) -> None:
        """End the current wait, if any. Never raises, so that the other waiters of a list are woken too."""
        future = self.future
        if future is not None and not future.done():
            try:
                future.set_result(None)
            except RuntimeError:  # the loop was closed while this waited, so no task is left to wake
                if not self._loop.is_closed():
                    raise

    take_turn = wake


class _EventWait:
    """Creates the coroutine that waits only when awaited: one that is never awaited causes a warning."""

    __slots__ = ("_event",)

    def __init__(self, event: anyio.Event) -> None:
        self._event = event

    def __await__(self) -> Generator[Any, Any, None]:
        return self._event.wait().__await__()


class TrioWaiter:
    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: anyio.Event | None = None

    def arm(self) -> Awaitable[None]:
        event = self._event = anyio.Event()
        return _EventWait(event)

    def wake(self) -> None:
        if self._event is not None:
            self._event.set()

    take_turn = wake


Waiter = AsyncioWaiter | TrioWaiter
"""One task that waits, reusable. Any number of wake-ups, from any code on its loop, are allowed."""


class Wakeable(Protocol):
    """What can be in a `WaitList`: a waiter, or something that has one."""

    def wake(self) -> None:
        """End the wait, if any. Never raises."""

    def take_turn(self) -> bool | None:
        """As `wake`, called by a callback of the loop, outside of any task. Returns whether it still waits."""


def asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """The running asyncio loop, if any. Pass it on: each call costs a system call before Python 3.12."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def on_asyncio() -> bool:
    """Whether the calling code runs on an asyncio loop."""
    return asyncio_loop() is not None


def make_waiter() -> Waiter:
    """A waiter for the running loop."""
    loop = asyncio_loop()
    return TrioWaiter() if loop is None else AsyncioWaiter(loop)


class WaitList:
    """The waiters of one condition, in the order of arrival. `wake` wakes and removes all of them."""

    __slots__ = ("waiters",)

    def __init__(self) -> None:
        self.waiters: dict[Wakeable, None] = {}

    def __len__(self) -> int:
        return len(self.waiters)

    def add(self, waiter: Wakeable) -> None:
        self.waiters[waiter] = None

    def discard(self, waiter: Wakeable) -> None:
        self.waiters.pop(waiter, None)

    def wake(self) -> None:
        if self.waiters:
            woken, self.waiters = self.waiters, {}
            for waiter in woken:
                waiter.wake()

    def take_turns(self) -> None:
        """As `wake`, called by a callback of the loop."""
        waiters = self.waiters
        for waiter in tuple(waiters):
            try:
                if waiter.take_turn():
                    continue
            except Exception:  # its task meets the same error and handles it
                waiter.wake()
            waiters.pop(waiter, None)

    async def wait(self) -> None:
        """Wait for the next `wake`."""
        waiter = make_waiter()
        self.add(waiter)
        try:
            await waiter.arm()
        finally:
            self.discard(waiter)


async def wait_for_any(*lists: WaitList) -> None:
    """Wait for the next `wake` of one of the lists."""
    waiter = make_waiter()
    woken = waiter.arm()
    for waiting in lists:
        waiting.add(waiter)
    try:
        await woken
    finally:
        for waiting in lists:
            waiting.discard(waiter)


MANY = 16
"""From this number of waiters on, `WakeSoon` wakes a list one iteration later."""


class WakeSoon:
    """Wakes wait lists on the next loop iteration, each once, however often `wake` was called for it.

    So all chunks that are appended in one iteration reach a reader together. On an idle loop the iteration ends at
    once; on a busy one this batches chunks without a timer. A list of many waiters is woken one iteration later: each
    wake-up of it is expensive, so batches save more there. Trio has no cheap way to schedule a call for the next
    iteration, so there the lists are woken at once.
    """

    __slots__ = ("_lists", "_loop")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lists: dict[WaitList, bool] = {}  # whether the list was postponed already

    def wake(self, waiting: WaitList) -> None:
        """Schedule a wake-up on the next loop iteration. Waiters added before then may wake spuriously."""
        if not waiting.waiters:
            return
        if self._loop is None or not self._loop.is_running():  # what was scheduled on another loop is lost
            self._loop, self._lists = asyncio_loop(), {}
            if self._loop is None:
                waiting.wake()
                return
        lists = self._lists
        if not lists:
            self._loop.call_soon(self._flush, lists)
        lists.setdefault(waiting, False)

    def _flush(self, lists: dict[WaitList, bool]) -> None:
        is_current = lists is self._lists
        if is_current:
            self._lists = {}
        for waiting, was_postponed in lists.items():
            if len(waiting.waiters) < MANY or was_postponed or not is_current:
                waiting.take_turns()
            else:
                self.wake(waiting)
                self._lists[waiting] = True


@contextmanager
def at_most(seconds: float | None, describe: Callable[[], str]) -> Iterator[None]:
    """Raise `TimeoutError` with the text from `describe` if the block takes longer. None means no limit.

    `anyio.fail_after` raises it without a text.
    """
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise TimeoutError(describe())
