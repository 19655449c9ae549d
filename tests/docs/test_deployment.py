"""The blocks of docs/deployment.md. Each program is started with the command in its first line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from asgi_realtime.testing import Event, EventParser
from tests import processes
from tests.docs.blocks import ROOT, blocks
from tests.ports import free_port
from tests.requirements import missing

GUARD_S = 60.0
SECRET = "a secret that is long enough for the tests"
WORDS = "Each word is sent as soon as it is produced.".split()
HOSTS = blocks("host")
DOCUMENT = (ROOT / "docs" / "deployment.md").read_text("utf-8")

_COMMANDS = re.compile(r"# app\.py, started with: (.+)\n")
_PORT = {"uvicorn": "--port={}", "hypercorn": "--bind=127.0.0.1:{}", "flask": "--port={}", "litestar": "--port={}"}

pytestmark = [pytest.mark.slow, pytest.mark.server]


@contextmanager
def running(command: str, folder: Path, environment: dict[str, str] | None = None) -> Iterator[str]:
    """Run a server command in a folder and yield its address once it listens. Fails if SIGTERM does not end it."""
    port = free_port()
    program, *arguments = command.split()
    log = folder / f"{program}.log"
    command_line = [sys.executable, "-m", program, *arguments, _PORT[program].format(port)]
    with processes.running(command_line, log, cwd=folder, env={**os.environ, **(environment or {})}) as process:
        wait_for_server(port, process)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(GUARD_S) in (0, -signal.SIGTERM)
    assert "Traceback" not in log.read_text(errors="replace")


def wait_for_server(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + GUARD_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=GUARD_S).close()
        except OSError:
            assert process.poll() is None, "the server exited"
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.02)
        else:
            return


def events_of(response: httpx.Response) -> Iterator[Event]:
    assert response.status_code == 200
    parser = EventParser()
    for body in response.iter_bytes():
        yield from parser.feed(body)


def check_streaming(app: str, streams: str) -> None:
    path = httpx.post(f"{app}/words", timeout=GUARD_S).text
    with httpx.stream("GET", streams + path, timeout=GUARD_S) as response:
        events = list(events_of(response))
    assert [json.loads(event.data) for event in events[:-1]] == WORDS
    assert (events[-1].event, events[-1].data) == ("end", '{"reason":"complete"}')


@contextmanager
def open_stream(app: str, streams: str) -> Iterator[None]:
    """Read a stream while its server stops, and check that the stream ends properly."""
    path = httpx.post(f"{app}/words", timeout=GUARD_S).text
    with httpx.stream("GET", streams + path, timeout=GUARD_S) as response:
        events = events_of(response)
        assert next(events).data == '"Each"'
        yield
        assert [event.event for event in events][-1] in ("reconnect", "end")  # `end` on a slow machine


@pytest.mark.parametrize("name", [name for name in HOSTS if name != "wsgi"])
def test_a_host_works_as_printed(name: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(HOSTS[name].text, "utf-8")
    found = _COMMANDS.match(HOSTS[name].text)
    assert found
    with ExitStack() as stack:
        server = stack.enter_context(running(found[1], tmp_path))
        check_streaming(server, server)
        with open_stream(server, server):
            stack.close()


@pytest.mark.redis
def test_flask_with_a_separate_stream_server(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(HOSTS["wsgi"].text, "utf-8")
    found = _COMMANDS.match(HOSTS["wsgi"].text)
    assert found
    flask, uvicorn = found[1].split(" and: ")
    environment = {"REALTIME_SECRET_KEY": SECRET, "REDIS_URL": redis_url}
    with running(flask, tmp_path, environment) as app, ExitStack() as stack:
        streams = stack.enter_context(running(uvicorn, tmp_path, environment))
        check_streaming(app, streams)
        with open_stream(app, streams):
            stack.close()


def test_every_host_has_a_program() -> None:
    asgi = {"fastapi", "starlette", "litestar", "quart", "blacksheep", "falcon", "django", "sanic"}
    assert set(HOSTS) == asgi | {"litestar_mount", "flask", "wsgi"}


def test_the_curl_lines_work(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        missing("curl is not installed")
    (tmp_path / "app.py").write_text(HOSTS["starlette"].text, "utf-8")
    with running("uvicorn app:app", tmp_path) as server:
        lines = blocks("lines")["words"].text.replace("localhost:8000", server.removeprefix("http://"))
        done = subprocess.run(["bash", "-ec", lines], capture_output=True, check=True)
    assert [event.data for event in EventParser().feed(done.stdout)][:-1] == [json.dumps(word) for word in WORDS]
