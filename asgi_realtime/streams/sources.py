"""What can be piped, and how it is opened, read and closed.

A source is an async iterable, an async context manager that returns one, a sequence, or any other sync iterable, which
a thread reads (`thread_iterator.py`). Of a source that is both kinds of iterable, the protocol that works is used. The
source is closed in every case, also if it is never read.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio

from asgi_realtime.core.errors import InvalidSource
from asgi_realtime.streams.thread_iterator import Post, ThreadBudget, ThreadIterator, close_in_thread

logger = logging.getLogger("asgi_realtime")

T = TypeVar("T")

_ALLOWED = "allowed are async iterables, async context managers that return one, and sync iterables"
_INLINE = (list, tuple, range, AbstractSet, deque)
"""Reading these cannot block, so they need no thread."""


def check_source(source: object) -> None:
    """Raise `InvalidSource` for an object that cannot be iterated, or that would be iterated by accident."""
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
        raise InvalidSource(f"a {name} is not a source: await it first and pipe the result; {_ALLOWED}")
    if hasattr(source, "stream_text") and not hasattr(source, "__aiter__"):
        raise InvalidSource(f"a {name} is not a source: pipe its .stream_text(delta=True); {_ALLOWED}")
    if not any(hasattr(source, method) for method in ("__aiter__", "__aenter__", "__iter__")):
        raise InvalidSource(f"a {name} is not a source; {_ALLOWED}")


def _iterates_fields(source: object) -> bool:
    """Whether this is a pydantic model without an iterator of its own: iterating it yields its fields, as pairs."""
    return getattr(getattr(type(source), "__iter__", None), "__module__", "").partition(".")[0] == "pydantic"


@asynccontextmanager
async def open_source(
    source: Any, *, threads: ThreadBudget, post: Post, close_s: float
) -> AsyncIterator[AsyncIterator[Any]]:
    """The iterator of a source. However the body ends, iterator and source are closed after it.

    Closing is shielded from cancellation for `close_s`. An error while closing is logged.
    """
    if _is_manager(source):
        async with _entered(source, close_s=close_s) as result:
            check_source(result)
            async with open_source(result, threads=threads, post=post, close_s=close_s) as iterator:
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


def _open(source: Any, *, threads: ThreadBudget, post: Post) -> tuple[AsyncIterator[Any], list[Any]]:
    """The iterator of a source, and what to close afterwards, in this order."""
    iterator: AsyncIterator[Any]
    if hasattr(source, "__aiter__"):
        if hasattr(source, "__iter__"):
            iterator = _EitherProtocol(source, lambda: ThreadIterator(source, threads=threads, post=post))
            return iterator, iterator.resources
        iterator = source.__aiter__()
        return iterator, [iterator] if iterator is source else [iterator, source]
    if isinstance(source, _INLINE):
        iterator = _inline(source)
    else:
        iterator = ThreadIterator(source, threads=threads, post=post)
    return iterator, [iterator]


class _EitherProtocol(AsyncIterator[Any]):
    """The items of a source with both iterator protocols.

    The proxies of instrumentations have both, whatever they wrap. A synchronous stream then has an `__aiter__` that
    fails in its first step, so it is read by a thread.
    """

    def __init__(self, source: Any, read_in_thread: Callable[[], AsyncIterator[Any]]) -> None:
        self.resources: list[Any] = [source]
        """What to close. A thread closes the source that it reads."""
        self._source = source
        self._read_in_thread = read_in_thread
        self._iterator: AsyncIterator[Any] | None = None

    async def __anext__(self) -> Any:
        if self._iterator is None:
            return await self._first()
        return await self._iterator.__anext__()

    async def _first(self) -> Any:
        try:
            iterator = self._source.__aiter__()
            if iterator is not self._source:
                self.resources.insert(0, iterator)
            self._iterator = iterator
            return await iterator.__anext__()
        except (AttributeError, TypeError) as exc:
            if "__anext__" not in str(exc) and "__aiter__" not in str(exc):
                raise
        self._iterator = self._read_in_thread()
        self.resources[:] = [self._iterator]
        return await self._iterator.__anext__()


@asynccontextmanager
async def _entered(manager: Any, *, close_s: float) -> AsyncIterator[Any]:
    """`async with manager`, whose exit is shielded from cancellation for `close_s`.

    The scope is entered before the manager, because scopes that the manager enters must be exited inside of it.
    """
    failure: BaseException | None = None
    with anyio.CancelScope() as scope:
        async with manager as result:
            try:
                yield result
            except BaseException as exc:
                failure = exc
                raise
            finally:
                scope.deadline = anyio.current_time() + close_s
                scope.shield = True
    if scope.cancelled_caught:
        _warn_slow_close(manager, close_s)
        if failure is not None:
            raise failure


async def discard(source: Any, *, close_s: float) -> None:
    """Close a source that will not be read."""
    if isinstance(source, _INLINE) or _is_manager(source):
        return
    if hasattr(source, "__aiter__"):
        await _close(source, close_s=close_s)
    else:
        close_in_thread(source)


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
        _warn_slow_close(resource, close_s)


def _warn_slow_close(resource: object, close_s: float) -> None:
    logger.warning("closing a piped %s took longer than %g s", type(resource).__name__, close_s)


async def _inline(items: Iterable[T]) -> AsyncIterator[T]:
    for item in items:
        yield item
