"""What can be piped, and how it is opened, read and closed.

A source is an async iterable, an async context manager that gives one, a plain sequence, or any other sync iterable,
which is read and closed by one daemon thread of its own: never the host's pool, and never holding up the exit. The
source is closed in every case.
"""

from __future__ import annotations

import contextvars
import inspect
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import anyio

from asgi_realtime.core.errors import InvalidSource, LimitExceeded
from asgi_realtime.loop.waiting import WaitList

logger = logging.getLogger("asgi_realtime")

T = TypeVar("T")

THREAD_AHEAD = 256
"""Items that a source's thread may be ahead of its reader."""

_ALLOWED = "allowed are async iterables, async context managers that give one, and sync iterables"
_INLINE = (list, tuple, range, AbstractSet, deque)


def check_source(source: object) -> None:
    """Raise `InvalidSource` for what cannot be iterated, or would be by accident."""
    name = type(source).__name__
    if isinstance(source, str | bytes | bytearray | memoryview):
        raise InvalidSource(f"a {name} is not a source: use append() for one chunk; {_ALLOWED}")
    if isinstance(source, Mapping):
        raise InvalidSource(f"a {name} is not a source: use append() for one chunk, or pipe its .items(); {_ALLOWED}")
    if _iterates_fields(source) and not hasattr(source, "__aiter__"):
        raise InvalidSource(
            f"a {name} is not a source: use append() for one chunk, or ask your client for a stream (stream=True);"
            f" {_ALLOWED}"
        )
    if inspect.isawaitable(source) and not hasattr(source, "__aiter__") and not hasattr(source, "__aenter__"):
        raise InvalidSource(f"a {name} is not a source: await it first and pipe what it gives; {_ALLOWED}")
    if not any(hasattr(source, method) for method in ("__aiter__", "__aenter__", "__iter__")):
        raise InvalidSource(f"a {name} is not a source; {_ALLOWED}")


def _iterates_fields(source: object) -> bool:
    """A pydantic model that says nothing of iteration itself: it would give its fields, as pairs."""
    return getattr(getattr(type(source), "__iter__", None), "__module__", "").partition(".")[0] == "pydantic"


class ThreadBudget:
    """Counts the threads that read sources, and refuses more than the limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self.used = 0

    def take(self) -> None:
        with self._lock:
            if self.used >= self._limit:
                raise LimitExceeded(
                    f"{self.used} sync sources are being read by threads, limit {self._limit}", status=429
                )
            self.used += 1

    def give_back(self) -> None:
        with self._lock:
            self.used -= 1


@asynccontextmanager
async def open_source(
    source: Any, *, threads: ThreadBudget, post: Callable[[Callable[[], object]], None], close_s: float
) -> AsyncIterator[AsyncIterator[Any]]:
    """The iterator of a source. Whatever happens in the body, iterator and source are closed behind it.

    Closing is shielded from cancellation for `close_s`; an error while closing is logged.
    """
    if _is_manager(source):
        async with _entered(source, close_s=close_s) as given:
            check_source(given)
            async with open_source(given, threads=threads, post=post, close_s=close_s) as iterator:
                yield iterator
        return
    try:
        iterator, resources = _open(source, threads=threads, post=post)
    except BaseException:
        await discard(source, close_s=close_s)
        raise
    try:
        yield iterator
    finally:
        for resource in resources:
            await _close(resource, close_s=close_s)


def _is_manager(source: object) -> bool:
    return hasattr(source, "__aenter__") and not hasattr(source, "__aiter__")


def _open(
    source: Any, *, threads: ThreadBudget, post: Callable[[Callable[[], object]], None]
) -> tuple[AsyncIterator[Any], list[Any]]:
    """The iterator of a source, and what is to be closed behind it, in that order."""
    iterator: AsyncIterator[Any]
    if hasattr(source, "__aiter__"):
        iterator = source.__aiter__()
        return iterator, [iterator] if iterator is source else [iterator, source]
    if isinstance(source, _INLINE):
        iterator = _inline(source)
    else:
        iterator = _ThreadIterator(source, threads=threads, post=post)
    return iterator, [iterator]


@asynccontextmanager
async def _entered(manager: Any, *, close_s: float) -> AsyncIterator[Any]:
    """`async with manager`, whose exit has `close_s` to itself, whatever is being cancelled.

    The scope is entered before the manager, since scopes that the manager enters must be left inside of it.
    """
    failure: BaseException | None = None
    with anyio.CancelScope() as scope:
        async with manager as given:
            try:
                yield given
            except BaseException as exc:
                failure = exc
                raise
            finally:
                scope.deadline = anyio.current_time() + close_s
                scope.shield = True
    if scope.cancelled_caught:
        logger.warning("closing a piped %s took longer than %g s", type(manager).__name__, close_s)
        if failure is not None:
            raise failure


async def discard(source: Any, *, close_s: float) -> None:
    """Close a source that nobody will read."""
    if isinstance(source, _INLINE) or _is_manager(source):
        return
    if hasattr(source, "__aiter__"):
        await _close(source, close_s=close_s)
    else:
        threading.Thread(target=_close_sync, args=(source,), name="asgi_realtime source", daemon=True).start()


async def _close(resource: Any, *, close_s: float) -> None:
    close = getattr(resource, "aclose", None) or getattr(resource, "close", None)
    if close is None:
        return
    with anyio.move_on_after(close_s, shield=True) as scope:
        try:
            result = close()
            if inspect.isawaitable(result):
                await result
        except Exception:
            logger.warning("closing a piped %s failed", type(resource).__name__, exc_info=True)
    if scope.cancelled_caught:
        logger.warning("closing a piped %s took longer than %g s", type(resource).__name__, close_s)


def _close_sync(resource: object) -> None:
    close: Callable[[], object] | None = getattr(resource, "close", None)
    if close is None:
        return
    try:
        close()
    except Exception:
        logger.warning("closing a piped %s failed", type(resource).__name__, exc_info=True)


async def _inline(items: Iterable[T]) -> AsyncIterator[T]:
    for item in items:
        yield item


class _ThreadIterator(Generic[T]):
    """Reads a sync iterable in one daemon thread, which also closes it."""

    def __init__(
        self, source: Iterable[T], *, threads: ThreadBudget, post: Callable[[Callable[[], object]], None]
    ) -> None:
        self._source = source
        self._threads = threads
        self._post = post
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._ended = False
        self._error: Exception | None = None
        self._arrived = WaitList()
        self._awaited = False  # the reader found nothing and is to be woken; each item would cost a call of the loop
        threads.take()
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(self._read,), name="asgi_realtime source", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            threads.give_back()
            raise

    def __aiter__(self) -> _ThreadIterator[T]:
        return self

    async def __anext__(self) -> T:
        while True:
            with self._changed:
                if self._items:
                    self._changed.notify()
                    return self._items.popleft()
                if self._ended:
                    break
                self._awaited = True
            await self._arrived.wait()  # parked before the loop makes any call that the thread posts
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def close(self) -> None:
        """Ask the thread to end. It does as soon as the source gives its next item; nobody waits for it."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _read(self) -> None:
        """The thread."""
        iterator: Iterator[T] | None = None
        try:
            iterator = iter(self._source)
            for item in iterator:
                if not self._offer(item):
                    break
        except Exception as exc:
            self._error = exc
        except BaseException as exc:  # SystemExit in a thread must not become one of the loop
            self._error = RuntimeError(f"the source raised {type(exc).__name__}")
            self._error.__cause__ = exc
        finally:
            for resource in {id(resource): resource for resource in (iterator, self._source)}.values():
                _close_sync(resource)
            self._threads.give_back()
            with self._changed:
                self._ended = True
                awaited = self._awaited
            if awaited:
                self._notify()

    def _offer(self, item: T) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._items) < THREAD_AHEAD)
            if self._stopped:
                return False
            self._items.append(item)
            awaited, self._awaited = self._awaited, False
        if awaited:
            self._notify()
        return True

    def _notify(self) -> None:
        try:
            self._post(self._arrived.wake)
        except RuntimeError:
            self._stopped = True  # the loop is gone
