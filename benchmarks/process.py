"""A server in a separate process: its start and end, its control channel, its CPU time and memory.

Commands are JSON lines over a socket pair rather than HTTP. That costs the measured server almost nothing, and the
server exits when this process does, because the channel closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_ROOT = Path(__file__).parent.parent
_START_S = 30.0
_STOP_S = 10.0
_LINE_LIMIT = 16 * 1024 * 1024


def choose_cpus() -> tuple[int, int]:
    """Return the CPUs for server and client, which are the same on a machine with one CPU."""
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[0], cpus[1 % len(cpus)]


def raise_file_limit() -> int:
    """Raise the limit of open files of this process and its children to the maximum, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def process_cpu_s(pid: int) -> float:
    """CPU time of a process so far, in nanosecond resolution and without its cooperation."""
    # The kernel's number for another process's CPU clock, as clock_getcpuclockid(3) computes it.
    return time.clock_gettime((~pid << 3) | 2)


def busy_s(cpus: Collection[int]) -> float:
    """Time that these CPUs have been busy so far, in any process."""
    total = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *numbers = line.split()
        if re.fullmatch(r"cpu\d+", name) and int(name[3:]) in cpus:
            user, nice, system, _idle, _iowait, *rest = map(int, numbers[:8])
            total += user + nice + system + sum(rest)
    return total / os.sysconf("SC_CLK_TCK")


class Target(Protocol):
    """What a workload drives: one server, or several processes that act as one."""

    @property
    def port(self) -> int:
        """The port that subscribers connect to."""

    async def call(self, command: str, *, timeout_s: float = 60.0, **arguments: Any) -> Any: ...

    async def receive(self, *, timeout_s: float = 60.0) -> Any: ...

    def send(self, command: str, **arguments: Any) -> None: ...

    def cpu_s(self) -> Mapping[str, float]:
        """CPU time of each process so far."""

    def others_s(self) -> float:
        """CPU time so far of other processes on the same CPUs."""

    def memory_kib(self) -> int: ...


@dataclass(slots=True)
class Server:
    """A running server and its control channel."""

    pid: int
    port: int
    cpus: Collection[int]
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter

    async def call(self, command: str, *, timeout_s: float = 60.0, **arguments: Any) -> Any:
        """Send a command and return its result. One call at a time, apart from `acknowledge`."""
        self.send(command, **arguments)
        return await self.receive(timeout_s=timeout_s)

    async def receive(self, *, timeout_s: float = 60.0) -> Any:
        """Return the result of a command that was sent before."""
        line = await asyncio.wait_for(self._reader.readline(), timeout_s)
        if not line:
            raise RuntimeError("the server exited before it responded; see its messages above")
        return json.loads(line)

    def send(self, command: str, **arguments: Any) -> None:
        """Send a command without waiting. Every command except `acknowledge` has a result; see `receive`."""
        self._writer.write(json.dumps({"do": command, **arguments}).encode() + b"\n")

    def cpu_s(self) -> Mapping[str, float]:
        return {"server": process_cpu_s(self.pid)}

    def others_s(self) -> float:
        return busy_s(self.cpus) - process_cpu_s(self.pid)

    def memory_kib(self) -> int:
        """Proportional set size: private pages, and its share of shared pages."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        match = re.search(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE)
        if match is None:
            raise RuntimeError(f"/proc/{self.pid}/smaps_rollup has no Pss line")
        return int(match[1])


@contextlib.asynccontextmanager
async def run_server(path: str, *, cpus: Collection[int], redis_url: str = "") -> AsyncIterator[Server]:
    """Start the server of a peer class on the given CPUs, wait until it listens, and terminate it at the end."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "benchmarks.servers", path, str(theirs.fileno()), ",".join(map(str, cpus))]
        command += [redis_url] if redis_url else []
        # Not asyncio's subprocess, because its child watcher would wake the client's loop.
        process = subprocess.Popen(  # noqa: ASYNC220
            command, cwd=_ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
    reader, writer = await asyncio.open_connection(sock=ours, limit=_LINE_LIMIT)
    try:
        line = await asyncio.wait_for(reader.readline(), _START_S)
        if not line:
            raise RuntimeError(f"the server of {path} did not start; see its messages above")
        yield Server(process.pid, json.loads(line)["port"], cpus, reader, writer)
    finally:
        writer.close()
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
