"""A namespace on a shared Redis for one test of job workers, and the processes that use it."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import redis

from asgi_realtime import Realtime, RunCanceled, RunFailed
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.runs.handles import RunHandle
from asgi_realtime.tasks.options import RunLike
from tests import processes

GUARD_S = 60.0
ROOT = Path(__file__).parent.parent.parent


@dataclass
class Stage:
    """A namespace on the shared Redis, and the processes that use it."""

    url: str
    prefix: str
    folder: Path
    realtime: Realtime
    client: redis.Redis
    processes: ExitStack

    @contextmanager
    def running(
        self, *command: str, environment: Mapping[str, str] | None = None, **options: Any
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run a command in a new session. At the end, kill what is left."""
        log = self.folder / f"{secrets.token_hex(4)}.log"
        env = {**os.environ, "REDIS_URL": self.url, "PREFIX": self.prefix, **(environment or {})}
        with processes.running([sys.executable, "-m", *command], log, cwd=ROOT, env=env, **options) as process:
            yield process

    def start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        return self.processes.enter_context(self.running(*command, **options))

    def start_worker(self, *options: str, workers: int = 1) -> subprocess.Popen[bytes]:
        return self.start("taskiq", "worker", "tests.e2e.worker_app:queue", "--workers", str(workers), *options)

    def start_web(self) -> str:
        return self.start_web_process()[0]

    def start_web_process(self) -> tuple[str, subprocess.Popen[bytes]]:
        """A web process and its address."""
        with socket.create_server(("127.0.0.1", 0)) as bound:
            command = ("uvicorn", "tests.e2e.worker_app:app", "--fd", str(bound.fileno()))
            process = self.start(*command, pass_fds=[bound.fileno()])
            return f"http://127.0.0.1:{bound.getsockname()[1]}", process

    async def begun(self, handle: RunHandle[Any], chunks: int = 3) -> int:
        """Wait until a worker executes the run and has written something. Return the pid of the worker."""
        found = 0
        async for _ in self.realtime.read(handle):
            found += 1
            if found == chunks:
                break
        return await self.worker_of(handle)

    async def worker_of(self, handle: RunHandle[Any]) -> int:
        """The pid of the process that executes a run."""
        async for record in self.realtime.subscribe_to_run(handle):
            if "pid" in record.metadata:
                pid: int = record.metadata["pid"]
                return pid
        raise AssertionError("it ended without the pid of its process")

    async def chunks(self, handle: RunLike) -> list[Any]:
        """All chunks of an ended run, however it ended."""
        found: list[Any] = []
        try:
            async for chunk in self.realtime.read(handle):
                found.append(chunk)  # noqa: PERF401 - what came before the end stays
        except (RunFailed, RunCanceled):
            pass
        return found

    async def ended(self, handle: RunHandle[Any]) -> StoredRecord:
        return await self.realtime.runs.ended(handle.id)

    def note(self, handle: RunHandle[Any]) -> str | None:
        found: Any = self.client.hget(f"{self.prefix}:notes", handle.id)
        return None if found is None else found.decode()

    def executions(self, handle: RunHandle[Any]) -> int:
        """How often the code of the run was started."""
        return self._counted("executions", handle)

    def deliveries(self, handle: RunHandle[Any]) -> int:
        """How often the queue delivered the run, if the worker counts that."""
        return self._counted("deliveries", handle)

    def _counted(self, what: str, handle: RunHandle[Any]) -> int:
        found: Any = self.client.hget(f"{self.prefix}:{what}", handle.id)
        return int(found or 0)

    def pending(self) -> int:
        """The number of delivered messages that are not acknowledged."""
        found: Any = self.client.xpending(f"{self.prefix}:queue", "taskiq")
        return int(found["pending"])


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - of other processes
        await anyio.sleep(0.01)


Make = Callable[[str, str], Realtime]
"""Creates the `Realtime` of the test process, from a URL and a prefix."""


@asynccontextmanager
async def staged(url: str, folder: Path, make: Make) -> AsyncIterator[Stage]:
    prefix = f"t{secrets.token_hex(6)}"
    with ExitStack() as processes, redis.from_url(url) as client, anyio.fail_after(GUARD_S):
        async with make(url, prefix) as realtime:
            yield Stage(url, prefix, folder, realtime, client, processes)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
