"""Who runs triggered runs: an `Executor` takes their ids and sees to it that `execute` is called for each.

The one here runs them in this process, in the order of arrival, up to the concurrency limit of each task.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol, runtime_checkable

from asgi_realtime.loop.supervisor import Job


class Executor(Protocol):
    """Hands runs to workers. A queue's adapter sends the run id through the queue."""

    async def enqueue(self, run_id: str, task_id: str) -> None:
        """See to it that some process calls `Realtime.execute(run_id)`. Calling it twice for a run is harmless."""
        ...


class ExecutorHost(Protocol):
    """A `Realtime`, as its executor sees it."""

    async def execute(self, run_id: str) -> None:
        """As `Realtime.execute`."""
        ...

    async def start(self) -> None:
        """Start the `Realtime`, in a process that has no other host: a worker."""
        ...

    async def stop(self) -> None:
        """Stop it. What it executes may go on for `timeouts.drain`; then it is cancelled and FAILED."""
        ...


@runtime_checkable
class AttachedExecutor(Protocol):
    """An executor that belongs to one `Realtime` and lives with it."""

    async def enqueue(self, run_id: str, task_id: str) -> None:
        """As `Executor.enqueue`."""
        ...

    def attach(self, host: ExecutorHost) -> None:
        """The `Realtime` that this was given to, when that is made."""
        ...

    async def start(self) -> None:
        """The `Realtime` starts: `enqueue` may be called from now on. An error keeps it from starting."""
        ...

    async def stop(self) -> None:
        """The `Realtime` is stopped, and what ran in it has ended."""
        ...


class InProcessExecutor:
    """Runs tasks beside the host's own code, on its loop. `concurrency_limit` gives None for a task unknown here."""

    def __init__(
        self,
        execute: Callable[[str], Awaitable[None]],
        *,
        spawn: Callable[[Job], None],
        concurrency_limit: Callable[[str], int | None],
        on_end: Callable[[], None],
    ) -> None:
        self._execute = execute
        self._spawn = spawn
        self._concurrency_limit = concurrency_limit
        self._on_end = on_end
        self._waiting: dict[str, deque[str]] = {}
        self._running: dict[str, list[str]] = {}
        self._held: dict[str, None] = {}

    def knows(self, task_id: str) -> bool:
        """Whether runs of this task can be executed here."""
        return self._concurrency_limit(task_id) is not None

    @property
    def running(self) -> list[str]:
        """The runs that were given a place; some may not be claimed yet."""
        return [run_id for run_ids in self._running.values() for run_id in run_ids]

    @property
    def held(self) -> list[str]:
        """The runs that wait or run here. From any thread."""
        return list(self._held)

    async def enqueue(self, run_id: str, task_id: str) -> None:
        if run_id not in self._held:
            self._held[run_id] = None
            self._waiting.setdefault(task_id, deque()).append(run_id)
            self._fill(task_id)

    def take_waiting(self) -> list[str]:
        """Give up the runs that have not begun, at shutdown."""
        waiting = [run_id for queue in self._waiting.values() for run_id in queue]
        self._waiting.clear()
        for run_id in waiting:
            del self._held[run_id]
        return waiting

    def forget(self) -> None:
        """Leave everything to another process: that of which this one is a fork."""
        self._waiting, self._running, self._held = {}, {}, {}

    def restart(self) -> None:
        """Begin anew, on another loop perhaps: what ran on the old one is gone, what waited there has its turn."""
        for run_id in self.running:
            del self._held[run_id]
        self._running = {}
        for task_id in tuple(self._waiting):
            self._fill(task_id)

    def _fill(self, task_id: str) -> None:
        waiting = self._waiting.get(task_id)
        limit = self._concurrency_limit(task_id) or 0
        while waiting and len(self._running.get(task_id, ())) < limit:
            run_id = waiting.popleft()
            self._running.setdefault(task_id, []).append(run_id)
            self._spawn(functools.partial(self._run, run_id, task_id, self._running))
        if waiting is not None and not waiting:
            self._waiting.pop(task_id, None)

    async def _run(self, run_id: str, task_id: str, running: dict[str, list[str]]) -> None:
        try:
            await self._execute(run_id)
        finally:
            running[task_id].remove(run_id)
            if not running[task_id]:
                del running[task_id]
            if running is self._running:
                del self._held[run_id]
                self._fill(task_id)
                self._on_end()
