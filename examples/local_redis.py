"""A Redis for an example: the one at REDIS_URL, or a temporary one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from examples.processes import running


@dataclass(frozen=True)
class Redis:
    """A Redis, and the processes started for it."""

    url: str
    processes: Sequence[subprocess.Popen[bytes]] = ()


@contextmanager
def local_redis() -> Iterator[Redis]:
    """Run a Redis for the duration of the block. It stores nothing on disk and listens on a Unix socket only."""
    if "REDIS_URL" in os.environ:
        yield Redis(os.environ["REDIS_URL"])
        return
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        sys.exit("redis-server is not installed (on Debian: apt-get install redis-server).\nOr set REDIS_URL.")
    with tempfile.TemporaryDirectory(prefix="redis") as folder:
        settings = ("--port", "0", "--unixsocket", f"{folder}/socket", "--save", "", "--logfile", f"{folder}/log")
        with running(binary, *settings, environment=os.environ) as process:
            wait_until(lambda: os.path.exists(f"{folder}/socket"), [process])
            yield Redis(f"unix://{folder}/socket", [process])


def wait_until(condition: Callable[[], bool], processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for a condition. Exits if one of the processes ends before; its own output explains why."""
    while not condition():
        if any(process.poll() is not None for process in processes):
            sys.exit(1)
        time.sleep(0.1)
