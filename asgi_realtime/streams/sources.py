"""What can be piped, and how it is opened, read and closed.

A source is an async iterable, an async context manager that returns one, a sequence, or any other sync iterable, which
a thread reads (`thread_iterator.py`). Of a source that is both kinds of iterable, the protocol that works is used. The
source is closed in every case, also if it is never read.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio

from asgi_realtime.core.errors import InvalidSource
from asgi_realtime.loop.logger import logger
from asgi_realtime.streams.thread_iterator import Post, ThreadBudget, ThreadIterator, close_in_thread

T = TypeVar("T")

_ALLOWED = "allowed are async iterables, async context managers that return one, and sync iterables"
_INLINE = (list, tuple, range, AbstractSet, deque)
"""Reading these cannot block, so they need no thread."""


_PARTS = {"stream_text": "stream_text(delta=True)", "aiter_sse": "aiter_sse()", "aiter_lines": "aiter_lines()"}
"""What to pipe of a response that is not itself a source, by the method that reveals it."""


def check_source(source: object) -> None:
    """Raise `InvalidSource` for an object that cannot be iterated, or that would be iterated by accident."""
    hint = _hint(source)
    if hint is not None:
        raise InvalidSource(f"{_description(source)} is not a source: {hint}; {_ALLOWED}")
    if not any(hasattr(source, method) for method in ("__aiter__", "__aenter__", "__iter__")):
        raise InvalidSource(f"{_description(source)} is not a source; {_ALLOWED}")


def _description(source: object) -> str:
    if isinstance(source, type):
        return f"the class {source.__qualname__}"
    if callable(source) and not hasattr(source, "__aiter__") and hasattr(source, "__qualname__"):
        return f"the function {source.__qualname__}"
    return f"a {type(source).__name__}"


def _hint(source: object) -> str | None:
    """What to pipe instead of this object, if there is an obvious mistake."""
    if isinstance(source, type) and not hasattr(type(source), "__iter__"):  # the class of an enum is iterable
        return "pass an instance of it"
    if isinstance(source, str | bytes | bytearray | memoryview):
        return "use append() for one chunk"
    if isinstance(source, Mapping):
        return "use append() for one chunk, or pipe its .items()"
    if hasattr(source, "__aiter__"):
        return None
    if _iterates_fields(source):
        return "use append() for one chunk, or ask your client for a stream (stream=True)"
    if inspect.isawaitable(source) and not hasattr(source, "__aenter__"):
        return "await it first and pipe the result"
    if callable(source) and not hasattr(source, "__iter__") and not hasattr(source, "__aenter__"):
        return "call it and await the result" if inspect.iscoroutinefunction(source) else "call it"
    return next((f"pipe its .{part}" for method, part in _PARTS.items() if hasattr(source, method)), None)


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
        iterator, resources = open_iterator(source, threads=threads, post=post)
    except BaseException:
        await discard(source, close_s=close_s)
        raise
    try:
        async with _entered(_Closing(resources), close_s=close_s):
            yield iterator
    finally:
        for resource in resources[1:]:
            await close_source(resource, close_s=close_s)


def _is_manager(source: object) -> bool:
    """Whether to enter a source. One that is also iterable is only entered if it asks for that, as `ai.parts` does."""
    return hasattr(source, "__aenter__") and (not hasattr(source, "__aiter__") or hasattr(source, "must_be_entered"))


def open_iterator(source: Any, *, threads: ThreadBudget, post: Post) -> tuple[AsyncIterator[Any], list[Any]]:
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


class _Closing:
    """Closes the iterator of a source, the first of its resources, when it is exited.

    A generator can hold scopes and task groups that it has entered. These must be exited inside of the scope that
    limits the closing, so that scope is entered before the first step (`_entered`).
    """

    def __init__(self, resources: list[Any]) -> None:
        self._resources = resources

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, *exc_info: object) -> None:
        await _close(self._resources[0])

    @property
    def name(self) -> str:
        return type(self._resources[0]).__name__


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
        _warn_slow_close(manager.name if isinstance(manager, _Closing) else type(manager).__name__, close_s)
        if failure is not None:
            raise failure


async def discard(source: Any, *, close_s: float) -> None:
    """Close a source that will not be read."""
    if isinstance(source, _INLINE) or (_is_manager(source) and not hasattr(source, "__aiter__")):
        return
    if hasattr(source, "__aiter__"):
        await close_source(source, close_s=close_s)
    else:
        close_in_thread(source)


async def close_source(resource: Any, *, close_s: float) -> None:
    """Close an iterator or a source, if it can be closed. Shielded for `close_s`. An error is logged."""
    with anyio.move_on_after(close_s, shield=True) as scope:
        await _close(resource)
    if scope.cancelled_caught:
        _warn_slow_close(type(resource).__name__, close_s)


async def _close(resource: Any) -> None:
    close = getattr(resource, "aclose", None) or getattr(resource, "close", None)
    if close is None:
        return
    try:
        result = close()
        if inspect.isawaitable(result):
            await result
    except Exception:
        logger.warning("closing a piped %s failed", type(resource).__name__, exc_info=True)
    except BaseExceptionGroup as exc:
        if exc.split(GeneratorExit)[1] is not None:  # a task group in a generator wraps the exit of the generator
            raise


def _warn_slow_close(name: str, close_s: float) -> None:
    logger.warning("closing a piped %s took longer than %g s", name, close_s)


async def _inline(items: Iterable[T]) -> AsyncIterator[T]:
    for item in items:
        yield item
