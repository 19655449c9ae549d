"""The multiprocess mode of prometheus-client: two workers of uvicorn, and either of them responds for both."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from tests.e2e.metrics_app import SECRET
from tests.e2e.stage import GUARD_S, ROOT
from tests.test_metrics import Values, values

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        command = [sys.executable, "-m", "uvicorn", "tests.e2e.metrics_app:app", "--workers", "2"]
        process = subprocess.Popen(
            [*command, "--fd", str(listener.fileno())],
            cwd=ROOT,
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
        try:
            yield process, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def test_one_scrape_has_the_sums_of_all_workers(
    server: tuple[subprocess.Popen[bytes], str], tmp_path: Path
) -> None:
    process, url = server
    pids: set[int] = set()
    runs = 0

    async def scrape() -> Values:
        async with httpx.AsyncClient(base_url=url, timeout=GUARD_S) as client:
            response = await client.get("/realtime/v1/metrics", headers={"authorization": f"Bearer {SECRET}"})
            assert response.status_code == 200
            return values(response.text)

    async def run() -> None:
        nonlocal runs
        async with httpx.AsyncClient(base_url=url, timeout=GUARD_S) as client:  # a connection of its own
            pids.add((await client.post("/run")).json()["pid"])
            runs += 1

    while len(pids) < 2:
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(run)

    expected = {
        ("runs_total", ("COMPLETED", "words")): runs,
        ("runs_executing", ("open",)): runs,
        ("received_chunks_total", ()): 2 * runs,
        ("first_chunk_seconds_count", ("words",)): runs,
    }
    while not expected.items() <= (found := await scrape()).items():  # the other worker writes at every tick
        assert all(found.get(key, 0) <= value for key, value in expected.items()), found
    for _ in range(4):  # whichever worker responds
        found = await scrape()
        assert expected.items() <= found.items()

    process.send_signal(signal.SIGTERM)
    await anyio.to_thread.run_sync(process.wait)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))  # type: ignore[no-untyped-call]
    assert registry.get_sample_value("asgi_realtime_runs_executing", {"task": "open"}) == 0
