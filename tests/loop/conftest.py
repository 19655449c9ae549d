from __future__ import annotations

import gc
from collections.abc import AsyncIterator

import anyio
import anyio.lowlevel
import pytest


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    """Fails a test that leaves a task behind."""
    await _collect()
    before = len(anyio.get_running_tasks())
    yield
    await _collect()
    assert len(anyio.get_running_tasks()) == before


async def _collect() -> None:
    """Collect garbage, also that of earlier tests, and let the tasks end that close async generators in it."""
    gc.collect()
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
