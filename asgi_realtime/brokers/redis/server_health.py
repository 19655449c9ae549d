"""The health of the Redis servers in the log: one line when a problem starts, one when it ends.

All connections report here. Problems that follow each other within a second are one problem: it is over once nothing
has failed for that long.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Hashable

from asgi_realtime.brokers.redis.clients import THE_URL, Address
from asgi_realtime.loop.logger import logger

_silent = logging.Logger("silent", logging.CRITICAL + 1)

_STEADY_S = 1.0
_QUIET_S = 10.0
"""How long broken connections are not logged again: a hundred can break in a second."""


class ServerHealthLog:
    """What fails now, by its subject: a server that is unavailable, a script that is refused.

    Separately it counts how long all servers have been answering calls, because leases could not be renewed before.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._logger = _silent if quiet else logger
        self._failing_since: dict[Hashable, float] = {}
        self._recovering: dict[Hashable, asyncio.TimerHandle] = {}
        self._broke_at: dict[Hashable, float] = {}
        self._unanswering: set[Hashable] = set()
        self._answering_since = -math.inf

    def answering_for_s(self) -> float:
        """How long all servers have been answering calls; infinite if they always have."""
        return 0.0 if self._unanswering else asyncio.get_running_loop().time() - self._answering_since

    def not_answering(self, server: Hashable) -> None:
        self._unanswering.add(server)

    def answering(self, server: Hashable) -> None:
        if server in self._unanswering:
            self._unanswering.discard(server)
            self._answering_since = asyncio.get_running_loop().time()

    def forget(self, server: Hashable) -> None:
        """The server has left the Cluster."""
        self.answering(server)
        self._failing_since.pop(server, None)
        self._broke_at.pop(server, None)
        timer = self._recovering.pop(server, None)
        if timer is not None:
            timer.cancel()

    def broke(self, subject: Hashable, name: str, reason: object) -> None:
        """A working connection broke. That alone is not a failure: the next attempt decides."""
        now = asyncio.get_running_loop().time()
        if subject not in self._failing_since and now - self._broke_at.get(subject, -math.inf) > _QUIET_S:
            self._broke_at[subject] = now
            self._logger.info("a connection to %s broke; connecting again: %s", name, reason)

    def failed(self, subject: Hashable, problem: str, reason: object) -> None:
        timer = self._recovering.pop(subject, None)
        if timer is not None:
            timer.cancel()
        if subject not in self._failing_since:
            self._failing_since[subject] = asyncio.get_running_loop().time()
            self._logger.warning("%s: %s", problem, reason)

    def works(self, subject: Hashable, recovery: str) -> None:
        if subject in self._failing_since and subject not in self._recovering:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(_STEADY_S, self._recovered, subject, recovery, loop.time())
            self._recovering[subject] = timer

    def _recovered(self, subject: Hashable, recovery: str, at: float) -> None:
        del self._recovering[subject]
        self._logger.info("%s, after %.1f s", recovery, at - self._failing_since.pop(subject))

    def close(self) -> None:
        for timer in self._recovering.values():
            timer.cancel()
        self._recovering.clear()
        self._failing_since.clear()
        self._broke_at.clear()


class ServerReporter:
    """Reports the connections to one server to the log."""

    def __init__(self, health: ServerHealthLog, address: Address, *, of_calls: bool) -> None:
        self._health = health
        self._of_calls = of_calls
        self._address = address
        self._name = "Redis" if address == THE_URL else f"Redis at {address.host}:{address.port}"

    def broke(self, reason: Exception) -> None:
        """A connection worked, and was lost."""
        self._health.broke(self._address, self._name, reason)

    def failed(self, reason: Exception) -> None:
        """A connection could not be opened, or the server does not answer."""
        if self._of_calls:
            self._health.not_answering(self._address)
        self._health.failed(self._address, f"{self._name} is unavailable", str(reason) or type(reason).__name__)

    def works(self) -> None:
        if self._of_calls:
            self._health.answering(self._address)
        self._health.works(self._address, f"{self._name} is available again")
