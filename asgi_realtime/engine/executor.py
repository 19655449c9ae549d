"""Executors: they accept the ids of triggered runs and make sure that some process executes each run.

`InProcessExecutor` executes them in this process, up to the concurrency limit of each task. The runs that wait for a
task start in turn, one of each owner, so the many runs of one owner delay a run of another by one run only.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, runtime_checkable

from asgi_realtime.loop.supervisor import Job


class Executor(Protocol):
    """Hands runs to workers. The adapter of a job queue sends the run id through the queue."""

    async def enqueue(self, run_id: str, task_id: str) -> None:
        """Make sure that some process calls `Realtime.execute(run_id)`. Enqueuing a run twice is harmless."""


class ExecutorHost(Protocol):
    """A `Realtime`, as its executor sees it."""

    async def execute(self, run_id: str) -> None:
        """As `Realtime.execute`."""

    async def start(self) -> None:
        """Start the `Realtime` in a process that no app starts it in: a worker."""

    async def stop(self) -> None:
        """Stop the `Realtime`. Its runs have `timeouts.drain` to end; then they are canceled and FAILED."""


@runtime_checkable
class AttachedExecutor(Executor, Protocol):
    """An executor that belongs to one `Realtime` and starts and stops with it."""

    def attach(self, host: ExecutorHost) -> None:
        """Called once, when the `Realtime` is created."""

    async def start(self) -> None:
        """Called when the `Realtime` starts, before the first `enqueue`. An error prevents the start."""

    async def stop(self) -> None:
        """Called when the `Realtime` has stopped and its runs have ended."""


class LimitedTask(Protocol):
    """A task, as `InProcessExecutor` sees it."""

    @property
    def concurrency_limit(self) -> int: ...


class InProcessExecutor:
    """Executes runs on the host's event loop. `tasks` are those that this process can execute.

    Runs of one owner start in the order of arrival. The host, None, counts as an owner.
    """

    def __init__(
        self,
        execute: Callable[[str], Awaitable[None]],
        tasks: Mapping[str, LimitedTask],
        *,
        spawn: Callable[[Job], None],
        on_end: Callable[[], None],
    ) -> None:
        self._execute = execute
        self._tasks = tasks
        self._spawn = spawn
        self._on_end = on_end
        self._waiting: dict[str, dict[str | None, deque[str]]] = {}  # by task, then by owner, the next one first
        self._running: dict[str, list[str]] = {}
        self._held: dict[str, None] = {}

    def knows(self, task_id: str) -> bool:
        """Whether this process can execute runs of the task."""
        return task_id in self._tasks

    @property
    def running(self) -> list[str]:
        """The runs that occupy a slot of their task, including those that are not claimed yet."""
        return [run_id for run_ids in self._running.values() for run_id in run_ids]

    @property
    def held(self) -> list[str]:
        """The runs that wait or execute here. Thread-safe."""
        return list(self._held)

    @property
    def waiting(self) -> list[str]:
        """The runs that wait for a free slot of their task."""
        return [run_id for owners in self._waiting.values() for run_ids in owners.values() for run_id in run_ids]

    def holds(self, run_id: str) -> bool:
        """Whether the run waits or executes here."""
        return run_id in self._held

    async def enqueue(self, run_id: str, task_id: str, *, owner: str | None = None) -> None:
        """As `Executor.enqueue`. `owner` is that of the token that triggered the run. Does not suspend."""
        if run_id not in self._held:
            self._held[run_id] = None
            self._waiting.setdefault(task_id, {}).setdefault(owner, deque()).append(run_id)
            self._fill(task_id)

    def take_waiting(self) -> list[str]:
        """Remove and return the runs that have not started. Called at shutdown."""
        waiting = self.waiting
        self._waiting.clear()
        for run_id in waiting:
            del self._held[run_id]
        return waiting

    def forget(self) -> None:
        """Drop every run, in a forked child: they belong to its parent."""
        self._waiting, self._running, self._held = {}, {}, {}

    def restart(self) -> None:
        """Continue after a stop, possibly on another event loop: runs that executed on the old one are lost, and runs
        that wait get their slots."""
        for run_id in self.running:
            del self._held[run_id]
        self._running = {}
        for task_id in tuple(self._waiting):
            self._fill(task_id)

    def _fill(self, task_id: str) -> None:
        """Start the runs of a task that wait, while slots are free."""
        task, waiting = self._tasks.get(task_id), self._waiting.get(task_id)
        while task and waiting and len(self._running.get(task_id, ())) < task.concurrency_limit:
            run_id = _next(waiting)
            self._running.setdefault(task_id, []).append(run_id)
            self._spawn(functools.partial(self._run, run_id, task_id, self._running))
        if waiting is not None and not waiting:
            self._waiting.pop(task_id, None)

    async def _run(self, run_id: str, task_id: str, running: dict[str, list[str]]) -> None:
        """Execute a run and free its slot. A different `self._running` means that the executor has restarted since."""
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


def _next(waiting: dict[str | None, deque[str]]) -> str:
    """Remove and return the next run of the first owner, which then becomes the last."""
    owner = next(iter(waiting))
    run_ids = waiting.pop(owner)
    run_id = run_ids.popleft()
    if run_ids:
        waiting[owner] = run_ids
    return run_id
