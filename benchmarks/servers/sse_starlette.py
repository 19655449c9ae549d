"""sse-starlette as its users write it: a Starlette route, a queue per subscriber, a generator of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from benchmarks.servers.peer import Subscription, check_token, make_tokens


class _Stream:
    def __init__(self) -> None:
        self.history: list[str] = []
        self.ended = False
        self.queues: set[asyncio.Queue[tuple[int, str] | None]] = set()


class SseStarlettePeer:
    """A history and a set of queues per stream."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}
        self._app = Starlette(routes=[Route("/streams/{name}", self._subscribe)])

    @property
    def app(self) -> ASGIApp:
        return self._app

    async def create_stream(self, name: str, *, tokens: int) -> Subscription:
        self._streams[name] = _Stream()
        return Subscription(f"/streams/{name}", make_tokens(name, tokens))

    async def publish(self, name: str, chunks: Sequence[str]) -> None:
        stream = self._streams[name]
        for chunk in chunks:
            item = (len(stream.history), f'"{chunk}"')
            stream.history.append(item[1])
            for queue in stream.queues:
                queue.put_nowait(item)

    async def end_stream(self, name: str) -> None:
        stream = self._streams[name]
        stream.ended = True
        for queue in stream.queues:
            queue.put_nowait(None)

    async def _subscribe(self, request: Request) -> EventSourceResponse:
        name = request.path_params["name"]
        if name not in self._streams:
            raise HTTPException(404)
        if not check_token(request.headers.get("authorization", ""), name):
            raise HTTPException(403)
        return EventSourceResponse(_events(self._streams[name]))


async def _events(stream: _Stream) -> AsyncIterator[ServerSentEvent]:
    queue: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
    stored, ended = len(stream.history), stream.ended
    stream.queues.add(queue)
    try:
        for seq in range(stored):
            yield ServerSentEvent(stream.history[seq], id=str(seq))
        if ended:
            return
        while (item := await queue.get()) is not None:
            yield ServerSentEvent(item[1], id=str(item[0]))
    finally:
        stream.queues.discard(queue)
