"""The servers that are compared: one module each, which differ in the transport only."""

from __future__ import annotations

PEERS = {
    "raw": "benchmarks.servers.raw:RawPeer",
    "sse-starlette": "benchmarks.servers.sse_starlette:SseStarlettePeer",
    "asgi_realtime": "benchmarks.servers.ours:OursPeer",
}
"""Name to class, imported only in the server's own process. The first is what the others are compared with."""

REDIS_PEERS = {
    "memory": PEERS["asgi_realtime"],
    "xadd": "benchmarks.servers.xadd:XaddPeer",
    "xadd-pipelined": "benchmarks.servers.xadd:PipelinedPeer",
    "broadcaster": "benchmarks.servers.broadcaster:BroadcasterPeer",
    "asgi_realtime": "benchmarks.servers.ours_redis:OursRedisPeer",
}
"""The same for what goes over Redis, between two processes of one class; `memory` is this library in one process."""
