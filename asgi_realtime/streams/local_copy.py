"""The local copy of a pipe: what the host's own code iterates while subscribers get the same chunks.

Bounded. Until it is full nobody waits for the local consumer. When it is full a consumer that reads makes the producer
wait; without one, or when somebody waits for the end, the copy is given up: subscribers come first.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from asgi_realtime.core.errors import LocalCopyLost
from asgi_realtime.loop.waiting import WaitList

T = TypeVar("T")


class LocalCopy(Generic[T]):
    """A bounded queue with a producer that may give it up."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[T] = deque()
        self._readers = 0
        self._draining = 0
        self._lost = False
        self._finished = False
        self._error: Exception | None = None
        self._arrived = WaitList()
        self._space = WaitList()
        self.error_seen = False
        """The source's error was raised to a reader."""

    def put(self, item: T) -> None:
        """Add an item. If that was one too many (`full`), wait for `room` before the next."""
        if not self._lost:
            self._items.append(item)
            self._arrived.wake()

    @property
    def full(self) -> bool:
        """Whether it holds more than its limit: the item that the producer could not get rid of."""
        return len(self._items) > self._limit

    async def room(self) -> None:
        """Wait while the copy is full and read; give it up if it is full and not."""
        while self.full:
            if not self._readers or self._draining:
                self._lost = True
                self._items.clear()
                self._arrived.wake()
            else:
                await self._space.wait()

    def finish(self, error: Exception | None) -> None:
        """No item follows. Readers get the error, if there is one, after the items. The first call decides."""
        if self._finished:
            return
        self._finished = True
        self._error = error
        self._arrived.wake()

    async def get(self) -> T:
        """The next item. Raises `StopAsyncIteration` at the end, the source's error, or `LocalCopyLost`."""
        while True:
            if self._lost:
                raise LocalCopyLost(
                    f"the local copy held {self._limit} chunks and nobody read them, so it was given up;"
                    " subscribers lost nothing (see limits.pipe_buffer)"
                )
            if self._items:
                item = self._items.popleft()
                self._space.wake()
                return item
            if self._finished:
                if self._error is not None:
                    self.error_seen = True
                    raise self._error
                raise StopAsyncIteration
            await self._arrived.wait()

    def reader_came(self) -> None:
        self._readers += 1

    def reader_left(self) -> None:
        self._readers -= 1
        self._space.wake()

    def drain_began(self) -> None:
        """Somebody waits for the end and reads nothing meanwhile."""
        self._draining += 1
        self._space.wake()

    def drain_ended(self) -> None:
        self._draining -= 1


class Reader(Generic[T]):
    """One `async for` over a local copy. Leaving the loop, by whatever way, drops it and so counts it off."""

    __slots__ = ("_copy",)

    def __init__(self, copy: LocalCopy[T]) -> None:
        self._copy = copy
        copy.reader_came()

    def __aiter__(self) -> Reader[T]:
        return self

    async def __anext__(self) -> T:
        return await self._copy.get()

    def __del__(self) -> None:
        self._copy.reader_left()
