"""A `Realtime` with one task that returns its payload, for tests of triggering."""

from __future__ import annotations

from typing import Any

import anyio

from asgi_realtime import (
    Realtime,
    UsageError,
)
from tests.inprocess import make_realtime


def with_echo(**options: Any) -> Realtime:
    realtime = make_realtime(**options)

    @realtime.task("echo")
    async def echo(payload: Any) -> Any:
        return payload

    return realtime


async def count_runs(realtime: Realtime, topic: str) -> int:
    return len((await realtime.broker.changes(topic)).items)


class SlowExecutor:
    """Accepts two runs, once `go` is set, and rejects the third."""

    def __init__(self) -> None:
        self.accepted: list[str] = []
        self.go = anyio.Event()

    async def enqueue(self, run_id: str, task_id: str) -> None:
        await self.go.wait()
        if len(self.accepted) == 2:
            raise UsageError("the queue takes two runs")
        self.accepted.append(run_id)
