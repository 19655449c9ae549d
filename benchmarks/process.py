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
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(slots=True)
class Server:
    """A running server, and the way to command it."""

    pid: int
    port: int
    cpu: int
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

    def cpu_s(self) -> float:
        """CPU time of the whole process so far, to the nanosecond and without asking it."""
        # The kernel's number for another process's CPU clock, as clock_getcpuclockid(3) computes it.
        return time.clock_gettime((~self.pid << 3) | 2)

    def busy_s(self) -> float:
        """Time that its CPU has not been idle so far, whoever used it."""
        line = re.search(rf"^cpu{self.cpu} (.*)$", Path("/proc/stat").read_text(), re.MULTILINE)
        if line is None:
            raise RuntimeError(f"/proc/stat has no line of cpu{self.cpu}")
        user, nice, system, _idle, _iowait, *rest = map(int, line[1].split()[:8])
        return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")

    def memory_kib(self) -> int:
        """Its proportional share of memory in use: private pages, and its part of shared ones."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        match = re.search(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE)
        if match is None:
            raise RuntimeError(f"/proc/{self.pid}/smaps_rollup has no Pss line")
        return int(match[1])


@contextlib.asynccontextmanager
async def run_server(peer: str, *, cpu: int) -> AsyncIterator[Server]:
    """Start one peer's server on the given CPU, wait until it listens, and end it by its pid."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "benchmarks.servers", peer, str(theirs.fileno()), str(cpu)]
        # Not asyncio's: its child watcher would wake up the client's loop, and nothing is read from the process.
        process = subprocess.Popen(  # noqa: ASYNC220
            command, cwd=_ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
    reader, writer = await asyncio.open_connection(sock=ours, limit=_LINE_LIMIT)
    try:
        line = await asyncio.wait_for(reader.readline(), _START_S)
        if not line:
            raise RuntimeError(f"the {peer} server did not start; see its messages above")
        yield Server(process.pid, json.loads(line)["port"], cpu, reader, writer)
    finally:
        writer.close()
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
