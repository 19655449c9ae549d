from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asgi_realtime.engine.siblings import WARNING, Siblings
from tests.inprocess import make_realtime

PROGRAM = """
import logging, sys
import anyio
from asgi_realtime import Realtime

logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)

async def main():
    async with Realtime(secret_key="s" * 32, broker=sys.argv[1]):
        async with Realtime(secret_key="t" * 32):  # a second one in this process is not another worker
            print("ready", flush=True)
            sys.stdin.readline()

anyio.run(main)
"""


class Worker:
    """A worker process. Ends when the test calls `end`."""

    def __init__(self, folder: Path, broker: str = "memory://") -> None:
        (folder / "worker.py").write_text(PROGRAM)
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
        self.process = subprocess.Popen(
            [sys.executable, "worker.py", broker],
            cwd=folder,
            env={**environment, "TMPDIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def until_ready(self) -> list[str]:
        assert self.process.stdout is not None
        return list(iter(self.process.stdout.readline, "ready\n"))

    def end(self) -> None:
        self.process.communicate("\n")


@pytest.mark.slow
def test_the_second_worker_warns_and_one_that_starts_after_all_have_ended_does_not(tmp_path: Path) -> None:
    first = Worker(tmp_path)
    assert first.until_ready() == []
    second = Worker(tmp_path)
    assert second.until_ready() == [f"WARNING {WARNING}\n"] * 2  # from both of its objects
    second.end()
    first.end()
    third = Worker(tmp_path)
    assert third.until_ready() == []
    third.end()
    assert list(tmp_path.glob("*.lock")) == []


@pytest.mark.slow
def test_a_killed_worker_leaves_no_lock(tmp_path: Path) -> None:
    first = Worker(tmp_path)
    first.until_ready()
    first.process.kill()
    first.process.communicate()
    second = Worker(tmp_path)
    assert second.until_ready() == []
    second.end()


@pytest.mark.slow
def test_another_folder_is_another_app(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    workers = [Worker(folder) for folder in folders]
    assert [worker.until_ready() for worker in workers] == [[], []]
    for worker in workers:
        worker.end()


@pytest.mark.anyio
async def test_without_a_directory_for_the_lock_nothing_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    async with make_realtime():
        pass
    assert "several workers" not in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_leaves_the_lock_of_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It removed the file, so the next worker did not detect the parent."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    siblings = Siblings()
    siblings.check()
    (lock,) = tmp_path.glob("*.lock")
    child = os.fork()
    if not child:
        siblings.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert lock.exists()
    siblings.release()
    assert not lock.exists()
