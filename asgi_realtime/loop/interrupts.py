"""Cancelling a block of code from outside, and only that block.

`anyio.CancelScope` does this, but on asyncio each scope holds several sets and callbacks. One interrupt exists for
each open subscription, so on asyncio it is an object of six slots that calls `Task.cancel` and `Task.uncancel`.

The difficulty on asyncio is that a task knows only how many cancellations were requested, not by what. An interrupt
counts the requests that were pending when the body began (a shielded body can run in a task that is being cancelled),
adds its own at most once, takes it back at the end, and swallows the `CancelledError` only if no other is pending.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Protocol

import anyio

from asgi_realtime.loop.waiting import on_asyncio


class Interrupt(Protocol):
    """A context manager; `interrupt` cancels its body, and nothing beyond it.

    The `with` swallows that cancellation and sets `interrupted`; any other passes through. On asyncio a task other than
    the one that entered can leave the body; `interrupt` cancels the one that entered.
    """

    interrupted: bool
    """Whether `interrupt` ended the body, and nothing else did."""

    @property
    def reachable(self) -> bool:
        """Whether the task that entered the body still exists, so that `interrupt` has an effect."""
        ...

    def interrupt(self) -> None: ...

    def __enter__(self) -> Interrupt: ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool: ...


class AsyncioInterrupt:
    __slots__ = ("_called", "_delivered", "_earlier", "_left", "_owner", "interrupted")

    def __init__(self) -> None:
        owner = asyncio.current_task()
        assert owner is not None
        self._owner = owner
        self._earlier = owner.cancelling()
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
            # Before Python 3.13, `uncancel` cannot take back a request that the task has not received yet. The task
            # itself can leave the body before that; so the request waits until the task is suspended or has left.
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


class AnyioInterrupt:
    __slots__ = ("_scope", "interrupted")

    def __init__(self) -> None:
        self._scope = anyio.CancelScope()
        self.interrupted = False

    def __enter__(self) -> Interrupt:
        self._scope.__enter__()
        return self

    @property
    def reachable(self) -> bool:
        return True  # a scope is left before its task ends

    def interrupt(self) -> None:
        self._scope.cancel()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        swallowed = bool(self._scope.__exit__(exc_type, exc, tb))
        self.interrupted = self._scope.cancelled_caught
        return swallowed


def make_interrupt() -> Interrupt:
    """An interrupt of the current task."""
    return AsyncioInterrupt() if on_asyncio() else AnyioInterrupt()
