"""The state machine of a mirror: a copy of a stream or topic in Redis that this process follows.

Joining history and tail. Redis stores the history, and a channel announces each append. Reading first and subscribing
later would lose the changes in between; subscribing first and appending the history to the received messages would
duplicate entries. A mirror therefore subscribes, waits until the server has confirmed that, and only then reads. Every
change before the read is in its answer; every change after it arrives as a message. Messages that arrive during the
read wait for it and are applied on top; each names its position, so what the answer already contains is skipped. This
join happens here and nowhere else.

Messages are hints. Pub/sub delivers at most once, so a message that does not continue the content, one that only names
a position, and a lost connection all have the same remedy: read again from the current position.

The states, and what moves a mirror between them:

* JOINING: subscribing and reading for the first time. Users wait in `joined`, messages wait for the read.
* LIVE: up to date as far as this process knows; messages are applied as they arrive. No job runs.
* SYNCING: messages were possibly missed, so a job reads again. Messages wait for it. Users can read the old content.
  An unavailable broker is retried for as long as there are users: one job per mirror, however often it is asked for.
* FAILED: cannot be followed (the run was removed, data was lost, an answer was unreadable). Users get the failure; the
  next user needs a new mirror. Messages are ignored.
* CLOSED: the last user has left, or the broker has been closed.

Invariants: a job runs in JOINING and SYNCING and in no other state. Leaving these two states takes no `await` after
the last waiting message was applied, so no message falls between the job and `on_message`. Every transition wakes
the tasks that wait for one. A read that was overtaken (`_reread`) is repeated by the same job before it becomes LIVE.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from typing import Any

from asgi_realtime.brokers.redis.pubsub import PubSub
from asgi_realtime.brokers.redis.pubsub_connection import retry_delays
from asgi_realtime.brokers.redis.servers import RESYNC
from asgi_realtime.core.errors import BrokerUnavailable, RealtimeError, ServerShutdown
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.waiting import WaitList

_PENDING_BYTES = 1024 * 1024
"""Messages that wait for a read. Beyond this, reading once more is cheaper."""


class MirrorState(Enum):
    JOINING = "joining"
    LIVE = "live"
    SYNCING = "syncing"
    FAILED = "failed"
    CLOSED = "closed"


JOINING, LIVE, SYNCING, FAILED, CLOSED = MirrorState  # saves a lookup in `on_message`, the hot path

TRANSITIONS: dict[MirrorState, frozenset[MirrorState]] = {
    JOINING: frozenset({LIVE, FAILED, CLOSED}),
    LIVE: frozenset({SYNCING, FAILED, CLOSED}),
    SYNCING: frozenset({LIVE, FAILED, CLOSED}),
    FAILED: frozenset({CLOSED}),
    CLOSED: frozenset(),
}


class DataLoss(BrokerUnavailable):
    """Redis has less than it had: acknowledged data was lost."""


class Mirror(ABC):
    """Something that users of this process follow. The first user creates it, the last one closes it."""

    def __init__(self, key: Any, channels: Sequence[str], pubsub: PubSub) -> None:
        self.key = key
        self.users = 0
        self._state = JOINING
        self.failure: RealtimeError | None = None
        self._changed = WaitList()  # woken by each transition
        self._reread = False
        self._routine = False  # nothing but silence is the reason for the read that is under way
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._channels = channels
        self._pubsub = pubsub
        for channel in channels:
            pubsub.add(channel, self)
        self._task: Any = pubsub.spawn(self._work(self._join))

    @property
    def is_usable(self) -> bool:
        """Whether another user can follow this one."""
        return self._state is not FAILED and self._state is not CLOSED

    async def joined(self) -> None:
        """Return when history and tail are joined. Raises `RunNotFound`, `BrokerUnavailable`."""
        await self._left(JOINING)

    async def _left(self, state: MirrorState) -> None:
        while self._state is state:
            await self._changed.wait()
        if self.failure is not None:
            raise self.failure

    def shut_down(self) -> None:
        """The broker closes: users get `ServerShutdown`."""
        if self.is_usable:
            self._fail(ServerShutdown())
        self.close()

    def close(self) -> None:
        """The last user has left."""
        if self._state is not CLOSED:
            self._enter(CLOSED)
        self._task.cancel()
        for channel in self._channels:
            self._pubsub.discard(channel, self)

    def _enter(self, state: MirrorState) -> None:
        if state not in TRANSITIONS[self._state]:
            raise RuntimeError(f"a mirror cannot go from {self._state.name} to {state.name}")
        self._state = state
        self._changed.wake()

    def _fail(self, failure: RealtimeError) -> None:
        self.failure = failure
        self._pending.clear()
        self._enter(FAILED)
        self._on_failure()

    # The job of JOINING and SYNCING

    async def _work(self, read: Callable[[], Awaitable[None]]) -> None:
        """Read, then become LIVE or FAILED, also after a cancellation or an unexpected error, because users wait."""
        failure: RealtimeError | None = BrokerUnavailable("history and tail could not be joined")
        try:
            await read()
            failure = None
        except RealtimeError as exc:
            failure = exc
        except Exception as exc:
            failure = BrokerUnavailable(f"Redis holds something that cannot be read: {exc!r}")
            raise
        finally:
            if self._state is JOINING or self._state is SYNCING:  # not if a message failed it or it was closed
                self._routine = False
                if failure is None:
                    self._enter(LIVE)
                else:
                    self._fail(failure)

    async def _join(self) -> None:
        await self._pubsub.confirmed(self._channels)
        await self._catch_up()

    async def _sync(self) -> None:
        for delay_s in retry_delays():
            try:
                return await self._catch_up()
            except DataLoss:
                raise
            except BrokerUnavailable:
                await asyncio.sleep(delay_s)

    async def _catch_up(self) -> None:
        """Read, then apply the messages that arrived during the read. Repeat until they continue it."""
        self._reread = True
        while self._reread and self.is_usable:
            self._reread = False
            await self._read()
            pending, self._pending, self._pending_bytes = self._pending, [], 0
            for message in pending:
                if self._reread:  # an earlier one does not continue what was read
                    self._keep(message)
                elif self.is_usable:
                    self._apply(message)

    # Messages

    def on_message(self, message: bytes) -> None:
        if message == RESYNC:
            self.check(routine=False)
        elif self._state is LIVE:
            self._apply(message)
        elif self.is_usable:
            self._keep(message)

    def _apply(self, message: bytes) -> None:
        try:
            self._take(message)
        except Exception:  # of another version or another publisher; Redis has the correct state
            logger.exception("cannot read a message on %s", self._channels[0])
            self.check(routine=False)

    def _keep(self, message: bytes) -> None:
        self._pending.append(message)
        self._pending_bytes += len(message)
        if self._pending_bytes > _PENDING_BYTES:
            self._pending.clear()
            self._pending_bytes = 0
            self._reread = True

    def check(self, *, routine: bool) -> None:
        """Read again, because messages were possibly missed. `routine`: only because the channels were silent."""
        if self._state is LIVE:
            self._routine = routine
            self._enter(SYNCING)
            self._task = self._pubsub.spawn(self._work(self._sync))
        elif self.is_usable:
            self._routine = self._routine and routine
            self._reread = True

    def _on_found_change(self) -> None:
        """The read found a change. If silence was its only reason, a message was lost: replace the connection."""
        if self._routine:
            self._routine = False
            self._pubsub.missed(self._channels[0])

    @abstractmethod
    async def _read(self) -> None:
        """Bring this up to date from Redis. Raises `DataLoss`, `RunNotFound`, `BrokerUnavailable`."""
        ...

    @abstractmethod
    def _take(self, message: bytes) -> None:
        """Apply a message, or call `check` if it does not continue the content."""
        ...

    @abstractmethod
    def _on_failure(self) -> None:
        """Hand `failure` to the users."""
        ...
