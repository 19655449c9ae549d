"""`python -m examples.redis_workers`: Redis, the model, two web workers and two job workers, until Ctrl-C.

Set REDIS_URL to use another Redis. PORT is the first port to try.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
from contextlib import ExitStack
from urllib.request import urlopen

from examples.local_model import ModelMissing, model_endpoint
from examples.local_redis import local_redis, wait_until
from examples.processes import running
from examples.server import free_socket

WEB = "uvicorn examples.redis_workers.app:app --workers 2 --log-level warning"
WORKER = "taskiq worker examples.redis_workers.tasks:queue --workers 2 --log-level WARNING --wait-tasks-timeout 1"


def is_up(url: str) -> bool:
    try:
        with urlopen(f"{url}/realtime/v1/health", timeout=10) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def run() -> None:
    with model_endpoint(), local_redis() as redis, ExitStack() as stack:
        with free_socket(int(os.environ.get("PORT", "8000"))) as bound:
            port = bound.getsockname()[1]
        key = os.environ.get("REALTIME_SECRET_KEY") or secrets.token_urlsafe(32)
        environment = {**os.environ, "REDIS_URL": redis.url, "REALTIME_SECRET_KEY": key}
        processes = [
            stack.enter_context(running(sys.executable, "-m", *command.split(), environment=environment))
            for command in (WORKER, f"{WEB} --port {port}")
        ]
        wait_until(lambda: is_up(f"http://127.0.0.1:{port}"), processes)
        print(f"The chat is at http://127.0.0.1:{port} (press Ctrl-C to stop)", flush=True)
        wait_until(lambda: False, [*processes, *redis.processes])


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        run()
    except ModelMissing as exc:
        sys.exit(f"{exc}.\nOr set OPENAI_BASE_URL or OPENAI_API_KEY to use another endpoint.")
    except KeyboardInterrupt:
        pass
