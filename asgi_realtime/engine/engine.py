"""What runs between start and stop: the supervisor, the ticker, the executions of this process.

Three ways lead to a start (the host's lifespan, the middleware, the first use) and all end here.
"""

from __future__ import annotations

import contextvars
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio

from asgi_realtime.brokers.base import Broker, ThreadRenewal
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.core.errors import (
    BrokerUnavailable,
    InvalidTransition,
    LimitExceeded,
    RunNotFound,
    ServerShutdown,
    UsageError,
)
from asgi_realtime.core.runs import Finished, RunError, RunRecord, Status
from asgi_realtime.engine.execution import Execution
from asgi_realtime.engine.executor import AttachedExecutor, Executor, InProcessExecutor
from asgi_realtime.engine.leases import LeaseThread
from asgi_realtime.engine.run import RelatedRun, Run
from asgi_realtime.engine.siblings import Siblings
from asgi_realtime.engine.subscribers import Subscribers
from asgi_realtime.engine.ticker import Ticker
from asgi_realtime.engine.watch import RunWatch
from asgi_realtime.loop.supervisor import Job, Supervisor
from asgi_realtime.loop.waiting import WaitList
from asgi_realtime.runs.store import RunStore
from asgi_realtime.streams.sources import ThreadBudget

logger = logging.getLogger("asgi_realtime")


class Engine:
    """The life of one `Realtime`. `executor` is set by whoever knows the tasks."""

    def __init__(
        self,
        broker: Broker,
        *,
        limits: Limits,
        timeouts: Timeouts,
        clock: Callable[[], float],
        signals: bool,
        debug: bool,
        after_end_s: float = Retention().after_end,
    ) -> None:
        self.broker = broker
        self.limits = limits
        self.timeouts = timeouts
        self.clock = clock
        self.subscribers = Subscribers(
            signals=signals, supervisor=lambda: self.supervisor, is_left_alone=lambda: self._lazy
        )
        self.executions: dict[str, Execution] = {}
        self.threads = ThreadBudget(limits.source_threads)
        self.runs = RunStore(broker, clock=clock, patience_s=timeouts.append, limits=limits, after_end_s=after_end_s)
        self.executor: Executor | None = None
        self._watches: dict[Execution, RunWatch] = {}
        self._renewer = broker if isinstance(broker, ThreadRenewal) else None
        self.renews_from_thread = self._renewer is not None
        self._leases: LeaseThread | None = None
        self._pid = os.getpid()
        self._debug = debug
        self.companions: list[Job] = []
        """Jobs that run beside everything else from each start to its stop."""
        self._supervisor: Supervisor | None = None
        self._lazy = False
        self._had_host = False
        self._ready = False
        self._failure: Exception | None = None
        self._changed = WaitList()
        self._executor_away = False
        self._siblings = None if broker.shared else Siblings()

    @property
    def supervisor(self) -> Supervisor | None:
        """The supervisor, if this runs."""
        self._heed_fork()
        supervisor = self._supervisor
        return None if supervisor is None or supervisor.ended or supervisor.dead else supervisor

    @property
    def owner(self) -> str:
        """This process, as the owner of the runs that it executes."""
        self._heed_fork()
        return self.runs.owner

    def _heed_fork(self) -> None:
        """A child of the process that this was made in is another owner, and has nothing of what runs there."""
        pid = os.getpid()
        if pid == self._pid:
            return
        self._pid = pid
        self._supervisor = None
        self._had_host = False
        self._ready = False
        self._changed = WaitList()
        self.runs.owner = secrets.token_hex(8)
        if self._in_process is not None:
            self._in_process.forget()

    @property
    def _in_process(self) -> InProcessExecutor | None:
        return self.executor if isinstance(self.executor, InProcessExecutor) else None

    @property
    def running(self) -> bool:
        """Whether this runs on the calling loop and the broker is there: nothing is to be waited for."""
        supervisor = self._supervisor
        return self._ready and supervisor is not None and supervisor.usable and not supervisor.ending

    def spawn_detached(self, job: Job) -> None:
        """Run a job beside everything else, outside of the caller's context."""
        self.begin().spawn_detached(job)

    def spawn_brief(self, job: Job) -> None:
        """As `spawn_detached`, for jobs that are short and many."""
        supervisor = self._supervisor
        if supervisor is None or not supervisor.usable:
            supervisor = self.begin()
        supervisor.spawn_brief(job)

    # Start and stop

    def begin(self, *, lazy: bool = True) -> Supervisor:
        """Start if this does not run yet, without waiting for it.

        Raises `RuntimeError` off its loop, and `ServerShutdown` at the end of a stop: who goes on to use it, again and
        again, must not keep it from ending.
        """
        self._heed_fork()
        self._had_host = self._had_host or not lazy
        supervisor = self._supervisor
        if supervisor is not None and not supervisor.ended:
            if supervisor.usable:
                if supervisor.ending:
                    raise ServerShutdown("the server was shut down")
                self._lazy = self._lazy and lazy
                return supervisor
            if not supervisor.dead:
                raise RuntimeError(
                    "this Realtime runs on another event loop or thread: call it there, or use realtime.sync"
                )
        try:
            context = contextvars.Context() if lazy else contextvars.copy_context()
            supervisor = Supervisor(context=context, drain=self._drain)
        except anyio.NoEventLoopError:
            raise RuntimeError("no event loop runs in this thread: use realtime.sync") from None
        self._supervisor = supervisor
        self._lazy = lazy
        self._ready = False
        self._failure = None
        self.subscribers.begin()
        self.executions.clear()
        self._watches.clear()
        self._end_leases()
        supervisor.start()
        for job in (self._serve, *self.companions):
            supervisor.spawn_detached(job)
        if self._in_process is not None:
            self._in_process.restart()
        if lazy and self._had_host:
            logger.warning("used after its host had stopped it, and started again: nothing but a signal stops it now")
        elif lazy:
            logger.info("started on first use: put realtime.lifespan or RealtimeMiddleware into the app to stop it too")
        return supervisor

    async def ensure_started(self, *, lazy: bool = True) -> None:
        """Start if needed and wait until the broker is there.

        Raises what kept it from starting; that is `ServerShutdown` if it was stopped meanwhile.
        """
        present = self.supervisor
        if present is not None and present.usable and present.stopping and not lazy:
            await present.wait_ended()
        self.begin(lazy=lazy)
        while not self._ready:
            if self._failure is not None:
                raise self._failure
            await self._changed.wait()

    async def stop(self) -> None:
        """End subscriptions, drain, cancel what still runs, leave the broker. Idempotent."""
        supervisor = self.supervisor
        if supervisor is None:
            return
        if not supervisor.usable:
            raise RuntimeError("this Realtime runs on another event loop or thread: stop it there")
        supervisor.request_stop()
        await supervisor.wait_ended()

    async def _serve(self) -> None:
        try:
            async with self.broker, self._executor_open():
                self._ready = True
                self._changed.wake()
                if self._siblings is not None:
                    self._siblings.look()
                self.keep_leases()
                ticker = Ticker(self)
                async with anyio.create_task_group() as group:
                    group.start_soon(ticker.tick_subscribers)
                    group.start_soon(ticker.run_what_is_due)
                    group.start_soon(ticker.hand_over_what_is_due)
        except Exception as exc:
            logger.exception("the broker or the executor cannot be used")
            self._failure = exc
            self._changed.wake()
            if self._supervisor is not None:
                self._supervisor.request_stop()  # so that the next use tries again
        except BaseException:
            self._failure = ServerShutdown("this Realtime was stopped before its broker was there")
            self._changed.wake()
            raise
        finally:
            self._end_leases()
            if self._siblings is not None:
                self._siblings.leave()
            self.subscribers.end()

    @asynccontextmanager
    async def _executor_open(self) -> AsyncIterator[None]:
        executor = self.executor
        if not isinstance(executor, AttachedExecutor):
            yield
            return
        await executor.start()
        try:
            yield
        finally:
            with anyio.move_on_after(self.timeouts.close, shield=True):
                try:
                    await executor.stop()
                except Exception:
                    logger.exception("the executor could not be stopped")

    async def _drain(self) -> None:
        """The shutdown: let what runs end, then end it."""
        self.subscribers.close()
        with anyio.move_on_after(self.timeouts.drain):
            await self._fail_waiting()
            while self._busy:
                await self._changed.wait()
        with anyio.move_on_after(self.timeouts.cancel):
            while self._busy:
                for execution in tuple(self.executions.values()):
                    execution.shut_down()
                    if not execution.reachable():
                        await execution.finish_stopped()
                        self.ended(execution)
                if self._busy:
                    await self._changed.wait()
            await self._fail_waiting()

    @property
    def _busy(self) -> bool:
        return bool(self.executions) or (self._in_process is not None and bool(self._in_process.running))

    async def _fail_waiting(self) -> None:
        """Fail the runs that would begin in this process."""
        if self._in_process is None:
            return
        for run_id in self._in_process.take_waiting():
            await self.end_waiting(run_id, RunError("ServerShutdown", "the server was shut down"))

    async def end_waiting(self, run_id: str, error: RunError) -> None:
        """Fail a run that has not begun, if it still has not."""
        try:
            await self.runs.update(run_id, Finished(Status.FAILED, error=error))
        except (InvalidTransition, RunNotFound, BrokerUnavailable) as exc:
            logger.info("run %s could not be failed: %s", run_id, exc)  # it has begun elsewhere, or so

    # Executions

    async def execution(self, record: RunRecord) -> Execution:
        """Take up a run that is EXECUTING and ours."""
        supervisor = self.begin()
        ids = [run_id for run_id in (record.parent_id, record.root_id) if run_id is not None and run_id != record.id]
        relatives = {
            found.id: RelatedRun(found, runs=self.runs, supervisor=supervisor, limits=self.limits)
            for found in await self.runs.load(ids)
            if found is not None
        }
        run = Run(
            record,
            runs=self.runs,
            supervisor=supervisor,
            limits=self.limits,
            broker=self.broker,
            parent=relatives.get(record.parent_id or ""),
            root=relatives.get(record.root_id or ""),
        )
        execution = Execution(run, runs=self.runs, debug=self._debug)
        self.executions[record.id] = execution
        self.runs.owned.own(record)
        self.keep_leases()
        self.wake()
        return execution

    def watch_executions(self) -> None:
        """Follow what others do to the runs that execute here. The ticker calls this: what is short needs no watch."""
        for execution in self.executions.values():
            if execution not in self._watches:
                watch = self._watches[execution] = RunWatch(execution, broker=self.broker, runs=self.runs)
                self.spawn_detached(watch.run)

    def ended(self, execution: Execution) -> None:
        """Forget an execution whose run is over."""
        if self.executions.get(execution.run.id) is execution:
            del self.executions[execution.run.id]
            self.runs.owned.disown(execution.run.id)
        watch = self._watches.pop(execution, None)
        if watch is not None:
            watch.end()
        self.wake()

    def wake(self) -> None:
        """Something began or ended: whoever waits for that looks again."""
        self._changed.wake()

    def takes(self, task_id: str) -> bool:
        """Whether the executor can have runs of this task executed."""
        return self._in_process is None or self._in_process.knows(task_id)

    async def hand_over(self, record: RunRecord) -> bool:
        """Hand a run that is QUEUED to the executor; return whether that took it.

        If not, the run stays QUEUED and due, and the ticker of any process hands it over later. Raises `UsageError`
        if the executor will never take it, and it has FAILED then; `LimitExceeded` is no such error, it passes.
        """
        try:
            await self.enqueue(record)
        except Exception as exc:  # of an executor it may be any
            if isinstance(exc, UsageError) and not isinstance(exc, LimitExceeded):
                await self.end_waiting(record.id, RunError("NotQueued", "the executor does not take such a run"))
                raise
            if not self._executor_away:
                logger.warning("the executor does not take runs; it is asked again", exc_info=True)
            self._executor_away = True
            return False
        self._executor_away = False
        return True

    async def enqueue(self, record: RunRecord) -> None:
        """Hand a run that is QUEUED to the executor.

        Raises what the executor does, and `TimeoutError` if that takes longer than `timeouts.append`.
        """
        assert self.executor is not None
        with anyio.fail_after(self.timeouts.append):
            await self.executor.enqueue(record.id, record.task)
        if self._in_process is not None:
            self.keep_leases()
            return
        try:
            await self.broker.enqueued(record.id)
        except BrokerUnavailable as exc:
            logger.info("run %s is in the queue and will be put there again: %s", record.id, exc)

    # Leases

    @property
    def held(self) -> list[str]:
        """The runs that this process has in hand: those that it executes and those that wait in it. From any thread."""
        waiting = [] if self._in_process is None else self._in_process.held
        return list(dict.fromkeys((*waiting, *list(self.executions))))

    def keep_leases(self) -> None:
        """Renew what is held, if the broker lets a thread do that; if not, the ticker does."""
        if self._renewer is None or not self.held:
            return
        if self._leases is None:
            self._leases = LeaseThread(self._renewer, lambda: self.held, owner=self.owner, lease_s=self.timeouts.lease)
        self._leases.keep()

    def _end_leases(self) -> None:
        if self._leases is not None:
            self._leases.stop()
            self._leases = None
