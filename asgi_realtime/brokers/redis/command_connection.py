"""One connection to one server, shared by all callers.

The commands of one loop iteration are written in one piece, and answers arrive in the order of the commands, so a
thousand writers cost one write. Cancelling a caller does not recall its command. When the connection is lost, or the
server owes an answer for too long, everything under way fails; the next command opens a new connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from copy import copy
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from asgi_realtime.brokers.redis.server_health import ServerReporter
from asgi_realtime.core.errors import BrokerUnavailable, ServerShutdown

try:
    from hiredis import pack_command
except ImportError:  # the `redis` extra installs it, but redis-py alone works too
    pack_command = None  # type: ignore[assignment]

Spawn = Callable[[Coroutine[Any, Any, None]], Any]
Command = tuple[Any, ...]

_COOL_DOWN_S = 0.1
"""The pause after a connection that failed to open or never answered."""


class ConnectionLost(BrokerUnavailable):
    """The connection was lost or could not be opened. It is unknown whether commands under way were executed."""

    def __init__(self, message: str, *, broke: bool = False) -> None:
        super().__init__(message)
        self.broke = broke
        """It worked until then, so a new one probably works at once."""


async def until_one_ends(*parts: Coroutine[Any, Any, None]) -> None:
    """Run the parts of a connection concurrently. The first that ends ends the others; its error is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class CommandConnection:
    """Sends commands and returns their answers. `connect` makes a connection that is not open yet."""

    def __init__(
        self, connect: Callable[[], AbstractConnection], *, timeout_s: float, spawn: Spawn, reporter: ServerReporter
    ) -> None:
        self._connect = connect
        self._timeout_s = timeout_s
        self._spawn = spawn
        self._reporter = reporter
        self._queue: list[tuple[Command, asyncio.Future[Any]]] = []
        self._sent: deque[asyncio.Future[Any]] = deque()
        self._answered_at = 0.0  # the last time the server answered, or owed nothing
        self._has_queue = asyncio.Event()
        self._to_reset = asyncio.Event()
        self._has_answered = False
        self._task: Any = None
        self._closed = False
        self.is_failing = False
        """The last attempt failed."""

    def send(self, *command: Any) -> asyncio.Future[Any]:
        """Send a command. The future has its answer, or raises `ConnectionLost` or the server's `ResponseError`."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(ServerShutdown())
            return future
        self._queue.append((command, future))
        self._has_queue.set()
        if self._task is None or self._task.done():
            self._task = self._spawn(self._run())
        return future

    def reset(self) -> None:
        """Close the connection, because it leads to the wrong server. The next command opens another."""
        self._to_reset.set()

    async def aclose(self) -> None:
        """Fail everything under way and close the connection."""
        self._closed = True
        self._fail(ServerShutdown())
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        """Connect when there is something to send, and carry commands until the connection is lost."""
        while True:
            await self._has_queue.wait()
            self._has_answered = False
            connection = self._connect()
            try:
                try:
                    async with asyncio.timeout(self._timeout_s):
                        await connection.connect()  # type: ignore[no-untyped-call]
                except Exception as exc:
                    self._fail(ConnectionLost(f"cannot connect to Redis: {exc or type(exc).__name__}"))
                    self._has_queue.clear()
                    raise
                self._answered_at = asyncio.get_running_loop().time()
                await until_one_ends(self._write(connection), self._read(connection), self._watch())
            except Exception as exc:  # any, such as an unparsable answer: no caller must wait forever
                self._on_lost(exc)
            finally:
                await connection.disconnect(nowait=True)
            if not self._has_answered:
                await asyncio.sleep(_COOL_DOWN_S)

    def _on_lost(self, exc: Exception) -> None:
        """Servers close idle connections, so only one that was in use is reported as broken."""
        broke = self._has_answered and not isinstance(exc, TimeoutError | RedisTimeoutError)
        if not broke:
            self.is_failing = True
            self._reporter.failed(exc)
        elif self._sent or self._queue:
            self._reporter.broke(exc)
        message = f"the connection to Redis was lost: {exc or type(exc).__name__}"
        self._fail(ConnectionLost(message, broke=broke), unsent=False)

    async def _write(self, connection: AbstractConnection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._has_queue.wait()
            self._has_queue.clear()
            queue, self._queue = self._queue, []
            batch = [(command, future) for command, future in queue if not future.done()]
            if not batch:
                continue
            if not self._sent:
                self._answered_at = loop.time()
            self._sent.extend(future for _, future in batch)
            packed = _pack(connection, [command for command, _ in batch])
            await connection.send_packed_command(packed, check_health=False)

    async def _read(self, connection: AbstractConnection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                answer = await connection.read_response(disable_decoding=True, disconnect_on_error=False)
            except ResponseError as exc:
                answer = exc
            self._answered_at = loop.time()
            if not self._has_answered:
                self._has_answered = True
                self.is_failing = False
                self._reporter.works()
            future = self._sent.popleft()
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    async def _watch(self) -> None:
        """End when the server owes an answer for too long, or after `reset`."""
        loop = asyncio.get_running_loop()
        self._to_reset.clear()
        checked_at = loop.time()
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._to_reset.wait(), self._timeout_s / 4)
                raise ConnectionError("it led to the wrong server")
            if self._has_answered and self._answered_at > checked_at:
                self._reporter.works()  # in case another connection has reported a failure
            checked_at = loop.time()
            if self._sent and loop.time() - self._answered_at > self._timeout_s:
                raise TimeoutError(f"no answer for {self._timeout_s:g} s")

    def _fail(self, failure: ConnectionLost | ServerShutdown, *, unsent: bool = True) -> None:
        under_way = list(self._sent)
        self._sent.clear()
        if unsent:
            queue, self._queue = self._queue, []
            under_way += [future for _, future in queue]
        for future in under_way:
            if not future.done():
                future.set_exception(copy(failure))  # one that is raised repeatedly accumulates tracebacks
                future.exception()  # marks it as retrieved, in case its caller was cancelled


def _pack(connection: AbstractConnection, commands: list[Command]) -> bytes | list[bytes]:
    """The commands as bytes. redis-py's own packing, in Python, takes six times as long."""
    if pack_command is None:
        return connection.pack_commands(commands)
    return b"".join([pack_command(command) for command in commands])
