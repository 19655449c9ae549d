"""The ticker of a process: it ticks the open subscriptions, and does what is due for runs.

The broker knows what is due, and any process can do it: the compare-and-set behind each change lets one succeed.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Protocol, runtime_checkable

import anyio

from asgi_realtime.brokers.base import Broker
from asgi_realtime.core.config import Timeouts
from asgi_realtime.core.errors import BrokerUnavailable, InvalidTransition, RunNotFound
from asgi_realtime.core.run_changes import Finished, Queued, RunChange
from asgi_realtime.core.runs import RunError, Status, StoredRecord
from asgi_realtime.engine.dispatch import Dispatcher
from asgi_realtime.engine.executions import Executions
from asgi_realtime.engine.leases import Leases
from asgi_realtime.engine.on_end import OnEnds
from asgi_realtime.engine.shutdown import Shutdown
from asgi_realtime.engine.subscribers import Subscribers
from asgi_realtime.engine.watchers import Watchers
from asgi_realtime.loop.logger import logger
from asgi_realtime.runs.store import RunStore

_EXPIRED = Finished(Status.EXPIRED, error=RunError("Expired", "the run was not started within its ttl"))
_CRASHED = Finished(Status.CRASHED, error=RunError("Crashed", "the process that executed the run died"))


@runtime_checkable
class MovedClock(Protocol):
    """A clock that a test moves: see `asgi_realtime.testing.FakeClock`."""

    def steady(self) -> float:
        """Seconds for spans; they advance with the clock."""

    def add_follower(self, follower: Ticker) -> None:
        """Tick the follower whenever the clock is moved, for as long as it is alive and `running`."""


class TickedEngine(Protocol):
    """An `Engine`, as its ticker sees it."""

    broker: Broker
    runs: RunStore
    executions: Executions
    dispatcher: Dispatcher
    leases: Leases
    on_ends: OnEnds
    subscribers: Subscribers
    watchers: Watchers
    shutdown: Shutdown
    timeouts: Timeouts
    clock: Callable[[], float]

    @property
    def running(self) -> bool: ...


class Ticker:
    """The ticker of one start of an engine."""

    def __init__(self, engine: TickedEngine) -> None:
        self._engine = engine
        self._broker = engine.broker
        self._runs = engine.runs
        self._dispatcher = engine.dispatcher
        self._unavailable = False
        self._refused = False
        """The executor refused a run in this pass; the others wait for the next."""
        self._steady: Callable[[], float] = time.monotonic
        if isinstance(engine.clock, MovedClock):
            self._steady = engine.clock.steady
            engine.clock.add_follower(self)

    @property
    def running(self) -> bool:
        """Whether the engine runs on the calling loop."""
        return self._engine.running

    async def run(self) -> None:
        """Tick until cancelled. An executor that does not respond delays nothing else."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._tick_subscribers)
            group.start_soon(self._at_every_tick, self._maintain_runs)
            group.start_soon(self._at_every_tick, self._dispatch_runs)

    async def once(self) -> None:
        """Do everything that is due now for runs."""
        await self._maintain_runs()
        await self._dispatch_runs()

    def tick(self) -> None:
        """Tick each open subscription."""
        self._engine.subscribers.tick(self._engine.clock(), self._steady())

    async def _tick_subscribers(self) -> None:
        while True:
            await anyio.sleep(self._engine.timeouts.tick)
            self._engine.shutdown.check_server()
            self.tick()

    async def _at_every_tick(self, act: Callable[[], Awaitable[None]]) -> None:
        while True:
            await anyio.sleep(self._engine.timeouts.tick)
            try:
                await act()
                self._unavailable = False
            except BrokerUnavailable as exc:
                self._runs.reporter.broker_failed()
                if not self._unavailable:
                    logger.warning("the broker is unavailable: %s", exc)
                self._unavailable = True
            except Exception:
                logger.exception("the ticker failed")

    async def _maintain_runs(self) -> None:
        await self._engine.executions.watch()
        await self._engine.leases.renew_if_due()  # before expiring leases: a blocked loop must not crash its own runs
        await self._each_due("ttl", lambda run_id: self._change(run_id, _EXPIRED))
        await self._each_due("lease", lambda run_id: self._change(run_id, _CRASHED))
        await self._each_due("cancel", lambda run_id: self._change(run_id, Finished(Status.CANCELED)))
        await self._engine.watchers.report()  # before canceling: a blocked loop must not lose its own readers
        await self._each_due("unwatched", self._cancel_unwatched)
        await self._each_due("unpublished", self._broker.publish)
        await self._each_due("expiry", self._broker.remove)
        self._runs.owned.release_expired(time.monotonic())

    async def _dispatch_runs(self) -> None:
        if self._engine.shutdown.begun:
            return  # another process executes them
        self._refused = False
        await self._each_due("on_end", self._engine.on_ends.take_over)
        await self._each_due("delay", self._queue)
        await self._each_due("enqueue", self._dispatch_again)

    async def _each_due(self, kind: str, act: Callable[[str], Awaitable[object]]) -> None:
        """Act on each due run once. A run that stays due, such as one of a task only others know, is skipped."""
        seen: set[str] = set()
        skip = 0
        while run_ids := await self._broker.due(kind, skip=skip):
            fresh = [run_id for run_id in run_ids if run_id not in seen]
            for run_id in fresh:
                await self._try(kind, act, run_id)
            seen.update(fresh)
            if not fresh:
                skip += len(run_ids)

    async def _try(self, kind: str, act: Callable[[str], Awaitable[object]], run_id: str) -> None:
        try:
            await act(run_id)
        except BrokerUnavailable:
            raise
        except Exception:  # raised by an executor, as a rule; it must not delay the other runs
            logger.exception("run %s is due (%s), and acting on it failed", run_id, kind)

    async def _cancel_unwatched(self, run_id: str) -> None:
        (record,) = await self._runs.load([run_id])
        if record is None or record.is_completed or record.cancel_requested_at_ms is not None:
            return
        logger.info("run %s is canceled: nobody has read it for %g s", run_id, record.unwatched_grace_s or 0)
        await self._engine.executions.cancel(run_id)

    async def _queue(self, run_id: str) -> None:
        """Queue and dispatch a run whose delay has passed, if this process has its task."""
        (record,) = await self._runs.load([run_id])
        if record is None or not self._dispatcher.accepts(record.task):
            return
        record = await self._change(run_id, Queued())
        if record is not None and record.status is Status.QUEUED and not self._refused:
            self._refused = not await self._dispatcher.dispatch(record)

    async def _dispatch_again(self, run_id: str) -> None:
        """Dispatch a run whose process died before it did, or whose executor refused it."""
        (record,) = await self._runs.load([run_id])
        if record is None or record.status is not Status.QUEUED or not self._dispatcher.accepts(record.task):
            return
        if not self._refused:
            await self._broker.renew([run_id], owner=self._runs.owner)  # for one lease, other processes leave it alone
            self._refused = not await self._dispatcher.dispatch(record)

    async def _change(self, run_id: str, change: RunChange) -> StoredRecord | None:
        try:
            return await self._runs.update(run_id, change)
        except (InvalidTransition, RunNotFound):
            return None  # another process was faster
