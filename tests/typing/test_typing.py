"""Users' code has precise types: strict mypy and pyright accept `sample.py`, in which each `assert_type` holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.requirements import node_binary, npm_packages

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WRONG = "\nassert_type(realtime, int)\n"

pytestmark = [pytest.mark.slow, pytest.mark.server]


def checked(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "sample.py").write_text((HERE / "sample.py").read_text("utf-8"), "utf-8")
    (folder / "wrong.py").write_text((HERE / "sample.py").read_text("utf-8") + WRONG, "utf-8")
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_strict_pyright_accepts_the_sample(tmp_path: Path) -> None:
    config = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)], "pythonVersion": "3.11"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    program = npm_packages(HERE) / "node_modules/pyright/index.js"
    done = checked(node_binary(), str(program), "--pythonpath", sys.executable, "--outputjson", folder=tmp_path)
    found = [(Path(one["file"]).name, one["rule"]) for one in json.loads(done.stdout)["generalDiagnostics"]]
    assert found == [("wrong.py", "reportAssertTypeFailure")], done.stdout


def test_strict_mypy_accepts_the_sample(tmp_path: Path) -> None:
    """As an app outside of this repository: with the installed package, not with our settings."""
    cache = f"--cache-dir={tmp_path}/cache"
    done = checked(sys.executable, "-m", "mypy", "--strict", cache, "sample.py", "wrong.py", folder=tmp_path)
    found = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [line.partition(":")[0] for line in found] == ["wrong.py"], done.stdout
    assert "[assert-type]" in found[0]
