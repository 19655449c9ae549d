"""The fixtures in a test folder elsewhere, where pytest finds them through the entry point."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import asgi_realtime_pytest as plugin

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
                assert (await response.next_event(timeout=30)).json() == "Hello"
                await realtime_clock.advance("16m")
                assert [event.event async for event in response.aiter_events()][-1] == "end"
    with pytest.raises(ExpiredToken):
        realtime.verify_token(token)

def test_explicit_settings_come_first(realtime_factory, realtime_clock):
    made = realtime_factory(secret_key="another secret of 32 bytes or more.", debug=True)
    assert (made.debug, made.clock, made.timeouts.tick) == (True, realtime_clock, 0.02)
    assert made.tokens.is_secret("another secret of 32 bytes or more.")
"""

CLIENT_AS_FIXTURE = """
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


def run_pytest(folder: Path, mode: str, **sources: str) -> str:
    for name, source in sources.items():
        (folder / f"test_{name}.py").write_text(source, "utf-8")
    (folder / "pytest.ini").write_text(INI, "utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:valkey", f"--asyncio-mode={mode}"]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_fixtures_work_with_the_marks_of_pytest_asyncio_and_anyio(tmp_path: Path) -> None:
    sources = {name: TEST.replace("MARK", f"@pytest.mark.{name}") for name in ("asyncio", "anyio")}
    assert "5 passed" in run_pytest(tmp_path, "strict", **sources)  # anyio runs it on asyncio and on trio


@pytest.mark.slow
def test_the_fixtures_work_in_the_auto_mode_of_pytest_asyncio(tmp_path: Path) -> None:
    assert "3 passed" in run_pytest(tmp_path, "auto", test=TEST.replace("MARK", ""), client=CLIENT_AS_FIXTURE)


def test_the_fixtures_are_documented_and_the_plugin_does_nothing_else() -> None:
    source = Path(plugin.__file__).read_text("utf-8")
    assert "autouse" not in source and "def pytest_" not in source
    for name in FIXTURES:
        assert getattr(plugin, name).__doc__


def test_the_plugin_does_not_import_the_library() -> None:
    """pytest loads it in every project of the environment, which cost 0.3 s."""
    project = tomllib.loads((Path(plugin.__file__).parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"asgi_realtime": plugin.__name__}
    code = f"import {plugin.__name__}, sys; print('asgi_realtime' in sys.modules, 'anyio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr
