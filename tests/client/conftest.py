"""Parametrizes tests over both clients and both loops, and starts one real server for tests that do not stop it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.reading import KINDS
from tests.e2e.site import Site, serving


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    with serving("memory") as running:
        yield running
