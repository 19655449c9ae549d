"""Build the page of this folder, and run an app behind it: in two web processes with Redis, or else in one.

It needs Node and `npm install` in this folder. PORT is the first port to try.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from examples.local_model import ModelMissing
from examples.local_redis import local_redis, wait_until
from examples.processes import running
from examples.redis_workers.__main__ import is_up
from examples.server import free_socket

FOLDER = Path(__file__).parent
VITE = FOLDER / "node_modules/.bin/vite"


def build() -> None:
    """Build the page, unless that has been done since the last change."""
    sources = [path for pattern in ("*.html", "*.json", "*.ts", "src/*") for path in FOLDER.glob(pattern)]
    built = FOLDER / "dist/index.html"
    if not built.exists() or any(path.stat().st_mtime > built.stat().st_mtime for path in sources):
        subprocess.run([VITE, "build", FOLDER, "--logLevel", "error"], check=True)


def has_redis() -> bool:
    return "REDIS_URL" in os.environ or bool(shutil.which("redis-server") or shutil.which("valkey-server"))


def web(app: str, port: int) -> list[str]:
    """The command of a web process."""
    return [sys.executable, "-m", "uvicorn", app, "--log-level", "warning", "--port", str(port)]


def run(app: str) -> None:
    with ExitStack() as stack:
        with free_socket(int(os.environ.get("PORT", "8000"))) as bound:
            port = bound.getsockname()[1]
        key = os.environ.get("REALTIME_SECRET_KEY") or secrets.token_urlsafe(32)
        environment = {**os.environ, "REALTIME_SECRET_KEY": key}
        command = web(app, port)
        processes: list[subprocess.Popen[bytes]] = []
        if has_redis():
            redis = stack.enter_context(local_redis())
            environment["REALTIME_BROKER"] = redis.url
            command += ["--workers", "2"]
            processes += redis.processes
        processes.append(stack.enter_context(running(*command, environment=environment)))
        wait_until(lambda: is_up(f"http://127.0.0.1:{port}"), processes)
        print(f"The chat is at http://127.0.0.1:{port} (press Ctrl-C to stop)", flush=True)
        wait_until(lambda: False, processes)


def main(app: str, model: AbstractContextManager[object]) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    if not VITE.exists():
        sys.exit(f"{VITE} is missing: run `npm install` in {FOLDER} (requires Node 18 or newer)")
    try:
        build()
        with model:
            run(app)
    except ModelMissing as exc:
        sys.exit(f"{exc}.\nOr set OPENAI_BASE_URL or OPENAI_API_KEY to use another endpoint.")
    except KeyboardInterrupt:
        pass
