"""The servers of the matrix, started by their command lines as users do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests import processes
from tests.ports import free_port

ROOT = Path(__file__).parent.parent.parent.parent
GUARD_S = 60.0
"""The longest wait. It says nothing about speed, as the machine may be busy."""

# With more than one thread, granian occasionally panics in a stopping worker before it notifies the app.
SERVERS = {
    "uvicorn": ["uvicorn", "{app}", "--host", "127.0.0.1", "--port", "{port}", "--workers", "{workers}"],
    "hypercorn": ["hypercorn", "{app}", "--bind", "127.0.0.1:{port}", "--workers", "{workers}"],
    "hypercorn-trio": ["hypercorn", "{app}", "-k", "trio", "--bind", "127.0.0.1:{port}", "--workers", "{workers}"],
    "granian": ["granian", "{app}", "--interface", "asgi", "--host", "127.0.0.1", "--port", "{port}"]
    + ["--workers", "{workers}", "--no-ws", "--runtime-mode", "st"],
    "gunicorn": ["gunicorn", "{app}", "-k", "asgi", "--bind", "127.0.0.1:{port}", "--workers", "{workers}"],
    "gunicorn-uvicorn": ["gunicorn", "{app}", "-k", "uvicorn_worker.UvicornWorker", "--bind", "127.0.0.1:{port}"]
    + ["--workers", "{workers}"],
}
ROOT_PATH = {
    "uvicorn": "--root-path",
    "hypercorn": "--root-path",
    "hypercorn-trio": "--root-path",
    "granian": "--url-path-prefix",
    "gunicorn": "--root-path",
}
"""How to tell each server that a proxy strips a prefix. uvicorn's gunicorn worker has no option for it."""


@dataclass
class Serving:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait(self) -> int:
        return self.process.wait(timeout=GUARD_S)

    def terminate(self) -> None:
        """Send SIGTERM to the main process, as a process manager does."""
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def serving(
    server: str,
    folder: Path,
    environment: dict[str, str],
    *options: str,
    app: str = "tests.e2e.hosts.apps:app",
    workers: int = 1,
    cwd: Path = ROOT,
    health: str = "/realtime/v1/health",
) -> Iterator[Serving]:
    """Start a server and wait until the library in it responds. At the end, kill what is left, including children."""
    port = free_port()
    command = [part.format(app=app, port=port, workers=workers) for part in SERVERS[server]]
    if server == "uvicorn" and workers == 1:
        command = command[:-2]  # with --workers it serves from a child process, and --reload does not accept the option
    outside = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}  # no test uses it
    log = folder / "server.log"
    env = {**outside, **environment, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    with processes.running([sys.executable, "-m", *command, *options], log, cwd=cwd, env=env) as process:
        running = Serving(process, f"http://127.0.0.1:{port}", log)
        _until_it_answers(running, health)
        yield running


def _until_it_answers(running: Serving, health: str) -> None:
    deadline = time.monotonic() + GUARD_S
    while True:
        try:
            if httpx.get(running.url + health, timeout=GUARD_S).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert running.process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the guest does not answer"
        time.sleep(0.02)
