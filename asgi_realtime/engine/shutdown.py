"""How this process shuts down, from the first sign of it.

Servers wait for open responses before they stop the app. The shutdown therefore begins with the signal, and the stop of
the app only joins it: both share one deadline. From its beginning new runs are rejected, and subscriptions end, except
those to a run that executes here: they continue until the run ends. At the deadline the remaining runs are cut, and
their readers get the `end`.

**States.** `OPEN` serves. A shutdown that is announced (by a signal, or by a server that stops) leads to `ANNOUNCED`.
An announcement is no certainty: a host can have a handler that ignores the signal. So if no stop follows within
`ANNOUNCEMENT_COUNTS_S`, the state is `OPEN` again. In `CLOSED`, which `begin` and the stop enter, the shutdown lasts
until the next start. A `Realtime` that was started on first use has no host to stop it, so there an announcement stops
it directly.

**The deadline** is `Timeouts.drain` after the beginning. It is `QUICK_DRAIN_S` if a person waits: after SIGINT, after a
second signal, and under a reloader. Process managers often signal a whole group of processes, and the main process of a
server then repeats the signal to its workers; so a signal within `SAME_SIGNAL_S` of the first is not a second one.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from enum import Enum
from typing import Protocol

import anyio

from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.engine.subscribers import Subscribers
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.signals import ShutdownSignals
from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.loop.waiting import WaitList

ANNOUNCEMENT_COUNTS_S = 30.0
"""How long an announced shutdown lasts while no stop follows, counted from the last announcement or the last run."""

QUICK_DRAIN_S = 0.5
"""How long runs can continue if a person waits for the exit."""

SAME_SIGNAL_S = 1.0
"""Signals within this time count as one."""


class State(Enum):
    OPEN = "open"
    ANNOUNCED = "announced"
    CLOSED = "closed"


class ShutdownHost(Protocol):
    """The `Engine`, as its shutdown sees it."""

    @property
    def supervisor(self) -> Supervisor | None:
        """The current one, if any."""

    @property
    def is_lazy(self) -> bool:
        """Whether no host is going to stop this `Realtime`."""

    def holds(self, run_id: str, /) -> bool:
        """Whether the run executes here."""

    def begin_drain(self) -> None:
        """The shutdown begins; `drain` follows."""

    def wake_drain(self) -> None:
        """The deadline has changed."""

    async def drain(self) -> None:
        """Wait for the runs of this process until the deadline, then cut them. Concurrent calls are allowed."""

    def reopen(self) -> None:
        """The announcement was ignored."""


class Shutdown:
    """Whether a shutdown has begun, how long runs can continue, and which readers stay."""

    def __init__(self, host: ShutdownHost, subscribers: Subscribers, *, drain_s: float, signals: bool) -> None:
        self._host = host
        self._subscribers = subscribers
        self._drain_s = drain_s
        self._state = State.OPEN
        self._deadline = 0.0
        self._announced_at = 0.0
        self._signaled_at: float | None = None
        self._drained = False
        self._signals = ShutdownSignals(self._on_signal, in_background=self._in_background) if signals else None
        self.waiting = WaitList()
        """Woken whenever `check_reader` can begin to raise."""

    @property
    def begun(self) -> bool:
        """Whether subscriptions end, and new ones and new runs are rejected."""
        return self._state is not State.OPEN

    @property
    def left_s(self) -> float:
        """How long runs can still continue, in seconds; zero or less when they are to be cut."""
        return self._deadline - time.monotonic()

    def waits_for(self, run_id: str) -> bool:
        """Whether the run executes here and its readers stay until its end."""
        return not self._drained and self._host.holds(run_id)

    def check_reader(self, run_id: str) -> None:
        """Called before a reader in the host's own code waits. Raises `ServerShutdown` if a shutdown has begun and does
        not wait for the run; it never waits for the empty id."""
        if self.begun and not self.waits_for(run_id):
            raise ServerShutdown()

    def _in_background(self) -> bool:
        supervisor = self._host.supervisor
        return supervisor is not None and supervisor.has_the_loop

    # Called by the engine

    def start(self) -> None:
        """A start begins: no subscription is open, and signals are watched."""
        self._subscribers.open.clear()
        self._state = State.OPEN
        self._drained = False
        self._signaled_at = None
        self.waiting = WaitList()
        if self._signals is not None:
            self._signals.install()

    def leave_signals(self) -> None:
        """From now on only the stop begins a shutdown. For the worker of a queue, which serves no responses and decides
        itself how long its runs continue."""
        self.stop()
        self._signals = None

    def stop(self) -> None:
        """The stop is complete: signals reach the server only."""
        if self._signals is not None:
            self._signals.restore()

    def close(self) -> None:
        """The stop begins. The state is final until the next start."""
        self._enter(State.CLOSED)

    def finish(self) -> None:
        """The drain is over: end the subscriptions that are left."""
        self._drained = True
        self._end_readers()

    def _enter(self, state: State, *, quick: bool = False) -> bool:
        """Move on to a state; return whether the shutdown begins with it."""
        begins, self._state = self._state is State.OPEN, state
        now = time.monotonic()
        if begins:
            self._drained = False
            self._deadline = now + self._drain_s
            self._host.begin_drain()
            self._end_readers()
        if quick:
            self._deadline = min(self._deadline, now + QUICK_DRAIN_S)
            self._host.wake_drain()
        return begins

    def _end_readers(self) -> None:
        self._subscribers.shut_down()
        self.waiting.wake()

    # Called by the ticker

    def check_server(self) -> None:
        """Detect a shutdown without a signal, and install the handlers again if the server has replaced them."""
        if self._signals is None:
            return
        self._signals.install()
        if self._signals.server_stops and not self.begun:
            self.announce()

    # Called from any thread or signal handler, even one that interrupts this very code

    def begin(self) -> None:
        """Begin the shutdown, on the next loop iteration. Idempotent."""
        self._post(lambda supervisor: self._begin(supervisor, State.CLOSED))

    def announce(self, *, quick: bool = False) -> None:
        """The server was asked to stop. Idempotent; a later call can only shorten the drain."""
        self._post(lambda supervisor: self._begin(supervisor, State.ANNOUNCED, quick=quick))

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if self._signaled_at is None:
            self._signaled_at = now
        repeated = now - self._signaled_at > SAME_SIGNAL_S
        assert self._signals is not None
        self.announce(quick=repeated or number == signal.SIGINT or self._signals.server_reloads)

    def _post(self, call: Callable[[Supervisor], None]) -> None:
        supervisor = self._host.supervisor
        if supervisor is not None:
            supervisor.post(lambda: call(supervisor))

    def _begin(self, supervisor: Supervisor, state: State, *, quick: bool = False) -> None:
        if self._host.is_lazy and state is State.ANNOUNCED:
            self._enter(State.CLOSED, quick=quick)
            supervisor.request_stop()
            return
        self._announced_at = time.monotonic()
        if self._enter(State.CLOSED if self._state is State.CLOSED else state, quick=quick):
            supervisor.spawn_detached(lambda: self._follow(supervisor))

    async def _follow(self, supervisor: Supervisor) -> None:
        """Drain, and then serve again if the announcement was ignored."""
        await self._host.drain()
        self._announced_at = max(self._announced_at, min(time.monotonic(), self._deadline))
        await _sleep_until(lambda: self._announced_at + ANNOUNCEMENT_COUNTS_S)
        if self._state is not State.ANNOUNCED:
            return
        if supervisor.stopping or (self._signals is not None and self._signals.server_stops):
            self._state = State.CLOSED
            return
        logger.warning("no stop followed a signal within %g s: subscriptions are served again", ANNOUNCEMENT_COUNTS_S)
        self._state = State.OPEN
        self._signaled_at = None
        self._host.reopen()


async def _sleep_until(time_s: Callable[[], float]) -> None:
    while (left_s := time_s() - time.monotonic()) > 0:  # noqa: ASYNC110 - the time can move
        await anyio.sleep(left_s)
