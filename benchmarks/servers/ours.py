"""asgi_realtime as its users write it: the middleware, one run per stream, default settings otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from asgi_realtime import Realtime, RealtimeMiddleware, Run
from asgi_realtime.core.config import Retention
from benchmarks.servers.peer import SECRET, Subscription

_RETENTION = Retention(stream_bytes=256 * 1024 * 1024)
"""Catch-up stores more than a stream retains by default. The other servers retain everything."""


class OursPeer:
    """A `Realtime` and its open runs."""

    def __init__(self, *, metrics: bool = False) -> None:
        self._realtime = Realtime(secret_key=SECRET, retention=_RETENTION, metrics=metrics)
        self._app = RealtimeMiddleware(PlainTextResponse("not found", 404), self._realtime, path="/realtime")
        self._open: dict[str, tuple[AbstractAsyncContextManager[Run], str]] = {}

    @property
    def app(self) -> ASGIApp:
        return self._app

    async def create_stream(self, name: str, *, tokens: int) -> Subscription:
        context = self._realtime.open_run("bench")
        run = await context.__aenter__()
        self._open[name] = (context, run.id)
        scopes = {"read": {"runs": [run.id]}}
        return Subscription(
            f"/realtime/v1/streams/{run.id}/default",
            [self._realtime.create_public_token(scopes=scopes, expires_in=3600 + number) for number in range(tokens)],
        )

    async def publish(self, name: str, chunks: Sequence[str]) -> None:
        run = self._open[name][1]
        for chunk in chunks:
            await self._realtime.append(chunk, "default", run=run)

    async def end_stream(self, name: str) -> None:
        await self._open.pop(name)[0].__aexit__(None, None, None)


class OursMetricsPeer(OursPeer):
    """The same with metrics."""

    def __init__(self) -> None:
        super().__init__(metrics=True)
