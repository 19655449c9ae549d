"""Writes chunks to one stream, in order, each once.

On a broker in memory a chunk is in the log when `write` returns. On any other the chunks gather while an append is
under way and go out together after it: one round trip of latency at low load, many chunks a call under load. The
producer's count makes a repeated call harmless, so an absent broker is waited for.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel

from asgi_realtime.brokers.base import Broker, End, ImmediateBroker, Position, Producer, StreamKey
from asgi_realtime.core.chunks import encode_chunk
from asgi_realtime.core.config import Limits
from asgi_realtime.core.errors import (
    BrokerUnavailable,
    EncodingError,
    LimitExceeded,
    ProducerGap,
    RealtimeError,
    RestoreOutOfOrder,
    RunNotFound,
    StreamClosed,
    StreamLost,
)
from asgi_realtime.loop.waiting import WaitList
from asgi_realtime.runs.store import RunStore

CALL_BYTES = 256 * 1024
CALL_ITEMS = 500

KEPT_BYTES = 256 * 1024
KEPT_S = 10.0
"""What a writer keeps of what was acknowledged, to write it again if the broker loses it."""

YIELD_EVERY = 64
"""Chunks of a producer that never suspends before the loop gets a turn."""

Spawn = Callable[[Callable[[], Awaitable[None]]], None]


def encode_within(value: Any, limit_bytes: int) -> bytes:
    """A chunk as JSON. Raises `EncodingError`, `LimitExceeded`."""
    data = encode_chunk(value)
    if len(data) > limit_bytes:
        raise LimitExceeded(f"a chunk is {len(data)} bytes, limit {limit_bytes}", status=413)
    return data


def encode_numbered(value: Any, limit_bytes: int, *, key: StreamKey, index: int) -> bytes:
    """As `encode_within`, with errors that say which chunk of a pipe or writer it is."""
    try:
        return encode_within(value, limit_bytes)
    except (EncodingError, LimitExceeded) as exc:
        exc.args = (f"chunk {index} of stream {key.name!r} of run {key.run!r}: {exc}",)
        raise


class StreamWriter:
    """One producer of one stream. `chunks`, `bytes` and `last_index` count what the broker has acknowledged."""

    def __init__(self, key: StreamKey, *, broker: Broker, runs: RunStore, spawn: Spawn, limits: Limits) -> None:
        self.key = key
        self.chunks = 0
        self.bytes = 0
        self.last_index: int | None = None
        self.failure: RealtimeError | None = None
        self._broker = broker
        self._runs = runs
        self._spawn = spawn
        self._limits = limits
        self._immediate = broker.append_nowait if isinstance(broker, ImmediateBroker) else None
        self.producer = secrets.token_hex(8)
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._taken = 0
        self._flushing = False
        self._progress = WaitList()
        self._kept: deque[_Kept] = deque()
        self._kept_bytes = 0
        self._restoring = anyio.Lock(fast_acquire=True)

    async def open(self) -> None:
        """Call before the first `write`. Raises `RunNotFound`, `LimitExceeded` on a broker in memory; any other is
        asked by the first append, so that it may be away for a while."""
        if self._immediate is not None:
            await self._runs.add_stream(self.key)

    def write(self, data: bytes) -> None:
        """Take one encoded chunk. Never waits. Raises what made the stream unwritable: `StreamClosed`, …"""
        if self.failure is not None:
            raise self.failure
        if self._immediate is not None:
            self._acknowledge(1, len(data), self._immediate(self.key, (data,)).last)
            return
        self._taken += 1
        self._pending.append(data)
        self._pending_bytes += len(data)
        if not self._flushing:
            self._flushing = True
            self._spawn(self._flush)

    @property
    def full(self) -> bool:
        """So much waits for the broker that the source should wait too."""
        return self._pending_bytes > self._limits.pending_bytes

    async def room(self) -> None:
        """Wait until the writer is no longer full, or has failed. Gives the loop a turn now and then, too."""
        while self.full and self.failure is None:
            await self._progress.wait()
        await self._give_way()

    async def settled(self) -> None:
        """Wait until what was written is acknowledged; on a broker in memory it is. Raises as `drain`."""
        if self._immediate is None:
            await self.drain()
        await self._give_way()

    async def _give_way(self) -> None:
        """Who writes without ever waiting must not starve the subscribers."""
        if self.chunks % YIELD_EVERY == 0:
            await anyio.lowlevel.checkpoint()

    async def drain(self) -> None:
        """Wait until the broker has acknowledged what was written before. Raises the failure if it did not."""
        taken = self._taken
        while self.chunks < taken and self.failure is None:
            await self._progress.wait()
        if self.failure is not None:
            raise self.failure

    def _acknowledge(self, chunks: int, size: int, last: int) -> None:
        self.chunks += chunks
        self.bytes += size
        self.last_index = last

    async def _flush(self) -> None:
        try:
            await self._runs.add_stream(self.key)
            self._runs.owned.writes(self)
            while self._pending:
                await self._append(self._next_call())
                self._progress.wake()
        except RealtimeError as exc:
            self._fail(exc)
        except BaseException as exc:
            self._fail(BrokerUnavailable(f"writing was stopped by {type(exc).__name__} before it was acknowledged"))
            raise
        finally:
            self._flushing = False
            self._progress.wake()

    def _fail(self, failure: RealtimeError) -> None:
        self.failure = failure
        self._pending.clear()
        self._pending_bytes = 0

    def _next_call(self) -> list[bytes]:
        """What goes out next; it stays pending until it is acknowledged."""
        items: list[bytes] = []
        size = 0
        for data in self._pending:
            if items and (size + len(data) > CALL_BYTES or len(items) == CALL_ITEMS):
                break
            items.append(data)
            size += len(data)
        return items

    async def _append(self, items: list[bytes]) -> None:
        position = await self._stored(items)
        if self.failure is not None:  # meanwhile another writer had all restored, and this stream was lost
            raise self.failure
        for _ in items:
            self._pending_bytes -= len(self._pending.popleft())
        self._keep(items, position)
        self._acknowledge(len(items), sum(map(len, items)), position.last)

    async def _stored(self, items: list[bytes]) -> Position:
        """Append, after what the broker has lost is there again."""
        producer = Producer(self.producer, self.chunks)
        while True:
            try:
                return await self._runs.retry(self._broker.append, self.key, items, producer=producer)
            except ProducerGap:
                await self._runs.restore_streams(self.key.run, self)
                if self.failure is not None:
                    raise self.failure from None
            except RunNotFound:
                if await self._runs.restored(self.key.run) is None:
                    raise

    # What a broker may lose

    def _keep(self, items: list[bytes], position: Position) -> None:
        """Keep what was acknowledged for a while: a broker that fails over may have less than it said."""
        now = time.monotonic()
        first = position.last - len(items) + 1
        for seq, data in enumerate(items, first):
            self._kept.append(_Kept(seq, data, now))
            self._kept_bytes += len(data)
        self.release(now)
        self._runs.owned.keeps(self)

    def release(self, now_s: float) -> bool:
        """Let go of what was kept long enough by this monotonic time; whether that is everything."""
        while self._kept and (self._kept_bytes > KEPT_BYTES or now_s - self._kept[0].since > KEPT_S):
            self._kept_bytes -= len(self._kept.popleft().data)
        return not self._kept

    async def restore(self) -> None:
        """Write again, at its old places, what the broker has lost of what it had acknowledged.

        What it still has is skipped; a place that others have to fill first is waited for. Where that cannot be done
        the stream ends as `lost`, and `failure` says so.
        """
        async with self._restoring:
            if self.failure is not None:
                return
            kept = list(self._kept)  # while this waits, more may be written and kept
            index = self.chunks - len(kept)
            try:
                for neighbours in _neighbours(kept) if kept else [[]]:
                    await self._restore(neighbours, index)
                    index += len(neighbours)
            except (
                ProducerGap,
                StreamLost,
                RestoreOutOfOrder,
            ):  # more is lost than was kept, or others have written there
                await self._lose()
            except StreamClosed as exc:
                self._forget(exc)

    async def _restore(self, kept: list[_Kept], index: int) -> None:
        """Append what stands side by side, as from this place in our count on. If it is nothing, that is a question."""
        items = [one.data for one in kept]
        producer = Producer(self.producer, index)
        at = kept[0].seq if kept else None
        await self._runs.retry(self._broker.append, self.key, items, producer=producer, at=at)

    async def _lose(self) -> None:
        """End the stream: its readers have seen what is not there any more."""
        failure = StreamLost(f"entries of stream {self.key.name!r} were lost by the broker and could not be restored")
        self._forget(failure)
        await self._runs.retry(self._broker.append, self.key, [], end=End("lost", str(failure)))

    def _forget(self, failure: RealtimeError) -> None:
        """What was acknowledged is not there, and will not be."""
        self._fail(failure)
        self.last_index = None
        self._kept.clear()
        self._kept_bytes = 0


class _Kept(NamedTuple):
    """An acknowledged item, where it stands, and since when."""

    seq: int
    data: bytes
    since: float


def _neighbours(kept: Iterable[_Kept]) -> Iterator[list[_Kept]]:
    """Items that stand side by side, of at most one call each."""
    group: list[_Kept] = []
    for one in kept:
        if group and (one.seq != group[-1].seq + 1 or len(group) == CALL_ITEMS):
            yield group
            group = []
        group.append(one)
    if group:
        yield group
