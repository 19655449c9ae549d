"""`python -m examples.react_app`: the model, the FastAPI example, and this page on another port, until Ctrl-C.

It needs Node and `npm install` in this folder. PORT is the first port to try.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from urllib.request import urlopen

from examples.local_model import ModelMissing, model_endpoint
from examples.local_redis import wait_until
from examples.processes import running
from examples.server import free_socket

FOLDER = Path(__file__).parent
VITE = FOLDER / "node_modules/.bin/vite"
WEB = "uvicorn examples.fastapi_app.app:app --log-level warning"


def is_up(url: str) -> bool:
    try:
        with urlopen(url, timeout=10) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def free_port(first: int) -> int:
    with free_socket(first) as bound:
        port: int = bound.getsockname()[1]
        return port


def run() -> None:
    with model_endpoint(), ExitStack() as stack:
        port = free_port(int(os.environ.get("PORT", "8000")))
        backend, page_port = f"http://127.0.0.1:{port}", free_port(5173)
        environment = {**os.environ, "BACKEND_URL": backend, "VITE_REALTIME_URL": f"{backend}/realtime"}
        vite = (str(VITE), str(FOLDER), "--port", str(page_port), "--host", "127.0.0.1", "--logLevel", "warn")
        commands = [(sys.executable, "-m", *WEB.split(), "--port", str(port)), vite]
        processes = [stack.enter_context(running(*command, environment=environment)) for command in commands]
        page = f"http://127.0.0.1:{page_port}"
        wait_until(lambda: is_up(f"{backend}/realtime/v1/health") and is_up(page), processes)
        print(f"The chat is at {page} (press Ctrl-C to stop)", flush=True)
        wait_until(lambda: False, processes)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    if not VITE.exists():
        sys.exit(f"{VITE} is missing: run `npm install` in {FOLDER} (requires Node 18 or newer)")
    try:
        run()
    except ModelMissing as exc:
        sys.exit(f"{exc}.\nOr set OPENAI_BASE_URL or OPENAI_API_KEY to use another endpoint.")
    except KeyboardInterrupt:
        pass
