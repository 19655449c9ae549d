from __future__ import annotations

from collections.abc import Sequence

import pytest

from asgi_realtime.core.topics import Change
from asgi_realtime.runs.paging import PAGE, newest, pages

pytestmark = pytest.mark.anyio

CHANGES = [Change(position, f"run_{position}", 1) for position in range(250)]


class Loader:
    """Returns the changes at even positions, and counts the requested ones."""

    def __init__(self) -> None:
        self.requested = 0

    async def __call__(self, page: Sequence[Change]) -> list[int]:
        self.requested += len(page)
        return [change.position for change in page if change.position % 2 == 0]


def test_pages_cover_all_changes_in_order() -> None:
    assert [len(page) for page in pages(CHANGES)] == [PAGE] * 7 + [250 - 7 * PAGE]
    assert [change for page in pages(CHANGES) for change in page] == CHANGES
    assert list(pages([])) == []


@pytest.mark.parametrize(("limit", "requested"), [(1, 32), (16, 32), (17, 64), (125, 250), (1000, 250)])
async def test_the_newest_are_found_from_the_end_and_returned_in_order(limit: int, requested: int) -> None:
    load = Loader()
    assert await newest(CHANGES, load, limit=limit) == list(range(0, 250, 2))[-limit:]
    assert load.requested == requested


async def test_an_empty_snapshot_loads_nothing() -> None:
    load = Loader()
    assert await newest([], load, limit=10) == []
    assert load.requested == 0
