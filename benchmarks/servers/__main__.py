"""The process of one server: uvicorn on one CPU, controlled through a socket.

`benchmarks.process` runs it as `python -m benchmarks.servers CLASS CONTROL_FD CPUS [REDIS_URL]`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import uvicorn
import uvloop

from benchmarks.chunks import make_chunk, make_text
from benchmarks.servers.in_process import measure
from benchmarks.servers.peer import Peer

_LINE_LIMIT = 16 * 1024 * 1024
_BACKLOG = 4096


class Control:
    """Executes the commands of the load client one at a time; acknowledgements arrive in between."""

    def __init__(self, peer: Peer, writer: asyncio.StreamWriter) -> None:
        self._peer = peer
        self._writer = writer
        self._produced: dict[str, int] = {}
        self._acknowledged = 0
        self._advanced = asyncio.Event()
        self._working: asyncio.Task[None] | None = None

    def handle(self, message: dict[str, Any]) -> None:
        command = message.pop("do")
        if command == "acknowledge":
            self._acknowledged = message["count"]
            self._advanced.set()
        else:
            self._working = asyncio.create_task(self._work(command, message))

    async def _work(self, command: str, arguments: dict[str, Any]) -> None:
        result = await getattr(self, f"do_{command}")(**arguments)
        self._writer.write(json.dumps(result).encode() + b"\n")

    async def do_create(self, *, streams: list[str], tokens: int = 1) -> list[dict[str, Any]]:
        self._produced |= dict.fromkeys(streams, 0)
        made = await asyncio.gather(*(self._peer.create_stream(name, tokens=tokens) for name in streams))
        return [dataclasses.asdict(subscription) for subscription in made]

    async def do_produce(self, *, stream: str, count: int, burst: int, window: int, seconds: float) -> int:
        """Publish `burst` chunks per loop iteration, at most `window` ahead of the slowest subscriber, for `seconds`.

        The window follows the progress that subscribers report, so no server can run ahead in its queues."""
        deadline = time.monotonic() + seconds
        seq = self._produced[stream]
        end = seq + count
        self._acknowledged = max(self._acknowledged, seq)
        while seq < end and time.monotonic() < deadline:
            if seq + burst > self._acknowledged + window:
                await self._wait_for_subscribers(deadline)
                continue
            now = time.monotonic_ns()
            await self._peer.publish(stream, [make_chunk(seq + number, now) for number in range(burst)])
            seq += burst
            await asyncio.sleep(0)
        self._produced[stream] = seq
        return seq

    async def do_pace(self, *, streams: list[str], rate: float, count: int, start_ns: int) -> int:
        """Publish to the streams in turn, `rate` chunks a second in total, whether or not subscribers keep up."""
        base = self._produced[streams[0]]
        done = 0
        while done < count:
            due = min(count, math.floor((time.monotonic_ns() - start_ns) * rate / 1e9) + 1)
            while done < due:
                chunk = make_chunk(base + done // len(streams), start_ns + int(done * 1e9 / rate))
                await self._peer.publish(streams[done % len(streams)], [chunk])
                done += 1
            wait_ms = (start_ns + done * 1e9 / rate - time.monotonic_ns()) / 1e6
            # uvloop's timers have a resolution of 1 ms; a shorter sleep would spin.
            await asyncio.sleep(max(1, math.ceil(wait_ms)) / 1000)
        self._produced |= dict.fromkeys(streams, base + count // len(streams))
        return base + count // len(streams)

    async def do_fill(self, *, streams: list[str], count: int) -> int:
        """Publish `count` chunks to each stream without a pause."""
        base = self._produced[streams[0]]
        for name in streams:
            now = time.monotonic_ns()
            await self._peer.publish(name, [make_chunk(base + number, now) for number in range(count)])
        self._produced |= dict.fromkeys(streams, base + count)
        return base + count

    async def do_store(self, *, streams: int, each: int, size: int, seconds: float) -> list[tuple[str, int]]:
        """Store `each` texts in each of new streams, concurrently and for at most `seconds`; return once acknowledged.

        Returns the Redis key of each stream and the number of texts from its source."""
        deadline = time.monotonic() + seconds
        counts = [0] * streams

        async def source(number: int) -> AsyncIterator[str]:
            for seq in range(each):
                if time.monotonic() > deadline:
                    return
                counts[number] = seq + 1
                yield make_text(seq, size)

        keys = await asyncio.gather(*(self._peer.store(source(number)) for number in range(streams)))
        return list(zip(keys, counts, strict=True))

    async def do_measure(self, *, streams: int, tokens: int, segments: int) -> float:
        return await measure(self._peer, streams=streams, tokens=tokens, segments=segments)

    async def do_end(self, *, streams: list[str]) -> None:
        await asyncio.gather(*(self._peer.end_stream(name) for name in streams))

    async def _wait_for_subscribers(self, deadline: float) -> None:
        self._advanced.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._advanced.wait()


def _make_peer(path: str, *redis_url: str) -> Peer:
    module, _, class_name = path.partition(":")
    return cast(Peer, getattr(importlib.import_module(module), class_name)(*redis_url))


async def _serve(peer: Peer, control_fd: int) -> None:
    config = uvicorn.Config(
        peer.app,
        interface="asgi3",
        http="httptools",
        ws="none",
        access_log=False,
        log_level="warning",
        backlog=_BACKLOG,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
    serving = asyncio.create_task(server.serve([listener]))
    while not server.started and not serving.done():  # noqa: ASYNC110 - uvicorn sets a flag and has no event
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=control_fd), limit=_LINE_LIMIT)
    if server.started:
        writer.write(json.dumps({"port": listener.getsockname()[1]}).encode() + b"\n")
        control = Control(peer, writer)
        with contextlib.suppress(ConnectionError):  # the client disconnected during a call
            while line := await reader.readline():
                control.handle(json.loads(line))
    # An overloaded server is stopped with a thousand open responses and would log a traceback for each.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    server.should_exit = True
    await serving


def main() -> None:
    path, control_fd, cpus, *redis_url = sys.argv[1:]
    os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    uvloop.run(_serve(_make_peer(path, *redis_url), int(control_fd)))


if __name__ == "__main__":
    main()
