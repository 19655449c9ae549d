"""The servers behind a URL: one, or the primaries of a Cluster; and how a call finds the right one.

Whether it is a Cluster is asked of the server itself. A call that meets a moved slot, a server that is loading, or one
that is no primary any more, is made again for a while. Foreign exceptions become ours here and nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from redis.asyncio.client import Redis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    AuthorizationError,
    ClusterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from asgi_realtime.brokers.redis.link import Link, Lost
from asgi_realtime.brokers.redis.scripts import Script
from asgi_realtime.errors import BrokerUnavailable, InvalidConfiguration

Spawn = Callable[[Coroutine[Any, Any, None]], Any]

_PAUSE_S = 0.02
_PASSING = (MovedError, AskError, TryAgainError, ClusterDownError, ReadOnlyError)
_PASSING_WORDS = ("LOADING", "MASTERDOWN", "READONLY", "CLUSTERDOWN", "TRYAGAIN")
_NO_CLUSTER = "cluster support disabled"


class Address(NamedTuple):
    """Where a primary listens. The empty host stands for the one that the URL names."""

    host: str
    port: int


THE_URL = Address("", 0)


class Servers:
    """All primaries. `client` is redis-py's, of a URL or the user's own (a Sentinel's too); its settings are used."""

    def __init__(self, client: Redis, *, timeout_s: float, spawn: Spawn) -> None:
        self._pool: ConnectionPool = client.connection_pool
        self._timeout_s = timeout_s
        self._spawn = spawn
        self._links: dict[tuple[Address, bool], Link] = {}
        self._slots: list[Address] = []  # by slot; empty without a Cluster
        self._known = False
        self._looking: asyncio.Future[None] | None = None

    def connection(self, address: Address) -> AbstractConnection:
        """A new connection, not open yet, that waits for answers as long as it has to."""
        settings = {
            **self._pool.connection_kwargs,
            "socket_timeout": None,
            "socket_connect_timeout": self._timeout_s,
            "health_check_interval": 0,
            "decode_responses": False,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
        }
        if address is not THE_URL:
            settings |= {"host": address.host, "port": address.port}
        made: AbstractConnection = self._pool.connection_class(**settings)
        return made

    async def address_of(self, key: str) -> Address:
        """The primary that has a key."""
        if not self._known:
            await self._look()
        return self._slots[key_slot(key.encode())] if self._slots else THE_URL

    async def call(self, key: str, *command: Any, bulk: bool = False) -> Any:
        """Send a command to the primary that has the key. Raises `BrokerUnavailable`.

        `bulk` is for answers that may be large: they have a connection of their own, and delay nobody else's.
        """
        return await self._patiently(key, command, bulk)

    async def run(self, script: Script, keys: Sequence[str], *args: Any, bulk: bool = False) -> Any:
        """Run a script on the primary that has its keys. Raises `BrokerUnavailable`."""
        rest = (len(keys), *keys, *args)
        try:
            return await self._patiently(keys[0], ("EVALSHA", script.sha, *rest), bulk)
        except NoScriptError:  # a new server, or SCRIPT FLUSH: with its text a script is known from then on
            return await self._patiently(keys[0], ("EVAL", script.text, *rest), bulk)

    async def _patiently(self, key: str, command: tuple[Any, ...], bulk: bool) -> Any:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        asked: Address | None = None
        while True:
            address = asked or (self._address(key) if self._known else await self.address_of(key))
            link = self._link(address, bulk)
            try:
                if asked is not None:
                    link.send("ASKING")
                return await link.send(*command)
            except NoScriptError:
                raise
            except ResponseError as exc:
                if not _is_passing(exc) or asyncio.get_running_loop().time() > deadline:
                    raise unavailable(exc) from exc
                failure: Exception = exc
            except Lost:
                self._known = self._known and not self._slots  # a primary may have gone for good
                raise
            asked = None
            if type(failure) is AskError:  # a MovedError is one too, and that one is for good
                asked = Address(failure.host, failure.port)
                continue
            if isinstance(failure, ReadOnlyError):
                link.reset()
            self._known = False
            await asyncio.sleep(_PAUSE_S)

    def _address(self, key: str) -> Address:
        return self._slots[key_slot(key.encode())] if self._slots else THE_URL

    def _link(self, address: Address, bulk: bool) -> Link:
        link = self._links.get((address, bulk))
        if link is None:
            link = self._links[address, bulk] = Link(
                lambda: self.connection(address), timeout_s=self._timeout_s, spawn=self._spawn
            )
        return link

    async def _look(self) -> None:
        """Learn who has which slot. Many may wait for one look."""
        while not self._known:
            if self._looking is None:
                self._looking = asyncio.get_running_loop().create_future()
                try:
                    self._slots = await self._ask_anyone()
                    self._known = True
                finally:
                    self._looking.set_result(None)
                    self._looking = None
            else:
                await asyncio.shield(self._looking)

    async def _ask_anyone(self) -> list[Address]:
        """The owner of each slot, from the first server that answers; nothing if there is no Cluster."""
        known = [address for address, bulk in self._links if not bulk and address is not THE_URL]
        failure: BrokerUnavailable | None = None
        for address in (*known, THE_URL):
            try:
                slots = _owners(await self._link(address, False).send("CLUSTER", "SLOTS"), self._pool)
            except Lost as exc:
                failure = exc
            except ResponseError as exc:
                if _NO_CLUSTER in str(exc) or isinstance(exc, NoPermissionError):
                    return []
                failure = unavailable(exc)
            else:
                if slots is not None:
                    return slots
                failure = BrokerUnavailable("the Redis Cluster does not serve all slots")
        assert failure is not None
        raise failure

    async def primaries(self) -> list[Address]:
        """Every primary that serves slots; the one server without a Cluster."""
        await self._look()
        return list(dict.fromkeys(self._slots)) or [THE_URL]

    async def call_at(self, address: Address, *command: Any) -> Any:
        """Send a command to one primary. Raises `BrokerUnavailable`."""
        try:
            return await self._link(address, False).send(*command)
        except ResponseError as exc:
            raise unavailable(exc) from exc

    def moved(self) -> None:
        """Slots are not where they were thought to be: look again before the next call."""
        self._known = not self._slots

    async def aclose(self) -> None:
        """Close all connections."""
        links = list(self._links.values())
        self._links.clear()
        for link in links:
            await link.aclose()
        self._known = False


def _owners(answer: Any, pool: ConnectionPool) -> list[Address] | None:
    """CLUSTER SLOTS as a list by slot; None if a slot has no owner."""
    slots: list[Address | None] = [None] * 16384
    for begin, end, primary, *_ in answer:
        host = primary[0].decode() if primary[0] else str(pool.connection_kwargs.get("host", "localhost"))
        slots[begin : end + 1] = [Address(host, primary[1])] * (end + 1 - begin)
    return None if None in slots else [owner for owner in slots if owner is not None]


def _is_passing(exc: ResponseError) -> bool:
    return isinstance(exc, _PASSING) or str(exc).startswith(_PASSING_WORDS)


def unavailable(exc: RedisError) -> BrokerUnavailable:
    """A refusal of the server as our own error, with what the user can do about it."""
    if isinstance(exc, OutOfMemoryError):
        return BrokerUnavailable("Redis has no memory left (maxmemory): raise it, or keep less by Retention")
    if isinstance(exc, NoPermissionError | AuthorizationError):
        return BrokerUnavailable(f"the Redis user may not do this ({exc}); docs/scaling.md has the rules it needs")
    return BrokerUnavailable(f"Redis refused: {exc}")


def open_client(url: str) -> Redis:
    """The client of a URL as redis-py takes it: `redis://`, `rediss://`, `unix://`. Raises `InvalidConfiguration`."""
    try:
        return Redis.from_url(url)
    except ValueError as exc:
        raise InvalidConfiguration(f"the broker's URL is not one that redis-py takes: {exc}") from exc
