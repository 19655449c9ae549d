"""The packages of model clients, which pip installs with the group `models`."""

from __future__ import annotations

import importlib
from typing import Any

from tests.requirements import missing


def need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        missing(f"{exc.name} is not installed (make clients)")
