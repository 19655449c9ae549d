"""Repeating a broker call while the broker is unavailable."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

import anyio

from asgi_realtime.core.errors import BrokerUnavailable

P = ParamSpec("P")
T = TypeVar("T")

FIRST_DELAY_S = 0.05
MAX_DELAY_S = 2.0


class Retry:
    """Calls a coroutine function again, with exponential backoff, while it raises `BrokerUnavailable`.

    Pass only calls that are safe to repeat. The error is raised once another attempt would start more than `patience_s`
    seconds after the first failure; every other exception, and cancellation, passes through at once.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s

    async def __call__(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        deadline: float | None = None
        delay_s = FIRST_DELAY_S
        while True:
            try:
                return await call(*args, **kwargs)
            except BrokerUnavailable:
                now = anyio.current_time()
                deadline = now + self._patience_s if deadline is None else deadline
                if now + delay_s > deadline:
                    raise
            await anyio.sleep(delay_s)
            delay_s = min(delay_s * 2, MAX_DELAY_S)
