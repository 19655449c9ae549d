"""Storing in Redis by hand with redis-py: one awaited XADD for each chunk, or pipelines."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

from redis.asyncio import BlockingConnectionPool, Redis

from benchmarks.servers.forwarding import ForwardingPeer, Source

_PIPELINE = 100
"""Chunks in one pipeline. The producer has to collect them, which delays them."""


class XaddPeer(ForwardingPeer):
    """What most people write: `await redis.xadd(...)` in the loop over the chunks."""

    def __init__(self, redis_url: str) -> None:
        super().__init__(redis_url)
        # The default pool raises when it is exhausted, and a thousand tasks need a connection at the same time.
        self.redis = Redis(connection_pool=BlockingConnectionPool.from_url(redis_url, timeout=None))
        self.keys = map("stream:{}".format, itertools.count())

    async def forward(self, name: str, source: Source) -> None:
        raise NotImplementedError("this server only stores")

    async def store(self, source: AsyncIterator[str]) -> str:
        key = next(self.keys)
        async for chunk in source:
            await self.redis.xadd(key, {"d": f'"{chunk}"'})
        return key


class PipelinedPeer(XaddPeer):
    """`XaddPeer` with a pipeline for each hundred chunks of a stream."""

    async def store(self, source: AsyncIterator[str]) -> str:
        key = next(self.keys)
        pipeline = self.redis.pipeline(transaction=False)
        async for chunk in source:
            pipeline.xadd(key, {"d": f'"{chunk}"'})
            if len(pipeline) >= _PIPELINE:
                await pipeline.execute()
        await pipeline.execute()
        return key
