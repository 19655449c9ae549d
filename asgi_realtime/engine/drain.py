"""Ending the runs of this process when the `Realtime` stops.

1. Runs that wait here become FAILED. The others have `timeouts.drain` to finish.
2. The code of the remaining runs is stopped, and they become FAILED with `ServerShutdown`. Their cleanup, and the
   commits that store these ends, have `timeouts.cancel`. Runs that the cleanup creates end in the same way.

The engine then cancels what still runs and leaves the broker, which interrupts calls in progress. If the broker is
unavailable or does not respond, the second step is short: nothing more can be stored, and a process that does not exit
delays a deployment. Runs whose end could not be stored end CRASHED when their lease expires.
"""

from __future__ import annotations

import anyio

from asgi_realtime.brokers.base import Broker
from asgi_realtime.core.config import Timeouts
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.engine.dispatch import Dispatcher
from asgi_realtime.engine.executions import Executions
from asgi_realtime.runs.store import RunStore

_PATIENCE_S = 0.5
"""How long the second step waits for a broker that is unavailable or does not respond."""


class Drain:
    """Ends all runs of this process when called."""

    def __init__(
        self, broker: Broker, runs: RunStore, *, executions: Executions, dispatcher: Dispatcher, timeouts: Timeouts
    ) -> None:
        self._broker = broker
        self._runs = runs
        self._executions = executions
        self._dispatcher = dispatcher
        self._timeouts = timeouts

    async def __call__(self) -> None:
        with anyio.move_on_after(self._timeouts.drain):
            await self._dispatcher.fail_waiting()
            while self._is_busy:
                await self._executions.changed.wait()
        self._runs.retry.shorten(_PATIENCE_S)
        cancel_s = self._timeouts.cancel
        if self._is_busy and not await self._broker_responds():
            cancel_s = min(cancel_s, _PATIENCE_S)
        with anyio.move_on_after(cancel_s):
            while self._is_busy:
                await self._executions.shut_down()
                if self._is_busy:
                    await self._executions.changed.wait()
            await self._dispatcher.fail_waiting()

    @property
    def _is_busy(self) -> bool:
        return bool(self._executions) or self._dispatcher.is_busy

    async def _broker_responds(self) -> bool:
        with anyio.move_on_after(_PATIENCE_S):
            try:
                await self._broker.ping()
                return True
            except BrokerUnavailable:
                pass
        return False
