"""How the runs of this process end at a shutdown, in two steps.

1. Runs that wait here become FAILED. The others can continue until the deadline.
2. The code of the remaining runs is stopped, and they become FAILED with `ServerShutdown`. Their cleanup, the commits
   that store these ends, and their `on_end` functions have `timeouts.cancel`. Runs that the cleanup creates end in the
   same way.

If the broker is unavailable or does not respond, the second step is short: nothing more can be stored, and a process
that does not exit delays a deployment. Runs whose end could not be stored end CRASHED when their lease expires.

The signal starts a drain, and so does the stop of the app. The second one waits for the first, and then for runs that
the host created in between.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable

import anyio

from asgi_realtime.brokers.base import Broker
from asgi_realtime.core.config import Timeouts
from asgi_realtime.core.errors import BrokerUnavailable, ServerShutdown
from asgi_realtime.engine.dispatch import Dispatcher
from asgi_realtime.engine.execution import Execution
from asgi_realtime.engine.executions import Executions
from asgi_realtime.engine.on_end import OnEnds
from asgi_realtime.loop.logger import logger
from asgi_realtime.runs.store import RunStore

PATIENCE_S = 0.5
"""How long the second step waits for a broker that is unavailable or does not respond."""

_LAST_CHUNKS_S = 1.0
"""How long the readers of these runs have for the last chunks and the `end`."""

_LOOK_S = 0.01
"""How often the drain looks for remaining readers."""


class Drain:
    """Ends the runs of one start.

    `left_s` returns how long they can continue, `is_creating` whether one is about to be stored and to execute here,
    and `has_readers` whether there are readers that the shutdown has not ended yet.
    """

    def __init__(
        self,
        *,
        runs: RunStore,
        executions: Executions,
        dispatcher: Dispatcher,
        on_ends: OnEnds,
        timeouts: Timeouts,
        left_s: Callable[[], float],
        is_creating: Callable[[], bool],
        has_readers: Callable[[], bool],
    ) -> None:
        self._runs = runs
        self._broker: Broker = runs.broker
        self._executions = executions
        self._dispatcher = dispatcher
        self._on_ends = on_ends
        self._timeouts = timeouts
        self._left_s = left_s
        self._is_creating = is_creating
        self._has_readers = has_readers
        self._lock = anyio.Lock()
        self._seen: dict[str, Execution] = {}

    @property
    def _is_busy(self) -> bool:
        return bool(self._executions or self._dispatcher.in_process.running or self._on_ends.ids)

    def begin(self) -> None:
        """The shutdown begins: note the runs that execute now, because they can end before `run` is called."""
        self._seen = dict(self._executions)

    def has_seen(self, run_id: str) -> bool:
        """Whether this drain has waited for the run. Its readers still need a moment for its end."""
        return run_id in self._seen

    async def run(self) -> None:
        """Return when no run executes here, or when it is too late for those that do."""
        async with self._lock:
            began = time.monotonic()
            self._seen.update(self._executions)
            unstarted = await self._wait()
            waited_s = time.monotonic() - began
            if self._is_busy:
                await self._cut()
            if self._seen or unstarted:
                _report(self._seen.values(), unstarted, waited_s)
                await self._let_readers_end()
            self._seen = {}

    async def _wait(self) -> int:
        """The first step. Returns how many runs had not started."""
        unstarted = len(self._dispatcher.in_process.waiting)
        with anyio.move_on_after(self._left_s()):
            await self._dispatcher.fail_waiting()
        while (self._is_busy or self._is_creating()) and (left_s := self._left_s()) > 0:
            with anyio.move_on_after(left_s):
                await self._executions.changed.wait()
            self._seen.update(self._executions)
        return unstarted

    async def _cut(self) -> None:
        """The second step."""
        self._runs.retry.shorten(PATIENCE_S)
        cancel_s = self._timeouts.cancel
        if not await self._broker_responds():
            cancel_s = min(cancel_s, PATIENCE_S)
        with anyio.move_on_after(cancel_s):
            while self._is_busy:
                await self._executions.shut_down()
                if self._is_busy:
                    await self._executions.changed.wait()
            await self._dispatcher.fail_waiting()

    async def _broker_responds(self) -> bool:
        with anyio.move_on_after(PATIENCE_S):
            try:
                await self._broker.ping()
                return True
            except BrokerUnavailable:
                pass
        return False

    async def _let_readers_end(self) -> None:
        with anyio.move_on_after(min(_LAST_CHUNKS_S, self._timeouts.drain)):
            while self._has_readers():  # noqa: ASYNC110 - the hot path changes them
                await anyio.sleep(_LOOK_S)


def _report(runs: Collection[Execution], unstarted: int, waited_s: float) -> None:
    cut = [execution for execution in runs if isinstance(execution.stopped_by, ServerShutdown)]
    text = f"shutdown: {_counted(len(runs) - len(cut))} finished, {len(cut)} cut"
    if cut:
        text += f" after {waited_s:.1f} s ({_tasks(cut)})"
    if unstarted:
        text += f", {unstarted} not started"
    logger.log(logging.WARNING if cut or unstarted else logging.INFO, "%s", text)


def _counted(runs: int) -> str:
    return "1 run" if runs == 1 else f"{runs} runs"


def _tasks(executions: Iterable[Execution]) -> str:
    """The tasks of runs, such as "chat × 2, report"."""
    counts = Counter(execution.run.task for execution in executions).most_common()
    return ", ".join(task if count == 1 else f"{task} × {count}" for task, count in counts)
