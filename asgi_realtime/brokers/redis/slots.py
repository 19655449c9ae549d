"""Which primary owns which slot of a Cluster; without a Cluster, one server owns everything.

The server itself knows whether it is part of a Cluster (CLUSTER SLOTS). The last known map is used until it is
replaced: by a MOVED answer, or by the next request, which is sent in the background after a connection was lost. A
primary that is down therefore delays only the calls that need it."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Coroutine
from copy import copy
from typing import Any, Protocol

from redis.crc import key_slot
from redis.exceptions import MovedError, NoPermissionError, ResponseError

from asgi_realtime.brokers.redis.clients import THE_URL, Address, unavailable
from asgi_realtime.brokers.redis.command_connection import ConnectionLost
from asgi_realtime.core.errors import BrokerUnavailable, RealtimeError, ServerShutdown

SLOTS = 16384

_REFRESH_S = 0.2
"""The shortest time between two requests in the background."""

_NO_CLUSTER = "cluster support disabled"


class Asks(Protocol):
    """What the map needs of `Servers`."""

    def ask(self, address: Address, *command: Any) -> Awaitable[Any]: ...

    def is_failing(self, address: Address) -> bool: ...

    def on_refreshed(self, primaries: list[Address]) -> None: ...

    def spawn(self, job: Coroutine[Any, Any, None]) -> Any: ...


class SlotMap:
    """`default_host` is what a server means that lists itself without a host."""

    def __init__(self, servers: Asks, *, default_host: str) -> None:
        self._servers = servers
        self._default_host = default_host
        self._owners: list[Address] = []  # by slot; empty without a Cluster
        self._job: asyncio.Task[None] | None = None
        self._asked_at = -math.inf
        self._failure: RealtimeError = ServerShutdown()  # what ended the job, unless it raised an error
        self.is_known = False

    def owner(self, key: str) -> Address:
        """The primary of a key, as far as is known."""
        return self._owners[key_slot(key.encode())] if self._owners else THE_URL

    async def primaries(self) -> list[Address]:
        """Every primary that owns slots; the one server without a Cluster. Raises `BrokerUnavailable`."""
        await self.known()
        return list(dict.fromkeys(self._owners)) or [THE_URL]

    async def known(self) -> None:
        """Return once the owners are known. Raises `BrokerUnavailable`. Many callers can wait for one request."""
        if self.is_known:
            return
        job = self._refresh()
        await asyncio.wait([job])
        if not self.is_known:
            raise copy(self._failure)  # one that is raised repeatedly accumulates tracebacks

    def refresh_soon(self) -> None:
        """Ask again in the background, if this is a Cluster and it was not asked just now."""
        if self._owners and asyncio.get_running_loop().time() - self._asked_at > _REFRESH_S:
            self._refresh()

    def learn(self, moved: MovedError) -> None:
        """Use the answer of a server that does not own a slot and names the one that does."""
        if self._owners:
            host = moved.host or self._owners[moved.slot_id].host
            self._owners[moved.slot_id] = Address(host, moved.port)

    def _refresh(self) -> asyncio.Task[None]:
        if self._job is None or self._job.done():
            self._asked_at = asyncio.get_running_loop().time()
            self._job = self._servers.spawn(self._ask())
        return self._job

    async def _ask(self) -> None:
        try:
            self._owners = await self._ask_any()
        except RealtimeError as exc:
            self._failure = exc
            return
        except Exception as exc:
            self._failure = BrokerUnavailable(f"CLUSTER SLOTS has an answer that cannot be read: {exc!r}")
            return
        self.is_known = True
        self._servers.on_refreshed(self._owners or [THE_URL])

    async def _ask_any(self) -> list[Address]:
        """The owner of each slot, from the first server that answers; an empty list if there is no Cluster."""
        known = list(dict.fromkeys(self._owners))
        random.shuffle(known)
        known.sort(key=self._servers.is_failing)
        failure: BrokerUnavailable | None = None
        for address in (*known, THE_URL):
            try:
                owners = self._parse(await self._servers.ask(address, "CLUSTER", "SLOTS"))
            except ConnectionLost as exc:
                failure = exc
            except ResponseError as exc:
                if _NO_CLUSTER in str(exc) or isinstance(exc, NoPermissionError):
                    return []
                failure = unavailable(exc)
            else:
                if owners is not None:
                    return owners
                failure = BrokerUnavailable("the Redis Cluster does not serve all slots")
        assert failure is not None
        raise failure

    def _parse(self, answer: Any) -> list[Address] | None:
        """CLUSTER SLOTS as a list by slot; None if a slot has no owner."""
        slots: list[Address | None] = [None] * SLOTS
        for first, last, primary, *_ in answer:
            host = primary[0].decode() if primary[0] else self._default_host
            slots[first : last + 1] = [Address(host, primary[1])] * (last + 1 - first)
        return None if None in slots else [owner for owner in slots if owner is not None]
