"""The one ticker of a process: heartbeats, expiry and stalled sends of subscriptions, and whatever runs are due.

What is due is the broker's knowledge, so any process may do it; the compare-and-set behind each change lets only one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import anyio

from asgi_realtime.core.errors import BrokerUnavailable, InvalidTransition, RunNotFound
from asgi_realtime.core.runs import Finished, Queued, RunChange, RunError, RunRecord, Status

if TYPE_CHECKING:
    from asgi_realtime.engine.engine import Engine

logger = logging.getLogger("asgi_realtime")

_EXPIRED = Finished(Status.EXPIRED, error=RunError("Expired", "the run was not started within its ttl"))
_CRASHED = Finished(Status.CRASHED, error=RunError("Crashed", "the process that executed the run is gone"))


@runtime_checkable
class MovedClock(Protocol):
    """A clock that a test moves: see `asgi_realtime.testing.FakeClock`."""

    def steady(self) -> float:
        """Seconds for spans, which move along."""

    def add_follower(self, follower: Ticker) -> None:
        """Have it act at once when the clock is moved, for as long as it is alive and `running`."""


class Ticker:
    """The ticker of one start of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._broker_away = False
        self._renewed_at = -math.inf
        self._refused = False
        """The executor refused a run in this pass: others wait for the next."""
        self._steady: Callable[[], float] = time.monotonic
        if isinstance(engine.clock, MovedClock):
            self._steady = engine.clock.steady
            engine.clock.add_follower(self)

    @property
    def running(self) -> bool:
        """The engine runs on the calling loop."""
        return self._engine.running

    async def tick_subscribers(self) -> None:
        engine = self._engine
        while True:
            await anyio.sleep(engine.timeouts.tick)
            engine.subscribers.look_at_server()
            self.tick()

    def tick(self) -> None:
        """Have each subscription look at the time."""
        self._engine.subscribers.tick(self._engine.clock(), self._steady())

    async def run_what_is_due(self) -> None:
        await self._at_every_tick(self._look_after_runs)

    async def hand_over_what_is_due(self) -> None:
        """Beside the rest: a queue that does not answer keeps nothing else waiting."""
        await self._at_every_tick(self._hand_over_runs)

    async def _at_every_tick(self, act: Callable[[], Awaitable[None]]) -> None:
        while True:
            await anyio.sleep(self._engine.timeouts.tick)
            try:
                await act()
                self._broker_away = False
            except BrokerUnavailable as exc:
                if not self._broker_away:
                    logger.warning("the broker is away: %s", exc)
                self._broker_away = True
            except Exception:
                logger.exception("the ticker failed")

    async def once(self) -> None:
        """Do all that is due now."""
        await self._look_after_runs()
        await self._hand_over_runs()

    async def _hand_over_runs(self) -> None:
        self._refused = False
        await self._each("delay", self._queue)
        await self._each("enqueue", self._hand_over)

    async def _look_after_runs(self) -> None:
        engine = self._engine
        engine.watch_executions()
        if engine.held and not engine.renews_from_thread:
            await self._renew()  # before looking for expired leases: a blocked loop must not crash its own runs
        await self._each("ttl", lambda run_id: self._change(run_id, _EXPIRED))
        await self._each("lease", lambda run_id: self._change(run_id, _CRASHED))
        await self._each("cancel", lambda run_id: self._change(run_id, Finished(Status.CANCELED)))
        await self._each("untold", engine.broker.tell)
        await self._each("expiry", engine.broker.remove)

    async def _renew(self) -> None:
        engine = self._engine
        now = engine.clock()  # unlike the loop's time it goes on while the machine sleeps, as leases do
        if not 0 <= now - self._renewed_at < engine.timeouts.lease / 3:
            await engine.broker.renew(engine.held, owner=engine.owner)
            self._renewed_at = now
            engine.runs.owned.renewed()

    async def _each(self, kind: str, act: Callable[[str], Awaitable[object]]) -> None:
        """Act on each run that is due, once: what stays due, such as a task that only others know, is passed over."""
        seen: set[str] = set()
        skip = 0
        while run_ids := await self._engine.broker.due(kind, skip=skip):
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
        except Exception:  # of an executor, as a rule; the others have their turn all the same
            logger.exception("run %s is due (%s) and that failed", run_id, kind)

    async def _queue(self, run_id: str) -> None:
        engine = self._engine
        (record,) = await engine.runs.load([run_id])
        if record is None or not engine.takes(record.task):
            return  # a process that has the task does it
        record = await self._change(run_id, Queued())
        if record is not None and record.status is Status.QUEUED and not self._refused:
            self._refused = not await engine.hand_over(record)

    async def _hand_over(self, run_id: str) -> None:
        """Hand over a run whose process was gone before it did, or whose queue refused it."""
        engine = self._engine
        (record,) = await engine.runs.load([run_id])
        if record is None or record.status is not Status.QUEUED or not engine.takes(record.task):
            return
        if not self._refused:
            await engine.broker.renew([run_id], owner=engine.owner)  # so that others leave it to us, for a lease
            self._refused = not await engine.hand_over(record)

    async def _change(self, run_id: str, change: RunChange) -> RunRecord | None:
        try:
            return await self._engine.runs.update(run_id, change)
        except (InvalidTransition, RunNotFound):
            return None  # somebody else was faster
