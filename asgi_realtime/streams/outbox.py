"""The chunks of one stream on their way to a broker outside this process.

All writers of a stream in this process share one outbox, which is one producer: the stream has their chunks in the
order in which they were written. Chunks collect while an append is in flight and are sent together after it: one round
trip of latency under low load, many chunks per call under high load. The broker recognizes a repeated call by the
producer's count, so the outbox retries while the broker is unavailable.

An outbox that failed stays so, because the broker may or may not have stored its last call. It fails the writers whose
chunks it held. The others continue with a new outbox.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Protocol
from weakref import WeakSet

from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.errors import BrokerUnavailable, RealtimeError
from asgi_realtime.runs.restoring import RestorableProducer
from asgi_realtime.runs.store import RunStore

CALL_BYTES = 256 * 1024
CALL_ITEMS = 500
"""Chunks of one append."""

Spawn = Callable[[Callable[[], Awaitable[None]]], None]


class Sender(Protocol):
    """What an outbox calls about the chunks of a writer."""

    def acknowledge(self, size: int, seq: int) -> None: ...

    def fail(self, failure: RealtimeError, *, lost: bool = False) -> None: ...

    def wake(self) -> None: ...


class Outbox:
    """One producer of one stream, for several writers. `spawn` starts the job that appends."""

    def __init__(self, key: StreamKey, *, runs: RunStore, spawn: Spawn) -> None:
        self.key = key
        self.failure: RealtimeError | None = None
        """Why nothing can be appended any more."""
        self._runs = runs
        self._spawn = spawn
        self._producer: RestorableProducer | None = None
        self._pending: deque[tuple[bytes, Sender]] = deque()
        self._senders: WeakSet[Sender] = WeakSet()
        self._flushing = False

    def put(self, data: bytes, sender: Sender) -> None:
        """Accept one encoded chunk, without suspending. Only while there is no `failure`."""
        self._senders.add(sender)
        self._pending.append((data, sender))
        if not self._flushing:
            self._flushing = True
            self._spawn(self._flush)

    async def _flush(self) -> None:
        try:
            await self._runs.add_stream(self.key)
            producer = self._producer = self._producer or RestorableProducer(
                self.key, self._runs.restorer, on_lost=self._lose
            )
            while self._pending:
                await self._append(producer, self._next_call())
        except RealtimeError as exc:
            self._fail(exc)
        except BaseException as exc:
            self._fail(
                BrokerUnavailable(f"{type(exc).__name__} stopped the writer before its chunks were acknowledged")
            )
            raise
        finally:
            self._flushing = False

    def _next_call(self) -> list[bytes]:
        """The chunks of the next append. They stay pending until they are acknowledged."""
        items: list[bytes] = []
        size = 0
        for data, _ in self._pending:
            if items and (size + len(data) > CALL_BYTES or len(items) == CALL_ITEMS):
                break
            items.append(data)
            size += len(data)
        return items

    async def _append(self, producer: RestorableProducer, items: list[bytes]) -> None:
        began = perf_counter()
        position = await producer.append(items)
        self._runs.reporter.appended(self.key, position.last - len(items) + 1, perf_counter() - began)
        senders: dict[Sender, None] = {}
        for seq in range(position.last - len(items) + 1, position.last + 1):
            data, sender = self._pending.popleft()
            sender.acknowledge(len(data), seq)
            senders[sender] = None
        for sender in senders:
            sender.wake()

    def _lose(self, failure: RealtimeError) -> None:
        """Acknowledged chunks are lost."""
        self.failure = failure
        self._pending.clear()
        for sender in list(self._senders):
            sender.fail(failure, lost=True)

    def _fail(self, failure: RealtimeError) -> None:
        self.failure = failure
        senders = dict.fromkeys(sender for _, sender in self._pending)
        self._pending.clear()
        for sender in senders:
            sender.fail(failure)
