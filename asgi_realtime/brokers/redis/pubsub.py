"""All channels that this process is subscribed to, at whichever primary they are.

There is one sharded pub/sub connection per primary (`pubsub_connection.py`), made when its first channel is needed. A
message announces a change and usually contains it; Redis always stores it too. So losing a connection costs no data:
once its channels are confirmed again, their subscribers compare positions. On a Cluster a slot can move to another
primary at any time; its channels are then subscribed there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from redis.exceptions import MovedError

from asgi_realtime.brokers.redis.clients import Address
from asgi_realtime.brokers.redis.pubsub_connection import PubSubConnection, retry_delays
from asgi_realtime.brokers.redis.server_health import ServerReporter
from asgi_realtime.brokers.redis.servers import Servers
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.loop.waiting import WaitList

_MOVE_S = 0.02
"""How long to wait before subscribing elsewhere: while a slot moves, its two servers can each name the other one."""

_TROUBLE_S = 1.0
"""A connection that is re-established within this is not worth reporting."""


class Subscriber(Protocol):
    """What is subscribed to channels. Both methods are called on the loop and must neither suspend nor raise."""

    def on_message(self, message: bytes) -> None: ...

    def check(self, *, routine: bool) -> None:
        """Messages were possibly missed: compare positions. `routine`: only because the channels were silent."""
        ...


class PubSub:
    """Subscribes, and delivers each message to the subscribers of its channel."""

    def __init__(self, servers: Servers, *, silence_s: float) -> None:
        self._servers = servers
        self._silence_s = silence_s
        self.spawn = servers.spawn
        self._subscribers: dict[str, dict[Subscriber, None]] = {}
        self._connections: dict[Address, PubSubConnection] = {}
        self._connection_of: dict[str, PubSubConnection] = {}
        self._confirmations: dict[str, WaitList] = {}
        self._placing: Any = None
        self._unplaced: dict[str, None] = {}
        self._placing_failure: Exception | None = None
        self._to_check: dict[str, None] = {}

    @property
    def trouble(self) -> str | None:
        """Why some channels have not been received for a while, if so."""
        now = asyncio.get_running_loop().time()
        for connection in self._connections.values():
            if connection.failure is not None and now - connection.failing_since > _TROUBLE_S:
                return str(connection.failure)
        return None

    def _failure(self) -> Exception | None:
        failures = [connection.failure for connection in self._connections.values()]
        return next(filter(None, failures), self._placing_failure)

    def add(self, channel: str, subscriber: Subscriber) -> None:
        """Subscribe. `confirmed` returns once the server has confirmed it."""
        if channel not in self._subscribers:
            self._subscribers[channel] = {}
            self._place([channel])
        self._subscribers[channel][subscriber] = None

    def discard(self, channel: str, subscriber: Subscriber) -> None:
        """Unsubscribe."""
        subscribers = self._subscribers.get(channel, {})
        subscribers.pop(subscriber, None)
        if subscribers or channel not in self._subscribers:
            return
        del self._subscribers[channel]
        self._confirmations.pop(channel, None)
        self._unplaced.pop(channel, None)
        connection = self._connection_of.pop(channel, None)
        if connection is not None:
            connection.unsubscribe(channel)

    async def confirmed(self, channels: Sequence[str]) -> None:
        """Return when the servers have confirmed all channels. Raises `BrokerUnavailable` if that takes too long."""
        try:
            async with asyncio.timeout(self._servers.timeout_s):
                for channel in channels:
                    while not self._is_confirmed(channel):
                        await self._confirmations.setdefault(channel, WaitList()).wait()
        except TimeoutError:
            failure = self._failure()
            reason = "" if failure is None else f": {failure}"
            raise BrokerUnavailable(
                f"Redis did not confirm a subscription within {self._servers.timeout_s:g} s{reason}"
            ) from None

    def _is_confirmed(self, channel: str) -> bool:
        connection = self._connection_of.get(channel)
        return connection is not None and channel in connection.confirmed

    # Which connection a channel belongs to

    def _place(self, channels: Iterable[str]) -> None:
        """Subscribe channels where they belong. One job does so for all of them."""
        self._unplaced.update(dict.fromkeys(channels))
        if self._unplaced and (self._placing is None or self._placing.done()):
            self._placing = self.spawn(self._place_all())

    async def _place_all(self) -> None:
        delays = retry_delays()
        while self._unplaced:
            channel = next(iter(self._unplaced))
            try:
                address = await self._servers.address_of(channel)
            except BrokerUnavailable as exc:
                self._placing_failure = exc
                await asyncio.sleep(next(delays))
                continue
            self._placing_failure = None
            if channel not in self._unplaced:
                continue
            del self._unplaced[channel]
            connection = self._connection_to(address)
            self._connection_of[channel] = connection
            connection.subscribe(channel)

    def _connection_to(self, address: Address) -> PubSubConnection:
        connection = self._connections.get(address)
        if connection is None:
            connection = self._connections[address] = PubSubConnection(
                self,
                address,
                connect=lambda: self._servers.connection(address),
                reporter=ServerReporter(self._servers.health, address, of_calls=False),
                timeout_s=self._servers.timeout_s,
                silence_s=self._silence_s,
            )
            connection.task = self.spawn(connection.run())
        return connection

    async def _place_later(self, channels: Sequence[str]) -> None:
        await asyncio.sleep(_MOVE_S)
        self._place(
            [channel for channel in channels if channel in self._subscribers and channel not in self._connection_of]
        )

    # What connections report

    def on_message(self, channel: str, message: bytes) -> None:
        for subscriber in tuple(self._subscribers.get(channel, ())):
            subscriber.on_message(message)

    def on_confirmed(self, channel: str) -> None:
        """A channel is received from now on. All that are confirmed in one loop iteration are checked together."""
        if not self._to_check:
            asyncio.get_running_loop().call_soon(self._check_confirmed)
        self._to_check[channel] = None
        if (waiting := self._confirmations.pop(channel, None)) is not None:
            waiting.wake()  # runs after the check, so that a subscriber that joins does not read twice

    def _check_confirmed(self) -> None:
        channels, self._to_check = self._to_check, {}
        self.check(channels, routine=False)

    def check(self, channels: Iterable[str], *, routine: bool) -> None:
        """Messages on these channels were possibly missed."""
        subscribers = {subscriber: None for channel in channels for subscriber in self._subscribers.get(channel, ())}
        for subscriber in subscribers:
            subscriber.check(routine=routine)

    def missed(self, channel: str) -> None:
        """The connection of this channel is up, and yet a message did not arrive: replace it."""
        connection = self._connection_of.get(channel)
        if connection is not None:
            connection.is_stale = True

    def on_moved(self, channels: Sequence[str], *, by: MovedError | None = None) -> None:
        """The server no longer has these channels. `by` is its answer, if that names the server that has them."""
        if by is None:
            self._servers.slots.refresh_soon()
        else:
            self._servers.slots.learn(by)
        for channel in channels:
            self._connection_of.pop(channel, None)
        self.spawn(self._place_later(channels))

    def on_lost(self) -> None:
        """A connection was lost. On a Cluster, another primary can have its channels by now."""
        self._servers.slots.refresh_soon()

    def is_needed(self, connection: PubSubConnection) -> bool:
        """Whether a lost connection still has channels. Those whose slots have moved are subscribed elsewhere."""
        if not connection.address.host:
            return True
        slots = self._servers.slots
        moved = [channel for channel in connection.channels if slots.owner(channel) != connection.address]
        for channel in moved:
            del connection.channels[channel]
        if moved:
            self.on_moved(moved)
        if connection.channels:
            return True
        if self._connections.get(connection.address) is connection:
            del self._connections[connection.address]
        return False

    async def aclose(self) -> None:
        connections = list(self._connections.values())
        self._connections.clear()
        self._connection_of.clear()
        self._subscribers.clear()
        self._unplaced.clear()
        self._to_check.clear()
        for connection in connections:
            await connection.aclose()
