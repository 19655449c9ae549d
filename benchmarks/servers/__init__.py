"""The compared servers, one module each. They differ only in the transport."""

from __future__ import annotations

PEERS = {
    "raw": "benchmarks.servers.raw:RawPeer",
    "sse-starlette": "benchmarks.servers.sse_starlette:SseStarlettePeer",
    "asgi_realtime": "benchmarks.servers.ours:OursPeer",
}
"""Names and classes, imported in the server's process only. The first is the baseline."""

TOKEN_PEERS = PEERS | {
    "raw source": "benchmarks.servers.raw_source:RawSourcePeer",
    "asgi_realtime pipe": "benchmarks.servers.ours_pipe:OursPipePeer",
    "litestar": "benchmarks.servers.litestar_channels:LitestarPeer",
    "fastapi": "benchmarks.servers.fastapi_sse:FastApiPeer",
}
"""The servers with one reader per stream: also `pipe` instead of `append`, and what frameworks have built in."""

IN_PROCESS_PEERS = TOKEN_PEERS | {"asgi_realtime metrics": "benchmarks.servers.ours:OursMetricsPeer"}
"""Without sockets, where what metrics cost is the largest part of a token."""

REDIS_PEERS = {
    "memory": PEERS["asgi_realtime"],
    "xadd": "benchmarks.servers.xadd:XaddPeer",
    "xadd-pipelined": "benchmarks.servers.xadd:PipelinedPeer",
    "broadcaster": "benchmarks.servers.broadcaster:BroadcasterPeer",
    "asgi_realtime": "benchmarks.servers.ours_redis:OursRedisPeer",
}
"""The servers over Redis, two processes of one class each; `memory` is this library in one process."""
