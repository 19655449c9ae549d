"""What this process follows: streams and topics as they are in Redis, kept up to date by messages.

A mirror subscribes, waits until that is confirmed, and then reads: whatever happened before the reading is in what was
read, whatever happens after it comes as a message. A message that does not join on to what is here, or one that only
names a position, makes the mirror read again from where it is. This is the one place where history and tail are joined.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain, repeat
from typing import Any

import msgspec

from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.brokers.redis.keys import Keys, run_of_topic
from asgi_realtime.brokers.redis.listener import Listener
from asgi_realtime.brokers.redis.servers import LOOK, Spawn
from asgi_realtime.brokers.redis.topics import NO_EPOCH, changes_after
from asgi_realtime.core.errors import BrokerUnavailable, RealtimeError, RunNotFound, ServerShutdown
from asgi_realtime.core.log import End, Entry, Log, Page, StreamKey
from asgi_realtime.core.topics import Change, Changes, Cursor, TopicIndex
from asgi_realtime.loop.waiting import WaitList, WakeSoon

logger = logging.getLogger("asgi_realtime")

_PENDING_BYTES = 1024 * 1024
"""Messages that wait for a reading; with more of them it is cheaper to read again."""

_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class Mirror(ABC):
    """Something that is followed by some users of this process. The first makes it and the last ends it."""

    def __init__(self, channels: Sequence[str], *, listener: Listener, spawn: Spawn) -> None:
        self.users = 0
        self.gone = False
        """It is of no use any more, and the next user needs a new one."""
        self._channels = channels
        self._listener = listener
        self._joined = False
        self._failure: RealtimeError | None = None
        self._changed = WaitList()
        self._busy = True  # a job reads, or is about to
        self._reading = True  # messages wait for it
        self._again = False
        self._unasked = False
        self._spawn = spawn
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        for channel in channels:
            listener.add(channel, self)
        self._task: Any = spawn(self._join())

    async def joined(self) -> None:
        """Return when history and tail are joined. Raises `RunNotFound`, `BrokerUnavailable`."""
        while not self._joined or self._failure is not None:
            if self._failure is not None:
                raise self._failure
            await self._changed.wait()

    def shut_down(self) -> None:
        """The broker is left: whoever follows this hears no more."""
        self._failure = ServerShutdown()
        self._changed.wake()
        self._lost(self._failure)
        self.close()

    def close(self) -> None:
        """Nobody follows this any more."""
        self.gone = True
        self._task.cancel()
        for channel in self._channels:
            self._listener.discard(channel, self)

    async def _join(self) -> None:
        try:
            await self._listener.confirmed(self._channels)
            await self._catch_up()
            self._joined = True
        except RealtimeError as exc:
            self._failure = self._failure or exc
        finally:  # also if it was cancelled, or failed in a way that nobody thought of: somebody waits
            if not self._joined:
                self.gone = True
                self._failure = self._failure or BrokerUnavailable("history and tail could not be joined")
            self._busy = False
            self._changed.wake()

    async def _catch_up(self) -> None:
        """Read, then take the messages that came meanwhile, until they join on."""
        while True:
            self._again = False
            await self._read()
            pending, self._pending, self._pending_bytes = self._pending, [], 0
            self._reading = False
            for message in pending:
                if self._reading:  # the one before does not join on
                    self._keep(message)
                else:
                    self._try(message)
            if not self._reading and not self._again:
                return
            self._reading = True

    def hear(self, message: bytes) -> None:
        if message == LOOK:
            self.check(unasked=False)
        elif self._reading:
            self._keep(message)
        else:
            self._try(message)

    def _try(self, message: bytes) -> None:
        try:
            self._take(message)
        except Exception:  # of another version, or of a stranger: what is true stands in Redis
            logger.exception("a message on %s cannot be read", self._channels[0])
            self._read_again()

    def _keep(self, message: bytes) -> None:
        self._pending.append(message)
        self._pending_bytes += len(message)
        if self._pending_bytes > _PENDING_BYTES:
            self._pending.clear()
            self._pending_bytes = 0
            self._again = True

    def check(self, *, unasked: bool) -> None:
        if self.gone:
            return
        if self._reading:
            self._again = True
        else:
            self._unasked = unasked
            self._read_again()

    def _read_again(self) -> None:
        """Read in a job of its own. Messages wait meanwhile."""
        self._reading = True
        if not self._busy:
            self._busy = True
            self._task = self._spawn(self._read_until_there())

    async def _read_until_there(self) -> None:
        for pause_s in chain(_PAUSES_S, repeat(_PAUSES_S[-1])):
            try:
                await self._catch_up()
                break
            except Behind as exc:
                self._lost(exc)
                break
            except BrokerUnavailable:
                await asyncio.sleep(pause_s)
            except RealtimeError as exc:
                self._lost(exc)
                break
            except Exception as exc:
                self._lost(BrokerUnavailable(f"what Redis holds cannot be read: {exc!r}"))
                raise
        self._busy = self._unasked = False
        self._changed.wake()

    def _news(self) -> None:
        """A reading brought something that no message did."""
        if self._unasked:
            self._unasked = False
            self._listener.missed(self._channels[0])

    @abstractmethod
    async def _read(self) -> None:
        """Bring this up to date from Redis."""
        ...

    @abstractmethod
    def _take(self, message: bytes) -> None:
        """Take a message, or call `_read_again` if it does not join on."""
        ...

    @abstractmethod
    def _lost(self, failure: RealtimeError) -> None:
        """This cannot be followed any more."""
        ...


ReadPage = Callable[[StreamKey, "int | None"], Awaitable[Page]]


class StreamMirror(Mirror):
    """The newest part of a stream. `live` is what readers follow."""

    def __init__(
        self,
        key: StreamKey,
        *,
        read: ReadPage,
        keys: Keys,
        listener: Listener,
        spawn: Spawn,
        wakes: WakeSoon,
        max_bytes: int,
    ) -> None:
        self.key = key
        self.live = LiveLog(Log(), wakes)
        self._read_page = read
        self._max_bytes = max_bytes
        self._begun = False
        self._ending: tuple[End, int] | None = None  # how the stream ended, and the position that it ended at
        channels = (keys.stream_channel(key), keys.topic_channel(f"run:{key.run}"))
        super().__init__(channels, listener=listener, spawn=spawn)

    async def _read(self) -> None:
        log = self.live.log
        while log.end is None:
            page = await self._read_page(self.key, log.next - 1 if self._begun else None)
            if page.next < log.next:
                raise Behind(f"{page.next} entries of stream {self.key.name!r} are left of {log.next}")
            if not self._begun or page.first > log.next:
                self._begun = True
                log.restart(page.entries[0].seq if page.entries else page.next)
            if page.entries:
                self._news()
            self._add(page.entries)
            if page.end is not None:
                self._end(page.end, page.next)
            if log.next >= page.next:
                return
            if not page.entries:
                raise BrokerUnavailable(f"entries of stream {self.key.name!r} from {log.next} on are not there")

    def _add(self, entries: Sequence[Entry]) -> None:
        log = self.live.log
        for entry in entries:
            log.append((entry.data,), entry.time_ms)
        if entries:
            self._grown()

    def _grown(self) -> None:
        log = self.live.log
        if log.size > self._max_bytes:
            log.trim(self._max_bytes)
        if self._ending is not None:
            self._end(*self._ending)
        self.live.wake()

    def _end(self, end: End, at: int) -> None:
        """The end is told when everything before it is here."""
        self._ending = (end, at)
        if self.live.log.next >= at:
            self.live.log.close(end)
            self.live.wake()

    def _take(self, message: bytes) -> None:
        log = self.live.log
        kind = message[:1]
        if kind == b"r":
            self._lost(RunNotFound(f"run {self.key.run!r} is past its retention"))
        elif log.end is not None:
            return
        elif kind == b"a":
            head, _, body = message.partition(b"\n")
            _, seq_text, time_ms = head.split(b" ")
            seq = int(seq_text)
            if seq > log.next:
                self._read_again()
                return
            items = body.split(b"\n")
            if seq < log.next:
                items = items[log.next - seq :]
            if items:
                log.append(items, int(time_ms))
                self._grown()
        elif kind == b"p":
            if int(message[2:]) > log.next:
                self._read_again()
        elif kind == b"e":
            head, _, end = message.partition(b"\n")
            self._ended(decode_end(end), int(head[2:]))
        elif kind == b"E":
            self._ended(*_run_end(message, self.key.name))

    def _ended(self, end: End, at: int) -> None:
        self._end(end, at)
        if self.live.log.end is None:
            self._read_again()

    def _lost(self, failure: RealtimeError) -> None:
        self.gone = True
        self.live.fail(failure)


class Behind(BrokerUnavailable):
    """Redis has less of a stream than it had: acknowledged entries were lost."""


class TopicMirror(Mirror):
    """A topic's index. `waiting` is where its followers wait."""

    def __init__(
        self,
        topic: str,
        *,
        read: Callable[[str], Awaitable[TopicIndex]],
        ask: Callable[[str, Cursor, int], Awaitable[Changes]],
        keys: Keys,
        listener: Listener,
        spawn: Spawn,
    ) -> None:
        self.topic = topic
        self.waiting = WaitList()
        self._run_id = run_of_topic(topic)
        self._read_index = read
        self._ask = ask
        self._index = TopicIndex(NO_EPOCH, max_runs=1)
        self._refreshing = asyncio.Lock()
        self._refreshes = 0
        super().__init__((keys.topic_channel(topic),), listener=listener, spawn=spawn)

    async def changes(self, cursor: Cursor | None, *, limit: int = 1000) -> Changes:
        if self._failure is not None:
            raise self._failure
        index = self._index
        if cursor is not None and cursor.epoch == index.epoch and cursor.position > index.position:
            return await self._ask(self.topic, cursor, limit)  # from a process that has heard more than this one
        return changes_after(index, cursor, limit)

    async def refresh(self) -> None:
        """Be as new as Redis was when this was called: messages may be late. Raises `BrokerUnavailable`.

        Those who come while one asks share the next one.
        """
        wanted = self._refreshes + 1
        async with self._refreshing:
            if self._refreshes < wanted:
                self._refreshes += 1
                await self._refresh()

    async def _refresh(self) -> None:
        before = self._index
        changes = await self._ask(self.topic, Cursor(before.epoch, before.position), before.max_runs)
        await self._caught_up()
        index = self._index
        if changes.cursor.epoch != index.epoch or changes.snapshot:
            if changes.cursor != (index.epoch, index.position):  # it is another one than was known
                self._read_again()
                await self._caught_up()
            return
        later = [change for change in changes.items if change.position > index.position]
        for change in later:
            index.put(change)
        if later:
            self.waiting.wake()

    async def _caught_up(self) -> None:
        """Wait for a reading that is under way."""
        while self._reading and not self.gone:
            await self._changed.wait()
        if self.gone:
            raise self._failure or BrokerUnavailable(f"topic {self.topic!r} cannot be followed just now")

    async def _read(self) -> None:
        index, before = await self._read_index(self.topic), self._index
        self._index = index
        changed = (index.epoch, index.position) != (before.epoch, before.position)
        if changed or not self._unasked:  # whoever could not load what was told tries again after an absence
            self.waiting.wake()
        if changed:
            self._news()

    def _take(self, message: bytes) -> None:
        kind = message[:1]
        if kind == b"t":
            _, epoch, before, position, version, run_id = message.decode().split(" ", 5)
            self._tell(epoch, int(before), Change(int(position), run_id, int(version)))
        elif kind == b"c" and self._run_id is not None:
            places = [int(number) for number in message[2:].split(b" ")]
            epoch = self._index.epoch
            change = Change(places[1], self._run_id, places[2])
            self._tell("" if epoch == NO_EPOCH else epoch, places[0], change)
        elif kind in (b"f", b"r"):
            self._index.forget(message[2:].decode() if kind == b"f" else self._run_id or "")
            self.waiting.wake()
        elif kind == b"w":
            self.waiting.wake()

    def _tell(self, epoch: str, before: int, change: Change) -> None:
        index = self._index
        if epoch == index.epoch and change.position == index.position:
            return
        if epoch == index.epoch and before == index.position:
            index.put(change)
            self.waiting.wake()
        else:
            self._read_again()

    def _lost(self, failure: RealtimeError) -> None:
        self.gone = True
        self.waiting.wake()


_END = msgspec.json.Decoder(End)
_POSITIONS = msgspec.msgpack.Decoder(dict[str, int])


def decode_end(data: bytes) -> End:
    return _END.decode(data)


def _run_end(message: bytes, name: str) -> tuple[End, int]:
    """How a run ended, and where its stream of this name did."""
    head, _, body = message.partition(b"\n")
    size = int(head[2:])
    return decode_end(body[:size]), _POSITIONS.decode(body[size:]).get(name, 0)
