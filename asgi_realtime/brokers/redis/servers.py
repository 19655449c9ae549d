"""Calls to Redis: each is sent to the primary that owns its key, and repeated where that is safe.

* A refusal that passes (a slot moves, a server loads its data or is no longer a primary) is retried until `timeout_s`.
* After a working connection broke, a call is repeated once on a new one, unless executing it twice would do harm.
* Everything else is raised as `BrokerUnavailable`; the caller decides whether to wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

from redis.asyncio.client import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AskError, MovedError, NoScriptError, ReadOnlyError, ResponseError

from asgi_realtime.brokers.redis import clients
from asgi_realtime.brokers.redis.clients import Address
from asgi_realtime.brokers.redis.command_connection import Command, CommandConnection, ConnectionLost, Spawn
from asgi_realtime.brokers.redis.scripts import Script
from asgi_realtime.brokers.redis.server_health import ServerHealthLog, ServerReporter
from asgi_realtime.brokers.redis.slots import SlotMap
from asgi_realtime.core.errors import BrokerUnavailable, ServerShutdown

_RETRY_S = 0.02

RESYNC = b"?"
"""A message without a change: its subscribers read again."""

_WRITABLE = "#!lua\nreturn 1"
"""Writes nothing, but is refused wherever a writing script would be: without memory, on a replica."""


class Servers:
    """All primaries. `client` is redis-py's, from a URL or the user's own (Sentinel too); its settings are used.

    `quiet`: write nothing to the log, because the caller does.
    """

    def __init__(self, client: Redis, *, timeout_s: float, spawn: Spawn, quiet: bool = False) -> None:
        self._pool = clients.own_pool(client.connection_pool, timeout_s=timeout_s)
        self.timeout_s = timeout_s
        self.spawn = spawn
        self._connections: dict[tuple[Address, bool], CommandConnection] = {}
        self._closed = False
        self._refusals: dict[tuple[Address, object], tuple[Address, str]] = {}
        self.health = ServerHealthLog(quiet=quiet)
        self.slots = SlotMap(self, default_host=str(self._pool.connection_kwargs.get("host", "localhost")))

    def connection(self, address: Address) -> AbstractConnection:
        """A connection that is not open yet."""
        return clients.new_connection(self._pool, address, timeout_s=self.timeout_s)

    async def address_of(self, key: str) -> Address:
        """The primary of a key. Raises `BrokerUnavailable` if that is not known yet and no server answers."""
        if not self.slots.is_known:
            await self.slots.known()
        return self.slots.owner(key)

    async def call(self, key: str, *command: Any, bulk: bool = False) -> Any:
        """Send a command to the primary of a key. Raises `BrokerUnavailable`.

        It can be executed twice. `bulk` is for answers that can be large: they use a separate connection, so that
        they delay no others.
        """
        return await self._call(key, command, bulk)

    async def run(
        self,
        script: Script,
        keys: Sequence[str],
        *args: Any,
        bulk: bool = False,
        repeat: bool = True,
        channel: str | None = None,
    ) -> Any:
        """Run a script on the primary of its keys. Raises `BrokerUnavailable`.

        It can be executed twice unless `repeat` is false. `channel` is where the script publishes.
        """
        rest = (len(keys), *keys, *args)
        try:
            return await self._call(keys[0], ("EVALSHA", script.sha, *rest), bulk, repeat, channel)
        except NoScriptError:  # a new server, or SCRIPT FLUSH; EVAL also loads the script
            return await self._call(keys[0], ("EVAL", script.text, *rest), bulk, repeat, channel)

    async def _call(
        self, key: str, command: Command, bulk: bool, repeat: bool = True, channel: str | None = None
    ) -> Any:
        deadline = asyncio.get_running_loop().time() + self.timeout_s
        redirect: Address | None = None  # where an ASK has sent this call, for one time
        while True:
            address = redirect or (self.slots.owner(key) if self.slots.is_known else await self.address_of(key))
            connection = self._connection(address, bulk)
            try:
                if redirect is not None:
                    connection.send("ASKING")
                answer = await connection.send(*command)
            except NoScriptError:
                raise
            except ResponseError as exc:
                if not clients.is_transient(exc) or asyncio.get_running_loop().time() > deadline:
                    raise self._refused(address, command, exc) from exc
                redirect = None
                if type(exc) is AskError:  # not isinstance: MovedError is a subclass, and is permanent
                    redirect = Address(exc.host, exc.port)
                    continue
                if isinstance(exc, MovedError):
                    self.slots.learn(exc)
                elif isinstance(exc, ReadOnlyError):
                    connection.reset()
                await asyncio.sleep(_RETRY_S)
            except ConnectionLost as exc:
                self.slots.refresh_soon()  # in case the primary was replaced
                if not exc.broke or not repeat:
                    raise
                repeat = False
                redirect = None
            else:
                if self._refusals:
                    self._accepted(address, command)
                if redirect is not None and channel is not None:
                    self._resync(channel)
                return answer

    def _resync(self, channel: str) -> None:
        """A slot is moving: subscribers are at the old primary, and the script has published at the new one."""
        sent = self._connection(self.slots.owner(channel), False).send("SPUBLISH", channel, RESYNC)
        sent.add_done_callback(lambda future: future.cancelled() or future.exception())  # silence finds it otherwise

    def _refused(self, address: Address, command: Command, exc: ResponseError) -> BrokerUnavailable:
        refusal = clients.unavailable(exc)
        subject = self._refusals[address, _kind(command)] = (address, str(refusal))
        self.health.failed(subject, "Redis refuses calls", refusal)
        return refusal

    def _accepted(self, address: Address, command: Command) -> None:
        subject = self._refusals.pop((address, _kind(command)), None)
        if subject is not None:
            self.health.works(subject, "Redis accepts calls again")

    def _connection(self, address: Address, bulk: bool) -> CommandConnection:
        if self._closed:  # a job that outlives its caller must not open a connection that nothing closes
            raise ServerShutdown()
        connection = self._connections.get((address, bulk))
        if connection is None:
            connection = self._connections[address, bulk] = CommandConnection(
                lambda: self.connection(address),
                timeout_s=self.timeout_s,
                spawn=self.spawn,
                reporter=ServerReporter(self.health, address, of_calls=True),
            )
        return connection

    # For the map of slots

    def ask(self, address: Address, *command: Any) -> Awaitable[Any]:
        """Send a command to one server. Raises `ConnectionLost`, or redis-py's `ResponseError`."""
        return self._connection(address, False).send(*command)

    def is_failing(self, address: Address) -> bool:
        return self._connection(address, False).is_failing

    def on_refreshed(self, primaries: list[Address]) -> None:
        for address in {address for address, _ in self._connections}.difference(primaries):
            self.health.forget(address)  # it has left the Cluster, or was only asked for its slots

    # All of them

    async def check(self) -> None:
        """Return if all primaries answer and accept writes. Raises `BrokerUnavailable`."""
        await self.ask_all("EVAL", _WRITABLE, 0)

    async def ask_all(self, *command: Any) -> list[Any]:
        """The answer of each primary. Raises `BrokerUnavailable`."""
        return await asyncio.gather(*(self._ask(address, command) for address in await self.slots.primaries()))

    async def _ask(self, address: Address, command: Command, *, again: bool = False) -> Any:
        try:
            return await self.ask(address, *command)
        except ConnectionLost as exc:
            self.slots.refresh_soon()
            if not exc.broke or again:
                raise
            return await self._ask(address, command, again=True)
        except ResponseError as exc:
            raise clients.unavailable(exc) from exc

    async def aclose(self) -> None:
        """Close all connections. Later calls raise `ServerShutdown`."""
        self._closed = True
        connections = list(self._connections.values())
        self._connections.clear()
        for connection in connections:
            await connection.aclose()
        self.health.close()
        await clients.close_sentinels(self._pool)


def _kind(command: Command) -> object:
    """The script, or the command without its keys."""
    return command[1] if command[0] == "EVALSHA" else command[0]
