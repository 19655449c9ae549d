from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.cli.command import Command
from tests.docs.programs import served
from tests.inprocess import SECRET

pytestmark = [pytest.mark.slow, pytest.mark.server]

PROGRAM = """
import logging
import os

from fastapi import FastAPI

from asgi_realtime import Realtime

realtime = Realtime(secret_key=os.environ["REALTIME_SECRET_KEY"], inspector=True)
app = FastAPI(lifespan=realtime.lifespan)
app.mount("/realtime", realtime)
app.mount("/off", Realtime(secret_key=os.environ["REALTIME_SECRET_KEY"]))

logging.getLogger("asgi_realtime").setLevel(logging.CRITICAL)  # a traceback would fail the fixture


@realtime.task("fails")
async def fails():
    raise ValueError("\\x1b]0;owned")


@app.post("/runs/{run_id}")
async def open_run(run_id: str, task: str = "chat"):
    if task == "fails":
        await realtime.trigger(fails, run_id=run_id)
        async for record in realtime.subscribe_to_run(run_id):
            pass
        return
    async with realtime.open_run(task, run_id=run_id, tags=["user:1"]):
        pass
"""


@contextmanager
def served_with_runs(folder: Path) -> Iterator[str]:
    with served(PROGRAM, folder, {"REALTIME_SECRET_KEY": SECRET}) as url:
        httpx.post(f"{url}/runs/run_1", timeout=30)
        httpx.post(f"{url}/runs/run_2?task=fails", timeout=30)
        httpx.post(f"{url}/runs/run_3?task=import", timeout=30)
        yield url


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served_with_runs(tmp_path_factory.mktemp("runs")) as url:
        yield url


def test_the_newest_run_is_printed_last(server: str, command: Command) -> None:
    done = command("runs", f"{server}/realtime")
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert [line[1:3] for line in lines] == [["run_1", "COMPLETED"], ["run_2", "FAILED"], ["run_3", "COMPLETED"]]
    assert lines[0][5:] == ["chat", "user:1"] and lines[1][5:] == ["fails", "ValueError"]


def test_the_runs_are_filtered(server: str, command: Command) -> None:
    def ids(*options: str) -> list[str]:
        done = command("runs", f"{server}/realtime", "--json", *options)
        return [json.loads(line)["id"] for line in done.out.splitlines()]

    assert ids("--task", "import") == ["run_3"]
    assert ids("--status", "FAILED,CRASHED") == ["run_2"]
    assert ids("--tag", "user:1") == ["run_1", "run_3"]
    assert ids("--limit", "1") == ["run_3"]


def test_following_prints_what_changes(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with served_with_runs(tmp_path) as server:
        rounds = iter(["run_4", None, ""])

        def sleep(seconds: float) -> None:
            run_id = next(rounds)
            if run_id == "":
                raise KeyboardInterrupt
            if run_id:
                httpx.post(f"{server}/runs/{run_id}", timeout=30)

        with monkeypatch.context() as patched:  # not while the server is stopped, which sleeps too
            patched.setattr("asgi_realtime.cli.runs.time.sleep", sleep)
            done = command("runs", f"{server}/realtime", "--follow", "--limit", "2", "--json")
    assert [json.loads(line)["id"] for line in done.out.splitlines()] == ["run_2", "run_3", "run_4"]
    assert done.code == 130


@pytest.mark.parametrize(
    ("path", "options", "code", "error"),
    [
        ("/off", [], 2, "asgi-realtime: the server has no inspector; turn it on with Realtime(inspector=True)"),
        ("/realtime", ["--status", "DONE"], 2, "asgi-realtime: status is 'DONE'; allowed are DELAYED, QUEUED"),
        ("/realtime", ["--secret-key-file", "/dev/null"], 2, "asgi-realtime: no secret key: set $REALTIME_SECRET_KEY"),
    ],
)
def test_errors(server: str, command: Command, path: str, options: list[str], code: int, error: str) -> None:
    done = command("runs", f"{server}{path}", *options)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(error)


def test_a_wrong_key(server: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("another secret of the tests, also of 32 bytes or more", "schlüssel"):
        monkeypatch.setenv("REALTIME_SECRET_KEY", key)
        done = command("runs", f"{server}/realtime")
        assert done.code == 1 and done.err.startswith("invalid_token: ") and key not in done.err


def test_a_server_that_cannot_be_reached(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    done = command("runs", "http://127.0.0.1:1/realtime")
    assert done.code == 1 and "http://127.0.0.1:1/realtime/inspect/runs cannot be reached" in done.err
    monkeypatch.delenv("REALTIME_SECRET_KEY")
    assert "no secret key: set $REALTIME_SECRET_KEY" in command("runs", "http://127.0.0.1:1/realtime").err
