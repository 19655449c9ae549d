"""The life of a `Realtime`: what lives between its start and its stop.

Three ways lead to a start (the host's lifespan, the middleware, the first use), and all of them call `Engine.begin`.
The engine joins the parts, each with one responsibility, and decides when they start and stop:

* `supervisor`: the task group in which everything runs;
* `executions`: the runs that this process executes;
* `dispatcher`: hands QUEUED runs to the executor;
* `leases`: renews the leases of the runs that this process holds;
* `subscribers`: the open subscriptions, and the signals that end them;
* the ticker: what has to be done at regular intervals.

A stop ends the runs of this process in two steps:

1. Runs that wait here become FAILED. The others have `timeouts.drain` to finish.
2. The code of the remaining runs is stopped, and they become FAILED with `ServerShutdown`. Their cleanup, and the
   commits that store these ends, have `timeouts.cancel`. Runs that the cleanup creates end in the same way.

The engine then cancels what still runs and leaves the broker, which interrupts calls in progress. If the broker is
unavailable or does not respond, the second step is short: nothing more can be stored, and a process that does not exit
delays a deployment. Runs whose end could not be stored end CRASHED when their lease expires.

A forked child inherits the memory of a started engine but none of its tasks and threads. It is another owner of runs
and starts on its own, so each entry point checks the process id first.
"""

from __future__ import annotations

import contextvars
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio

from asgi_realtime.brokers.base import Broker
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.core.errors import BrokerUnavailable, ServerShutdown
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.engine.dispatch import Dispatcher
from asgi_realtime.engine.execution import Execution
from asgi_realtime.engine.executions import Executions
from asgi_realtime.engine.leases import Leases
from asgi_realtime.engine.siblings import Siblings
from asgi_realtime.engine.subscribers import Subscribers
from asgi_realtime.engine.ticker import Ticker
from asgi_realtime.loop.supervisor import Job, Supervisor
from asgi_realtime.loop.waiting import WaitList
from asgi_realtime.runs.store import RunStore
from asgi_realtime.streams.thread_iterator import ThreadBudget

logger = logging.getLogger("asgi_realtime")

_PATIENCE_S = 0.5
"""How long the second step of a stop waits for a broker that is unavailable or does not respond."""


@dataclass(slots=True)
class Start:
    """One start: its supervisor, and then either `ready` or the `failure` that prevented that."""

    supervisor: Supervisor
    lazy: bool
    """Started on first use, so no host is going to stop it."""
    ready: bool = False
    failure: Exception | None = None
    changed: WaitList = field(default_factory=WaitList)

    def succeed(self) -> None:
        self.ready = True
        self.changed.wake()

    def fail(self, failure: Exception) -> None:
        self.failure = failure
        self.changed.wake()

    async def wait_ready(self) -> None:
        """Raises the failure."""
        while not self.ready:
            if self.failure is not None:
                raise self.failure
            await self.changed.wait()


class Engine:
    """The parts of one `Realtime`, and when they start and stop. `Tasks` sets `dispatcher.executor`."""

    def __init__(
        self,
        broker: Broker,
        *,
        limits: Limits,
        timeouts: Timeouts,
        clock: Callable[[], float],
        signals: bool,
        debug: bool,
        retention: Retention | None = None,
    ) -> None:
        self.broker = broker
        self.limits = limits
        self.timeouts = timeouts
        self.clock = clock
        self.runs = RunStore(broker, clock=clock, patience_s=timeouts.append, limits=limits, retention=retention)
        self.threads = ThreadBudget(limits.source_threads)
        self.subscribers = Subscribers(
            signals=signals, supervisor=lambda: self.supervisor, is_lazy=lambda: self._is_lazy
        )
        self.leases = Leases(self.runs, held=lambda: self.held, clock=clock, lease_s=timeouts.lease)
        self.dispatcher = Dispatcher(self.runs, timeouts=timeouts, on_held=self.leases.keep)
        self.executions = Executions(self.runs, debug=debug, supervisor=self.begin, on_held=self.leases.keep)
        self.companions: list[Job] = []
        """Jobs that run from each start to its stop."""
        self._siblings = None if broker.shared else Siblings()
        self._start: Start | None = None
        self._had_host = False
        self._pid = os.getpid()

    # State

    @property
    def supervisor(self) -> Supervisor | None:
        """The supervisor of the current start, if any."""
        self._check_fork()
        supervisor = None if self._start is None else self._start.supervisor
        return None if supervisor is None or supervisor.ended or supervisor.loop_is_closed else supervisor

    @property
    def owner(self) -> str:
        """This process, as the owner of the runs that it executes."""
        self._check_fork()
        return self.runs.owner

    @property
    def held(self) -> list[str]:
        """The runs that this process holds: those it executes and those that wait in it. Thread-safe."""
        return list(dict.fromkeys((*self.dispatcher.in_process.held, *self.executions.ids)))

    @property
    def running(self) -> bool:
        """Whether this runs on the calling loop and the broker is available, so a call need not wait for a start."""
        start = self._start
        return start is not None and start.ready and start.supervisor.accepts_jobs

    @property
    def _is_lazy(self) -> bool:
        return self._start is not None and self._start.lazy

    def _check_fork(self) -> None:
        """Forget, in a forked child, everything that runs in the parent."""
        pid = os.getpid()
        if pid == self._pid:
            return
        self._pid = pid
        self._start = None
        self._had_host = False
        self.runs.owner = secrets.token_hex(8)
        self.executions.clear()
        self.dispatcher.forget()

    # Jobs

    def spawn_detached(self, job: Job) -> None:
        """Run a background job, outside of the caller's context."""
        self.begin().spawn_detached(job)

    def spawn_brief(self, job: Job) -> None:
        """As `spawn_detached`, for many short jobs."""
        start = self._start
        supervisor = self.begin() if start is None or not start.supervisor.usable else start.supervisor
        supervisor.spawn_brief(job)

    # Start

    def begin(self, *, lazy: bool = True) -> Supervisor:
        """Start, unless this runs already, without waiting until it is ready.

        Raises `RuntimeError` on a foreign loop or thread, and `ServerShutdown` at the end of a stop: constant use must
        not prevent a stop from ending.
        """
        return self._begin(lazy=lazy).supervisor

    async def ensure_started(self, *, lazy: bool = True) -> None:
        """Start, unless this runs already, and wait until the broker is available.

        Raises what prevented the start; if a stop did, `ServerShutdown`.
        """
        self._check_fork()
        if lazy and self.running:
            return
        supervisor = self.supervisor
        if supervisor is not None and supervisor.usable and supervisor.stopping and not lazy:
            await supervisor.wait_ended()
        await self._begin(lazy=lazy).wait_ready()

    def _begin(self, *, lazy: bool) -> Start:
        self._check_fork()
        self._had_host = self._had_host or not lazy
        start = self._start
        if start is not None and not start.supervisor.ended:
            if start.supervisor.usable:
                if start.supervisor.ending:
                    raise ServerShutdown()
                start.lazy = start.lazy and lazy
                return start
            if not start.supervisor.loop_is_closed:
                raise RuntimeError(
                    "this Realtime runs on another event loop or thread: call it there, or use realtime.sync"
                )
        return self._start_anew(lazy=lazy)

    def _start_anew(self, *, lazy: bool) -> Start:
        context = contextvars.Context() if lazy else contextvars.copy_context()
        try:
            supervisor = Supervisor(context=context, drain=self._drain)
        except anyio.NoEventLoopError:
            raise RuntimeError("no event loop runs in this thread: use realtime.sync") from None
        start = self._start = Start(supervisor, lazy)
        self.runs.retry.reset()
        self.subscribers.start()
        self.executions.clear()
        self.leases.stop()
        supervisor.start()
        supervisor.spawn_detached(lambda: self._serve(start))
        for job in self.companions:
            supervisor.spawn_detached(job)
        self.dispatcher.restart()
        if lazy and self._had_host:
            logger.warning("used after shutdown: started again, and will only stop on SIGTERM or SIGINT")
        elif lazy:
            logger.info(
                "started on first use: add realtime.lifespan or RealtimeMiddleware, so that it also shuts down cleanly"
            )
        return start

    async def _serve(self, start: Start) -> None:
        """The job of a start: hold the broker and the executor open, and tick, until it is cancelled."""
        try:
            async with self.broker, self.dispatcher.running():
                start.succeed()
                if self._siblings is not None:
                    self._siblings.check()
                self.leases.keep()
                await self.make_ticker().run()
        except Exception as exc:
            logger.exception("the broker or the executor cannot be used")
            start.fail(exc)
            start.supervisor.request_stop()  # the next use tries again
        except BaseException:
            start.fail(ServerShutdown("this Realtime was stopped before its broker was available"))
            raise
        finally:
            self.leases.stop()
            if self._siblings is not None:
                self._siblings.release()
            self.subscribers.stop()

    def make_ticker(self) -> Ticker:
        """A ticker of this engine."""
        return Ticker(self)

    async def open_run(self, record: RunRecord) -> Execution:
        """Create a run that this process executes from its creation on; start first if necessary."""
        await self.ensure_started()
        await self.runs.create(record)
        return await self.executions.start(record)

    # Stop

    async def stop(self) -> None:
        """End subscriptions, drain, cancel what still runs, and leave the broker. Idempotent."""
        supervisor = self.supervisor
        if supervisor is None:
            return
        if not supervisor.usable:
            raise RuntimeError("this Realtime runs on another event loop or thread: stop it there")
        supervisor.request_stop()
        await supervisor.wait_ended()

    async def _drain(self) -> None:
        self.subscribers.close()
        with anyio.move_on_after(self.timeouts.drain):
            await self.dispatcher.fail_waiting()
            while self._is_busy:
                await self.executions.changed.wait()
        self.runs.retry.shorten(_PATIENCE_S)
        cancel_s = self.timeouts.cancel
        if self._is_busy and not await self._broker_responds():
            cancel_s = min(cancel_s, _PATIENCE_S)
        with anyio.move_on_after(cancel_s):
            while self._is_busy:
                await self.executions.shut_down()
                if self._is_busy:
                    await self.executions.changed.wait()
            await self.dispatcher.fail_waiting()

    @property
    def _is_busy(self) -> bool:
        return bool(self.executions or self.dispatcher.in_process.running)

    async def _broker_responds(self) -> bool:
        with anyio.move_on_after(_PATIENCE_S):
            try:
                await self.broker.ping()
                return True
            except BrokerUnavailable:
                pass
        return False
