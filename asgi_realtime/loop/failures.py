"""Telling failures of a piece of code from its cancellation, and from an interrupt of the whole program.

Three kinds of exceptions leave a coroutine, and each has another receiver:

* A *failure* concerns that code alone: any `Exception`, and `SystemExit`, because code that exits inside a job must
  not end the server. It is logged or stored.
* A *cancellation* was requested from outside, and must pass through to whatever requested it.
* `KeyboardInterrupt` concerns the whole program, and must reach its main task.

Task groups raise any mix of these as one exception group.
"""

from __future__ import annotations

import asyncio

from asgi_realtime.loop.waiting import on_asyncio


def is_failure(exc: BaseException) -> bool:
    """Whether this is a failure, or a group of nothing but failures."""
    if isinstance(exc, BaseExceptionGroup):
        return all(map(is_failure, exc.exceptions))
    return isinstance(exc, (Exception, SystemExit))


def is_interrupt(exc: BaseException) -> bool:
    """Whether this is a `KeyboardInterrupt`, or a group that contains one."""
    if isinstance(exc, BaseExceptionGroup):
        return any(map(is_interrupt, exc.exceptions))
    return isinstance(exc, KeyboardInterrupt)


def cancelled_itself() -> bool:
    """Whether the cancellation being handled was not requested: the code raised it, so it counts as a failure.

    On asyncio, awaiting a cancelled task or future raises `CancelledError` in a task that has not been cancelled.
    """
    task = asyncio.current_task() if on_asyncio() else None
    return task is not None and not task.cancelling()
