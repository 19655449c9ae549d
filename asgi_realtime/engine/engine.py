"""The life of a `Realtime`: what lives between its start and its stop.

Three ways lead to a start (the host's lifespan, the middleware, the first use), and all of them call `Engine.begin`.
The engine joins the parts, each with one responsibility, and decides when they start and stop:

* `supervisor`: the task group in which everything runs;
* `executions`: the runs that this process executes;
* `run_threads`: creates runs, at most one active run in each thread;
* `dispatcher`: hands QUEUED runs to the executor;
* `leases`: renews the leases of the runs that this process holds;
* `subscribers`: the open subscriptions;
* `watchers`: counts the readers of runs that ask for it;
* `on_ends`: calls the `on_end` functions of runs that are over;
* `shutdown`: whether a shutdown has begun, by a signal or otherwise, and its deadline;
* the ticker: what has to be done at regular intervals.

A shutdown begins with a signal or with the stop, ends the runs of this process (`drain`), and ends with the stop: the
engine cancels what still runs and leaves the broker, which interrupts calls in progress.

A forked child inherits the memory of a started engine but none of its tasks and threads. It is another owner of runs
and starts on its own, so each entry point checks the process id first.
"""

from __future__ import annotations

import contextvars
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import anyio

from asgi_realtime.brokers.base import Broker
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.core.errors import BrokerUnavailable, RunExists, ServerShutdown
from asgi_realtime.core.run_errors import VersionConflict
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.engine.dispatch import Dispatcher
from asgi_realtime.engine.drain import PATIENCE_S, Drain
from asgi_realtime.engine.execution import Execution
from asgi_realtime.engine.executions import Executions
from asgi_realtime.engine.leases import Leases
from asgi_realtime.engine.on_end import OnEnd, OnEnds
from asgi_realtime.engine.run import current_run_of
from asgi_realtime.engine.run_threads import RunThreads
from asgi_realtime.engine.shutdown import Shutdown
from asgi_realtime.engine.siblings import Siblings
from asgi_realtime.engine.subscribers import Subscribers
from asgi_realtime.engine.ticker import Ticker
from asgi_realtime.engine.watchers import Watchers
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.supervisor import Job, Supervisor
from asgi_realtime.loop.waiting import WaitList
from asgi_realtime.runs.handles import MakeHandle
from asgi_realtime.runs.recent import RecentRuns
from asgi_realtime.runs.reporter import Reporter
from asgi_realtime.runs.store import RunStore
from asgi_realtime.streams.thread_iterator import ThreadBudget

_hosts: contextvars.ContextVar[frozenset[object]] = contextvars.ContextVar("asgi_realtime_hosts", default=frozenset())
"""The engines that the calling code, or code that it descends from, has started: that is the host's own start and stop,
and everything that runs in an engine."""


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
    """The parts of one `Realtime`, and when they start and stop. `handle` creates the handle of a run; `Tasks` sets
    `dispatcher.executor`."""

    def __init__(
        self,
        broker: Broker,
        *,
        limits: Limits,
        timeouts: Timeouts,
        clock: Callable[[], float],
        signals: bool,
        debug: bool,
        handle: MakeHandle,
        retention: Retention | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self.broker = broker
        self.limits = limits
        self.timeouts = timeouts
        self.clock = clock
        self.handle = handle
        self.runs = RunStore(
            broker, clock=clock, patience_s=timeouts.append, limits=limits, retention=retention, reporter=reporter
        )
        self.threads = ThreadBudget(limits.source_threads)
        self.subscribers = Subscribers()
        self.shutdown = Shutdown(self, self.subscribers, drain_s=timeouts.drain, signals=signals)
        self.leases = Leases(self.runs, held=lambda: self.held, clock=clock, lease_s=timeouts.lease)
        self.dispatcher = Dispatcher(self.runs, timeouts=timeouts, on_held=self.leases.keep)
        self.executions = Executions(
            self.runs, debug=debug, supervisor=self.begin, on_held=self.leases.keep, handle=handle
        )
        self.on_ends = OnEnds(
            self.runs,
            supervisor=self.begin,
            on_held=self.leases.keep,
            on_called=lambda: self.executions.changed.wake(),
        )
        self.run_threads = RunThreads(self.runs, self.executions, timeouts=timeouts)
        self.watchers = Watchers(self.runs, clock=clock, timeouts=timeouts)
        self.companions: list[Job] = []
        """Jobs that run from each start to its stop."""
        self.recent: RecentRuns | None = None
        self._siblings = None if broker.shared else Siblings()
        self._start: Start | None = None
        self._mark = object()
        self._had_host = False
        self._pid = os.getpid()

    def list_runs(self) -> None:
        """Keep a list of the runs that changed last, for the inspector."""
        self.recent = RecentRuns(self.broker, period_s=self.timeouts.tick)
        self.runs.on_stored = self.recent.note
        self.companions.append(self.recent.run)

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
        """The runs that this process holds: those that execute or wait here, and those whose `on_end` is being called.
        Thread-safe."""
        return list(dict.fromkeys((*self.dispatcher.in_process.held, *self.executions.ids, *self.on_ends.ids)))

    @property
    def running(self) -> bool:
        """Whether this runs on the calling loop and the broker is available, so a call need not wait for a start."""
        start = self._start
        return start is not None and start.ready and start.supervisor.accepts_jobs

    @property
    def is_lazy(self) -> bool:
        """Whether this was started on first use, so no host is going to stop it."""
        return self._start is not None and self._start.lazy

    def holds(self, run_id: str, /) -> bool:
        """Whether the run executes here, or is about to, or has ended in this drain."""
        return (
            run_id in self.executions
            or self.dispatcher.in_process.holds(run_id)
            or run_id in self.runs.creating
            or self._drain.has_seen(run_id)
        )

    def check_accepts_runs(self) -> None:
        """Raises `ServerShutdown` once a shutdown has begun. The code of a run can still create others, and so can the
        host's own start and stop; requests cannot."""
        if self.shutdown.begun and current_run_of(self.runs) is None and self._mark not in _hosts.get():
            raise ServerShutdown("the server is shutting down and accepts no new run; retry on another one")

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
        self.on_ends.clear()
        self.watchers.clear()
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
        if not lazy:
            self._had_host = True
            _hosts.set(_hosts.get() | {self._mark})
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
            supervisor = Supervisor(context=context, drain=self._close_and_drain)
        except anyio.NoEventLoopError:
            raise RuntimeError("no event loop runs in this thread: use realtime.sync") from None
        start = self._start = Start(supervisor, lazy)
        self.runs.retry.reset()
        self.shutdown.start()
        self._drain = Drain(
            runs=self.runs,
            executions=self.executions,
            dispatcher=self.dispatcher,
            on_ends=self.on_ends,
            timeouts=self.timeouts,
            left_s=lambda: self.shutdown.left_s,
            is_creating=lambda: self.running and bool(self.runs.creating),
            has_readers=lambda: bool(self.subscribers.open or self.shutdown.waiting),
        )
        self.executions.clear()
        self.on_ends.clear()
        self.watchers.clear()
        self.leases.stop()
        supervisor.start()
        supervisor.spawn_detached(lambda: self._serve(start))
        for job in self.companions:
            supervisor.spawn_detached(job)
        self.dispatcher.restart()
        if lazy and self._had_host:
            logger.warning("used after shutdown: started again, and will only stop on SIGTERM/SIGINT")
        elif lazy and threading.current_thread() is threading.main_thread():  # in a worker, sync calls use a thread
            logger.info(
                "not started by the app: add realtime.lifespan (or RealtimeMiddleware) so it also shuts down cleanly"
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
            self.shutdown.stop()

    def make_ticker(self) -> Ticker:
        """A ticker of this engine."""
        return Ticker(self)

    async def open_run(
        self,
        record: StoredRecord,
        *,
        handle_owner: str | None = None,
        on_end: OnEnd | None = None,
        replaces: bool = False,
    ) -> Execution:
        """Create a run that this process executes from its creation on; start first if necessary.

        `handle_owner` is that of the `Run`, and `on_end` is called when it is over. `replaces`: it cancels the active
        run of its thread. Raises `RunExists`, `ThreadBusy`.
        """
        await self.ensure_started()
        self.check_accepts_runs()
        try:
            await self.run_threads.create(record, replace=replaces)
        except VersionConflict:
            raise RunExists(record.id) from None
        execution = await self.executions.start(record, handle_owner=handle_owner)
        if on_end is not None:
            execution.on_ended = partial(self.on_ends.call, on_end=on_end)
        return execution

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

    async def _close_and_drain(self) -> None:
        self.shutdown.close()
        await self.drain()
        self.runs.retry.shorten(PATIENCE_S)  # for the jobs that are left

    async def drain(self) -> None:
        """Wait for the runs of this process until the deadline of the shutdown, then cut them."""
        await self._drain.run()
        if self.recent is not None:
            with suppress(BrokerUnavailable):
                await self.recent.flush()  # how the runs ended
        self.shutdown.finish()

    def begin_drain(self) -> None:
        """The shutdown begins."""
        self._drain.begin()

    def reopen(self) -> None:
        """The announced shutdown did not happen."""
        self.runs.retry.reset()

    def wake_drain(self) -> None:
        """The deadline of the shutdown has changed."""
        self.executions.changed.wake()
