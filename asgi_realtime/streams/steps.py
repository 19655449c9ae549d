"""Finds sources that block the event loop, such as an async generator that iterates a synchronous client.

A step is one `__anext__` of a source. While it blocks, no chunk is sent and nothing else of the app runs. A watched
step is driven by hand, so that the time between two of its suspensions can be measured. That is too slow for every
step: a pipe watches the first one, and again the one after a step that took `LONG_STEP_S`, for which it reads a clock
once per chunk. While steps hold the event loop noticeably it continues to watch, and lets subscribers run in between,
so that they get each chunk before the next step blocks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator
from time import monotonic
from typing import Any, Generic, TypeVar

import anyio.lowlevel

from asgi_realtime.loop.logger import logger

T = TypeVar("T")

LONG_STEP_S = 0.25
"""A source that blocks for longer gets a warning."""

_NOTICEABLE_S = 0.01

_SEND_ITERATIONS = 3
"""Loop iterations in which a subscription sends what was appended."""


class WatchedSteps(Generic[T]):
    """The items of a source, while its steps hold the event loop. Ends with `ended` set, or because they do not."""

    def __init__(self, iterator: AsyncIterator[T], *, where: str) -> None:
        self.ended = False
        self._iterator = iterator
        self._where = where
        self._active = True
        self._yields = False
        self._warned = False

    def __aiter__(self) -> WatchedSteps[T]:
        self._active = True
        return self

    async def __anext__(self) -> T:
        if not self._active:
            raise StopAsyncIteration
        if self._yields:
            for _ in range(_SEND_ITERATIONS):
                await anyio.lowlevel.checkpoint()
        step: _TimedStep[T] = _TimedStep(self._iterator)
        try:
            return await step
        except StopAsyncIteration:
            self.ended = True
            raise
        finally:
            self._yields = True
            self._active = step.held_s > _NOTICEABLE_S
            if step.held_s > LONG_STEP_S:
                self._warn(step.held_s)

    def _warn(self, held_s: float) -> None:
        if not self._warned:
            self._warned = True
            name = getattr(self._iterator, "__qualname__", type(self._iterator).__qualname__)
            logger.warning(
                "the source %s of %s blocked the event loop for %.2f s: use an async client, or pipe a synchronous"
                " iterable, which a thread reads",
                name,
                self._where,
                held_s,
            )


class _TimedStep(Generic[T]):
    """The next step of an iterator, which measures for how long it holds the event loop at most."""

    def __init__(self, iterator: AsyncIterator[T]) -> None:
        self.held_s = 0.0
        self._iterator = iterator

    def __await__(self) -> Generator[Any, Any, T]:
        """As `yield from`. Spec: PEP 380."""
        step: Any = self._iterator.__anext__().__await__()
        advance: Callable[..., Any] = step.__next__
        arguments: tuple[Any, ...] = ()
        while True:
            started = monotonic()
            try:
                pending = advance(*arguments)
            except StopIteration as stop:
                value: T = stop.value
                return value
            finally:
                self.held_s = max(self.held_s, monotonic() - started)
            try:
                sent = yield pending
            except BaseException as exc:
                if not hasattr(step, "throw"):
                    raise
                advance, arguments = step.throw, (exc,)
            else:
                advance, arguments = (step.__next__, ()) if sent is None else (step.send, (sent,))
