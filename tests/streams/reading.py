"""Helpers for the tests of readers and followers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from tests.faults import RemoteBroker, steps, take
from tests.inprocess import GUARD_S


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


def broker_for(where: str) -> dict[str, Any]:
    return {"broker": RemoteBroker()} if where == "remote" else {}


where = pytest.mark.parametrize("where", ["memory", "remote"])


async def cancelled_after(turns: int, items: AsyncIterator[Any], into: list[Any]) -> None:
    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as group:
            group.start_soon(take, items, into)
            await steps(turns)
            group.cancel_scope.cancel()
