"""The guide's programs with job workers, started as documented, each with its own Redis."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from asgi_realtime.testing import EventParser
from tests import processes
from tests.docs.blocks import blocks
from tests.docs.programs import served
from tests.redis_servers import RedisServer

WORKERS = blocks("worker")
COMMANDS = {
    "taskiq": "taskiq worker app:queue --workers 2 --wait-tasks-timeout 20",
    "celery": "celery -A app:celery worker",
    "celery_task": "celery -A app:celery worker",
}
SECRET = "a secret that is long enough for the tests"
GUARD_S = 60.0

pytestmark = [pytest.mark.slow, pytest.mark.redis]


def test_every_program_with_workers_is_started_as_documented() -> None:
    assert set(WORKERS) == set(COMMANDS)
    for name, command in COMMANDS.items():
        assert f"$ {command}\n" in WORKERS[name].document.read_text("utf-8")


@contextmanager
def working(command: str, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Run a worker in a folder. Fails if SIGTERM does not end it in time."""
    words, log = [sys.executable, "-m", *command.split()], folder / "worker.log"
    with processes.running(words, log, cwd=folder, env={**os.environ, **environment}) as process:
        yield
        process.send_signal(signal.SIGTERM)
        process.wait(GUARD_S)


@pytest.mark.parametrize("name", WORKERS)
def test_a_program_with_workers(name: str, tmp_path: Path, redis_server: RedisServer) -> None:
    environment = {"REDIS_URL": redis_server.url, "REALTIME_SECRET_KEY": SECRET}
    with served(WORKERS[name].text, tmp_path, environment) as url, working(COMMANDS[name], tmp_path, environment):
        handle = httpx.post(f"{url}/count", params={"limit": 3}, timeout=GUARD_S).json()
        query = {"access_token": handle["publicAccessToken"]}
        parser = EventParser()
        with httpx.stream(
            "GET", f"{url}/realtime/v1/streams/{handle['id']}/default", params=query, timeout=GUARD_S
        ) as r:
            events = [event for body in r.iter_bytes() for event in parser.feed(body)]
        run = httpx.get(f"{url}/realtime/api/v3/runs/{handle['id']}", params=query, timeout=GUARD_S).json()
    assert [json.loads(event.data) for event in events] == [0, 1, 2, {"reason": "complete"}]
    assert (run["status"], run["output"]) == ("COMPLETED", 3)
