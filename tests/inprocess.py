"""Shared by tests of the in-process API: a fast `Realtime`, a manual clock, and waiting for a condition."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from asgi_realtime import Realtime, Timeouts
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.tasks.options import RunLike, run_id_of

SECRET = "a secret of the tests, 32 bytes or more"
QUICK = Timeouts(tick=0.01, drain=0.02, cancel=1.0)
GUARD_S = 25.0
"""The time limit of a wait in one process: a busy machine does not reach it, and no timeout of the product that is 30 s
or longer ends the wait first."""


class FakeClock:
    """Unix seconds, set by the test."""

    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0

    def __call__(self) -> float:
        return self.seconds


def make_realtime(**options: Any) -> Realtime:
    merged: dict[str, Any] = {"secret_key": SECRET, "signals": False, "timeouts": QUICK} | options
    return Realtime(**merged)


async def until(fact: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    with anyio.fail_after(GUARD_S):
        while not fact():  # noqa: ASYNC110 - it can depend on threads, or have no event
            await anyio.sleep(0.001)


async def stored(realtime: Realtime, run: RunLike) -> StoredRecord:
    """The record of a run, with its internals."""
    return await realtime.runs.get(run_id_of(run))


async def ended(realtime: Realtime, run: RunLike) -> StoredRecord:
    """The last record of a run, with its internals."""
    with anyio.fail_after(GUARD_S):
        return await realtime.runs.ended(run_id_of(run))


def run_without_anyio(main: Callable[[], Coroutine[Any, Any, None]], backend: str) -> None:
    """Run a program on a new event loop, as servers do. anyio's runner sets a context variable that it reads."""
    if backend == "asyncio":
        asyncio.run(asyncio.wait_for(main(), GUARD_S))
    else:
        import trio

        trio.run(main)
