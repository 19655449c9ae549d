"""Reads a sync iterable in a daemon thread of its own.

Not in the host's thread pool: a source can block for minutes, and would take the pool from the host. Not in a regular
thread: the interpreter's exit would wait for it. The thread runs ahead of its reader by up to `THREAD_AHEAD` items, and
closes the source when it ends.

The states, all changed under one lock:

* READING: the thread reads the source, or waits because it is too far ahead.
* STOPPING: the reader closed the iterator, or its event loop is closed. The thread ends as soon as the source yields;
  nothing can interrupt a source that blocks.
* ENDED: the thread is over; `_error` is set if the source failed. Buffered items can still be read.

A call into the event loop costs more than an item, so the thread makes one only if the reader is waiting (`_awaited`).
The reader sets that flag under the lock when it finds nothing, so no item is missed in between.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Generic, TypeVar

from asgi_realtime.core.errors import LimitExceeded
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.waiting import WaitList

T = TypeVar("T")

THREAD_AHEAD = 256

THREAD_NAME = "asgi_realtime source"

Post = Callable[[Callable[[], object]], None]
"""Calls a function on the event loop, from any thread. Raises `RuntimeError` if the loop is closed."""


class ThreadBudget:
    """Counts the threads that read sources, and rejects more than the limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self.used = 0

    def acquire(self) -> None:
        with self._lock:
            if self.used >= self._limit:
                raise LimitExceeded(
                    f"{self.used} sync sources are being read by threads, limit {self._limit}", status=429
                )
            self.used += 1

    def release(self) -> None:
        with self._lock:
            self.used -= 1


class ThreadState(Enum):
    READING = "reading"
    STOPPING = "stopping"
    ENDED = "ended"


class ThreadIterator(Generic[T]):
    """The items of a sync iterable, for one async reader."""

    def __init__(self, source: Iterable[T], *, threads: ThreadBudget, post: Post) -> None:
        self._source = source
        self._threads = threads
        self._post = post
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._state = ThreadState.READING
        self._error: Exception | None = None
        self._arrived = WaitList()
        self._awaited = False
        threads.acquire()
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(self._read,), name=THREAD_NAME, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            threads.release()
            raise

    # On the event loop

    def __aiter__(self) -> ThreadIterator[T]:
        return self

    async def __anext__(self) -> T:
        while True:
            with self._changed:
                if self._items:
                    self._changed.notify()
                    return self._items.popleft()
                if self._state is ThreadState.ENDED:
                    break
                self._awaited = True
            await self._arrived.wait()  # registers before the loop can run a call that the thread posts
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def close(self) -> None:
        """Ask the thread to end, without waiting for it."""
        with self._changed:
            if self._state is ThreadState.READING:
                self._state = ThreadState.STOPPING
            self._changed.notify()

    # In the thread

    def _read(self) -> None:
        iterator: Iterator[T] | None = None
        try:
            iterator = iter(self._source)
            for item in iterator:
                if not self._offer(item):
                    break
        except Exception as exc:
            self._error = exc
        except BaseException as exc:  # the loop must not raise a SystemExit of the thread
            self._error = RuntimeError(f"the source raised {type(exc).__name__}")
            self._error.__cause__ = exc
        finally:
            for resource in {id(resource): resource for resource in (iterator, self._source)}.values():
                close_sync(resource)
            self._threads.release()
            with self._changed:
                self._state = ThreadState.ENDED
                awaited = self._awaited
            if awaited:
                self._notify()

    def _offer(self, item: T) -> bool:
        """Buffer an item. Returns whether to read on."""
        with self._changed:
            self._changed.wait_for(lambda: self._state is ThreadState.STOPPING or len(self._items) < THREAD_AHEAD)
            if self._state is ThreadState.STOPPING:
                return False
            self._items.append(item)
            awaited, self._awaited = self._awaited, False
        if awaited:
            self._notify()
        return True

    def _notify(self) -> None:
        try:
            self._post(self._arrived.wake)
        except RuntimeError:  # the loop is closed
            self.close()


def close_sync(resource: object) -> None:
    """Close a sync iterator or source, if it can be closed. Logs an error."""
    close: Callable[[], object] | None = getattr(resource, "close", None)
    if close is None:
        return
    try:
        close()
    except Exception:
        logger.warning("closing a piped %s failed", type(resource).__name__, exc_info=True)


def close_in_thread(source: object) -> None:
    """Close a sync source that was never read. In a thread, because closing can block."""
    threading.Thread(target=close_sync, args=(source,), name=THREAD_NAME, daemon=True).start()
