"""The test in docs/testing.md, run by pytest as a reader would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import blocks

GUARD_S = 60.0


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    (folder / "pytest.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_documented_test_passes_and_can_fail(tmp_path: Path) -> None:
    printed = blocks("pytest")["stream"].text
    lines = printed[printed.index("@pytest") :].splitlines()
    assert len(lines) - 1 <= 10, "the document promises ten lines"
    (tmp_path / "app.py").write_text(blocks("program")["smallest"].text)
    (tmp_path / "test_words.py").write_text(printed)
    (tmp_path / "test_other_words.py").write_text(printed.replace('"Each"', '"Every"'))
    done = run_pytest(tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1][:18]) == (1, "1 failed, 1 passed"), done.stdout
    assert "FAILED test_other_words.py" in done.stdout


def test_the_plugin_imports_no_optional_dependencies() -> None:
    heavy = "starlette.testclient hypothesis httpx trio redis fastapi".split()
    script = f"import sys, asgi_realtime_pytest; print(sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
