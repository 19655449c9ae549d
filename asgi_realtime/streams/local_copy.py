"""The local copy of a pipe: what the host's own code iterates while subscribers get the same chunks.

The copy is bounded. While it has room, the producer never waits for the local reader. When it is full there are two
cases: if a reader is iterating, the producer waits for it, because the host wants every chunk. Otherwise nothing will
make room, so the copy is dropped and iterating it later raises `LocalCopyLost`. The second case includes a host that
waits for the end of the pipe (`draining`). Subscribers come first: they lose nothing either way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Generic, TypeVar

from asgi_realtime.core.errors import LocalCopyLost
from asgi_realtime.loop.waiting import WaitList

T = TypeVar("T")


class CopyState(Enum):
    """`OPEN` leads to one of the others, which are final."""

    OPEN = "open"
    DROPPED = "dropped"
    """It was full without a reader, and its items were discarded."""
    FINISHED = "finished"
    """No item follows."""


_OPEN = CopyState.OPEN  # on the hot path, a module constant is cheaper than an enum member


class LocalCopy(Generic[T]):
    """A bounded queue that its producer can drop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[T] = deque()
        self._state = CopyState.OPEN
        self._error: Exception | None = None
        self._readers = 0
        self._draining = 0
        self._arrived = WaitList()
        self._space = WaitList()
        self.error_seen = False
        """Whether a reader got the source's error."""

    def _leave_open(self, state: CopyState) -> None:
        self._state = state
        self._arrived.wake()

    # Producer

    def put(self, item: T) -> bool:
        """Add an item. Returns whether the copy is `full`, so that the producer has to wait for `room` now."""
        if self._state is not _OPEN:
            return False
        self._items.append(item)
        if self._arrived.waiters:
            self._arrived.wake()
        return len(self._items) > self._limit

    @property
    def full(self) -> bool:
        """Whether it holds one item more than its limit: the one that the producer had already read."""
        return len(self._items) > self._limit

    async def room(self) -> None:
        """Wait while the copy is full and a reader is iterating. Drop it if it is full otherwise."""
        while self.full and self._state is _OPEN:
            if self._readers and not self._draining:
                await self._space.wait()
            else:
                self._leave_open(CopyState.DROPPED)
                self._items.clear()

    def finish(self, error: Exception | None) -> None:
        """No item follows. Readers get the error, if any, after the items. The first call wins."""
        if self._state is _OPEN:
            self._leave_open(CopyState.FINISHED)
            self._error = error

    # Reader

    async def get(self) -> T:
        """The next item. Raises `StopAsyncIteration` at the end, the source's error, or `LocalCopyLost`."""
        while not self._items:
            if self._state is CopyState.DROPPED:
                raise LocalCopyLost(
                    f"the local copy held {self._limit} chunks (Limits.pipe_buffer) and was not read, so it was"
                    " dropped; subscribers lost nothing"
                )
            if self._state is CopyState.FINISHED:
                if self._error is None:
                    raise StopAsyncIteration
                self.error_seen = True
                raise self._error
            await self._arrived.wait()
        self._space.wake()
        return self._items.popleft()

    def add_reader(self) -> None:
        self._readers += 1

    def remove_reader(self) -> None:
        self._readers -= 1
        self._space.wake()

    @contextmanager
    def draining(self) -> Iterator[None]:
        """The host waits for the end of the pipe, and does not read in the meantime."""
        self._draining += 1
        self._space.wake()
        try:
            yield
        finally:
            self._draining -= 1


class Reader(Generic[T]):
    """One `async for` over a local copy. The reader counts until it is deleted, however the loop was left."""

    __slots__ = ("_copy",)

    def __init__(self, copy: LocalCopy[T]) -> None:
        self._copy = copy
        copy.add_reader()

    def __aiter__(self) -> Reader[T]:
        return self

    async def __anext__(self) -> T:
        return await self._copy.get()

    def __del__(self) -> None:
        self._copy.remove_reader()
