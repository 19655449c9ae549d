"""A short soak: every reader of every run gets each chunk once, and nothing remains in the server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.requirements import redis_binary

_ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.redis
def test_a_short_soak_survives_a_crash_of_redis() -> None:
    redis_binary()
    command = [sys.executable, "-m", "benchmarks.soak", "--seconds", "4", "--visitors", "4", "--redis"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout
