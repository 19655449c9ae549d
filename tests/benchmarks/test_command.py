"""The command runs, and its exit code shows whether all chunks were delivered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.requirements import redis_binary

pytest.importorskip("uvloop")

_ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_a_quick_run_of_the_raw_server_succeeds(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--peers", "raw", "--only", "burst", "--json", str(file)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    row = json.loads(file.read_text())["workloads"]["burst"]["summary"]["raw"]
    assert row["missing"] == row["duplicated"] == row["damaged"] == 0
    assert row["us_per_event"] > 0
    assert row["ratio"] == 1


@pytest.mark.slow
@pytest.mark.redis
def test_a_quick_run_over_redis_succeeds(tmp_path: Path) -> None:
    redis_binary()
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "redis", "--quick", "--peers", "asgi_realtime", "--json", str(file)]
    done = subprocess.run([*command, "--only", "storm-1000,footprint"], cwd=_ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    workloads = json.loads(file.read_text())["workloads"]
    assert set(workloads) == {"storm-1000", "footprint"}
    for name in workloads:
        row = workloads[name]["summary"]["asgi_realtime"]
        assert row["missing"] == row["duplicated"] == row["damaged"] == 0
        assert row["sent"] > 0


def test_an_unknown_name_is_rejected() -> None:
    command = [sys.executable, "-m", "benchmarks", "--only", "sideways"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)

    assert done.returncode == 2
    assert "fanout" in done.stderr
