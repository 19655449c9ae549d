"""Litestar's channels as its users write them: the plugin with its memory backend, and `ServerSentEvent`.

The backend numbers nothing, so the ids are part of what is published. Subscriptions exist before the first chunk.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

from litestar import Litestar, Request, get
from litestar.channels import ChannelsPlugin
from litestar.channels.backends.memory import MemoryChannelsBackend
from litestar.exceptions import NotFoundException, PermissionDeniedException
from litestar.response import ServerSentEvent, ServerSentEventMessage
from starlette.types import ASGIApp

from benchmarks.servers.peer import Subscription, check_token, make_tokens

_END = b"end"


class LitestarPeer:
    """A channel per stream, and the number of chunks published to each."""

    def __init__(self) -> None:
        self._published: dict[str, int] = {}
        self._channels = ChannelsPlugin(backend=MemoryChannelsBackend(), arbitrary_channels_allowed=True)

        @get("/streams/{name:str}")
        async def subscribe(name: str, request: Request[object, object, Any]) -> ServerSentEvent:
            if name not in self._published:
                raise NotFoundException
            if not check_token(request.headers.get("authorization", ""), name):
                raise PermissionDeniedException
            return ServerSentEvent(self._events(name))

        self._app = Litestar([subscribe], plugins=[self._channels])

    async def _events(self, name: str) -> AsyncIterator[ServerSentEventMessage]:
        async with self._channels.start_subscription([name]) as subscriber:
            async for event in subscriber.iter_events():
                if event == _END:
                    return
                seq, _, data = event.decode().partition(" ")
                yield ServerSentEventMessage(data=data, id=seq)

    @property
    def app(self) -> ASGIApp:
        return cast(ASGIApp, self._app)

    async def create_stream(self, name: str, *, tokens: int) -> Subscription:
        self._published[name] = 0
        return Subscription(f"/streams/{name}", make_tokens(name, tokens))

    async def publish(self, name: str, chunks: Sequence[str]) -> None:
        for chunk in chunks:
            self._channels.publish(f'{self._published[name]} "{chunk}"'.encode(), [name])
            self._published[name] += 1

    async def end_stream(self, name: str) -> None:
        self._channels.publish(_END, [name])
