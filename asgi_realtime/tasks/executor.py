"""Who runs triggered runs: an `Executor` takes their ids and sees to it that `execute` is called for each.

The one here runs them in this process, in the order of arrival, up to the concurrency limit of each task.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

from asgi_realtime.supervisor import Job


class Executor(Protocol):
    """Hands runs to workers. A queue's adapter sends the run id through the queue."""

    async def enqueue(self, run_id: str, task_id: str) -> None:
        """See to it that some process calls `Realtime.execute(run_id)`. Calling it twice for a run is harmless."""
        ...


class InProcessExecutor:
    """Runs tasks beside the host's own code, on its loop."""

    def __init__(
        self,
        execute: Callable[[str], Awaitable[None]],
        *,
        spawn: Callable[[Job], None],
        concurrency_limit: Callable[[str], int],
    ) -> None:
        self._execute = execute
        self._spawn = spawn
        self._concurrency_limit = concurrency_limit
        self._waiting: dict[str, deque[str]] = {}
        self._running: dict[str, int] = {}

    async def enqueue(self, run_id: str, task_id: str) -> None:
        self._waiting.setdefault(task_id, deque()).append(run_id)
        self._fill(task_id)

    def take_waiting(self) -> list[str]:
        """Give up the runs that have not begun, at shutdown."""
        waiting = [run_id for queue in self._waiting.values() for run_id in queue]
        self._waiting.clear()
        return waiting

    def _fill(self, task_id: str) -> None:
        waiting = self._waiting.get(task_id)
        while waiting and self._running.get(task_id, 0) < self._concurrency_limit(task_id):
            run_id = waiting.popleft()
            self._running[task_id] = self._running.get(task_id, 0) + 1
            self._spawn(lambda run_id=run_id: self._run(run_id, task_id))  # type: ignore[misc]
        if waiting is not None and not waiting:
            self._waiting.pop(task_id, None)

    async def _run(self, run_id: str, task_id: str) -> None:
        try:
            await self._execute(run_id)
        finally:
            self._running[task_id] -= 1
            if not self._running[task_id]:
                del self._running[task_id]
            self._fill(task_id)
