"""Runs on the workers of a taskiq queue. Needs the extra `taskiq`.

The queue carries the id of a run and nothing else. Its workers import the same module as the web processes, and take
the run from the `Realtime`'s broker, which all of them share::

    queue = RedisStreamBroker("redis://localhost")
    realtime = Realtime(secret_key=…, broker="redis://localhost", executor=TaskiqExecutor(queue))

    $ taskiq worker app:queue

A run that the queue delivers twice is executed once: whoever comes second finds that it is not QUEUED any more.
"""

from __future__ import annotations

import logging
from collections.abc import Coroutine
from typing import Any

import anyio

from asgi_realtime.core.errors import BrokerUnavailable, RunNotFound, UnknownTask
from asgi_realtime.engine.executor import ExecutorHost

logger = logging.getLogger("asgi_realtime")

try:
    from taskiq import AsyncBroker, AsyncTaskiqDecoratedTask, TaskiqEvents, TaskiqState
except ImportError as exc:
    raise ImportError("TaskiqExecutor needs taskiq: pip install 'asgi_realtime[taskiq]'") from exc

_START_S = 5.0
"""For the start of the taskiq broker. redis-py tries for some minutes to reach a server that is away."""

_PAUSE_S = 1.0
"""Between two tries to execute a run, while the `Realtime`'s broker is away."""


class TaskiqExecutor:
    """Hands the runs of a `Realtime` to the workers of a taskiq broker.

    The `Realtime` starts the taskiq broker where it starts itself, unless somebody has done that already. In a worker
    it is the other way round: the worker's start and shutdown are those of the `Realtime`. `task_name` is the one
    taskiq task that there is of this; it must differ if several `Realtime`s share a taskiq broker.
    """

    def __init__(self, broker: AsyncBroker, *, task_name: str = "asgi_realtime.execute") -> None:
        self.broker = broker
        self._task_name = task_name
        self._host: ExecutorHost | None = None
        self._task: AsyncTaskiqDecoratedTask[[str], Coroutine[Any, Any, None]] | None = None
        self._host_started_it = False
        self._up = False  # we have started it
        self._touched = False  # we have tried to
        self._busy = False  # it is we who start or stop it, just now
        self._turn = anyio.Lock()
        self._stopped = False

    def attach(self, host: ExecutorHost) -> None:
        if self._host is not None:
            raise RuntimeError("this TaskiqExecutor belongs to another Realtime already; make one for each")
        self._host = host

        async def execute(run_id: str) -> None:  # a function, as taskiq sets its name
            await self._execute(run_id)

        self._task = self.broker.register_task(execute, task_name=self._task_name)
        for event, handler in (
            (TaskiqEvents.WORKER_STARTUP, self._worker_starts),
            (TaskiqEvents.WORKER_SHUTDOWN, self._worker_stops),
            (TaskiqEvents.CLIENT_STARTUP, self._client_starts),
            (TaskiqEvents.CLIENT_SHUTDOWN, self._client_stops),
        ):
            self.broker.add_event_handler(event, handler)

    async def enqueue(self, run_id: str, task_id: str) -> None:
        assert self._task is not None
        await self._start_once()
        await self._task.kicker().with_task_id(run_id).kiq(run_id)

    # The Realtime starts and stops

    async def start(self) -> None:
        """Without the queue streams can be read all the same, so a web process starts. `enqueue` tries again."""
        try:
            await self._start_once()
        except Exception as exc:
            logger.warning("the taskiq broker cannot be started yet: %s", exc or type(exc).__name__)

    async def _start_once(self) -> None:
        async with self._turn:
            if self.broker.is_worker_process or self._host_started_it or self._up:
                return
            self._busy = self._touched = True
            try:
                with anyio.fail_after(_START_S):
                    await self.broker.startup()
                self._up = True
            finally:
                self._busy = False

    async def stop(self) -> None:
        if not self._touched:
            return
        self._busy = True
        self._up = self._touched = False
        try:
            await self.broker.shutdown()
        finally:
            self._busy = False

    # The taskiq broker starts and stops

    async def _worker_starts(self, state: TaskiqState) -> None:
        if not self._busy:  # taskiq's in-memory broker is client and worker in one
            assert self._host is not None
            self._stopped = False
            await self._host.start()

    async def _worker_stops(self, state: TaskiqState) -> None:
        if not self._busy:
            assert self._host is not None
            self._stopped = True
            await self._host.stop()

    def _client_starts(self, state: TaskiqState) -> None:
        self._host_started_it = not self._busy

    def _client_stops(self, state: TaskiqState) -> None:
        self._host_started_it = False

    async def _execute(self, run_id: str) -> None:
        """What the worker does. The queue would not deliver the run again, so an absent broker is waited for."""
        assert self._host is not None
        waits = False
        while not self._stopped:
            try:
                await self._host.execute(run_id)
                return
            except (RunNotFound, UnknownTask) as exc:
                logger.warning("run %s came from the queue and is not executed: %s", run_id, exc)
                return
            except BrokerUnavailable as exc:
                if not waits:
                    logger.warning("run %s came from the queue and waits: %s", run_id, exc)
                waits = True
                await anyio.sleep(_PAUSE_S)
        raise BrokerUnavailable("the worker stops before the run could be executed")  # the queue may deliver it again
