"""What this process hears: one sharded pub/sub connection to each primary, made when the first channel is asked for.

A message says that something happened and usually what; it is never the only place where that stands. So a
connection that was lost costs nothing but a look: once its channels are confirmed again, all who listen there are told
to check their positions. After some silence they check too, and a connection that missed something is made anew.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from redis.asyncio.connection import AbstractConnection
from redis.crc import key_slot
from redis.exceptions import MovedError

from asgi_realtime.brokers.redis.link import until_one_ends
from asgi_realtime.brokers.redis.servers import Address, ServerReporter, Servers, Spawn
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.loop.waiting import WaitList

_GROUP = 500
"""Channels in one SSUBSCRIBE: a server does nothing else meanwhile."""

_PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)
"""Between tries to connect, each cut to a random part of it: many processes lose a server at the same time."""

_MOVES_S = 0.02
"""Until a channel is asked for elsewhere: while a slot moves, its servers may each name the other one."""

_TROUBLE_S = 1.0
"""A connection that is made anew within this is no trouble."""


def _pauses() -> Iterator[float]:
    for pause_s in itertools.chain(_PAUSES_S, itertools.repeat(_PAUSES_S[-1])):
        yield pause_s * random.uniform(0.5, 1.0)


class Hearer(Protocol):
    """Whoever listens to channels. Called on the loop; neither call suspends or raises."""

    def hear(self, message: bytes) -> None: ...

    def check(self, *, unasked: bool) -> None:
        """Messages may have been missed: compare positions. `unasked`: nothing says so but silence."""
        ...


class Listener:
    """All channels of this process, at whatever primary they are."""

    def __init__(self, servers: Servers, *, timeout_s: float, silence_s: float, spawn: Spawn) -> None:
        self._servers = servers
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self._spawn = spawn
        self._hearers: dict[str, dict[Hearer, None]] = {}
        self._ears: dict[Address, PubSubConnection] = {}
        self._at: dict[str, PubSubConnection] = {}
        self._confirmations: dict[str, WaitList] = {}
        self._sorting: Any = None
        self._unsorted: dict[str, None] = {}
        self._unsorted_why: Exception | None = None
        self._to_check: dict[str, None] = {}

    @property
    def trouble(self) -> str | None:
        """Why something that is asked for is not heard, and has not been for a while."""
        now = asyncio.get_running_loop().time()
        for ear in self._ears.values():
            if ear.failure is not None and now - ear.failing_since > _TROUBLE_S:
                return str(ear.failure)
        return None

    def _failure(self) -> Exception | None:
        failures = [ear.failure for ear in self._ears.values()]
        return next(filter(None, failures), self._unsorted_why)

    def add(self, channel: str, hearer: Hearer) -> None:
        """Listen to a channel from now on. `confirmed` tells when that is so."""
        hearers = self._hearers.get(channel)
        if hearers is not None:
            hearers[hearer] = None
            return
        self._hearers[channel] = {hearer: None}
        self._sort([channel])

    def discard(self, channel: str, hearer: Hearer) -> None:
        """Do not listen any more."""
        hearers = self._hearers.get(channel)
        if hearers is None:
            return
        hearers.pop(hearer, None)
        if hearers:
            return
        del self._hearers[channel]
        self._confirmations.pop(channel, None)
        self._unsorted.pop(channel, None)
        ear = self._at.pop(channel, None)
        if ear is not None:
            ear.unsubscribe(channel)

    async def confirmed(self, channels: Sequence[str]) -> None:
        """Return when the servers have confirmed all of these. Raises `BrokerUnavailable` if that takes too long."""
        try:
            async with asyncio.timeout(self._timeout_s):
                for channel in channels:
                    while not self._is_confirmed(channel):
                        await self._confirmations.setdefault(channel, WaitList()).wait()
        except TimeoutError:
            failure = self._failure()
            reason = "" if failure is None else f": {failure}"
            raise BrokerUnavailable(
                f"Redis did not confirm a subscription within {self._timeout_s:g} s{reason}"
            ) from None

    def _is_confirmed(self, channel: str) -> bool:
        ear = self._at.get(channel)
        return ear is not None and channel in ear.confirmed

    def _sort(self, channels: Iterable[str]) -> None:
        """Have the channels subscribed where they belong."""
        self._unsorted.update(dict.fromkeys(channels))
        if self._unsorted and (self._sorting is None or self._sorting.done()):
            self._sorting = self._spawn(self._sort_all())

    async def _sort_all(self) -> None:
        pauses = _pauses()
        while self._unsorted:
            channel = next(iter(self._unsorted))
            try:
                address = await self._servers.address_of(channel)
            except BrokerUnavailable as exc:
                self._unsorted_why = exc
                await asyncio.sleep(next(pauses))
                continue
            self._unsorted_why = None
            if channel not in self._unsorted:
                continue
            del self._unsorted[channel]
            ear = self._ears.get(address)
            if ear is None:
                ear = self._ears[address] = PubSubConnection(
                    self, address, timeout_s=self._timeout_s, silence_s=self._silence_s
                )
                ear.task = self._spawn(ear.run())
            self._at[channel] = ear
            ear.subscribe(channel)

    # What an ear tells

    def connect(self, address: Address) -> AbstractConnection:
        return self._servers.connection(address)

    def reporter(self, address: Address) -> ServerReporter:
        return self._servers.reporter(address)

    def heard(self, channel: str, message: bytes) -> None:
        for hearer in tuple(self._hearers.get(channel, ())):
            hearer.hear(message)

    def confirmed_one(self, channel: str) -> None:
        """A channel is heard from now on. Those that are confirmed in one turn of the loop are checked together."""
        if not self._to_check:
            asyncio.get_running_loop().call_soon(self._check_confirmed)
        self._to_check[channel] = None
        waiting = self._confirmations.pop(channel, None)
        if waiting is None:
            return
        waiting.wake()  # after that: who waits for this begins to read, and need not be told to read again

    def _check_confirmed(self) -> None:
        channels, self._to_check = self._to_check, {}
        self.check(channels)

    def check(self, channels: Iterable[str], *, unasked: bool = False) -> None:
        """Messages of these channels may have been missed."""
        hearers = {hearer: None for channel in channels for hearer in self._hearers.get(channel, ())}
        for hearer in hearers:
            hearer.check(unasked=unasked)

    def missed(self, channel: str) -> None:
        """The connection of this channel is there and yet a message did not come: make a new one."""
        ear = self._at.get(channel)
        if ear is not None:
            ear.deaf = True

    def moved(self, channels: Sequence[str], *, by: MovedError | None = None) -> None:
        """The server does not have these channels any more. `by` is its answer, if it says who has."""
        if by is None:
            self._servers.look_again()
        else:
            self._servers.learn(by)
        for channel in channels:
            self._at.pop(channel, None)
        self._spawn(self._sort_soon(channels))

    async def _sort_soon(self, channels: Sequence[str]) -> None:
        await asyncio.sleep(_MOVES_S)
        self._sort([channel for channel in channels if channel in self._hearers and channel not in self._at])

    def lost(self) -> None:
        """A connection was lost. On a Cluster its channels may be elsewhere by now."""
        self._servers.look_again()

    def is_needed(self, ear: PubSubConnection) -> bool:
        """Whether there is something to listen to at an address that was lost. What is elsewhere goes there."""
        if not ear.address.host:
            return True
        gone = [channel for channel in ear.channels if self._servers.address_now(channel) != ear.address]
        for channel in gone:
            del ear.channels[channel]
        if gone:
            self.moved(gone)
        if ear.channels:
            return True
        if self._ears.get(ear.address) is ear:
            del self._ears[ear.address]
        return False

    async def aclose(self) -> None:
        ears = list(self._ears.values())
        self._ears.clear()
        self._at.clear()
        self._hearers.clear()
        self._unsorted.clear()
        self._to_check.clear()
        for ear in ears:
            await ear.aclose()


def _slot(channel: str) -> int:
    return key_slot(channel.encode())


class PubSubConnection:
    """The connection to one primary."""

    def __init__(self, listener: Listener, address: Address, *, timeout_s: float, silence_s: float) -> None:
        self.address = address
        self.channels: dict[str, None] = {}
        self.confirmed: set[str] = set()
        self.task: Any = None
        self.failure: Exception | None = None
        """Why it does not hear all of its channels, if it was lost."""
        self.failing_since = 0.0
        self._listener = listener
        self._reporter = listener.reporter(address)
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self._awaited: Counter[str] = Counter()  # confirmations of subscriptions that are under way
        self._to_send: list[tuple[str, str]] = []
        self._wanted = asyncio.Event()
        self._heard_at = 0.0
        self._pinged = False
        self._connected = False
        self._well = False  # connected, and all that was asked for then is confirmed
        self.deaf = False
        """It is there, and does not hear everything."""

    def subscribe(self, channel: str) -> None:
        self.channels[channel] = None
        if self._connected:
            self._to_send.append(("SSUBSCRIBE", channel))
            self._wanted.set()

    def unsubscribe(self, channel: str) -> None:
        if self.channels.pop(channel, self) is self:
            return
        self.confirmed.discard(channel)
        if self._connected:
            self._to_send.append(("SUNSUBSCRIBE", channel))
            self._wanted.set()

    async def run(self) -> None:
        """Listen, and connect again whenever the connection is lost."""
        pauses = _pauses()
        while True:
            connection = self._listener.connect(self.address)
            try:
                async with asyncio.timeout(self._timeout_s):
                    await connection.connect()  # type: ignore[no-untyped-call]
                self._begin()
                await until_one_ends(self._write(connection), self._read(connection), self._watch(connection))
            except Exception as exc:  # whatever it is: an ear that does not try again is deaf for good
                if self.failure is None:
                    self.failing_since = asyncio.get_running_loop().time()
                    pauses = _pauses()
                self._lost(exc)
            finally:
                self._connected = False
                self.confirmed.clear()
                await connection.disconnect(nowait=True)
            await asyncio.sleep(next(pauses))
            if not self._listener.is_needed(self):
                return

    def _lost(self, exc: Exception) -> None:
        self.failure = exc
        if self._well:
            self._reporter.broke(exc)
        elif self.channels:
            self._reporter.lost(exc)
        self._well = False
        self._listener.lost()

    def _begin(self) -> None:
        channels = list(self.channels)
        if self.address.host:
            channels.sort(key=_slot)  # those of one slot go into one command
        self._awaited.clear()
        self._to_send = [("SSUBSCRIBE", channel) for channel in channels]
        self._connected = True
        self._pinged = self.deaf = False
        self._heard_at = asyncio.get_running_loop().time()
        self._wanted.set()
        if not channels:
            self._is_well()

    def _is_well(self) -> None:
        self.failure = None
        self._well = True
        self._reporter.works()

    async def _write(self, connection: AbstractConnection) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            pending, self._to_send = self._to_send, []
            packed = connection.pack_commands(self._commands(pending))
            await connection.send_packed_command(packed, check_health=False)

    def _commands(self, pending: Sequence[tuple[str, str]]) -> list[list[str]]:
        """Subscriptions and their ends in their order, in groups. On a Cluster a command has channels of one slot."""
        commands: list[list[str]] = []
        group: tuple[str, int] | None = None
        for verb, channel in pending:
            if verb == "SSUBSCRIBE":
                if channel not in self.channels:
                    continue
                self._awaited[channel] += 1
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
                self._moved(exc)
                continue
            self._heard_at = loop.time()
            match answer:
                case [b"smessage", channel, message]:
                    self._listener.heard(channel.decode(), message)
                case [b"ssubscribe", channel, _]:
                    self._confirm(channel.decode())
                case [b"sunsubscribe", channel, _]:
                    self._ended(channel.decode())
                case _:
                    self._pinged = False

    def _confirm(self, channel: str) -> None:
        self._awaited[channel] -= 1
        if self._awaited[channel] > 0:
            return
        del self._awaited[channel]
        if channel in self.channels:
            self.confirmed.add(channel)
            self._listener.confirmed_one(channel)
        if not self._well and not self._awaited:
            self._is_well()

    def _moved(self, exc: MovedError) -> None:
        """A subscription was refused: its slot is elsewhere."""
        gone = [channel for channel in self._awaited if _slot(channel) == exc.slot_id]
        for channel in gone:
            del self._awaited[channel]
            self.channels.pop(channel, None)
            self.confirmed.discard(channel)
        self._listener.moved(gone, by=exc)

    def _ended(self, channel: str) -> None:
        """Either we have left, or the slot of the channel has."""
        if channel in self.channels and not self._awaited[channel]:
            del self.channels[channel]
            self.confirmed.discard(channel)
            self._listener.moved([channel])

    async def _watch(self, connection: AbstractConnection) -> None:
        """After some silence ask whether the server is there, and let positions be compared."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(self._silence_s, self._timeout_s) / 4)
            if self.deaf:
                raise TimeoutError("it missed a message")
            silent_s = loop.time() - self._heard_at
            if (self._pinged or self._awaited) and silent_s > self._timeout_s:
                raise TimeoutError(f"no answer for {self._timeout_s:g} s")
            if silent_s >= self._silence_s and not self._pinged:
                self._pinged = True
                self._listener.check(list(self.channels), unasked=True)
                await connection.send_packed_command(connection.pack_command("PING"), check_health=False)

    async def aclose(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
