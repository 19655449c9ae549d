"""The baseline: what a careful programmer writes by hand, with a library for tokens only.

Frames are encoded once into a list that all subscribers share. Each subscriber waits on one future and sends one frame
at a time, and a second task waits in `receive()`, because servers report a disconnect in no other way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.servers.peer import Subscription, check_token, make_tokens

_PREFIX = "/streams/"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class _Stream:
    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.ended = False
        self.waiting: dict[asyncio.Future[None], None] = {}

    def wake(self) -> None:
        waiting, self.waiting = self.waiting, {}
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)


class RawPeer:
    """One dict of streams and one ASGI function."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}

    @property
    def app(self) -> ASGIApp:
        return self._app

    async def create_stream(self, name: str, *, tokens: int) -> Subscription:
        self._streams[name] = _Stream()
        return Subscription(_PREFIX + name, make_tokens(name, tokens))

    async def publish(self, name: str, chunks: Sequence[str]) -> None:
        stream = self._streams[name]
        for chunk in chunks:
            stream.frames.append(f'id: {len(stream.frames)}\ndata: "{chunk}"\n\n'.encode())
        stream.wake()

    async def end_stream(self, name: str) -> None:
        self._streams[name].ended = True
        self._streams[name].wake()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        name = scope["path"].removeprefix(_PREFIX)
        stream = self._streams.get(name)
        authorization = next((value for key, value in scope["headers"] if key == b"authorization"), b"")
        if stream is None or not check_token(authorization.decode("latin-1"), name):
            await send({"type": "http.response.start", "status": 404 if stream is None else 403, "headers": []})
            await send({"type": "http.response.body"})
            return
        await _subscribe(stream, receive, send)


async def _subscribe(stream: _Stream, receive: Receive, send: Send) -> None:
    loop = asyncio.get_running_loop()
    subscriber = asyncio.current_task()
    assert subscriber is not None

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        subscriber.cancel()

    watcher = loop.create_task(watch())
    waiter: asyncio.Future[None] | None = None
    cursor = 0
    frames = stream.frames
    try:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        while True:
            while cursor < len(frames):
                await send({"type": "http.response.body", "body": frames[cursor], "more_body": True})
                cursor += 1
            if stream.ended:
                break
            waiter = loop.create_future()
            stream.waiting[waiter] = None
            await waiter
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    except asyncio.CancelledError:
        if not watcher.done():  # canceled by the server, not by the disconnect
            raise
    finally:
        if waiter is not None:
            stream.waiting.pop(waiter, None)
        watcher.cancel()


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
