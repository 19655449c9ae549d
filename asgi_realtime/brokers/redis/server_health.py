"""Whether Redis is there, as the log tells it: once that something is wrong, and once that it is well again.

Every connection reports here. What goes away and comes back many times in a row is one absence: it is over when nothing
was lost for a while.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Hashable

logger = logging.getLogger("asgi_realtime")
_silent = logging.Logger("silent", logging.CRITICAL + 1)

_STEADY_S = 1.0
_QUIET_S = 10.0
"""After a broken connection was told of, until the next one is: they may break a hundred times in a second."""


class ServerHealthLog:
    """What does not work now, by what it is: a server that is away, a script that is refused."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._logger = _silent if quiet else logger
        self._since: dict[Hashable, float] = {}
        self._ending: dict[Hashable, asyncio.TimerHandle] = {}
        self._broke_at: dict[Hashable, float] = {}
        self._absent: set[Hashable] = set()
        self._present_since = -math.inf

    def present_for_s(self) -> float:
        """For how long all servers have answered calls; endless if they always did."""
        return 0.0 if self._absent else asyncio.get_running_loop().time() - self._present_since

    def absent(self, server: Hashable) -> None:
        """It does not answer calls."""
        self._absent.add(server)

    def present(self, server: Hashable) -> None:
        """It answers calls."""
        if server in self._absent:
            self._absent.discard(server)
            self._present_since = asyncio.get_running_loop().time()

    def forget(self, server: Hashable) -> None:
        """It is none of ours any more."""
        self.present(server)
        self._since.pop(server, None)
        self._broke_at.pop(server, None)
        ending = self._ending.pop(server, None)
        if ending is not None:
            ending.cancel()

    def broke(self, what: Hashable, name: str, reason: object) -> None:
        """A connection that worked broke. That alone is no absence: the next try tells."""
        now = asyncio.get_running_loop().time()
        if what not in self._since and now - self._broke_at.get(what, -math.inf) > _QUIET_S:
            self._broke_at[what] = now
            self._logger.info("a connection to %s broke and is made anew: %s", name, reason)

    def lost(self, what: Hashable, trouble: str, reason: object) -> None:
        """It does not work, and why."""
        ending = self._ending.pop(what, None)
        if ending is not None:
            ending.cancel()
        if what not in self._since:
            self._since[what] = asyncio.get_running_loop().time()
            self._logger.warning("%s: %s", trouble, reason)

    def works(self, what: Hashable, relief: str) -> None:
        """It works."""
        if what in self._since and what not in self._ending:
            loop = asyncio.get_running_loop()
            self._ending[what] = loop.call_later(_STEADY_S, self._well, what, relief, loop.time())

    def _well(self, what: Hashable, relief: str, at: float) -> None:
        del self._ending[what]
        self._logger.info("%s, after %.1f s", relief, at - self._since.pop(what))

    def close(self) -> None:
        """Nobody looks any more."""
        for ending in self._ending.values():
            ending.cancel()
        self._ending.clear()
        self._since.clear()
        self._broke_at.clear()
