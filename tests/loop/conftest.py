from __future__ import annotations

import gc
from collections.abc import AsyncIterator

import anyio
import anyio.lowlevel
import pytest


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    """Fails a test that leaves a task behind."""
    before = len(anyio.get_running_tasks())
    yield
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
    gc.collect()
    assert len(anyio.get_running_tasks()) == before
