"""sse-starlette as its users write it: a Starlette route, a queue per subscriber, a generator of events."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from benchmarks.servers.peer import check_token
from benchmarks.servers.queues import QueuesPeer, Stream


class SseStarlettePeer(QueuesPeer):
    """One route."""

    def __init__(self) -> None:
        super().__init__()
        self._app = Starlette(routes=[Route("/streams/{name}", self._subscribe)])

    @property
    def app(self) -> ASGIApp:
        return self._app

    async def _subscribe(self, request: Request) -> EventSourceResponse:
        name = request.path_params["name"]
        if name not in self.streams:
            raise HTTPException(404)
        if not check_token(request.headers.get("authorization", ""), name):
            raise HTTPException(403)
        return EventSourceResponse(_events(self.streams[name]))


async def _events(stream: Stream) -> AsyncIterator[ServerSentEvent]:
    async for seq, data in stream.chunks():
        yield ServerSentEvent(data, id=str(seq))
