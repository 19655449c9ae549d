"""The program of the guide that saves answers, in two processes: what had arrived is saved after a Stop and a crash."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from asgi_realtime.testing import EventParser
from tests.docs.blocks import blocks
from tests.docs.programs import GUARD_S, served

pytestmark = [pytest.mark.slow, pytest.mark.redis]

PROGRAM = blocks("program")["history"].text
TOGETHER = """
    import pathlib
    pathlib.Path(f"{os.getpid()}.starts").touch()
    while len(list(pathlib.Path().glob("*.starts"))) < 2:
        pass
    async with engine.begin() as"""
"""Both processes create the table at the same moment: the slower one must not fail."""
STAGED = (
    PROGRAM.replace("realtime = Realtime(", "realtime = Realtime(timeouts=Timeouts(lease=1), ")
    .replace("import Realtime, ", "import Timeouts, Realtime, ")
    .replace("\n    async with engine.begin() as", TOGETHER)
)


@contextmanager
def killed(folder: Path, environment: dict[str, str]) -> Iterator[tuple[str, int]]:
    """A second process of the same program, its address and its pid. It is killed."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        command = [sys.executable, "-m", "uvicorn", "app:app", "--fd", str(bound.fileno())]
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, pass_fds=[bound.fileno()], stderr=subprocess.DEVNULL
        )
    try:
        yield address, process.pid
    finally:
        process.kill()
        process.wait()


def saved(database: Path, run_id: str) -> tuple[str, list[dict[str, str]]]:
    """The status and the parts of the saved message, once there is one."""
    deadline = time.monotonic() + GUARD_S
    while time.monotonic() < deadline:
        with sqlite3.connect(database) as connection:
            rows = connection.execute("SELECT status, parts FROM messages WHERE run = ?", (run_id,)).fetchall()
        connection.close()
        if rows:
            ((status, parts),) = rows
            return status, json.loads(parts)
        time.sleep(0.02)
    raise AssertionError(f"nothing was saved for run {run_id}")


def test_the_partial_answer_is_saved_after_a_stop_and_after_a_crash(tmp_path: Path, redis_url: str) -> None:
    database = tmp_path / "history.db"
    environment = {
        "REALTIME_SECRET_KEY": secrets.token_hex(32),
        "REDIS_URL": redis_url,
        "DATABASE_URL": f"sqlite+aiosqlite:///{database}",
    }
    with served(STAGED, tmp_path, environment) as survivor, killed(tmp_path, environment) as (victim, pid):
        for how, status in (("stop", "CANCELED"), ("crash", "CRASHED")):
            started = httpx.post(f"{victim}/answers", params={"prompt": how}, timeout=GUARD_S).json()
            stream = f"{survivor}/realtime/v1/streams/{started['id']}/default"
            headers = {"authorization": f"Bearer {started['publicAccessToken']}"}
            parser, chunks, ended = EventParser(), [], False
            with httpx.stream("GET", stream, headers=headers, timeout=GUARD_S) as response:
                for body in response.iter_bytes():
                    for event in parser.feed(body):
                        chunks += [json.loads(event.data)] if event.event == "message" else []
                    if len(chunks) >= 3 and not ended:
                        ended = True
                        if how == "stop":
                            url = f"{survivor}/answers/{started['id']}/stop"
                            assert httpx.post(url, timeout=GUARD_S).status_code == 204
                        else:
                            os.kill(pid, signal.SIGKILL)
            assert chunks == [f"{how} {number}, " for number in range(len(chunks))]
            saved_status, parts = saved(database, started["id"])
            assert saved_status == status
            assert "".join(part["text"] for part in parts) == "".join(chunks)
