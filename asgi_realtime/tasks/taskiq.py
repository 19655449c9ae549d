"""Executes runs on the workers of a taskiq queue. Needs the extra `taskiq`.

The queue carries only run ids. Its workers import the same module as the web processes and load the run from the broker
of the `Realtime`, which all processes share::

    queue = RedisStreamBroker("redis://localhost")
    realtime = Realtime(secret_key=…, broker="redis://localhost", executor=TaskiqExecutor(queue))

    $ taskiq worker app:queue

A run that the queue delivers twice executes once: the second delivery finds that the run is no longer QUEUED.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import anyio

from asgi_realtime.core.errors import BrokerUnavailable, RunNotFound, UnknownTask
from asgi_realtime.engine.executor import ExecutorHost
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.waiting import at_most

try:
    from taskiq import AsyncBroker, AsyncTaskiqDecoratedTask, TaskiqEvents, TaskiqState
except ImportError as exc:
    raise ImportError("TaskiqExecutor needs taskiq: pip install 'asgi_realtime[taskiq]'") from exc

_START_S = 5.0
"""Longest start of the taskiq broker. redis-py would try for minutes to reach an unavailable server."""

_PAUSE_S = 1.0
"""Pause between attempts to execute a run while the broker of the `Realtime` is unavailable."""


class TaskiqExecutor:
    """Enqueues the runs of a `Realtime` for the workers of a taskiq broker.

    In a web process the `Realtime` starts and stops the taskiq broker with itself, unless the app has started the
    broker. In a worker the broker's events start and stop the `Realtime`. `task_name` is the name of the taskiq task;
    it must differ if several `Realtime`s share a taskiq broker.
    """

    def __init__(self, broker: AsyncBroker, *, task_name: str = "asgi_realtime.execute") -> None:
        self.broker = broker
        self._task_name = task_name
        self._host: ExecutorHost | None = None
        self._task: AsyncTaskiqDecoratedTask[[str], Coroutine[Any, Any, None]] | None = None
        self._host_started_it = False
        self._started = False
        """This object has started the broker."""
        self._touched = False
        """This object has tried to start the broker, so `stop` has to shut it down."""
        self._busy = False
        """This object starts or stops the broker now, so the events of the broker are its own."""
        self._start_lock = anyio.Lock()
        self._worker_stopped = False

    def attach(self, host: ExecutorHost) -> None:
        if self._host is not None:
            raise RuntimeError("this TaskiqExecutor belongs to another Realtime; create one for each")

        async def execute(run_id: str) -> None:  # taskiq sets the name of the function, which a method does not allow
            await self._execute(run_id)

        self._task = self.broker.register_task(execute, task_name=self._task_name)
        for event, handler in (
            (TaskiqEvents.WORKER_STARTUP, self._worker_starts),
            (TaskiqEvents.WORKER_SHUTDOWN, self._worker_stops),
            (TaskiqEvents.CLIENT_STARTUP, self._client_starts),
            (TaskiqEvents.CLIENT_SHUTDOWN, self._client_stops),
        ):
            self.broker.add_event_handler(event, handler)
        self._host = host

    async def enqueue(self, run_id: str, task_id: str) -> None:
        assert self._task is not None
        await self._start_once()
        await self._task.kicker().with_task_id(run_id).kiq(run_id)

    # The `Realtime` starts and stops

    async def start(self) -> None:
        """Start the broker. A failure is only logged, because a web process can serve streams without the queue;
        `enqueue` tries again."""
        try:
            await self._start_once()
        except Exception as exc:
            logger.warning("the taskiq broker cannot be started yet: %s", exc or type(exc).__name__)

    async def _start_once(self) -> None:
        async with self._start_lock:
            if self.broker.is_worker_process or self._host_started_it or self._started:
                return
            self._busy = self._touched = True
            try:
                with at_most(_START_S, lambda: f"it did not start within {_START_S:g} s"):
                    await self.broker.startup()
                self._started = True
            finally:
                self._busy = False

    async def stop(self) -> None:
        if not self._touched:
            return
        self._busy = True
        self._started = self._touched = False
        try:
            await self.broker.shutdown()
        finally:
            self._busy = False

    # The taskiq broker starts and stops

    async def _worker_starts(self, state: TaskiqState) -> None:
        if not self._busy:  # the startup of taskiq's in-memory broker is also that of a worker
            assert self._host is not None
            self._worker_stopped = False
            await self._host.start()

    async def _worker_stops(self, state: TaskiqState) -> None:
        if not self._busy:
            assert self._host is not None
            self._worker_stopped = True
            await self._host.stop()

    def _client_starts(self, state: TaskiqState) -> None:
        self._host_started_it = not self._busy

    def _client_stops(self, state: TaskiqState) -> None:
        self._host_started_it = False

    async def _execute(self, run_id: str) -> None:
        """Execute a run in a worker. The queue does not deliver it again, so this waits for an unavailable broker."""
        assert self._host is not None
        logged = False
        while not self._worker_stopped:
            try:
                await self._host.execute(run_id)
                return
            except (RunNotFound, UnknownTask) as exc:
                logger.warning("run %s from the queue cannot be executed: %s", run_id, exc)
                return
            except BrokerUnavailable as exc:
                if not logged:
                    logger.warning("run %s from the queue waits: %s", run_id, exc)
                logged = True
                await anyio.sleep(_PAUSE_S)
        raise BrokerUnavailable("the worker stopped before it could execute the run")  # a queue can redeliver it
