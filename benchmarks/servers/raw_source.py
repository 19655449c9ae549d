"""The baseline for `pipe`: the raw app, with a task per stream that reads a source, as a model's client would be."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from benchmarks.servers.forwarding import Source
from benchmarks.servers.peer import Subscription
from benchmarks.servers.raw import RawPeer


class RawSourcePeer(RawPeer):
    """`RawPeer`, and a task for each stream."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[str, tuple[Source, asyncio.Task[None]]] = {}

    async def create_stream(self, name: str, *, tokens: int) -> Subscription:
        subscription = await super().create_stream(name, tokens=tokens)
        source = Source()
        self._open[name] = (source, asyncio.create_task(self._forward(name, source)))
        return subscription

    async def publish(self, name: str, chunks: Sequence[str]) -> None:
        self._open[name][0].put(chunks)

    async def end_stream(self, name: str) -> None:
        source, task = self._open.pop(name)
        source.end()
        await task
        await super().end_stream(name)

    async def _forward(self, name: str, source: Source) -> None:
        async for chunk in source:
            await super().publish(name, (chunk,))
