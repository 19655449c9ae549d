"""asgi_realtime over Redis as its users write it: two identical processes, one pipe for each stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from asgi_realtime import Realtime, RealtimeMiddleware
from asgi_realtime.brokers.redis.broker import PREFIX
from asgi_realtime.brokers.redis.keys import Keys
from asgi_realtime.core.config import Retention
from asgi_realtime.core.log import StreamKey
from benchmarks.servers.forwarding import Source
from benchmarks.servers.peer import SECRET, Subscription

_RETENTION = Retention(stream_bytes=256 * 1024 * 1024)
"""Everything is retained, because everything is verified."""


class OursRedisPeer:
    """A `Realtime` and its pipes."""

    def __init__(self, redis_url: str) -> None:
        self._realtime = Realtime(secret_key=SECRET, broker=redis_url, retention=_RETENTION)
        self._app = RealtimeMiddleware(PlainTextResponse("not found", 404), self._realtime, path="/realtime")
        self._open: dict[str, tuple[Source, Any]] = {}

    @property
    def app(self) -> ASGIApp:
        return self._app

    async def create_stream(self, name: str, *, tokens: int) -> Subscription:
        source = Source()
        pipe = self._realtime.pipe(source)
        self._open[name] = (source, pipe)
        await self._realtime.get_run(pipe.run_id)
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

    async def store(self, source: AsyncIterator[str]) -> str:
        pipe = self._realtime.pipe(source)
        await pipe.wait_until_complete()
        return Keys(PREFIX).entries(StreamKey(pipe.run_id, pipe.stream))
