"""A server in a process of its own: start, the control channel, its CPU time and memory, its end.

Control is JSON lines over a socket pair, not HTTP: it costs the measured server next to nothing, and the server ends
when this process does, because the channel ends.
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
    """Return the CPUs for server and client; the same one twice if the machine has no other."""
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[0], cpus[1 % len(cpus)]


def raise_file_limit() -> int:
    """Allow this process and its children as many open files as the system admits, and return the number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def process_cpu_s(pid: int) -> float:
    """CPU time of a whole process so far, to the nanosecond and without asking it."""
    # The kernel's number for another process's CPU clock, as clock_getcpuclockid(3) computes it.
    return time.clock_gettime((~pid << 3) | 2)


def busy_s(cpus: Collection[int]) -> float:
    """Time that these CPUs have not been idle so far, whoever used them."""
    total = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *numbers = line.split()
        if re.fullmatch(r"cpu\d+", name) and int(name[3:]) in cpus:
            user, nice, system, _idle, _iowait, *rest = map(int, numbers[:8])
            total += user + nice + system + sum(rest)
    return total / os.sysconf("SC_CLK_TCK")


class Target(Protocol):
    """What a workload drives: one server, or several processes that belong together."""

    @property
    def port(self) -> int:
        """Where subscribers connect to."""

    async def call(self, command: str, *, timeout_s: float = 60.0, **arguments: Any) -> Any: ...

    async def answer(self, *, timeout_s: float = 60.0) -> Any: ...

    def tell(self, command: str, **arguments: Any) -> None: ...

    def cpu_s(self) -> Mapping[str, float]:
        """CPU time of each of its processes so far."""

    def others_s(self) -> float:
        """CPU time so far that others took on the CPUs that it runs on."""

    def memory_kib(self) -> int: ...


@dataclass(slots=True)
class Server:
    """A running server, and the way to command it."""

    pid: int
    port: int
    cpus: Collection[int]
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter

    async def call(self, command: str, *, timeout_s: float = 60.0, **arguments: Any) -> Any:
        """Have the server do something and return its answer. One call at a time; `acknowledge` may come in between."""
        self.tell(command, **arguments)
        return await self.answer(timeout_s=timeout_s)

    async def answer(self, *, timeout_s: float = 60.0) -> Any:
        """Return the answer to what it was told before."""
        line = await asyncio.wait_for(self._reader.readline(), timeout_s)
        if not line:
            raise RuntimeError("the server ended before it answered; see its messages above")
        return json.loads(line)

    def tell(self, command: str, **arguments: Any) -> None:
        """Have it do something without waiting. Everything but `acknowledge` is answered, see `answer`."""
        self._writer.write(json.dumps({"do": command, **arguments}).encode() + b"\n")

    def cpu_s(self) -> Mapping[str, float]:
        return {"server": process_cpu_s(self.pid)}

    def others_s(self) -> float:
        return busy_s(self.cpus) - process_cpu_s(self.pid)

    def memory_kib(self) -> int:
        """Its proportional share of memory in use: private pages, and its part of shared ones."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        match = re.search(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE)
        if match is None:
            raise RuntimeError(f"/proc/{self.pid}/smaps_rollup has no Pss line")
        return int(match[1])


@contextlib.asynccontextmanager
async def run_server(path: str, *, cpus: Collection[int], redis_url: str = "") -> AsyncIterator[Server]:
    """Start the server of one peer's class on the given CPUs, wait until it listens, and end it by its pid."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "benchmarks.servers", path, str(theirs.fileno()), ",".join(map(str, cpus))]
        command += [redis_url] if redis_url else []
        # Not asyncio's: its child watcher would wake up the client's loop, and nothing is read from the process.
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
