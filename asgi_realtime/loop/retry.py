"""Repeating a broker call while the broker is unavailable."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

import anyio

from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.loop.waiting import WaitList

P = ParamSpec("P")
T = TypeVar("T")

FIRST_DELAY_S = 0.05
MAX_DELAY_S = 2.0


class Retry:
    """Calls a coroutine function again, with exponential backoff, while it raises `BrokerUnavailable`.

    Pass only calls that are safe to repeat. The error is raised once another attempt would start more than `patience_s`
    seconds after the first failure; every other exception, and cancellation, passes through at once. `on_failure` is
    called for each attempt that fails.
    """

    def __init__(self, patience_s: float, *, on_failure: Callable[[], None] = lambda: None) -> None:
        self._full_patience_s = self._patience_s = patience_s
        self._on_failure = on_failure
        self._shortened = WaitList()

    def shorten(self, patience_s: float) -> None:
        """Reduce the patience, for calls in progress as well, until `reset`."""
        self._patience_s = min(self._patience_s, patience_s)
        self._shortened.wake()

    def reset(self) -> None:
        """Restore the full patience, and forget calls of an earlier event loop."""
        self._patience_s = self._full_patience_s
        self._shortened = WaitList()

    async def __call__(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        failed_at: float | None = None
        delay_s = FIRST_DELAY_S
        while True:
            try:
                return await call(*args, **kwargs)
            except BrokerUnavailable:
                self._on_failure()
                now = anyio.current_time()
                failed_at = now if failed_at is None else failed_at
                if now + delay_s > failed_at + self._patience_s:
                    raise
            with anyio.move_on_after(delay_s):
                await self._shortened.wait()
            delay_s = min(delay_s * 2, MAX_DELAY_S)
