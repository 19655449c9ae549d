"""broadcaster over Redis with sse-starlette, as its users write it: publish each chunk, a queue per subscriber.

This works around two defects of broadcaster 0.3.1, which otherwise delivers little. Its listener can start before the
first SUBSCRIBE has completed and then sleeps forever, so one channel is subscribed before all others and the listener
woken after that. And concurrent first subscribers of a channel replace each other's set, so they enter one at a time.

broadcaster has no history, so subscriptions exist before responses begin, and responses before chunks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from broadcaster import Broadcast
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

from benchmarks.servers.forwarding import ForwardingPeer, Source
from benchmarks.servers.peer import check_token

_END = "end"
_POOL = 4000
"""Limit of redis-py connections. Each publish in progress takes one, and fails without."""


class BroadcasterPeer(ForwardingPeer):
    """A Starlette app and its `Broadcast`."""

    def __init__(self, redis_url: str) -> None:
        super().__init__(redis_url)
        self._broadcast = Broadcast(f"{redis_url}?max_connections={_POOL}")
        self._entering = asyncio.Lock()
        self.app = Starlette(routes=[Route("/streams/{name}", self._subscribe)], lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with self._broadcast, self._broadcast.subscribe("first"):
            backend: Any = self._broadcast._backend
            backend._ready.set()
            yield

    async def forward(self, name: str, source: Source) -> None:
        seq = 0
        async for chunk in source:
            await self._broadcast.publish(name, f'{seq} "{chunk}"')
            seq += 1
        await self._broadcast.publish(name, _END)

    async def store(self, source: AsyncIterator[str]) -> str:
        raise NotImplementedError("broadcaster stores nothing")

    async def _subscribe(self, request: Request) -> EventSourceResponse:
        name = request.path_params["name"]
        if not check_token(request.headers.get("authorization", ""), name):
            raise HTTPException(403)
        stack = AsyncExitStack()
        async with self._entering:
            subscriber = await stack.enter_async_context(self._broadcast.subscribe(name))
        return EventSourceResponse(_events(subscriber, stack))


async def _events(subscriber: Any, stack: AsyncExitStack) -> AsyncIterator[ServerSentEvent]:
    async with stack:
        async for event in subscriber:
            if event.message == _END:
                return
            seq, _, data = event.message.partition(" ")
            yield ServerSentEvent(data, id=seq)
