"""Streams that one process writes and another follows while something happens to Redis.

The two processes are two broker objects. The writer behaves like a pipe and repeats each call until it is acknowledged;
the reader behaves like a browser and resumes by its cursor when it is interrupted.
"""

from __future__ import annotations

import asyncio
import gc
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import pytest
from redis.asyncio import Redis

from asgi_realtime import Limits, Retention, Timeouts
from asgi_realtime.brokers.base import Broker, Producer, StreamKey
from asgi_realtime.brokers.redis import RedisBroker
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.testing.conformance.kit import (
    COMPLETE,
    Backend,
    Reader,
    create,
    new_key,
    read_all,
    seqs,
)
from tests.redis_servers import GUARD_S

T = TypeVar("T")


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(GUARD_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call while the broker is unavailable, as a pipe does."""
    async with asyncio.timeout(2 * GUARD_S):
        pause_s = 0.02
        while True:
            try:
                return await call()
            except BrokerUnavailable:
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, 0.5)


@asynccontextmanager
async def processes(
    server: str | Callable[[], Redis],
    *,
    limits: Limits | None = None,
    retention: Retention | None = None,
    timeouts: Timeouts | None = None,
) -> AsyncIterator[Backend]:
    """Two brokers on one server. Checks that they release everything."""
    before = asyncio.all_tasks()
    settings: dict[str, Any] = {"limits": limits, "retention": retention, "timeouts": timeouts}
    settings["prefix"] = f"t{secrets.token_hex(4)}"
    first, second = (RedisBroker(server if isinstance(server, str) else server(), **settings) for _ in range(2))
    async with first as broker, second as peer:
        yield Backend(broker=broker, peer=peer, held=lambda: broker.held + peer.held)
        await until(lambda: not broker.held + peer.held, "readers release everything when they leave")
    assert asyncio.all_tasks() == before


class Streaming:
    """One stream in use. `sent` items are acknowledged; the reader has `seen` some of them."""

    def __init__(self, writer: Broker, reader: Broker, key: StreamKey, *, size: int) -> None:
        self.key = key
        self.sent = 0
        self.reader = Reader(reader, key)
        self.resumed = 0
        self._writer = writer
        self._padding = b"x" * size
        self._enough = False
        self._writing = asyncio.Lock()

    @property
    def seen(self) -> int:
        return len(self.reader.seen)

    async def write(self) -> None:
        """Append item after item until `end` is called, then end the stream."""
        while not self._enough:
            item = b'"%d %s"' % (self.sent, self._padding)
            producer = Producer("p", self.sent)
            async with self._writing:
                await patiently(partial(self._writer.append, self.key, [item], producer=producer))
            self.sent += 1
        await patiently(lambda: self._writer.append(self.key, [], end=COMPLETE))

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Keep the writer idle."""
        async with self._writing:
            yield

    async def read(self) -> None:
        """Follow to the end, resuming whenever the stream can no longer be followed."""
        while self.reader.end is None:
            try:
                await self.reader.run()
            except BrokerUnavailable:
                self.resumed += 1
                await asyncio.sleep(0.01)

    async def continues(self, items: int = 100) -> None:
        """Wait until this many more items have arrived."""
        wanted = self.sent + items
        await until(lambda: self.seen >= wanted, f"{wanted} items arrived")

    def end(self) -> None:
        self._enough = True

    async def assert_complete(self) -> None:
        """Nothing was lost or duplicated, in Redis or at the reader."""
        self.reader.assert_seamless()
        assert seqs(self.reader.seen) == list(range(self.sent))
        assert [entry.data.split()[0] for entry in self.reader.seen] == [b'"%d' % n for n in range(self.sent)]
        assert [(entry.seq, entry.data) for entry in await read_all(self._writer, self.key)] == [
            (entry.seq, entry.data) for entry in self.reader.seen
        ]


@asynccontextmanager
async def streaming(
    backend: Backend, *, count: int = 1, size: int = 0, keys: Sequence[StreamKey] = ()
) -> AsyncIterator[Sequence[Streaming]]:
    """Streams that are written and read during the block. Checks that they are complete after it."""
    keys = keys or [await new_key(backend) for _ in range(count)]
    streams = [Streaming(backend.broker, backend.peer, key, size=size) for key in keys]
    async with asyncio.timeout(3 * GUARD_S), asyncio.TaskGroup() as group:
        for stream in streams:
            group.create_task(stream.write())
            group.create_task(stream.read())
        await asyncio.gather(*(stream.continues(10) for stream in streams))
        yield streams
        await asyncio.gather(*(stream.continues(10) for stream in streams))
        for stream in streams:
            stream.end()
    for stream in streams:
        await stream.assert_complete()


class Iterations:
    """Counts the iterations of the running loop. A slow machine makes them fewer, so a limit holds everywhere."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop: Any = asyncio.get_running_loop()
        run_once = loop._run_once
        self.count = 0

        def counted() -> None:
            self.count += 1
            run_once()

        monkeypatch.setattr(loop, "_run_once", counted)


# Log messages


class Log:
    """The log messages about Redis."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def having(self, text: str) -> list[str]:
        messages = (record.getMessage() for record in self._caplog.records if record.name == "asgi_realtime")
        return [message for message in messages if text in message]

    @property
    def outages(self) -> int:
        return len(self.having(" is unavailable: "))

    @property
    def broke(self) -> int:
        return len(self.having(" broke; connecting again: "))

    @property
    def recoveries(self) -> int:
        return len(self.having(" is available again, after "))

    async def until_available(self) -> None:
        await until(lambda: self.outages == self.recoveries, "the log reports that Redis is available again")

    async def assert_reported_once(self, *, processes: int = 2) -> None:
        """Each process that noticed the outage has logged it once, and its end once.

        If the server is available again at once, only a broken connection is logged.
        """
        await self.until_available()
        assert 1 <= self.outages + self.broke, "no process noticed it"
        assert self.outages <= processes, self.having("Redis")


def assert_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """No error was logged, and no exception was left unretrieved."""
    gc.collect()
    loud = [record for record in caplog.records if record.levelname == "ERROR" or record.name == "asyncio"]
    assert [record.getMessage() for record in loud if "Using selector" not in record.getMessage()] == []


__all__ = [
    "Iterations",
    "Log",
    "Streaming",
    "assert_quiet",
    "create",
    "patiently",
    "processes",
    "streaming",
    "until",
]
