"""Subscriptions without sockets: the app is called with a `send` that only remembers its last body.

What remains is the cost of the app and of the event loop, which is repeatable within a few percent.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import ASGIApp, Message

from benchmarks.servers.peer import Peer, Subscription

_TEXT = "x" * 20
_OPENING_S = 10.0


class _Reader:
    """One subscription: an ASGI call whose client never disconnects."""

    def __init__(self, app: ASGIApp, subscription: Subscription) -> None:
        self.last = b""
        self._requested = False
        self._status = 0
        self._opened = asyncio.Event()
        self._task = asyncio.create_task(self._call(app, subscription))

    async def _call(self, app: ASGIApp, subscription: Subscription) -> None:
        authorization = f"Bearer {subscription.tokens[0]}"
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": subscription.path,
            "raw_path": subscription.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"authorization", authorization.encode())],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }
        await app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if not self._requested:
            self._requested = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def _send(self, message: Message) -> None:
        self.last = message.get("body", b"")
        if not self._opened.is_set():
            self._status = message["status"]
            self._opened.set()

    async def opened(self) -> None:
        async with asyncio.timeout(_OPENING_S):
            await self._opened.wait()
        if self._status != 200:
            raise RuntimeError(f"a subscription got status {self._status}")

    async def received(self, marker: bytes) -> None:
        async with asyncio.timeout(_OPENING_S):
            while marker not in self.last:  # noqa: ASYNC110 - `send` must cost nothing
                await asyncio.sleep(0)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@asynccontextmanager
async def _open(peer: Peer, names: Sequence[str]) -> AsyncIterator[list[_Reader]]:
    readers = [_Reader(peer.app, await peer.create_stream(name, tokens=1)) for name in names]
    try:
        for reader in readers:
            await reader.opened()
        yield readers
    finally:
        for name in names:
            await peer.end_stream(name)
        for reader in readers:
            await reader.close()


async def measure(peer: Peer, *, streams: int, tokens: int, segments: int) -> float:
    """CPU microseconds per token: `streams` streams with one reader each, one token per loop iteration.

    `tokens` per stream in each of `segments`; the cheapest segment counts, because noise only adds.
    """
    names = [f"in-process-{number}" for number in range(streams)]
    found = []
    async with _open(peer, names) as readers:
        gc.collect()
        for segment in range(segments + 1):
            start = time.process_time()
            for number in range(tokens):
                chunk = [f"{segment} {number} {_TEXT}"]
                for name in names:
                    await peer.publish(name, chunk)
                    await asyncio.sleep(0)
            for reader in readers:
                await reader.received(chunk[0].encode())
            found.append(time.process_time() - start)
    return min(found[1:]) / (streams * tokens) * 1e6  # the first one warms up
