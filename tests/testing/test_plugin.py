"""The fixtures as a user has them: in a test file elsewhere, found through the entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asgi_realtime.testing import plugin

FIXTURES = ("realtime_client", "realtime_clock", "realtime_factory")

TEST = """
from asgi_realtime import ExpiredToken
import pytest

MARK
async def test_it(realtime_client, realtime_clock, realtime_factory):
    realtime = realtime_factory()
    async with realtime, realtime.open_run("sample") as run:
        token = realtime.create_public_token(scopes={"read": {"runs": run.id}}, expires_in="15m")
        async with realtime_client(realtime, token=token, lifespan=False) as client:
            async with client.stream(f"/v1/streams/{run.id}/default") as response:
                await realtime.append("Hello")
                assert (await response.next_event(timeout=5)).json() == "Hello"
                await realtime_clock.advance("16m")
                assert [event.event async for event in response.aiter_events()][-1] == "end"
    with pytest.raises(ExpiredToken):
        realtime.verify_token(token)

def test_settings_of_the_user_come_first(realtime_factory, realtime_clock):
    made = realtime_factory(secret_key="another secret of 32 bytes or more.", debug=True)
    assert (made.debug, made.clock, made.timeouts.tick) == (True, realtime_clock, 0.02)
    assert made.tokens.is_secret("another secret of 32 bytes or more.")
"""

MODES = {
    "asyncio-strict": ("@pytest.mark.asyncio", ["--asyncio-mode=strict"]),
    "asyncio-auto": ("", ["--asyncio-mode=auto"]),
    "anyio": ("@pytest.mark.anyio", []),
}

IN_A_FIXTURE = """
import pytest_asyncio

@pytest_asyncio.fixture
async def client(realtime_client):
    log = []

    async def app(scope, receive, send):
        while (message := await receive())["type"] != "lifespan.shutdown":
            log.append(message["type"])
            await send({"type": "lifespan.startup.complete"})
        log.append("lifespan.shutdown")
        await send({"type": "lifespan.shutdown.complete"})

    async with realtime_client(app) as client:
        client.log = log
        yield client
    assert log == ["lifespan.startup", "lifespan.shutdown"]

async def test_it(client):
    assert client.log == ["lifespan.startup"]
"""


INI = """[pytest]
filterwarnings = error
asyncio_default_fixture_loop_scope = function
"""


def run_pytest(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_user.py").write_text(source, "utf-8")
    (folder / "pytest.ini").write_text(INI, "utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:valkey", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(90)
@pytest.mark.parametrize("mode", MODES)
def test_the_fixtures_work_under(mode: str, tmp_path: Path) -> None:
    mark, arguments = MODES[mode]
    done = run_pytest(tmp_path, TEST.replace("MARK", mark), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{3 if mode == 'anyio' else 2} passed" in done.stdout  # anyio's plugin runs it on asyncio and on trio


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_client_may_live_in_a_fixture_of_pytest_asyncio(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, IN_A_FIXTURE, "--asyncio-mode=auto")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_fixtures_are_documented_and_nothing_happens_by_itself() -> None:
    source = Path(plugin.__file__).read_text("utf-8")
    assert "autouse" not in source and "def pytest_" not in source
    for name in FIXTURES:
        assert getattr(plugin, name).__doc__
