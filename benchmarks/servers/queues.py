"""The base of servers with a queue per subscriber, as users write them: a history and a set of queues per stream."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence

from starlette.types import ASGIApp

from benchmarks.servers.peer import Subscription, make_tokens


class Stream:
    """A history of JSON texts, and the queues of the subscribers."""

    def __init__(self) -> None:
        self.history: list[str] = []
        self.ended = False
        self.queues: set[asyncio.Queue[tuple[int, str] | None]] = set()

    async def chunks(self) -> AsyncIterator[tuple[int, str]]:
        """The number and the JSON of each chunk, from the first on."""
        queue: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        stored, ended = len(self.history), self.ended
        self.queues.add(queue)
        try:
            for seq in range(stored):
                yield seq, self.history[seq]
            while not ended and (item := await queue.get()) is not None:
                yield item
        finally:
            self.queues.discard(queue)


class QueuesPeer(ABC):
    """The streams of one server."""

    def __init__(self) -> None:
        self.streams: dict[str, Stream] = {}

    @property
    @abstractmethod
    def app(self) -> ASGIApp: ...

    async def create_stream(self, name: str, *, tokens: int) -> Subscription:
        self.streams[name] = Stream()
        return Subscription(f"/streams/{name}", make_tokens(name, tokens))

    async def publish(self, name: str, chunks: Sequence[str]) -> None:
        stream = self.streams[name]
        for chunk in chunks:
            item = (len(stream.history), f'"{chunk}"')
            stream.history.append(item[1])
            for queue in stream.queues:
                queue.put_nowait(item)

    async def end_stream(self, name: str) -> None:
        stream = self.streams[name]
        stream.ended = True
        for queue in stream.queues:
            queue.put_nowait(None)
