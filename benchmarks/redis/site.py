"""The processes of one measurement, driven like one server: chunks enter at the worker and leave at the web process.

Redis is started here, stores nothing on disk, and is terminated by its pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import redis
from redis.exceptions import ConnectionError as RedisConnectionError

from benchmarks.process import Server, busy_s, process_cpu_s, run_server
from benchmarks.servers import REDIS_PEERS

BINARY = "redis-server"
_START_S = 10.0
_STOP_S = 5.0


def has_redis() -> bool:
    return shutil.which(BINARY) is not None


@dataclass(slots=True)
class RedisServer:
    """A running Redis and a client of the benchmark, which is idle during measurements."""

    pid: int
    port: int
    client: redis.Redis

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def executed(self) -> dict[str, int]:
        """How often each command has run so far, including in scripts."""
        stats: Any = self.client.info("commandstats")
        return {name.removeprefix("cmdstat_"): int(numbers["calls"]) for name, numbers in stats.items()}

    def connections(self, pid: int) -> set[str]:
        """The addresses of the connections of a process, as in Redis's client list."""
        clients: Any = self.client.client_list()
        ports = _local_ports(pid)
        return {client["addr"] for client in clients if int(client["addr"].rpartition(":")[2]) in ports}

    @contextlib.asynccontextmanager
    async def sent_by(self, pid: int) -> AsyncIterator[list[str]]:
        """The commands that a process sends during the block, each with its first argument, without those in scripts.

        MONITOR slows Redis down, so do not measure anything else during the block."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        sent: list[tuple[str, str]] = []

        async def watch() -> None:
            while line := await reader.readline():
                match = re.match(rb'\+[\d.]+ \[\d+ ([^\]]+)\] ("[^"]+"(?: "[^"]*")?)', line)
                if match is not None:
                    sent.append((match[1].decode(), match[2].decode().replace('"', "")))

        writer.write(b"MONITOR\r\n")
        await reader.readline()
        task = asyncio.create_task(watch())
        chosen: list[str] = []
        try:
            yield chosen
            await asyncio.sleep(0.2)
            addresses = self.connections(pid)
            chosen += [command for address, command in sent if address in addresses and command != "PING"]
        finally:
            task.cancel()
            writer.close()


def _local_ports(pid: int) -> set[int]:
    """The local ports of the TCP connections of a process."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(link.readlink().name.removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[9] in inodes}


@contextlib.asynccontextmanager
async def run_redis() -> AsyncIterator[RedisServer]:
    """Start a Redis without persistence on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with TemporaryDirectory() as directory:
        command = [BINARY, "--port", str(port), "--bind", "127.0.0.1", "--dir", directory, "--save", ""]
        command += ["--appendonly", "no", "--loglevel", "warning", "--tcp-backlog", "511"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
        client = redis.Redis(port=port)
        try:
            await _until_ready(client, process)
            yield RedisServer(process.pid, port, client)
        finally:
            client.close()
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, _STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _until_ready(client: redis.Redis, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            client.ping()
            return
        except RedisConnectionError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("redis-server did not start") from error
        await asyncio.sleep(0.01)


@dataclass(slots=True)
class Site:
    """A `Target` of several processes. Without Redis, one process is both web and worker."""

    web: Server
    worker: Server
    redis: RedisServer | None

    @property
    def port(self) -> int:
        return self.web.port

    async def call(self, command: str, *, timeout_s: float = 60.0, **arguments: Any) -> Any:
        return await self.worker.call(command, timeout_s=timeout_s, **arguments)

    async def receive(self, *, timeout_s: float = 60.0) -> Any:
        return await self.worker.receive(timeout_s=timeout_s)

    def send(self, command: str, **arguments: Any) -> None:
        self.worker.send(command, **arguments)

    def cpu_s(self) -> Mapping[str, float]:
        used = {"web": process_cpu_s(self.web.pid)}
        if self.redis is not None:
            used |= {"worker": process_cpu_s(self.worker.pid), "redis": process_cpu_s(self.redis.pid)}
        return used

    def others_s(self) -> float:
        return busy_s(_all_cpus()) - sum(self.cpu_s().values()) - time.process_time()

    def memory_kib(self) -> int:
        return self.web.memory_kib()


def _all_cpus() -> set[int]:
    return set(range(os.cpu_count() or 1))


@contextlib.asynccontextmanager
async def start_site(peer: str, server_cpu: int) -> AsyncIterator[Site]:
    """Start the processes of one peer."""
    path = REDIS_PEERS[peer]
    if peer == "memory":
        async with run_server(path, cpus=[server_cpu]) as server:
            yield Site(server, server, None)
        return
    async with (
        run_redis() as redis_server,
        run_server(path, cpus=[server_cpu], redis_url=redis_server.url) as web,
        run_server(path, cpus=_all_cpus(), redis_url=redis_server.url) as worker,
    ):
        yield Site(web, worker, redis_server)
