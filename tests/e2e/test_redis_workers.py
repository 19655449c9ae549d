"""The example with several processes, as one command starts it: web workers, job workers and Redis."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page

from asgi_realtime.testing import Event, EventParser
from examples.redis_workers.__main__ import WEB, WORKER
from tests.docs.programs import completions_endpoint
from tests.e2e.conftest import GUARD_S, ROOT, Server, example
from tests.e2e.fake_model import ANSWER, FakeModel
from tests.e2e.test_chat_page import (
    answer,
    ask,
    ask_and_hold,
    context,
    held,
    load_run,
    open_chat,
    page,
    wait_for_end,
)
from tests.requirements import redis_binary

pytestmark = [pytest.mark.slow, pytest.mark.redis]

__all__ = ["context", "held", "page"]  # fixtures


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + GUARD_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def descendants(pid: int) -> set[int]:
    """All descendants of a process."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just exited
        parents[int(stat.parent.name)] = int(fields[1])
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found


def running(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


@contextmanager
def started(environment: dict[str, str]) -> Iterator[Server]:
    """The example with its own Redis. However the test ends, no process of it is left."""
    redis_binary()
    kept = {key: value for key, value in environment.items() if key != "REDIS_URL"}
    children: set[int] = set()
    with example("redis_workers", kept) as server:
        children = descendants(server.process.pid)
        yield server
    wait_until(lambda: not running(children))


@pytest.fixture
def without_redis_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)


@pytest.fixture
def answering() -> Iterator[dict[str, str]]:
    with completions_endpoint() as environment:
        yield environment


def chat(client: httpx.Client) -> tuple[dict[str, Any], list[Event]]:
    """Ask a question and read the stream to its end. Return the handle of the run, and the events."""
    handle: dict[str, Any] = client.post("/chat", json={"text": "Hi"}).json()
    parser = EventParser()
    path = f"/realtime/v1/streams/{handle['id']}/default?access_token={handle['publicAccessToken']}"
    with client.stream("GET", path) as response:
        return handle, [event for body in response.iter_bytes() for event in parser.feed(body)]


@pytest.mark.usefixtures("without_redis_url")
def test_a_worker_answers_and_ctrl_c_ends_everything(answering: dict[str, str]) -> None:
    with started(answering) as server:
        with httpx.Client(base_url=server.url, timeout=GUARD_S) as client:
            for _ in range(4):  # whichever web worker responds
                handle, events = chat(client)
                headers = {"authorization": f"Bearer {handle['publicAccessToken']}"}
                run = client.get(f"/realtime/api/v3/runs/{handle['id']}", headers=headers).json()
                words = [json.loads(event.data)["choices"][0]["delta"]["content"] for event in events[:-1]]
                assert words == ["Hel", "lo"]
                assert (events[-1].event, json.loads(events[-1].data)["reason"]) == ("end", "complete")
                assert (run["status"], run["output"]) == ("COMPLETED", {"text": "Hello"})
        children = descendants(server.process.pid)
        server.process.send_signal(signal.SIGINT)
        output, _ = server.process.communicate(timeout=GUARD_S)
        assert (server.process.returncode, output) == (0, "")
        wait_until(lambda: not running(children))  # processes that Python started end a little later


@pytest.mark.usefixtures("without_redis_url")
def test_no_process_survives_the_one_that_started_them(answering: dict[str, str]) -> None:
    with started(answering) as server:
        children = descendants(server.process.pid)
        assert len(children) > 6
        server.process.kill()
        wait_until(lambda: not running(children))


@pytest.fixture(scope="module")
def server(fake: FakeModel, redis_url: str) -> Iterator[Server]:
    """The example on an existing Redis."""
    with example("redis_workers", {**fake.environment, "REDIS_URL": redis_url}) as server:
        yield server
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(GUARD_S) == 0


def test_the_redis_in_the_environment_is_used(server: Server) -> None:
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in descendants(server.process.pid)]
    assert commands and not any("redis-server" in command for command in commands)
    with httpx.Client(base_url=server.url, timeout=GUARD_S) as client:
        _, events = chat(client)
    assert len(events) == len(ANSWER) + 1


def test_without_a_redis_the_error_says_what_to_do(answering: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.redis_workers"],
        cwd=ROOT,
        env={**answering, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=GUARD_S,
    )
    assert done.returncode == 1
    assert "apt-get install redis-server" in done.stderr and "REDIS_URL" in done.stderr


@pytest.mark.chromium
def test_the_chat_page_with_workers(server: Server, page: Page, held: FakeModel) -> None:
    open_chat(page, server)
    run_id = ask(page)
    wait_for_end(page, "COMPLETED")
    run = load_run(page, server, run_id)
    assert answer(page) == run["output"]["text"]
    assert page.text_content("#progress") == f"{run['metadata']['tokens']} tokens"

    run_id = ask_and_hold(page, held)
    before = answer(page)
    page.click("#stop")  # the worker, which waits for the model, is canceled
    wait_for_end(page, "CANCELED")
    held.let_go()
    assert answer(page).startswith(before)
    assert load_run(page, server, run_id)["status"] == "CANCELED"
    page.goto("about:blank")


def test_the_compose_file_starts_the_same() -> None:
    yaml: Any = importlib.import_module("yaml")  # a dependency of uvicorn; its types are a separate package
    compose = yaml.safe_load((ROOT / "examples/redis_workers/compose.yaml").read_text("utf-8"))
    services = compose["services"]
    assert set(services) == {"redis", "web", "worker"}
    for command, service in ((WEB, "web"), (WORKER, "worker")):
        program, *arguments = command.split()
        target = next(argument for argument in arguments if ":" in argument)
        assert services[service]["command"].startswith(program)
        assert target in services[service]["command"]
        assert {"REDIS_URL", "REALTIME_SECRET_KEY"} <= set(services[service]["environment"])
