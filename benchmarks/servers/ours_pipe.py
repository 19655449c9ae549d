"""asgi_realtime with `pipe`: each stream has a source, as a model's client would be."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from asgi_realtime import Pipe, Realtime, RealtimeMiddleware
from benchmarks.servers.forwarding import Source
from benchmarks.servers.peer import SECRET, Subscription


class OursPipePeer:
    """A `Realtime` and its pipes."""

    def __init__(self) -> None:
        self._realtime = Realtime(secret_key=SECRET)
        self._app = RealtimeMiddleware(PlainTextResponse("not found", 404), self._realtime, path="/realtime")
        self._open: dict[str, tuple[Source, Pipe[str]]] = {}

    @property
    def app(self) -> ASGIApp:
        return self._app

    async def create_stream(self, name: str, *, tokens: int) -> Subscription:
        source = Source()
        pipe = self._realtime.pipe(source)
        await asyncio.sleep(0)
        self._open[name] = (source, pipe)
        scopes = {"read": {"runs": [pipe.run_id]}}
        return Subscription(
            f"/realtime/v1/streams/{pipe.run_id}/default",
            [self._realtime.create_public_token(scopes=scopes, expires_in=3600 + number) for number in range(tokens)],
        )

    async def publish(self, name: str, chunks: Sequence[str]) -> None:
        self._open[name][0].put(chunks)

    async def end_stream(self, name: str) -> None:
        source, pipe = self._open.pop(name)
        source.end()
        await pipe.wait_until_complete()
