"""Running the next step of a waiting task inside the wake-up, without a switch to the task.

To wake a task, asyncio ends a future, schedules a callback and runs it, and the task makes the next future. For a task
that only awaits one coroutine and waits again, all this costs more than the coroutine. So a callback of the loop can
begin the coroutine on behalf of a `ParkedTask`. If it ends without suspending, the task stays parked. Otherwise the
task is woken and continues it. The coroutine cannot tell the difference:

* The parked task is the current task. asyncio documents how to switch it: "Extending", `_enter_task`.
* It has the context variables that the task had when it parked, and keeps this context to its end.
* A cancellation of the task reaches it, also one that arrives before the task continues it.

Trio has no callbacks in which this is possible. There the task is always woken.
"""

from __future__ import annotations

import asyncio
from asyncio import _enter_task, _leave_task, current_task
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context, copy_context
from functools import partial
from types import CoroutineType
from typing import Any

from asgi_realtime.loop.waiting import AsyncioWaiter, TrioWaiter, asyncio_loop


class Rest:
    """What remains of a coroutine. To be awaited once."""

    __slots__ = ("_context", "_coroutine", "_pending", "_step")

    def __init__(self, coroutine: Coroutine[Any, Any, None], context: Context, pending: Any, *, begun: bool) -> None:
        self._coroutine = coroutine
        self._context = context
        self._pending = pending
        self._step: Callable[[], Any] = (lambda: pending) if begun else partial(context.run, coroutine.send, None)

    def cancel(self, exc: BaseException) -> None:
        """Raise the cancellation of the task in the coroutine, and cancel what it waits for."""
        if asyncio.isfuture(self._pending):
            self._pending.cancel()
        self._step = partial(self._context.run, self._coroutine.throw, exc)

    def __await__(self) -> Generator[Any, Any, None]:
        """As `yield from`, in the context of the coroutine. Spec: PEP 380."""
        step, run, coroutine = self._step, self._context.run, self._coroutine
        while True:
            try:
                pending = step()
            except StopIteration:
                return
            try:
                sent = yield pending
            except BaseException as exc:
                step = partial(run, coroutine.throw, exc)
            else:
                step = partial(run, coroutine.send, sent)


class ParkedTask(AsyncioWaiter):
    """A waiter for which a callback of the loop can begin a coroutine.

    Its task waits like this. It is not a method, because the frame of one would add to the memory of each idle reader:

    try:
        await parked.arm()
    except BaseException as exc:
        if parked.rest is None:
            raise
        parked.rest.cancel(exc)
    if parked.rest is not None:
        await parked.take_rest()
    """

    __slots__ = ("_context", "_task", "rest")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.rest: Rest | None = None

    def arm(self) -> Awaitable[None]:
        """Return an awaitable of the next `wake` or `begin`, to be awaited by the calling task."""
        self._task = current_task(self._loop)
        self._context = copy_context()
        return super().arm()

    @property
    def is_parked(self) -> bool:
        """Whether the task waits, and nothing has woken or cancelled it yet."""
        return self.future is not None and not self.future.done()

    def begin(self, awaitable: Awaitable[None]) -> bool:
        """Run an awaitable for the task, which must be parked. Returns whether it ended, without an error.

        If not, the task is woken and gets the rest. Only for callbacks of the loop, that is, outside of any task.
        """
        coroutine: Any = awaitable if type(awaitable) is CoroutineType else _waiting_for(awaitable)
        task: Any = self._task
        _enter_task(self._loop, task)
        try:
            pending = self._context.run(coroutine.send, None)
        except StopIteration:
            return True
        except BaseException as exc:
            self.rest = Rest(_raising(exc), self._context, None, begun=False)
        else:
            self.rest = Rest(coroutine, self._context, pending, begun=True)
        finally:
            _leave_task(self._loop, task)
        self.wake()
        return False

    def take_rest(self) -> Rest:
        """What the task has to await next."""
        rest, self.rest = self.rest, None
        assert rest is not None
        return rest


async def _waiting_for(awaitable: Awaitable[None]) -> None:
    await awaitable


async def _raising(exc: BaseException) -> None:
    raise exc


class TrioTask(TrioWaiter):
    """As `ParkedTask`, for trio. It is never parked, so nothing is begun for it."""

    __slots__ = ()
    rest: Rest | None = None
    is_parked = False

    def begin(self, awaitable: Awaitable[None]) -> bool:
        raise RuntimeError("a trio task is never parked")

    def take_rest(self) -> Rest:
        raise RuntimeError("a trio task is never parked")


def make_parked_task() -> ParkedTask | TrioTask:
    """A waiter of the running loop."""
    loop = asyncio_loop()
    return TrioTask() if loop is None else ParkedTask(loop)
