"""FastAPI's own event streams as its users write them: a queue per subscriber, a route that yields events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.types import ASGIApp

from benchmarks.servers.peer import check_token
from benchmarks.servers.queues import QueuesPeer, Stream


class FastApiPeer(QueuesPeer):
    """One route."""

    def __init__(self) -> None:
        super().__init__()
        self._app = FastAPI()

        def find(name: str, authorization: Annotated[str, Header()] = "") -> Stream:
            if name not in self.streams:
                raise HTTPException(404)
            if not check_token(authorization, name):
                raise HTTPException(403)
            return self.streams[name]

        @self._app.get("/streams/{name}", response_class=EventSourceResponse)
        async def subscribe(stream: Stream = Depends(find)) -> AsyncIterator[ServerSentEvent]:  # noqa: B008
            async for seq, data in stream.chunks():
                yield ServerSentEvent(raw_data=data, id=str(seq))

    @property
    def app(self) -> ASGIApp:
        return self._app
