"""The servers behind a URL: one, or the primaries of a Cluster; and how a call finds the right one.

Whether it is a Cluster is asked of the server itself. A call that meets a moved slot, a server that is loading, or one
that is no primary any more, is made again for a while; one whose connection broke is made again once. What is known of
the slots is used until something better is known, so a primary that is away delays nobody who does not need it. Foreign
exceptions become ours here and nowhere else.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Coroutine, Sequence
from copy import copy
from typing import Any, NamedTuple

from redis.asyncio.client import Redis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
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

from asgi_realtime.brokers.redis.link import Command, Link, Lost
from asgi_realtime.brokers.redis.scripts import Script
from asgi_realtime.brokers.redis.server_health import ServerHealthLog
from asgi_realtime.core.errors import BrokerUnavailable, InvalidConfiguration, ServerShutdown

Spawn = Callable[[Coroutine[Any, Any, None]], Any]

_PAUSE_S = 0.02
_LOOKS_S = 0.2
"""Between two looks at who has which slot."""

LOOK = b"?"
"""Published on a channel: something happened there, and nothing else is said."""

WRITABLE = Script("#!lua\nreturn 1")
"""Writes nothing, but is refused where a script that does would be: without memory, on a replica."""

_PASSING = (MovedError, AskError, TryAgainError, ClusterDownError, ReadOnlyError)
_PASSING_WORDS = ("LOADING", "MASTERDOWN", "READONLY", "CLUSTERDOWN", "TRYAGAIN")
_NO_CLUSTER = "cluster support disabled"


class Address(NamedTuple):
    """Where a primary listens. The empty host stands for the one that the URL names."""

    host: str
    port: int


THE_URL = Address("", 0)


class Servers:
    """All primaries. `client` is redis-py's, of a URL or the user's own (a Sentinel's too); its settings are used.

    `quiet`: somebody else channel the log whether they are there.
    """

    def __init__(self, client: Redis, *, timeout_s: float, spawn: Spawn, quiet: bool = False) -> None:
        self._pool = _pool_of_our_own(client.connection_pool, timeout_s=timeout_s)
        self._timeout_s = timeout_s
        self._spawn = spawn
        self._links: dict[tuple[Address, bool], Link] = {}
        self._slots: list[Address] = []  # by slot; empty without a Cluster
        self._known = False
        self._closed = False
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = -math.inf
        self._unknown_why = ""
        self._refusals: dict[tuple[Address, object], tuple[Address, str]] = {}
        self.presence = ServerHealthLog(quiet=quiet)

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

    def reporter(self, address: Address, *, of_calls: bool = False) -> ServerReporter:
        """Whom a connection to a server channel how it fares."""
        return ServerReporter(self.presence, address, of_calls=of_calls)

    async def address_of(self, key: str) -> Address:
        """The primary that has a key. Raises `BrokerUnavailable` if no server can be asked, the first time."""
        if not self._known:
            await self._look()
        return self.address_now(key)

    def address_now(self, key: str) -> Address:
        """The primary that has a key, as far as is known."""
        return self._slots[key_slot(key.encode())] if self._slots else THE_URL

    async def call(self, key: str, *command: Any, bulk: bool = False) -> Any:
        """Send a command to the primary that has the key. Raises `BrokerUnavailable`.

        It may be carried out twice. `bulk` is for answers that may be large: they have a connection of their own, and
        delay nobody else's.
        """
        return await self._patiently(key, command, bulk)

    async def run(
        self,
        script: Script,
        keys: Sequence[str],
        *args: Any,
        bulk: bool = False,
        repeat: bool = True,
        channel: str | None = None,
    ) -> Any:
        """Run a script on the primary that has its keys. Raises `BrokerUnavailable`.

        It may be carried out twice, unless `repeat` says that this would do harm. `channel` is the channel on which the
        script publishes.
        """
        rest = (len(keys), *keys, *args)
        try:
            return await self._patiently(keys[0], ("EVALSHA", script.sha, *rest), bulk, repeat, channel)
        except NoScriptError:  # a new server, or SCRIPT FLUSH: with its text a script is known from then on
            return await self._patiently(keys[0], ("EVAL", script.text, *rest), bulk, repeat, channel)

    async def _patiently(
        self, key: str, command: Command, bulk: bool, repeat: bool = True, channel: str | None = None
    ) -> Any:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        asked: Address | None = None
        while True:
            address = asked or (self.address_now(key) if self._known else await self.address_of(key))
            link = self._link(address, bulk)
            try:
                if asked is not None:
                    link.send("ASKING")
                answer = await link.send(*command)
            except NoScriptError:
                raise
            except ResponseError as exc:
                if not _is_passing(exc) or asyncio.get_running_loop().time() > deadline:
                    raise self._refused(address, command, exc) from exc
                failure: Exception = exc
            except Lost as exc:
                self.look_again()  # a primary may have gone for good
                if not exc.broke or not repeat:
                    raise
                repeat = False
                asked = None
                continue
            else:
                if self._refusals:
                    self._accepted(address, command)
                if asked is not None and channel is not None:
                    self._tell(channel)
                return answer
            asked = None
            if type(failure) is AskError:  # a MovedError is one too, and that one is for good
                asked = Address(failure.host, failure.port)
                continue
            if isinstance(failure, MovedError):
                self.learn(failure)
            elif isinstance(failure, ReadOnlyError):
                link.reset()
            await asyncio.sleep(_PAUSE_S)

    def _tell(self, channel: str) -> None:
        """The slot is on its way: those who listen do so at its old primary, and the script published at the new."""
        told = self._link(self.address_now(channel), False).send("SPUBLISH", channel, LOOK)
        told.add_done_callback(lambda future: future.cancelled() or future.exception())

    def _refused(self, address: Address, command: Command, exc: ResponseError) -> BrokerUnavailable:
        refusal = unavailable(exc)
        what = self._refusals[address, _kind(command)] = (address, str(refusal))
        self.presence.lost(what, "Redis refuses calls", refusal)
        return refusal

    def _accepted(self, address: Address, command: Command) -> None:
        what = self._refusals.pop((address, _kind(command)), None)
        if what is not None:
            self.presence.works(what, "Redis takes calls again that it refused")

    def _link(self, address: Address, bulk: bool) -> Link:
        if self._closed:  # by a job that outlives its caller: nobody would close another connection
            raise ServerShutdown()
        link = self._links.get((address, bulk))
        if link is None:
            link = self._links[address, bulk] = Link(
                lambda: self.connection(address),
                timeout_s=self._timeout_s,
                spawn=self._spawn,
                reporter=self.reporter(address, of_calls=True),
            )
        return link

    # Where the slots are

    async def _look(self) -> None:
        """Learn who has which slot, for the first time. Many may wait for one look."""
        self._begin_to_look()
        assert self._looking is not None
        await asyncio.wait([self._looking])
        if not self._known:
            if self._closed:
                raise ServerShutdown()
            raise BrokerUnavailable(self._unknown_why)

    def look_again(self) -> None:
        """On a Cluster, ask who has which slot, beside everything else. Not more often than makes sense."""
        if self._slots and not self._closed and asyncio.get_running_loop().time() - self._looked_at > _LOOKS_S:
            self._begin_to_look()

    def _begin_to_look(self) -> None:
        if self._closed:
            raise ServerShutdown()
        if self._looking is None or self._looking.done():
            self._looked_at = asyncio.get_running_loop().time()
            self._looking = self._spawn(self._ask())

    async def _ask(self) -> None:
        try:
            self._slots = await self._ask_anyone()
            self._known = True
            for address in {address for address, _ in self._links}.difference(self._slots or (THE_URL,)):
                self.presence.forget(address)  # it has left the Cluster, or was only asked who is in it
        except ServerShutdown:
            return
        except BrokerUnavailable as exc:
            self._unknown_why = str(exc)

    def learn(self, moved: MovedError) -> None:
        """A server that does not have a slot says who has."""
        if self._slots:
            host = moved.host or self._slots[moved.slot_id].host
            self._slots[moved.slot_id] = Address(host, moved.port)

    async def _ask_anyone(self) -> list[Address]:
        """The owner of each slot, from the first server that answers; nothing if there is no Cluster."""
        known = list(dict.fromkeys(self._slots))
        random.shuffle(known)
        known.sort(key=lambda address: self._link(address, False).failing)
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

    # All of them

    async def primaries(self) -> list[Address]:
        """Every primary that serves slots; the one server without a Cluster."""
        if not self._known:
            await self._look()
        return list(dict.fromkeys(self._slots)) or [THE_URL]

    async def check(self) -> None:
        """Return if all primaries answer and take writes. Raises `BrokerUnavailable`."""
        await asyncio.gather(*(self._check(address) for address in await self.primaries()))

    async def ask_all(self, *command: Any) -> list[Any]:
        """The answer of each primary. Raises `BrokerUnavailable`."""
        addresses = await self.primaries()
        try:
            return await asyncio.gather(*(self._link(address, False).send(*command) for address in addresses))
        except ResponseError as exc:
            raise unavailable(exc) from exc

    async def _check(self, address: Address, *, again: bool = False) -> None:
        link = self._link(address, False)
        try:
            try:
                await link.send("EVALSHA", WRITABLE.sha, 0)
            except NoScriptError:
                await link.send("EVAL", WRITABLE.text, 0)
        except Lost as exc:
            self.look_again()
            if not exc.broke or again:
                raise
            await self._check(address, again=True)
        except ResponseError as exc:
            raise unavailable(exc) from exc

    async def aclose(self) -> None:
        """Close all connections, for good."""
        self._closed = True
        links = list(self._links.values())
        self._links.clear()
        for link in links:
            await link.aclose()
        self.presence.close()
        if isinstance(self._pool, SentinelConnectionPool):
            for sentinel in self._pool.sentinel_manager.sentinels:
                await sentinel.connection_pool.disconnect()


class ServerReporter:
    """What the connections to one server tell the log."""

    def __init__(self, presence: ServerHealthLog, address: Address, *, of_calls: bool) -> None:
        self._presence = presence
        self._of_calls = of_calls
        self._address = address
        self._name = f"Redis at {address.host}:{address.port}" if address.host else "Redis"

    def broke(self, reason: Exception) -> None:
        self._presence.broke(self._address, self._name, reason)

    def lost(self, reason: Exception) -> None:
        if self._of_calls:
            self._presence.absent(self._address)
        self._presence.lost(self._address, f"{self._name} is away", str(reason) or type(reason).__name__)

    def works(self) -> None:
        if self._of_calls:
            self._presence.present(self._address)
        self._presence.works(self._address, f"{self._name} is back")


def _pool_of_our_own(pool: ConnectionPool, *, timeout_s: float) -> ConnectionPool:
    """A Sentinel's pool asks its sentinels over connections that belong to one loop; make ours ask over ours."""
    if not isinstance(pool, SentinelConnectionPool):
        return pool
    manager = copy(pool.sentinel_manager)
    manager.sentinels = [_sentinel(one.connection_pool, timeout_s / 3) for one in manager.sentinels]
    settings = {name: value for name, value in pool.connection_kwargs.items() if name != "connection_pool"}
    return SentinelConnectionPool(  # type: ignore[no-untyped-call]
        pool.service_name,
        manager,
        connection_class=pool.connection_class,
        is_master=pool.is_master,
        check_connection=pool.check_connection,
        **settings,
    )


def _sentinel(pool: ConnectionPool, timeout_s: float) -> Redis:
    """One that does not answer must leave time to ask the next."""
    settings = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, **pool.connection_kwargs}
    settings["retry"] = Retry(NoBackoff(), 0)
    return Redis(connection_pool=ConnectionPool(connection_class=pool.connection_class, **settings))


def _owners(answer: Any, pool: ConnectionPool) -> list[Address] | None:
    """CLUSTER SLOTS as a list by slot; None if a slot has no owner."""
    slots: list[Address | None] = [None] * 16384
    for begin, end, primary, *_ in answer:
        host = primary[0].decode() if primary[0] else str(pool.connection_kwargs.get("host", "localhost"))
        slots[begin : end + 1] = [Address(host, primary[1])] * (end + 1 - begin)
    return None if None in slots else [owner for owner in slots if owner is not None]


def _kind(command: Command) -> object:
    """The script, or the command without its keys."""
    return command[1] if command[0] == "EVALSHA" else command[0]


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
