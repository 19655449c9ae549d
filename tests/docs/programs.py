"""Runs programs of the documents under uvicorn as a reader would, with an endpoint that imitates a language model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

GUARD_S = 60.0


@contextmanager
def served(source: str, folder: Path, environment: dict[str, str] | None = None) -> Iterator[str]:
    """Run `uvicorn app:app` on a free port and yield its address. Fails if SIGTERM does not end it in time.

    The port listens before the process starts, so early requests wait instead of being refused.
    """
    (folder / "app.py").write_text(source, "utf-8")
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "app:app", "--fd", str(bound.fileno())],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            pass_fds=[bound.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=GUARD_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode in (0, -signal.SIGTERM), output
    assert "Traceback" not in output, output


class _Completions(BaseHTTPRequestHandler):
    """Streams one completion, one word per chunk."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for word in ("Hel", "lo"):
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            self.wfile.write(b"data: %b\n\n" % json.dumps(chunk).encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def completions_endpoint() -> Iterator[dict[str, str]]:
    """Serve completions, and yield the environment for the openai client."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Completions) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield {"OPENAI_BASE_URL": f"http://127.0.0.1:{server.server_port}/v1", "OPENAI_API_KEY": "none"}
        finally:
            server.shutdown()
            thread.join()
