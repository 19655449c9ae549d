"""The base of producers that publish over Redis: each stream has a source, like a model's client, and a task.

`publish` puts chunks into the source, and the task forwards them in the way of the peer.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Sequence

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from benchmarks.servers.peer import Subscription, make_tokens


class Source:
    """Yields chunks as they arrive, until `end`."""

    def __init__(self) -> None:
        self._chunks: deque[str] = deque()
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, chunks: Sequence[str]) -> None:
        self._chunks.extend(chunks)
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __aiter__(self) -> AsyncIterator[str]:
        while True:
            while self._chunks:
                yield self._chunks.popleft()
            if self._ended:
                return
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter


class ForwardingPeer(ABC):
    """A process that forwards sources."""

    app: ASGIApp = PlainTextResponse("not found", 404)

    def __init__(self, redis_url: str) -> None:
        self.redis_url = redis_url
        self._open: dict[str, tuple[Source, asyncio.Task[None]]] = {}

    async def create_stream(self, name: str, *, tokens: int) -> Subscription:
        source = Source()
        self._open[name] = (source, asyncio.create_task(self.forward(name, source)))
        return Subscription(f"/streams/{name}", make_tokens(name, tokens))

    async def publish(self, name: str, chunks: Sequence[str]) -> None:
        self._open[name][0].put(chunks)

    async def end_stream(self, name: str) -> None:
        source, task = self._open.pop(name)
        source.end()
        await task

    @abstractmethod
    async def forward(self, name: str, source: Source) -> None:
        """Send the chunks and the end of the source to the subscribers."""
