"""One sharded pub/sub connection to one primary.

Its states, and what moves it between them:

* DISCONNECTED: at the start, and after a connection was lost; `run` connects, with growing pauses.
* SUBSCRIBING: connected. SSUBSCRIBE for all channels is sent; some confirmations are outstanding.
* LISTENING: every channel that was requested when it connected is confirmed. Channels added later are confirmed one by
  one and do not lead back to SUBSCRIBING: the connection works.

Only a connection that was LISTENING counts as one that *broke*, which is normal (servers can close idle ones) and is
logged once; a connection that was never LISTENING means that the server cannot be used, and counts as an outage.

Redis confirms a subscription and its end by the name of the channel only. A channel that is left and subscribed again
quickly gets three confirmations, so `_outstanding` counts them; everything before the last one is outdated.

TCP does not notice a peer that disappears without closing the connection. After `silence_s` without any message the
connection sends PING and lets its subscribers compare positions; if that finds a change that no message announced, it
is stale.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from itertools import chain, repeat
from typing import Any, Protocol

from redis.asyncio.connection import AbstractConnection
from redis.crc import key_slot
from redis.exceptions import MovedError

from asgi_realtime.brokers.redis.clients import Address
from asgi_realtime.brokers.redis.command_connection import until_one_ends
from asgi_realtime.brokers.redis.server_health import ServerReporter

_RETRY_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)
"""Reconnect delays, jittered, because many processes lose a server at once."""

_GROUP = 500
"""Channels per SSUBSCRIBE. The server does nothing else while it executes one."""


class ConnectionState(Enum):
    DISCONNECTED = "disconnected"
    SUBSCRIBING = "subscribing"
    LISTENING = "listening"


DISCONNECTED, SUBSCRIBING, LISTENING = ConnectionState

TRANSITIONS: dict[ConnectionState, frozenset[ConnectionState]] = {
    DISCONNECTED: frozenset({DISCONNECTED, SUBSCRIBING}),
    SUBSCRIBING: frozenset({LISTENING, DISCONNECTED}),
    LISTENING: frozenset({DISCONNECTED}),
}


class ChannelRegistry(Protocol):
    """What the connection reports to; see `PubSub`."""

    def on_message(self, channel: str, message: bytes) -> None: ...

    def on_confirmed(self, channel: str) -> None: ...

    def on_moved(self, channels: Sequence[str], *, by: MovedError | None = None) -> None: ...

    def on_lost(self) -> None: ...

    def check(self, channels: Iterable[str], *, routine: bool) -> None: ...

    def is_needed(self, connection: PubSubConnection) -> bool: ...


def retry_delays() -> Iterator[float]:
    for delay_s in chain(_RETRY_S, repeat(_RETRY_S[-1])):
        yield delay_s * random.uniform(0.5, 1.0)


def _slot(channel: str) -> int:
    return key_slot(channel.encode())


class PubSubConnection:
    """`channels` are those it should receive, `confirmed` those it does."""

    def __init__(
        self,
        registry: ChannelRegistry,
        address: Address,
        *,
        connect: Callable[[], AbstractConnection],
        reporter: ServerReporter,
        timeout_s: float,
        silence_s: float,
    ) -> None:
        self.address = address
        self.channels: dict[str, None] = {}
        self.confirmed: set[str] = set()
        self.task: Any = None
        self.failure: Exception | None = None
        """Why it does not receive all of its channels, since it was lost."""
        self.failing_since = 0.0
        self.is_stale = False
        """It is connected but does not receive everything; it is then replaced."""
        self._registry = registry
        self._connect = connect
        self._reporter = reporter
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self._state = DISCONNECTED
        self._outstanding: Counter[str] = Counter()
        self._to_send: list[tuple[str, str]] = []
        self._has_to_send = asyncio.Event()
        self._received_at = 0.0
        self._has_pinged = False

    def _enter(self, state: ConnectionState) -> None:
        if state not in TRANSITIONS[self._state]:
            raise RuntimeError(f"a connection cannot go from {self._state.name} to {state.name}")
        self._state = state

    def subscribe(self, channel: str) -> None:
        self.channels[channel] = None
        if self._state is not DISCONNECTED:
            self._send("SSUBSCRIBE", channel)

    def unsubscribe(self, channel: str) -> None:
        if self.channels.pop(channel, self) is self:
            return
        self.confirmed.discard(channel)
        if self._state is not DISCONNECTED:
            self._send("SUNSUBSCRIBE", channel)

    def _send(self, verb: str, channel: str) -> None:
        self._to_send.append((verb, channel))
        self._has_to_send.set()

    async def run(self) -> None:
        """Listen, and connect again whenever the connection is lost."""
        delays = retry_delays()
        while True:
            connection = self._connect()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await connection.connect()  # type: ignore[no-untyped-call]
                self._subscribe_all()
                await until_one_ends(self._write(connection), self._read(connection), self._watch(connection))
            except Exception as exc:  # any: a connection that is not retried would never receive anything again
                if self.failure is None:
                    self.failing_since = asyncio.get_running_loop().time()
                    delays = retry_delays()
                self._on_lost(exc)
            finally:
                self._enter(DISCONNECTED)
                self.confirmed.clear()
                await connection.disconnect(nowait=True)
            await asyncio.sleep(next(delays))
            if not self._registry.is_needed(self):
                return

    def _on_lost(self, exc: Exception) -> None:
        self.failure = exc
        if self._state is LISTENING:
            self._reporter.broke(exc)
        elif self.channels:
            self._reporter.failed(exc)
        self._registry.on_lost()

    def _subscribe_all(self) -> None:
        channels = list(self.channels)
        if self.address.host:
            channels.sort(key=_slot)  # so that those of one slot share a command
        self._outstanding.clear()
        self._to_send = [("SSUBSCRIBE", channel) for channel in channels]
        self._enter(SUBSCRIBING)
        self._has_pinged = self.is_stale = False
        self._received_at = asyncio.get_running_loop().time()
        self._has_to_send.set()
        if not channels:
            self._check_listening()

    def _check_listening(self) -> None:
        if self._state is SUBSCRIBING and not self._outstanding:
            self._enter(LISTENING)
            self.failure = None
            self._reporter.works()

    async def _write(self, connection: AbstractConnection) -> None:
        while True:
            await self._has_to_send.wait()
            self._has_to_send.clear()
            pending, self._to_send = self._to_send, []
            packed = connection.pack_commands(self._commands(pending))
            await connection.send_packed_command(packed, check_health=False)

    def _commands(self, pending: Sequence[tuple[str, str]]) -> list[list[str]]:
        """Commands in the order of the requests, grouped. On a Cluster all channels of a command share a slot."""
        commands: list[list[str]] = []
        group: tuple[str, int] | None = None
        for verb, channel in pending:
            if verb == "SSUBSCRIBE":
                if channel not in self.channels:
                    continue
                self._outstanding[channel] += 1
            slot = _slot(channel) if self.address.host else 0
            if group != (verb, slot) or len(commands[-1]) > _GROUP:
                group = (verb, slot)
                commands.append([verb])
            commands[-1].append(channel)
        return commands

    async def _read(self, connection: AbstractConnection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                answer = await connection.read_response(disable_decoding=True, disconnect_on_error=False)
            except MovedError as exc:
                self._on_refused(exc)
                continue
            self._received_at = loop.time()
            match answer:
                case [b"smessage", channel, message]:
                    self._registry.on_message(channel.decode(), message)
                case [b"ssubscribe", channel, _]:
                    self._on_confirmed(channel.decode())
                case [b"sunsubscribe", channel, _]:
                    self._on_unsubscribed(channel.decode())
                case _:
                    self._has_pinged = False

    def _on_confirmed(self, channel: str) -> None:
        self._outstanding[channel] -= 1
        if self._outstanding[channel] > 0:
            return
        del self._outstanding[channel]
        if channel in self.channels:
            self.confirmed.add(channel)
            self._registry.on_confirmed(channel)
        self._check_listening()

    def _on_refused(self, exc: MovedError) -> None:
        """A subscription was refused: another server has its slot."""
        moved = [channel for channel in self._outstanding if _slot(channel) == exc.slot_id]
        for channel in moved:
            del self._outstanding[channel]
            self.channels.pop(channel, None)
            self.confirmed.discard(channel)
        self._registry.on_moved(moved, by=exc)
        self._check_listening()

    def _on_unsubscribed(self, channel: str) -> None:
        """Either this process unsubscribed, or the slot of the channel has moved."""
        if channel in self.channels and not self._outstanding[channel]:
            del self.channels[channel]
            self.confirmed.discard(channel)
            self._registry.on_moved([channel])

    async def _watch(self, connection: AbstractConnection) -> None:
        """After some silence, check that the server answers and that no message was missed."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(self._silence_s, self._timeout_s) / 4)
            if self.is_stale:
                raise TimeoutError("a message did not arrive")
            silent_s = loop.time() - self._received_at
            if (self._has_pinged or self._outstanding) and silent_s > self._timeout_s:
                raise TimeoutError(f"no answer for {self._timeout_s:g} s")
            if silent_s >= self._silence_s and not self._has_pinged:
                self._has_pinged = True
                self._registry.check(list(self.channels), routine=True)
                await connection.send_packed_command(connection.pack_command("PING"), check_health=False)

    async def aclose(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
